"""The servos of one calibrated arm: their check at the start, positions and faults by joint, torque."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendError, Float32
from bridge.backends.so101 import registers as r
from bridge.backends.so101.bus import Answer, Bus, BusCounts, BusError
from bridge.backends.so101.calibration import Calibration

_RELEASES = 3


class ServoFaultError(BackendError):
    """A servo reports a fault."""


class Servos:
    """All joints at once, in the order of the calibration."""

    def __init__(self, bus: Bus, calibration: Calibration, max_speed_ticks_s: int) -> None:
        """`max_speed_ticks_s` goes out with every goal, so that a servo that lost power for a moment has it again."""
        self._bus = bus
        self._calibration = calibration
        self._speed = r.GOAL_TIME.encode(0) + r.GOAL_SPEED.encode(max_speed_ticks_s)
        self._names = dict(zip(calibration.ids, calibration.names, strict=True))
        self._seen_ticks: dict[int, int] = {}

    @property
    def counts(self) -> BusCounts:
        """What has gone wrong on the bus."""
        return self._bus.counts

    def check(self) -> None:
        """See that each joint's servo is there, is the right model in the right mode, and allows what the calibration
        does. Raises `BackendError` naming all that do not answer, or the joint that is wrong and what to do.
        """
        silent = [servo for servo in self._calibration.ids if not self._bus.ping(servo)]
        if silent:
            raise BusError(self._silent(silent), tuple(silent))
        for joint, servo in zip(self._calibration.joints, self._calibration.ids, strict=True):
            who = self._who(servo)
            model = self._bus.read(servo, r.MODEL)
            if model != r.MODEL_STS3215:
                raise BackendError(
                    f"{who} is a servo of model {model}, expected {r.MODEL_STS3215} (STS3215); "
                    "the ids in the calibration may belong to another arm"
                )
            if self._bus.read(servo, r.OPERATING_MODE) != r.POSITION_MODE:
                raise BackendError(f"{who} is not in position mode; set its operating mode to 0 with Feetech's tool")
            low, high = self._bus.read(servo, r.MIN_POSITION), self._bus.read(servo, r.MAX_POSITION)
            # Equal limits mean none.
            if low < high and not (low <= joint.low_ticks and joint.high_ticks <= high):
                raise BackendError(
                    f"{who} itself allows {low} to {high} ticks, its calibration {joint.low_ticks} to "
                    f"{joint.high_ticks}: they are of different arms, or the joint was calibrated anew"
                )

    def positions(self) -> Float32:
        """Where the joints are `[joints]`, in their units. Raises `ServoFaultError` and `BusError`."""
        readings = self._read()
        for servo, reading in readings.items():
            if reading.errors:
                raise ServoFaultError(self._fault(servo, reading))
        return self._positions(readings)

    def goals(self, positions: Float32 | NDArray[np.float64]) -> None:
        """Send the joints there `[joints]`, within their ranges and not faster than they may."""
        ticks = self._calibration.ticks(positions)
        self._send(dict(zip(self._calibration.ids, ticks.tolist(), strict=True)))

    def enable(self) -> Float32:
        """Torque on, where the joints are now: they do not move. Returns where that is. Raises as `positions`."""
        readings = self._read()
        # Without this a servo would run to the goal it had before its torque went.
        self._send({servo: reading.position_ticks for servo, reading in readings.items()})
        for servo in self._calibration.ids:
            self._bus.write(servo, r.TORQUE_ENABLE, 1)
        return self.positions()

    def hold(self) -> None:
        """Have every joint stay where it is; one that does not answer where it was last seen. Raises `PortError`."""
        self._decode(self._bus.try_sync_read(self._calibration.ids, r.PRESENT_ADDRESS, r.PRESENT_SIZE))
        if self._seen_ticks:
            self._send(self._seen_ticks)

    def release(self) -> None:
        """Torque off, told to all at once; told again if one says that it did not hear it. Raises `PortError`."""
        register, ids = r.TORQUE_ENABLE, self._calibration.ids
        for _ in range(_RELEASES):
            self._bus.sync_write(register.address, dict.fromkeys(ids, register.encode(0)))
            answers = self._bus.try_sync_read(ids, register.address, register.size)
            if not any(register.decode(answer.data) for answer in answers.values()):
                return

    def close(self) -> None:
        """Close the bus; idempotent."""
        self._bus.close()

    def _read(self) -> dict[int, r.Reading]:
        return self._decode(self._bus.sync_read(self._calibration.ids, r.PRESENT_ADDRESS, r.PRESENT_SIZE))

    def _decode(self, answers: Mapping[int, Answer]) -> dict[int, r.Reading]:
        readings = {servo: r.Reading.decode(answer.data, answer.error) for servo, answer in answers.items()}
        self._seen_ticks.update({servo: reading.position_ticks for servo, reading in readings.items()})
        return readings

    def _send(self, ticks: Mapping[int, int]) -> None:
        data = {servo: r.GOAL_POSITION.encode(int(goal)) + self._speed for servo, goal in ticks.items()}
        self._bus.sync_write(r.GOAL_POSITION.address, data)

    def _positions(self, readings: Mapping[int, r.Reading]) -> Float32:
        ticks: NDArray[np.int64] = np.array([readings[servo].position_ticks for servo in self._calibration.ids])
        return self._calibration.positions(ticks)

    def _who(self, servo: int) -> str:
        return f"{self._names[servo]} (servo {servo})"

    def _fault(self, servo: int, reading: r.Reading) -> str:
        known = [text for bit, text in r.FAULTS.items() if reading.errors & bit]
        what = " and ".join(name for name, _ in known) or f"unknown error {reading.errors:#04x}"
        advice = "; ".join(mend for _, mend in known) or "power the arm off and on"
        return (
            f"{self._who(servo)} reports {what} ({reading.temperature_c} degrees C, {reading.voltage_v:.1f} V, "
            f"load {abs(reading.load):.0%}): {advice}"
        )

    def _silent(self, silent: Sequence[int]) -> str:
        if len(silent) == len(self._names):
            return "no servo answers; see that the arm has power, that this is its port, and that `baud` is the servos'"
        who = ", ".join(self._who(servo) for servo in silent)
        return f"no answer from {who}; see the cables from servo to servo, and the ids in the calibration"
