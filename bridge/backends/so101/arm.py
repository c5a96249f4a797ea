"""The backend `so101`: an SO-100/SO-101 arm, or an emulated one."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress

import numpy as np

from bridge.backend import (
    ActionSpec,
    BackendError,
    BackendSpec,
    CameraSpec,
    Float32,
    Observation,
    Outcome,
    UInt8,
    VectorSpec,
)
from bridge.backends.so101.bus import Bus, BusCounts
from bridge.backends.so101.calibration import Calibration
from bridge.backends.so101.cameras import OpenCVCamera
from bridge.backends.so101.emulator import EmulatedPort, emulated_arm
from bridge.backends.so101.options import SO101Options as SO101Options
from bridge.backends.so101.options import calibration_of, home_of
from bridge.backends.so101.port import SerialPort
from bridge.backends.so101.registers import TICKS_PER_DEG
from bridge.backends.so101.scene import Reach, arm_points
from bridge.backends.so101.servos import Servos

ARRIVED = 4.0
"""Degrees or percent from its goal at which a joint counts as arrived; gravity bends an arm by a few."""
SETTLE_S = 2.0
"""How long joints have to arrive once they have been told."""

_TIP = ("tip_x", "tip_y", "tip_z", "target_x", "target_y", "target_z")


class SO101:
    """Joint positions are the state and the actions: degrees, and percent for the gripper where its calibration says
    so. Every tick sends the goals of all servos at once and reads all of them at once.

    A real arm's outcome is always `running`: success is the operator's to say. The emulated arm knows its task.
    """

    def __init__(self, options: SO101Options) -> None:
        """Reads the calibration; opens nothing. Raises `ConfigError`."""
        self._options = options
        self._calibration = calibration_of(options)
        self._home = home_of(options, self._calibration)
        self._reach = Reach(self._home) if options.emulate else None
        if self._reach is not None:
            # Of the object and not of the class: whoever asks whether a real arm has an expert must be told no.
            self.expert_action = self._expert_action
        self._spec = _spec(options, self._calibration)
        self._emulated: EmulatedPort | None = None
        self._servos: Servos | None = None
        self._cameras: dict[str, OpenCVCamera] = {}
        self._halted = threading.Event()
        self._halted.set()
        self._positions = self._goal = self._home

    @property
    def spec(self) -> BackendSpec:
        """Limits are those of the calibration."""
        return self._spec

    @property
    def counts(self) -> BusCounts:
        """What has gone wrong on the bus since `connect`."""
        return self._connected().counts

    @property
    def emulated(self) -> EmulatedPort | None:
        """The emulated arm in this process while connected, for setting faults."""
        return self._emulated

    def connect(self) -> None:
        """Open port and cameras, and check every servo. The arm does not move and its torque stays as it is.

        Raises `BackendError` naming the joint or camera, and what to do.
        """
        if self._servos is not None:
            return
        options = self._options
        try:
            if options.emulate and options.port is None:
                self._emulated = EmulatedPort(emulated_arm(self._calibration))
            path = options.port or (self._emulated.path if self._emulated else "")
            names = dict(zip(self._calibration.ids, self._calibration.names, strict=True))
            port = SerialPort(path, options.baud)
            bus = Bus(port, names, timeout_s=options.timeout_ms / 1000, retries=options.retries)
            self._servos = Servos(bus, self._calibration, round(options.max_speed_deg_s * TICKS_PER_DEG))
            self._servos.check()
            self._positions = self._goal = self._servos.positions()
            if not options.emulate:
                for camera in options.cameras:
                    self._cameras[camera.name] = OpenCVCamera(camera)
        except BaseException:
            self.close()
            raise

    def reset(self, task: str, seed: int) -> None:
        """Torque on, and slowly to `home`. Raises `BackendError` if a joint does not get there or `stop` comes first.

        For the emulated arm the seed (0 or more) places the target.
        """
        servos = self._connected()
        if task not in self._spec.instructions:
            known = ", ".join(self._spec.instructions)
            raise BackendError(f"so101 has no task {task!r} here; its tasks: {known}")
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; seeds are 0 or more")
        self._halted.clear()
        self._positions = self._goal = servos.enable()
        self._move_home(servos)
        if self._reach is not None:
            self._reach.reset(seed)

    def observe(self) -> Observation:
        """Read the joints and the cameras now."""
        self._positions = self._connected().positions()
        images: dict[str, UInt8] = {name: camera.read() for name, camera in self._cameras.items()}
        privileged = None
        if self._reach is not None:
            for camera in self._options.cameras:
                images[camera.name] = self._reach.draw(self._positions, camera.height, camera.width)
            tip = arm_points(self._positions)[-1]
            privileged = np.concatenate([tip, self._reach.target]).astype(np.float32)
        return Observation(images, self._positions.copy(), privileged)

    def apply(self, action: Float32) -> Float32:
        """Send joint targets `[joints]`, clipped to the limits, and read the joints. Returns the targets as sent, to
        the servos' resolution of 0.09 degrees. Raises `BackendError` after `stop`, and for a servo that fails.
        """
        servos = self._connected()
        size = len(self._calibration.names)
        if np.shape(action) != (size,) or not np.isfinite(action).all():
            raise BackendError(f"an action of so101 is {size} finite numbers, not {action!r}")
        if self._halted.is_set():
            raise BackendError("so101 is stopped; call reset() before apply()")
        sent = self._calibration.positions(self._calibration.ticks(action))
        servos.goals(sent)
        if self._halted.is_set():
            # A stop came from another thread in between; its hold may have gone out before these goals.
            self.stop()
            raise BackendError("so101 was stopped")
        self._goal = sent
        self._positions = servos.positions()
        return sent

    def outcome(self) -> Outcome:
        """`running`; of the emulated arm `success` with the tip at the target, and minus the distance in metres."""
        self._connected()
        if self._reach is None:
            return Outcome("running", 0.0)
        reached = self._reach.reached(self._positions)
        return Outcome("success" if reached else "running", -self._reach.distance_m(self._positions))

    def hold_action(self) -> Float32:
        """Where the joints were last seen; a joint that is at its goal keeps the goal, so that it does not sink by
        being told again and again where its load has bent it to.
        """
        near = np.abs(self._goal - self._positions) <= ARRIVED
        held = np.where(near, self._goal, self._positions)
        return np.clip(held, self._calibration.low, self._calibration.high).astype(np.float32)

    def stop(self) -> None:
        """As `on_stop` says; from any thread. A port that is gone is no error here: the next call of any other method
        says so."""
        self._halted.set()
        servos = self._servos
        if servos is None:
            return
        with suppress(BackendError):
            if self._options.on_stop == "hold":
                servos.hold()
            else:
                servos.release()

    def close(self) -> None:
        """Torque as `on_close` says, then close port and cameras. Idempotent."""
        self._halted.set()
        servos, self._servos = self._servos, None
        if servos is not None:
            with suppress(BackendError):
                if self._options.on_close == "limp":
                    servos.release()
            servos.close()
        while self._cameras:
            self._cameras.popitem()[1].close()
        if self._emulated is not None:
            self._emulated.close()
            self._emulated = None

    def _expert_action(self) -> Float32:
        """Towards the target, from where the joints are now."""
        assert self._reach is not None
        self._positions = self._connected().positions()
        action = self._reach.expert_action(self._positions)
        return np.clip(action, self._calibration.low, self._calibration.high)

    def _connected(self) -> Servos:
        if self._servos is None:
            raise BackendError("so101 is not connected; call connect() first")
        return self._servos

    def _move_home(self, servos: Servos) -> None:
        """All joints arrive together, the one with the longest way at `home_speed_deg_s`."""
        start, period_s = self._positions, 1.0 / self._options.control_hz
        longest = float(np.abs(self._home - start).max())
        steps = max(1, math.ceil(longest / (self._options.home_speed_deg_s * period_s)))
        settle = math.ceil(SETTLE_S / period_s)
        for step in range(1, steps + settle):
            if self._halted.is_set():
                self.stop()
                raise BackendError("so101 was stopped on its way home")
            self._goal = (start + (self._home - start) * min(1.0, step / steps)).astype(np.float32)
            servos.goals(self._goal)
            time.sleep(period_s)
            self._positions = servos.positions()
            away = np.abs(self._home - self._positions)
            if step >= steps and away.max() <= ARRIVED:
                return
        worst = int(away.argmax())
        raise BackendError(
            f"{self._calibration.names[worst]} did not get home: it is at {self._positions[worst]:.1f}, "
            f"home is {self._home[worst]:.1f}; see what blocks it, or whether it carries too much"
        )


def _spec(options: SO101Options, calibration: Calibration) -> BackendSpec:
    names, units = calibration.names, calibration.units
    return BackendSpec(
        name="so101",
        cameras=tuple(CameraSpec(camera.name, camera.height, camera.width) for camera in options.cameras),
        state=VectorSpec(names, units),
        action=ActionSpec(
            names=names,
            units=units,
            low=tuple(map(float, calibration.low)),
            high=tuple(map(float, calibration.high)),
            kind="absolute",
        ),
        control_hz=options.control_hz,
        instructions={"reach": ("reach the green ball",)} if options.emulate else options.tasks,
        privileged=VectorSpec(_TIP, ("m",) * len(_TIP)) if options.emulate else None,
        paced=True,
    )
