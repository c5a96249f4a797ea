"""The guard: the only way from the control loop to the backend, the dead-man, the latched stop, the operator's wishes.

`bridge.watch` has the thread that calls `tick` and brings the runtime's orders. It must be able to stop a robot whose
loop hangs, so `bridge.device` lets one in at a time in an episode, and a stop does not wait long for whoever is inside.
The guarding thread waits for no call of the backend, but for `stop` for a second.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np

from bridge.backend import Backend, BackendError, Float32, Observation, Outcome, UInt8
from bridge.config import SafetyConfig
from bridge.device import LOOK_S, Device
from bridge.errors import FieldtuneError
from bridge.messages import Ending, Orders, RobotState
from bridge.safety import CHUNK_AGE, HOLD, SafetyStage

REST_S = 10.0  # for a backend's stop() where nobody is in danger: between episodes, and at the end
SPEAKS_AGAIN_STEPS = 2  # a loop silent for longer while the robot is held does not send the hold actions itself
PAUSED_HERE = "at the robot"
T = TypeVar("T")


class StoppedError(FieldtuneError):
    """The robot was stopped, and its episode does not go on; the message says why."""


class Guard:
    """Stands between one control loop and one backend. All methods may be called from any thread.

    The loop calls `begin`, (`observe`, `waiting`, `check`, (`cut`, `apply`)*)*, `rest`, or `wait_for_scene` before all
    that; `tick` and `obey` are for the guarding thread; `stop`, `pause`, `finish` for whoever hears the operator.
    """

    def __init__(
        self,
        backend: Backend,
        config: SafetyConfig,
        *,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is connected yet. Raises `ConfigError` for limits that are missing or loosened."""
        self.config = config
        self.paced = backend.spec.paced
        self.period_s = 1.0 / backend.spec.control_hz
        self.stage = SafetyStage(backend, config, clock=clock)
        self.stopped = ""
        """Why the robot is stopped; empty if it is not."""
        self.told_to_pause = False
        """By the operator of the runtime; another runtime takes that over."""
        self.ending: Ending = ""
        """How the operator wants the running episode to end."""
        self.holding = ""
        """Why the dead-man holds the robot; empty if it does not."""
        self.ready_for = ""
        """The task whose scene a person has put back; empty once something was played in it."""
        self.ended = ""
        """The episode that has ended last, for whoever judges it afterwards; empty if it was given up."""
        self.reconnect = False
        """A stop that the backend has never confirmed was lifted: it is to be connected anew."""
        self.clock = clock
        self._backend, self._warn = backend, warn
        self._device = Device(backend, self.check_running)
        self._latch = threading.Lock()
        self._naming = threading.Lock()  # which episode runs, and which was the last, change together
        self._safe = True  # whether the backend's stop() has returned since the robot was stopped
        self._why_not_safe = ""
        self._resetting = False
        self._leaving: Callable[[], bool] = lambda: False
        self._halted = ""  # why the episode was stopped; only `begin` lifts that, a reset does not bring it back
        self._armed = False
        self._episode = ""
        self._moving = False  # whether an action of the policy was sent in it
        self._paused_here = False
        self._scene = ""  # what a person has to put back before the episode begins; empty if nobody is waited for
        self._loop_s = self._heard_s = 0.0
        self._doing = ""

    # --- for the control loop -------------------------------------------------------------------------------------

    def call(self, method: Callable[..., T], *arguments: object) -> T:
        """Make a call of the backend. A robot's driver raises what it likes, and all of it is a `BackendError`."""
        try:
            return method(*arguments)
        except FieldtuneError:
            raise
        except Exception as error:
            if not self.paced:
                raise
            raise BackendError(f"{self._backend.spec.name}: {type(error).__name__}: {error}") from error

    def wait_for_scene(self, task: str, instruction: str, leaving: Callable[[], bool]) -> bool:
        """Pause before an episode, until a person has put the scene back for `task` and lets the robot go on, and
        nobody else has paused it; False if the worker is `leaving`. Raises `StoppedError`.
        """
        with self._latch:
            if self.stopped:
                raise StoppedError(self.stopped)
            self._halted, self._scene = "", f"for the scene of {task} ({instruction})"
        try:
            while self.paused:
                self.check_running()
                if leaving():
                    return False
                time.sleep(LOOK_S)
            self.check_running()
            self.ready_for = task
            return True
        finally:
            self._scene = ""

    def begin(self, episode: str, reset: Callable[[], None], leaving: Callable[[], bool] = lambda: False) -> None:
        """Start an episode: `reset` brings the backend to its start. From then on the dead-man watches.

        A reset under way is broken off by a stop, and once the worker is `leaving`; then and if the robot is stopped
        already, raises `StoppedError`.
        """
        with self._latch:
            if self.stopped:
                raise StoppedError(self.stopped)
            self._halted, self._leaving = "", leaving
        self._device.check_free()  # without the latch: a stop must not wait for that
        with self._latch:
            self.check_running()
            self._device.sent()  # a stop from before does not count for what the reset does
            self._episode, self.ending, self.holding, self._moving = episode, "", "", False
            self._resetting = True
        try:
            self.call(reset)
        finally:
            self._device.sent()  # in this order: a stop after it has to be a new one
            self._resetting = False
        self.check_running()
        self.stage.restart()
        self._heard_s = self.clock()
        self._mark("starting the episode")
        self._armed = self.paced

    def observe(self) -> Observation:
        """The backend's observation. Raises `StoppedError`."""
        self._mark("reading the observation")
        with self._device:
            self.check_running()
            return self.call(self._backend.observe)

    def waiting(self) -> None:
        """The loop now waits for the runtime's answer."""
        self._mark("waiting for a chunk")

    def heard(self) -> None:
        """The runtime has answered, so both sides are alive."""
        self._heard_s = self.clock()
        self._mark("reading the answer")
        self.holding = ""

    def check(self, actions: Float32) -> tuple[Float32, UInt8]:
        """What may be sent of a chunk `[k, d]`; see `SafetyStage.check`."""
        with self._device:
            return self.call(self.stage.check, actions)

    def cut(self, observed_s: float) -> int:
        """0, or the bit of the rule by which nothing more of a chunk for an observation of that time is played."""
        if self.paused or self.ending or self.holding:
            return HOLD
        return CHUNK_AGE if self.stage.too_old(observed_s) else 0

    def apply(self, action: Float32) -> tuple[Float32, int]:
        """Send an action `[d]`: what was really sent, and the bit of a rule that changed it. Raises `StoppedError`."""
        self._mark("sending an action")
        with self._device:
            self.check_running()
            self.ready_for = ""
            action, rule = self.call(self.stage.keep_inside, action)
            self._moving = True
            sent = self._send(action)
            self.stage.sent(action)
        self._stop_again_if_halted()
        self.check_running()
        return sent, rule

    def outcome(self) -> Outcome:
        """The backend's status and reward."""
        with self._device:
            outcome = self.call(self._backend.outcome)
        if self.paced and not self.call(lambda: math.isfinite(outcome.reward)):
            raise BackendError(f"{self._backend.spec.name}: outcome gave a reward of {outcome.reward!r}")
        return outcome

    def hold(self) -> Float32:
        """Send the hold action in place of a chunk's: what was really sent. Raises `StoppedError`."""
        self._mark("holding")
        with self._device:
            self.check_running()
            sent = self._hold()
        self._stop_again_if_halted()
        self.check_running()
        return sent

    @property
    def halted(self) -> bool:
        """Whether the episode was stopped; also after a reset, until the next one begins."""
        return bool(self._halted)

    def check_running(self) -> None:
        """Raises `StoppedError` if the episode was stopped."""
        if self._halted:
            raise StoppedError(self._halted)

    def rest(self, *, stop: bool, ended: str = "") -> Ending:
        """The episode is over: the dead-man does not watch any more, and the backend is stopped if asked.

        `ended` is its id, unless it was given up. Gives what the operator had said of its end; from here on `finish` is
        for the next one. A backend that cannot be stopped is a robot that may move on: it is stopped for good, and
        asked until it is.
        """
        with self._naming:
            ending, self.ending = self.ending, ""
            self._episode, self.ended = "", ended
        self._armed, self.holding = False, ""
        if stop:
            try:
                self._device.stop(REST_S)
            except Exception as error:  # noqa: BLE001 - a backend's own; the stop below goes on asking
                self.stop(f"after its episode: {error}")
        return ending

    def leave(self) -> None:
        """The worker leaves: the backend is stopped and closed, watched or not. Raises what they raise."""
        try:
            self._device.stop(REST_S)
        finally:
            self._backend.close()

    # --- for the operator -----------------------------------------------------------------------------------------

    def stop(self, why: str) -> None:
        """Stop the robot at once and keep it stopped until `reset`."""
        with self._latch:
            if self.stopped:
                return
            # Before anything else: from here on the loop sends nothing.
            self.stopped, self._halted, self._safe, self._why_not_safe = why, why, False, ""
            self.ready_for = ""  # somebody may have been in it
            self._stop_latched()
        self._tell(f"stopped: {why}; `fieldtune operator CONFIG reset` lets it go on")

    def reset(self) -> None:
        """Lift a stop. What was stopped does not go on: the robot takes its next episode."""
        with self._latch:
            if not self.stopped:
                return
            self.reconnect = self.reconnect or not self._safe
            self.stopped, self._armed = "", False
        self._tell("reset by the operator")

    @property
    def paused(self) -> bool:
        """By the operator of the runtime, by the one at this computer, or for the scene."""
        return bool(self._paused_here or self.told_to_pause or self._scene)

    def pause(self, paused: bool) -> None:
        """Hold the robot, or let it go on, as the operator at this computer wants."""
        self._paused_here = paused
        if not paused:
            self._scene = ""

    def finish(self, ending: Ending, episode: str = "") -> str:
        """End the running episode so, if it is `episode`; its id, empty if there is none. Where none is named: before
        the policy has moved the robot, what is said is most often meant for the episode before.
        """
        with self._naming:
            meant = episode == self._episode if episode else self._moving
            if not self._episode or not meant:
                return ""
            self.ending = ending
            return self._episode

    @property
    def state(self) -> tuple[RobotState, str]:
        """What the robot does, and why if that is not to drive."""
        if self.stopped:
            # "stopped" is what the operator relies on.
            if self._why_not_safe:
                return "stopping", f"{self.stopped}; {self._why_not_safe}"
            return "stopped" if self._safe else "stopping", self.stopped
        if self._resetting:
            return "resetting", ""
        if self.paused:
            return "paused", self._scene or ("" if self.told_to_pause else PAUSED_HERE)
        if self.holding:
            return "holding", self.holding
        return ("driving" if self._episode else "idle"), ""

    # --- for the guarding thread ----------------------------------------------------------------------------------

    def obey(self, orders: Orders) -> None:
        """Do what the runtime says; to hear it is a sign of life too."""
        self._heard_s = self.clock()
        if orders.reset:
            self.reset()
        if orders.stopped:
            self.stop(orders.stopped)
        self.told_to_pause = orders.paused
        if orders.resume:
            self._scene = ""
        if orders.end and orders.episode:
            self.finish(orders.end, orders.episode)

    def tick(self) -> None:
        """The dead-man; call it every control period. Holds a robot whose loop or runtime is silent, then stops it."""
        if self.stopped:
            if not self._safe:
                with self._latch:
                    self._stop_latched()
            return
        if self._resetting and self._leaving():
            with self._latch:
                self._halted = self._halted or "the bridge was told to leave"
                self._stop_latched()
            return
        if not self._armed:
            self.holding = ""
            return
        now_s = self.clock()
        loop_s, runtime_s = now_s - self._loop_s, now_s - self._heard_s
        silent_s = max(loop_s, runtime_s)
        if silent_s <= self.config.hold_after_s:
            self.holding = ""
            return
        what = "the runtime has been silent" if runtime_s > loop_s else f"the control loop has been {self._doing}"
        if silent_s > self.config.stop_after_s:
            self.stop(f"{what} for {silent_s:.2f} s")
            return
        if not self.holding:
            self.holding = f"{what} for {silent_s:.2f} s"
            self._tell(f"holding: {self.holding}")
        # With the lock in other hands the backend itself hangs, and only a stop is left.
        if self._loop_is_silent() and not self._device.busy:
            # The backend may hang in this very call, and a stop must not wait for it.
            threading.Thread(target=self._hold_for_the_loop, name="guard", daemon=True).start()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _mark(self, doing: str) -> None:
        """A sign of life of the loop."""
        if self.paced:
            self._loop_s = self.clock()
            self._doing = doing

    def _loop_is_silent(self) -> bool:
        return self.clock() - self._loop_s > SPEAKS_AGAIN_STEPS * self.period_s

    def _hold_for_the_loop(self) -> None:
        """Send one hold action, unless the loop speaks again. The lock lets in one at a time."""
        if not self._device.take():
            return
        try:
            if self._armed and not self._halted and self._loop_is_silent():
                self._hold()
        except Exception as error:  # noqa: BLE001 - a backend's own; the stop comes in its time
            self._tell(f"cannot hold: {error}")
        finally:
            self._device.give_back()
        self._stop_again_if_halted()

    def _hold(self) -> Float32:
        sent = self._send(self.call(self.stage.hold_action))
        self.stage.restart()
        return sent

    def _send(self, action: Float32) -> Float32:
        """With the device taken. What a robot's driver says that it has sent is checked: it goes into the log."""
        try:
            sent = self.call(lambda: np.asarray(self._backend.apply(action), np.float32))
        finally:
            self._device.sent()
        if self.paced and not (sent.shape == action.shape and np.isfinite(sent).all()):
            raise BackendError(f"{self._backend.spec.name}: apply gave {sent!r}; expected {len(action)} finite numbers")
        return sent

    def _stop_again_if_halted(self) -> None:
        """A stop that could not wait for the action just sent may have been undone by it."""
        if self._halted:
            with self._latch:
                self._safe = False
                self._stop_latched()

    def _stop_latched(self) -> None:
        """With the latch held. A backend that cannot stop now is asked again at the next tick, and so is one that is
        being reset: that may have begun to move it just after it was stopped.
        """
        resetting = self._resetting
        try:
            self._device.stop()
        except Exception as error:  # noqa: BLE001 - a backend's own; whatever it is, the next tick tries again
            if not self._why_not_safe:
                self._tell(f"cannot stop, trying again: {error}")
            self._why_not_safe = f"cannot stop: {error}"
        else:
            if self._why_not_safe:
                self._tell("stopped now")
            self._safe, self._why_not_safe = not resetting, ""

    def _tell(self, message: str) -> None:
        """Warn where that is possible: a full disk or a lost terminal must not keep a stop from being tried."""
        with suppress(Exception):
            self._warn(message)
