"""The servos of one calibrated arm: their check at the start, positions and faults by joint, torque."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendError, Float32
from bridge.backends.so101 import registers as r
from bridge.backends.so101.bus import Answer, Bus, BusCounts, BusError
from bridge.backends.so101.calibration import Calibration

_TELLS = 3


class ServoFaultError(BackendError):
    """A servo reports a fault."""


class Servos:
    """All joints at once, in the order of the calibration."""

    def __init__(self, bus: Bus, calibration: Calibration, *, max_speed_ticks_s: int, slow_ticks_s: int) -> None:
        """A speed limit goes out with every goal, so that a servo that lost power for a moment has it again.

        `slow_ticks_s` is that of the way home, and of joints that are to stay where they are: beyond the limits that a
        servo keeps itself it goes back to them all the same.
        """
        self._bus = bus
        self._calibration = calibration
        self._max_speed_ticks_s = max_speed_ticks_s
        self._slow_ticks_s = min(slow_ticks_s, max_speed_ticks_s)
        self._names = dict(zip(calibration.ids, calibration.names, strict=True))
        self._seen_ticks: dict[int, int] = {}
        self._held_ticks: dict[int, int] = {}
        """Where joints were told to stay and have confirmed it; empty while they go."""
        self.stopped = True
        """No goals are sent: before the first `enable`, and since `hold` or `release`."""

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

    def goals(self, positions: Float32 | NDArray[np.float64], *, slow: bool = False) -> None:
        """Send the joints there `[joints]`, within their ranges and not faster than they may. Nobody acknowledges it:
        the next tick sends new ones. Raises `BackendError` where they are stopped.
        """
        ticks = dict(zip(self._calibration.ids, self._calibration.ticks(positions).tolist(), strict=True))
        # Under the turn of a stop, so that none goes out behind it.
        with self._bus.first():
            self._check_going()
            self._bus.sync_write(r.GOAL_POSITION.address, self._goal_data(ticks, slow=slow))

    def enable(self) -> Float32:
        """Torque on, where the joints are now: they do not move. Returns where that is. Raises as `positions`, and
        `BusError` for a servo that has not taken its goal: it would run to the one that it had before.
        """
        with self._bus.first():
            self.stopped = False
            self._held_ticks.clear()
        ticks = {servo: reading.position_ticks for servo, reading in self._read().items()}
        self._tell(r.GOAL_POSITION.address, self._goal_data(ticks, slow=True), "to stay where it is")
        for servo in self._calibration.ids:
            with self._bus.first():
                self._check_going()
                self._bus.write(servo, r.TORQUE_ENABLE, 1)
        return self.positions()

    def hold(self) -> None:
        """Have every joint stay where it is; one that does not answer where it was last seen. Goes before what other
        threads want. One that has confirmed it is told the same place again: a joint under load rests a little below
        its goal, and told to stay there each time it would sink. One that has not is asked anew where it is: its power
        may have been cut, and then it has fallen. Raises `BusError` naming those that have not confirmed it,
        `PortError`.
        """
        with self._bus.first():
            self.stopped = True
            ids = [servo for servo in self._calibration.ids if servo not in self._held_ticks]
            self._decode(self._bus.try_sync_read(ids, r.PRESENT_ADDRESS, r.PRESENT_SIZE, once=True))
            ticks = self._seen_ticks | self._held_ticks
            try:
                self._tell(r.GOAL_POSITION.address, self._goal_data(ticks, slow=True), "to stay where it is")
            except BusError as error:
                self._held_ticks = {servo: goal for servo, goal in ticks.items() if servo not in error.missing}
                raise
            self._held_ticks = ticks

    def release(self) -> None:
        """Torque off. Raises as `hold`."""
        with self._bus.first():
            self.stopped = True
            self._held_ticks.clear()
            off = dict.fromkeys(self._calibration.ids, r.TORQUE_ENABLE.encode(0))
            self._tell(r.TORQUE_ENABLE.address, off, "to let go")

    def close(self) -> None:
        """Close the bus; idempotent."""
        self._bus.close()

    def _read(self) -> dict[int, r.Reading]:
        return self._decode(self._bus.sync_read(self._calibration.ids, r.PRESENT_ADDRESS, r.PRESENT_SIZE))

    def _decode(self, answers: Mapping[int, Answer]) -> dict[int, r.Reading]:
        readings = {servo: r.Reading.decode(answer.data, answer.error) for servo, answer in answers.items()}
        self._seen_ticks.update({servo: reading.position_ticks for servo, reading in readings.items()})
        return readings

    def _check_going(self) -> None:
        if self.stopped:
            raise BackendError("so101 was stopped")

    def _goal_data(self, ticks: Mapping[int, int], *, slow: bool) -> dict[int, bytes]:
        """Goal, time and speed of each servo, as they lie side by side."""
        speed = r.GOAL_TIME.encode(0) + r.GOAL_SPEED.encode(self._slow_ticks_s if slow else self._max_speed_ticks_s)
        return {servo: r.GOAL_POSITION.encode(int(goal)) + speed for servo, goal in ticks.items()}

    def _tell(self, address: int, data: Mapping[int, bytes], what: str) -> None:
        """Write registers of several servos until each has them: nobody acknowledges that, so they are read back."""
        left = dict(data)
        for _ in range(_TELLS):
            self._bus.sync_write(address, left)
            size = len(next(iter(left.values())))
            answers = self._bus.try_sync_read([*left], address, size, once=True)
            left = {servo: own for servo, own in left.items() if servo not in answers or answers[servo].data != own}
            if not left:
                return
        who = ", ".join(self._who(servo) for servo in left)
        raise BusError(f"{who} was told {what} and has not confirmed it in {_TELLS} attempts", tuple(left))

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
