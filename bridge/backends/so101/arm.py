"""The backend `so101`: an SO-100/SO-101 arm, or an emulated one."""

from __future__ import annotations

import math
import time

import numpy as np

from bridge.backend import (
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
from bridge.backends.so101.targets import ARRIVED, Targets

SETTLE_S = 2.0
"""How long joints have to arrive once they have been told."""

CATCH_UP = 1.25
"""How much quicker than the goals joints may be on the way home, so that one that lags comes up with them."""

_TIP = ("tip_x", "tip_y", "tip_z", "target_x", "target_y", "target_z")


class SO101:
    """Joint positions are the state; actions are goals of the joints or steps of the goals (`Targets`): degrees, and
    percent for the gripper where its calibration says so. Every tick sends the goals of all servos at once and reads
    all of them at once.

    A real arm's outcome is always `running`: success is the operator's to say. The emulated arm knows its task.
    """

    def __init__(self, options: SO101Options) -> None:
        """Reads the calibration; opens nothing. Raises `ConfigError`."""
        self._options = options
        self._calibration = calibration_of(options)
        self._home = home_of(options, self._calibration)
        self._targets = Targets(self._calibration, options.actions, options.max_speed_deg_s, options.control_hz)
        self._reach = Reach(self._home, self._calibration) if options.emulate else None
        if self._reach is not None:
            # Of the object and not of the class: whoever asks whether a real arm has them must be told no.
            self.expert_action = self._expert_action
            self.tip_after = self._tip_after
            if options.port is None:
                self.unplug_for_test = self._unplug_for_test
        self._spec = _spec(options, self._calibration, self._targets)
        self._emulated: EmulatedPort | None = None
        self._servos: Servos | None = None
        self._cameras: dict[str, OpenCVCamera] = {}
        self._positions = self._home

    @property
    def spec(self) -> BackendSpec:
        """Limits are those of the calibration and of `max_speed_deg_s`."""
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
            self._servos = Servos(
                bus,
                self._calibration,
                max_speed_ticks_s=round(options.max_speed_deg_s * TICKS_PER_DEG),
                slow_ticks_s=round(CATCH_UP * options.home_speed_deg_s * TICKS_PER_DEG),
            )
            self._servos.check()
            self._positions = self._servos.positions()
            self._targets.sent(self._positions.astype(np.float64))
            if not options.emulate:
                for camera in options.cameras:
                    self._cameras[camera.name] = OpenCVCamera(camera)
        except BaseException:
            # Not `close`: an arm that is held up must not fall because a camera is missing.
            self._shut()
            raise

    def reset(self, task: str, seed: int) -> None:
        """Torque on, and slowly to `home`. Raises `BackendError` if a joint does not get there or `stop` comes first.

        For the emulated arm the seed (0 or more) places the target, and the start near `home`.
        """
        servos = self._connected()
        if task not in self._spec.instructions:
            known = ", ".join(self._spec.instructions)
            raise BackendError(f"so101 has no task {task!r} here; its tasks: {known}")
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; seeds are 0 or more")
        self._positions = servos.enable()
        start = self._home
        if self._reach is not None:
            self._reach.reset(seed)
            start = self._reach.start
        self._move(servos, start)

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
        """Send the goals of an action `[joints]`, clipped to the limits, and read the joints. Returns the action that
        was sent; absolute goals are rounded to the servos' 0.09 degrees. Raises `BackendError` after `stop`, and for a
        servo that fails.
        """
        servos = self._connected()
        size = len(self._calibration.names)
        if np.shape(action) != (size,) or not np.isfinite(action).all():
            raise BackendError(f"an action of so101 is {size} finite numbers, not {action!r}")
        if servos.stopped:
            raise BackendError("so101 is stopped; call reset() before apply()")
        goal = self._targets.after(action, self._positions)
        servos.goals(goal)
        sent = self._targets.sent(goal)
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
        """Where the joints were last seen; see `Targets.hold`."""
        return self._targets.hold(self._positions)

    def stop(self) -> None:
        """As `on_stop` says; from any thread, and before anything that another one wants of the bus. Raises
        `BackendError` where a servo has not confirmed it: then only a person can.
        """
        servos = self._servos
        if servos is None:
            return
        try:
            if self._options.on_stop == "hold":
                servos.hold()
            else:
                servos.release()
        except BackendError as error:
            raise BackendError(f"{error}; it may still move: use its emergency stop or cut its power") from error

    def close(self) -> None:
        """Torque as `on_close` says, then close port and cameras. Idempotent. Raises `BackendError`, with all closed,
        where a servo has not confirmed that it let go.
        """
        servos = self._servos
        try:
            if servos is not None and self._options.on_close == "limp":
                servos.release()
        except BackendError as error:
            raise BackendError(f"{error}; its motors may still have torque") from error
        finally:
            self._shut()

    def _shut(self) -> None:
        """Close port and cameras; torque stays as it is."""
        servos, self._servos = self._servos, None
        if servos is not None:
            servos.close()
        while self._cameras:
            self._cameras.popitem()[1].close()
        if self._emulated is not None:
            self._emulated.close()
            self._emulated = None

    def _expert_action(self) -> Float32:
        """Towards the target, from where the joints were told to be."""
        assert self._reach is not None
        self._connected()
        return self._targets.towards(self._reach.expert_goal(self._targets.goal))

    def _tip_after(self, action: Float32) -> Float32:
        """Where the tip is once the joints are at the goals of this action: float32 `[3]`, m."""
        return np.asarray(arm_points(self._targets.after(action, self._positions))[-1], np.float32)

    def _unplug_for_test(self) -> None:
        """As if the USB cable had been pulled."""
        if self._emulated is not None:
            self._emulated.close()

    def _connected(self) -> Servos:
        if self._servos is None:
            raise BackendError("so101 is not connected; call connect() first")
        return self._servos

    def _move(self, servos: Servos, home: Float32) -> None:
        """All joints arrive together, the one with the longest way at `home_speed_deg_s`. The servos keep to that speed
        themselves: a joint that begins beyond its range has its first goal far away.
        """
        start, period_s = self._positions, 1.0 / self._options.control_hz
        longest = float(np.abs(home - start).max())
        steps = max(1, math.ceil(longest / (self._options.home_speed_deg_s * period_s)))
        settle = math.ceil(SETTLE_S / period_s)
        for step in range(1, steps + settle):
            if servos.stopped:
                raise BackendError("so101 was stopped on its way home")
            goal = start + (home - start).astype(np.float64) * min(1.0, step / steps)
            servos.goals(goal, slow=True)
            self._targets.sent(goal)
            time.sleep(period_s)
            self._positions = servos.positions()
            away = np.abs(home - self._positions)
            if step >= steps and away.max() <= ARRIVED:
                return
        worst = int(away.argmax())
        raise BackendError(
            f"{self._calibration.names[worst]} did not get home: it is at {self._positions[worst]:.1f}, "
            f"home is {home[worst]:.1f}; see what blocks it, or whether it carries too much"
        )


def _spec(options: SO101Options, calibration: Calibration, targets: Targets) -> BackendSpec:
    return BackendSpec(
        name="so101",
        cameras=tuple(CameraSpec(camera.name, camera.height, camera.width) for camera in options.cameras),
        state=VectorSpec(calibration.names, calibration.units),
        action=targets.spec,
        control_hz=options.control_hz,
        instructions={"reach": ("reach the green ball",)} if options.emulate else options.tasks,
        privileged=VectorSpec(_TIP, ("m",) * len(_TIP)) if options.emulate else None,
        paced=True,
        max_rate=targets.max_rate,
        judges=options.emulate,
    )
