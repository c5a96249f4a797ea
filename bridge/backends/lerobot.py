"""Any LeRobot `Robot`: an object with `observation_features`, `action_features`, `connect`, `get_observation`,
`send_action` and `disconnect`.

LeRobot itself is not imported here. The options name the class, and whatever has these members will do.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bridge.backend import BackendError, BackendSpec, Float32, Observation, Outcome, UInt8
from bridge.backends.frozen import Frozen
from bridge.backends.lerobot_features import OPTIONS, LeRobotOptions, read_spec
from bridge.backends.lerobot_making import forget_late_answers, make_robot, said
from bridge.backends.resizing import Resizer

__all__ = ["LeRobot", "LeRobotOptions"]

_TRIES = 3
_LAST_TRY_S = 0.1
"""A call is repeated only so long after it was first made: the arm stays on its way meanwhile."""
_WAIT_S = 1.0
"""How long a call waits for the one that another thread makes."""
_FRESH_S = 0.1
"""A stop holds where the robot was read so recently: LeRobot reads no joint without all the cameras."""


class LeRobot:
    """The backend. Whether the task is done is for the operator to say: `outcome` is always running.

    The robot's own errors have no class in common, so every one of them becomes a `BackendError` here. Its calls are
    made one at a time: on a serial bus two threads would take each other's answers.
    """

    def __init__(self, options: LeRobotOptions) -> None:
        """Make the robot, as its features are the spec; nothing is connected. Raises `ConfigError` naming the option
        that is wrong.
        """
        self._options = options
        self._robot: Any = make_robot(options)
        self._spec = read_spec(self._robot.observation_features, self._robot.action_features, options)
        self._low, self._high = (np.array(x, np.float32) for x in (self._spec.action.low, self._spec.action.high))
        self._resizers: dict[tuple[int, ...], Resizer] = {}
        self._frozen: dict[str, Frozen] = {}
        # The actions that stand still at what is read under their names.
        self._reads = tuple(
            name for name, action in options.actions.items() if options.kind == "absolute" and action.hold is None
        )
        self._connected = False
        self._calling = threading.Lock()  # of the robot, and of what is kept of it
        self._stop_waits = self._halted = False
        self._seen: tuple[float, Float32] | None = None  # when it was read last, and `_reads` then
        self._sent: Float32 | None = None
        # While it holds, one and the same target is sent: reading a new one each time would follow a sagging arm down.
        self._held: Float32 | None = None
        self._guessed = False  # whether the hold is what was sent last, as the robot could not be read

    @property
    def spec(self) -> BackendSpec:
        """Names and order are those of the robot's features; units, limits and rate those of the options."""
        return self._spec

    def connect(self) -> None:
        """Connect; nothing happens if that is done. A robot that was never calibrated is refused: calibrating asks
        questions, and moves the arm.
        """
        with self._alone():
            if not self._connected:
                self._connect()

    def _connect(self) -> None:
        try:
            if self._robot is None:
                self._robot = make_robot(self._options)
            asks = "calibrate" in inspect.signature(self._robot.connect).parameters
            self._robot.connect(**({"calibrate": False} if asks else {}))
            calibrated = getattr(self._robot, "is_calibrated", True)
        except Exception as error:
            self._give_up_robot()
            raise BackendError(
                f"{self._name} cannot be connected: {said(error)}; check power, cables and the ports in "
                f"{OPTIONS}.config, and that no other program has them open"
            ) from error
        if not calibrated:
            self._give_up_robot()
            raise BackendError(
                f"{self._name} is not calibrated: it has no calibration file, or its motors hold other values than the "
                f"file; run `lerobot-calibrate` for this robot, with the same id as in {OPTIONS}.config"
            )
        self._frozen = {camera.name: Frozen() for camera in self._spec.cameras}
        self._connected = True

    def reset(self, task: str, seed: int) -> None:
        """Nothing moves: the scene is put back by a person. `seed` chooses the wording only."""
        self._check_connected()
        if task not in self._spec.instructions:
            raise BackendError(f"there is no task {task!r} here; the tasks are {', '.join(self._spec.instructions)}")
        with self._alone():
            self._halted = False
            # Somebody may have moved the arm by hand: neither a hold nor what was sent last is where it stands.
            self._forget()

    def observe(self) -> Observation:
        """Read the robot once, all its cameras with it. Raises `BackendError`, also where a camera is frozen."""
        with self._alone():
            reading = self._read()
            taken_s = time.monotonic()
        state = self._numbers(reading, self._spec.state.names, "get_observation")
        images = {camera.name: self._image(reading, camera.name, taken_s) for camera in self._spec.cameras}
        return Observation(images, state)

    def apply(self, action: Float32) -> Float32:
        """Clip to the limits and send; returns float32 `[d]` as the robot says that it was sent. Raises `BackendError`
        after `stop`.
        """
        size = len(self._spec.action.names)
        if np.shape(action) != (size,) or not np.isfinite(action).all():
            raise BackendError(f"an action of {self._name} is {size} finite numbers, not {action!r}")
        with self._alone():
            self._check_connected()
            if self._halted:
                raise BackendError(f"{self._name} is stopped; call reset() before apply()")
            if self._held is not None and np.array_equal(action, self._held):
                # Where the robot stands may be outside the limits; holding must not move it to them.
                return self._send(self._held)
            self._held = None
            return self._send(np.clip(np.asarray(action, np.float32), self._low, self._high))

    def outcome(self) -> Outcome:
        """Running, with no reward: a robot does not know."""
        return Outcome("running", 0.0)

    def hold_action(self) -> Float32:
        """Float32 `[d]`: what the options say, 0 for a delta, and where the robot stands now for a position.

        It stays the same until another action is applied. Where the robot cannot be read any more it is what was sent
        last, until it can be read.
        """
        with self._alone():
            self._check_connected()
            return self._hold().copy()

    def stop(self) -> None:
        """Send the hold action, from any thread; nothing else is sent until `reset`. Raises `BackendError` where the
        robot does not take it, or is in a call that does not end: until it succeeds only a person can stop the robot.
        """
        # Before anything else: from here on nothing new is sent, and what fails is not tried again.
        self._halted = True
        if not self._connected:
            return
        self._stop_waits = True
        try:
            with self._alone():
                self._stop_waits = False
                if self._connected:
                    self._halted = True  # a reset may have had the robot first
                    self._send(self._hold(_FRESH_S))
        except BackendError as error:
            raise BackendError(f"{error}; it may still move: use its emergency stop or cut its power") from error
        finally:
            self._stop_waits = False

    def close(self) -> None:
        """Disconnect. Many robots let go of their torque with that; their configuration says whether."""
        if not self._connected:
            return
        try:
            with self._alone():
                self._connected = False
                self._forget()
                try:
                    self._robot.disconnect()
                except Exception:
                    self._give_up_robot()
                    raise
        except Exception as error:
            raise BackendError(
                f"{self._name} cannot be disconnected: {said(error)}; its motors may still have torque"
            ) from error

    @property
    def _name(self) -> str:
        return self._options.robot

    def _check_connected(self) -> None:
        if not self._connected:
            raise BackendError(f"{self._name} is not connected; call connect() first")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread is in a call of the robot. Raises `BackendError` if one does not come back from it."""
        if not self._calling.acquire(timeout=_WAIT_S):
            raise BackendError(f"{self._name} has been in one call of its driver for over {_WAIT_S:g} s")
        try:
            yield
        finally:
            self._calling.release()

    def _forget(self) -> None:
        """What was known of where the robot is."""
        self._sent = self._held = self._seen = None

    def _give_up_robot(self) -> None:
        """Let the robot go: LeRobot does not connect a robot that is half connected, so `connect` makes a new one."""
        with contextlib.suppress(Exception):
            self._robot.disconnect()
        self._robot = None

    def _read(self) -> Mapping[str, Any]:
        def read() -> tuple[float, Mapping[str, Any]]:
            return time.monotonic(), self._robot.get_observation()

        began_s: float
        reading: Mapping[str, Any]
        began_s, reading = self._ask(read, "cannot be read", "check cables, power and cameras")
        with contextlib.suppress(BackendError):  # whoever needs these numbers says that they are missing
            self._seen = began_s, self._numbers(reading, self._reads, "get_observation")
        return reading

    def _send(self, action: Float32) -> Float32:
        names = self._spec.action.names
        targets = dict(zip(names, action.tolist(), strict=True))
        # A delta that did arrive must not be sent again.
        tries = 1 if self._options.kind == "delta" else _TRIES
        sent = self._ask(
            lambda: self._robot.send_action(targets), "took no action", "check cables and power", tries=tries
        )
        self._sent = self._numbers(sent, names, "send_action")
        return self._sent.copy()

    def _ask(self, call: Callable[[], Any], failed: str, mend: str, *, tries: int = _TRIES) -> Any:
        """What `call` gives, tried again where it raises: many drivers ask once, and one damaged packet is an error.

        The error tells the first one: those after it are often about what that left behind.
        """
        self._check_connected()
        last_s = time.monotonic() + _LAST_TRY_S
        first = ""
        while True:
            forget_late_answers(self._robot)
            tries -= 1
            try:
                return call()
            except Exception as error:
                first = first or said(error)
                if tries <= 0 or self._stop_waits or time.monotonic() > last_s:
                    raise BackendError(f"{self._name} {failed}: {first}; {mend}, then connect again") from error

    def _hold(self, fresh_s: float = 0.0) -> Float32:
        """The hold action; a reading not older than `fresh_s` will do for it."""
        if self._held is not None and not self._guessed:
            return self._held
        names, guessed = self._spec.action.names, False
        hold = {name: self._options.actions[name].hold or 0.0 for name in names}
        if self._reads:
            try:
                if self._seen is None or time.monotonic() - self._seen[0] >= fresh_s:
                    stands = self._numbers(self._read(), self._reads, "get_observation")
                else:
                    stands = self._seen[1]
                hold.update(zip(self._reads, stands.tolist(), strict=True))
            except BackendError:
                # A camera that is gone fails the whole reading, and must not keep the arm from holding.
                if self._sent is None:
                    raise
                sent = dict(zip(names, self._sent.tolist(), strict=True))
                hold.update((name, sent[name]) for name in self._reads)
                guessed = True
        self._held = np.array([hold[name] for name in names], np.float32)
        self._guessed = guessed
        return self._held

    def _numbers(self, values: Any, names: tuple[str, ...], source: str) -> Float32:
        """The named values as float32 `[n]`."""
        try:
            vector = np.array([float(values[name]) for name in names], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(
                f"{source}() of {self._name} gives no number for each of {', '.join(names)}: {said(error)}; its "
                "features promise them"
            ) from error
        if not np.isfinite(vector).all():
            wrong = [name for name, x in zip(names, vector, strict=True) if not np.isfinite(x)]
            raise BackendError(f"{source}() of {self._name} gives {', '.join(wrong)} as not finite; is it plugged in?")
        return vector

    def _image(self, reading: Mapping[str, Any], name: str, taken_s: float) -> UInt8:
        image = np.asarray(reading.get(name))
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BackendError(
                f"camera {name} of {self._name} gives {image.dtype}{list(image.shape)}, expected uint8 [H, W, 3]"
            )
        frozen_after_s = self._options.frozen_after_s
        if frozen_after_s is not None and (same_s := self._frozen[name].same_s(image, taken_s)) > frozen_after_s:
            raise BackendError(
                f"camera {name} of {self._name} has sent the very same picture for {same_s:.1f} s; it is frozen: see "
                f"its cable, then connect again ({OPTIONS}.frozen_after_s)"
            )
        wanted = self._options.cameras[name]
        key = (*image.shape[:2], wanted.height, wanted.width)
        if key not in self._resizers:
            self._resizers[key] = Resizer((image.shape[0], image.shape[1]), (wanted.height, wanted.width))
        return self._resizers[key](image)
