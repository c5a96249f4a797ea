"""The guard: the dead-man with a clock of the test's own, the latched stop, and the operator's wishes."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from guarded import ROBOT, Clock, Robot, f32
from msgspec.structs import replace

from bridge.backend import BackendError, Float32, Outcome
from bridge.config import BridgeConfig, SafetyConfig
from bridge.control import EpisodeLoop
from bridge.device import STOP_S
from bridge.guard import Guard, StoppedError
from bridge.messages import Assignment, Chunk, EndEpisode, Infer, Orders, Welcome
from bridge.safety import CHUNK_AGE, FIRST_JUMP, HELD, HOLD, RATE

ENOUGH_S = 30.0
TICK_S = 1 / ROBOT.control_hz
SIMULATOR = replace(ROBOT, paced=False)
STILL = f32(0, 0)
RESET = "`fieldtune operator CONFIG reset` lets it go on"


def _waited(event: threading.Event) -> None:
    assert event.wait(ENOUGH_S)


class Guarded:
    """A guard, the robot behind it, and a clock."""

    def __init__(self, robot: Robot | None = None, **config: Any) -> None:
        self.clock, self.robot = Clock(), robot or Robot()
        self.warnings: list[str] = []
        settings = SafetyConfig(**{"hold_after_s": 0.5, "stop_after_s": 2.0, **config})
        self.guard = Guard(self.robot, settings, warn=self.warnings.append, clock=self.clock)

    def begin(self, episode: str = "e1") -> None:
        self.guard.begin(episode, lambda: self.robot.reset("t", 0))
        self.robot.calls.clear()

    def tick(self) -> None:
        """Tick once, and wait for the hold that this may have begun."""
        self.guard.tick()
        for thread in threading.enumerate():
            if thread.name == "guard":
                thread.join(ENOUGH_S)

    def pass_time(self, seconds: float, *, runtime: bool = False, loop: bool = False) -> None:
        """Tick at the control rate; the runtime or the loop may be alive meanwhile."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.work(TICK_S)
            if runtime:
                self.guard.obey(Orders())
            if loop:
                self.guard.apply(STILL)
            self.tick()


# --- the dead-man -----------------------------------------------------------------------------------------------------


def test_a_silent_runtime_holds_the_robot_and_then_stops_it() -> None:
    g = Guarded()
    g.begin()
    g.pass_time(0.5, loop=True)
    assert not g.guard.holding and not g.guard.stopped
    g.pass_time(TICK_S, loop=True)
    assert g.guard.holding == "the runtime has been silent for 0.55 s" and g.guard.state[0] == "holding"
    assert g.guard.cut(g.clock()) == HOLD
    g.pass_time(1.45, loop=True)
    assert not g.guard.stopped and "stop" not in g.robot.calls
    with pytest.raises(StoppedError, match="the runtime has been silent for 2"):
        g.pass_time(2 * TICK_S, loop=True)
    assert g.robot.calls[-1] == "stop"
    assert g.guard.state == ("stopped", g.guard.stopped)
    assert [warning.partition(":")[0] for warning in g.warnings] == ["holding", "stopped"]


def test_a_loop_that_hangs_is_held_for_and_then_stopped_with_the_place_where_it_hangs() -> None:
    g = Guarded(Robot(at=f32(0.3, 0)))
    g.begin()
    g.guard.waiting()
    g.pass_time(0.5, runtime=True)
    assert g.robot.calls == []
    g.pass_time(1.5, runtime=True)
    assert g.robot.calls == ["apply"] * 30
    assert all((action == f32(0.3, 0)).all() for action in g.robot.applied)
    g.pass_time(TICK_S, runtime=True)
    assert g.robot.calls[-1] == "stop"
    assert g.guard.stopped == "the control loop has been waiting for a chunk for 2.05 s"
    calls = len(g.robot.calls)
    g.pass_time(5.0, runtime=True)
    assert len(g.robot.calls) == calls


def test_whoever_speaks_again_in_time_goes_on() -> None:
    g = Guarded()
    g.begin()
    g.guard.waiting()
    g.pass_time(1.0, runtime=True)
    assert g.guard.holding
    g.guard.heard()
    assert not g.guard.holding and g.guard.cut(g.clock()) == 0
    g.pass_time(5.0, runtime=True, loop=True)
    assert g.warnings == ["holding: the control loop has been waiting for a chunk for 0.55 s"]


def test_after_a_hold_the_next_action_is_a_first_one() -> None:
    g = Guarded()
    g.begin()
    g.guard.check(f32([0, 0]))
    g.guard.waiting()
    g.pass_time(0.6, runtime=True)
    g.guard.heard()
    assert g.guard.check(f32([0.9, 0]))[1].tolist() == [FIRST_JUMP]


@pytest.mark.parametrize("spec", [ROBOT, SIMULATOR])
def test_nobody_is_watched_between_episodes_and_a_simulator_never(spec: Any) -> None:
    g = Guarded(Robot(spec))
    g.pass_time(10.0)
    g.begin()
    if spec.paced:
        g.guard.rest(stop=False)
    g.pass_time(10.0)
    assert not g.guard.stopped and not g.warnings and g.robot.calls == []


def test_the_time_that_a_reset_takes_does_not_count() -> None:
    g = Guarded()
    g.guard.begin("e1", lambda: g.pass_time(10.0))
    g.guard.tick()
    assert not g.guard.holding and not g.guard.stopped


def test_a_backend_that_hangs_is_stopped_all_the_same() -> None:
    hangs, go = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert go.wait(ENOUGH_S)

    g = Guarded(Robot(on={"observe": hang}))
    g.begin()
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            g.guard.observe()
            g.guard.apply(STILL)
        except StoppedError as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    assert hangs.wait(ENOUGH_S)
    g.pass_time(2.1, runtime=True)
    # Its lock is in other hands, so nobody could hold; the stop did not wait for it.
    assert g.robot.calls == ["observe", "stop"]
    assert g.guard.stopped == "the control loop has been reading the observation for 2.05 s"
    go.set()
    thread.join(ENOUGH_S)
    assert len(errors) == 1 and g.robot.calls == ["observe", "stop"]


def test_a_hold_that_fails_is_told_and_ends_in_the_stop() -> None:
    def fail() -> None:
        raise OSError("the bus is gone")

    g = Guarded(Robot(on={"apply": fail}))
    g.begin()
    g.guard.waiting()
    g.pass_time(2.1, runtime=True)
    assert "cannot hold: fake: OSError: the bus is gone" in g.warnings and g.robot.calls[-1] == "stop"


def test_a_hold_of_the_dead_man_that_hangs_keeps_no_order_and_no_stop_waiting() -> None:
    hangs, go = threading.Event(), threading.Event()

    def hang() -> None:
        if not hangs.is_set():
            hangs.set()
            assert go.wait(ENOUGH_S)

    g = Guarded(Robot(on={"apply": hang}))
    g.begin()
    g.guard.waiting()
    g.clock.work(0.6)
    g.guard.tick()
    assert hangs.wait(ENOUGH_S)
    g.guard.obey(Orders(paused=True))
    assert g.guard.paused
    for _ in range(30):
        g.clock.work(TICK_S)
        g.guard.obey(Orders(paused=True))
        g.guard.tick()
    assert g.robot.calls == ["apply", "stop"]
    assert g.guard.stopped == "the control loop has been waiting for a chunk for 2.05 s"
    go.set()
    g.tick()
    assert g.robot.calls == ["apply", "stop", "stop"], "what the driver sent late is followed by another stop"


def test_a_hold_whose_loop_speaks_again_before_it_is_sent_is_not_sent() -> None:
    g = Guarded()
    g.begin()
    g.guard.waiting()
    g.clock.work(0.6)
    g.robot.hold_action = lambda: pytest.fail("a hold in the middle of a chunk")  # type: ignore[method-assign]
    late = threading.Thread(target=g.guard._hold_for_the_loop)
    g.guard.heard()
    late.start()
    late.join(ENOUGH_S)
    assert not g.robot.applied and not g.warnings


# --- a driver of somebody else's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["reset", "observe", "apply", "hold", "outcome"])
def test_whatever_a_robots_driver_raises_is_an_error_of_the_backend(what: str) -> None:
    broken = OSError(5, "Input/output error")

    def fail() -> Any:
        raise broken

    def act(g: Guarded) -> None:
        if what != "reset":
            g.begin()
        g.robot.on["apply" if what == "hold" else what] = fail
        g.robot.outcome = fail if what == "outcome" else g.robot.outcome  # type: ignore[method-assign]
        acts = {"reset": g.begin, "observe": g.guard.observe, "hold": g.guard.hold, "outcome": g.guard.outcome}
        acts.get(what, lambda: g.guard.apply(STILL))()  # type: ignore[operator]

    with pytest.raises(BackendError, match=r"^fake: OSError: \[Errno 5\] Input/output error$") as caught:
        act(Guarded())
    assert caught.value.__cause__ is broken
    with pytest.raises(OSError, match="Input/output"):
        act(Guarded(Robot(SIMULATOR)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoppedError("a hand"), BackendError("too hot")])
def test_what_is_no_drivers_error_stays_what_it_is(error: BaseException) -> None:
    def fail() -> None:
        raise error

    g = Guarded(Robot(on={"observe": fail}))
    g.begin()
    with pytest.raises(type(error)) as caught:
        g.guard.observe()
    assert caught.value is error


# --- the latched stop -------------------------------------------------------------------------------------------------


def test_nothing_is_sent_after_a_stop_until_a_reset_and_a_new_episode() -> None:
    g = Guarded()
    g.begin()
    g.guard.apply(STILL)
    g.guard.stop("a hand")
    g.guard.stop("again")
    for act in (lambda: g.guard.apply(STILL), g.guard.hold, g.guard.observe, g.guard.check_running, g.begin):
        with pytest.raises(StoppedError, match="a hand"):
            act()
    assert g.robot.calls == ["apply", "stop"] and g.guard.state == ("stopped", "a hand")
    g.guard.reset()
    with pytest.raises(StoppedError, match="a hand"):
        g.guard.apply(STILL)
    g.begin("e2")
    g.guard.apply(STILL)
    assert g.robot.calls == ["apply"] and g.guard.state == ("driving", "")


def test_a_stop_during_the_reset_ends_the_episode_before_it_begins() -> None:
    g = Guarded()
    with pytest.raises(StoppedError, match="a hand"):
        g.guard.begin("e1", lambda: g.guard.stop("a hand"))
    assert g.robot.calls == ["stop"]


def test_a_backend_that_cannot_stop_is_asked_until_it_does() -> None:
    fails = [OSError("no answer")] * 2

    def stop() -> None:
        if fails:
            raise fails.pop()

    g = Guarded(Robot(on={"stop": stop}))
    g.begin()
    g.guard.stop("a hand")
    g.pass_time(0.5)
    assert g.robot.calls == ["stop"] * 3
    told = [text for text in g.warnings if "stop" in text]
    assert told[:2] == ["cannot stop, trying again: no answer", "stopped: a hand; " + RESET]
    assert told[2:] == ["stopped now"], "once, and not with every tick"


def test_a_stop_that_does_not_return_keeps_nobody_and_counts_once_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.guard.REST_S", 0.05)
    go = threading.Event()
    g = Guarded(Robot(on={"stop": lambda: None if go.is_set() else _waited(go)}))
    g.begin()
    g.guard.stop("a hand")
    for _ in range(3):
        g.guard.obey(Orders())
        g.guard.tick()
        assert g.guard.state == ("stopping", "a hand; cannot stop: stop() of fake has not returned")
    with pytest.raises(StoppedError, match="a hand"):
        g.guard.observe()
    g.guard.obey(Orders(reset=True))
    with pytest.raises(BackendError, match=r"stop\(\) of fake has not returned"):
        g.guard.begin("e2", lambda: pytest.fail("two calls at once"))
    with pytest.raises(BackendError, match=r"stop\(\) of fake has not returned"):
        g.guard.leave()
    g.guard.stop("again")
    assert g.robot.calls == ["stop", "close"]
    go.set()
    for thread in threading.enumerate():
        if thread.name == "stop":
            thread.join(ENOUGH_S)
    g.guard.tick()
    assert g.robot.calls == ["stop", "close"] and g.guard.state == ("stopped", "again"), "nothing was sent since"
    assert g.guard.reconnect, "it was reset before it had confirmed its stop"
    g.guard.reset()
    g.begin("e3")


def test_a_slow_stop_is_waited_for_between_episodes_and_counts_once_it_has_returned() -> None:
    slow = STOP_S + 0.3
    g = Guarded(Robot(on={"stop": lambda: time.sleep(slow)}))
    g.begin()
    g.guard.rest(stop=True)
    assert not g.guard.stopped and g.robot.calls == ["stop"]
    g.begin()
    g.guard.stop("a hand")
    assert g.guard.state == ("stopping", "a hand; cannot stop: stop() of fake has not returned")
    deadline_s = time.monotonic() + ENOUGH_S
    while g.guard.state[0] == "stopping":
        assert time.monotonic() < deadline_s
        g.guard.tick()
    assert g.guard.state == ("stopped", "a hand") and g.robot.calls == ["stop"]


def test_a_stop_that_was_called_before_an_action_went_out_does_not_count() -> None:
    stops, sends = threading.Event(), threading.Event()

    def stop() -> None:
        if g.robot.calls.count("stop") == 1:
            stops.set()
            _waited(sends)

    g = Guarded(Robot(on={"stop": stop, "apply": lambda: _waited(stops)}))
    g.begin()

    def act() -> None:
        with suppress(StoppedError):
            g.guard.apply(STILL)

    loop = threading.Thread(target=act)
    loop.start()
    guard = threading.Thread(target=g.guard.stop, args=("a hand",))
    guard.start()
    while "apply" not in g.robot.calls or g.robot.applied == []:
        time.sleep(0.01)
    sends.set()
    guard.join(ENOUGH_S)
    loop.join(ENOUGH_S)
    assert g.robot.calls[:2] == ["apply", "stop"] and g.robot.calls.count("stop") >= 2
    assert g.guard.state == ("stopped", "a hand")


def test_a_robot_is_stopped_though_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    g = Guarded()
    g.begin()
    monkeypatch.setattr(threading.Thread, "start", start)
    g.guard.stop("a hand")
    assert g.robot.calls == ["stop"] and g.guard.state == ("stopped", "a hand")


def hanging_hold() -> tuple[Guarded, threading.Event]:
    """The dead-man's hold hangs in the driver until the event is set."""
    hangs, go = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        _waited(go)

    g = Guarded(Robot(on={"apply": hang}))
    g.begin()
    g.guard.waiting()
    g.clock.work(0.6)
    g.guard.tick()
    assert hangs.wait(ENOUGH_S)
    return g, go


def test_an_episode_does_not_begin_while_a_hold_of_the_dead_man_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.device.STOP_S", 0.05)
    g, go = hanging_hold()
    g.guard.stop("a hand")
    g.guard.reset()
    with pytest.raises(BackendError, match="a call of fake has not returned"):
        g.begin("e2")
    go.set()
    g.tick()
    g.begin("e2")


def test_a_stop_does_not_wait_for_an_episode_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.device.STOP_S", ENOUGH_S)
    g, go = hanging_hold()
    begun = threading.Event()
    check_free = g.guard._device.check_free

    def checked() -> None:
        begun.set()
        check_free()

    monkeypatch.setattr(g.guard._device, "check_free", checked)
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            g.guard.begin("e2", lambda: pytest.fail("it was stopped before"))
        except StoppedError as error:
            errors.append(error)

    loop = threading.Thread(target=begin)
    loop.start()
    assert begun.wait(ENOUGH_S)
    g.guard.stop("a hand")
    assert g.guard.state == ("stopped", "a hand") and loop.is_alive()
    go.set()
    loop.join(ENOUGH_S)
    assert [str(error) for error in errors] == ["a hand"]


def test_a_stop_that_nobody_waited_for_does_not_count_for_the_next_way_home() -> None:
    go = threading.Event()
    g = Guarded(Robot(on={"stop": lambda: _waited(go)}))
    g.begin()
    g.guard.stop("a hand")
    assert g.guard.state[0] == "stopping"
    go.set()
    for thread in threading.enumerate():
        if thread.name == "stop":
            thread.join(ENOUGH_S)
    g.guard.reset()  # before a tick has seen that it had returned
    with pytest.raises(StoppedError, match="again"):
        g.guard.begin("e2", lambda: g.guard.stop("again"))
    assert g.robot.calls == ["stop", "stop"]


def test_a_stop_ends_the_wait_of_a_loop_for_a_hold_that_hangs() -> None:
    g, go = hanging_hold()
    stop = threading.Timer(0.2, g.guard.stop, ["a hand"])
    stop.start()
    with pytest.raises(StoppedError, match="a hand"):
        g.guard.observe()
    stop.join(ENOUGH_S)
    go.set()


def test_stopped_is_said_once_the_backend_has_stopped() -> None:
    fails = [OSError("no answer")]

    def stop() -> None:
        if fails:
            raise fails.pop()

    g = Guarded(Robot(on={"stop": stop}))
    g.begin()
    g.guard.stop("a hand")
    assert g.guard.state == ("stopping", "a hand; cannot stop: no answer")
    g.guard.tick()
    assert g.guard.state == ("stopped", "a hand")


def test_a_robot_that_cannot_be_stopped_after_its_episode_stays_stopped() -> None:
    fails = [OSError("no answer")] * 2

    def stop() -> None:
        if fails:
            raise fails.pop()

    g = Guarded(Robot(on={"stop": stop}))
    g.begin()
    g.guard.rest(stop=True)
    assert g.guard.state == ("stopping", "after its episode: no answer; cannot stop: no answer")
    g.guard.tick()
    assert g.guard.state == ("stopped", "after its episode: no answer")
    with pytest.raises(StoppedError):
        g.begin("e2")


def test_a_stop_just_before_a_reset_is_repeated_until_that_has_ended() -> None:
    g = Guarded()

    def reset() -> None:
        g.guard.stop("a hand")
        g.robot.reset("t", 0)  # it begins to move although it was told to stop
        assert g.guard.state == ("stopping", "a hand")
        g.guard.tick()
        assert g.robot.calls[-1] == "stop"

    with pytest.raises(StoppedError, match="a hand"):
        g.guard.begin("e1", reset)
    g.guard.tick()
    assert g.guard.state == ("stopped", "a hand")
    stops = g.robot.calls.count("stop")
    g.guard.tick()
    assert g.robot.calls.count("stop") == stops == 3


@pytest.mark.parametrize("what", ["action", "hold", "hold of the dead-man"])
def test_what_was_under_way_at_the_stop_is_followed_by_another_stop(what: str) -> None:
    applying, go = threading.Event(), threading.Event()

    def hang() -> None:
        applying.set()
        assert go.wait(ENOUGH_S)

    g = Guarded(Robot(on={"apply": hang}))
    g.begin()
    done = threading.Event()

    def send() -> None:
        if what == "hold of the dead-man":
            g.clock.work(1.0)
            g.tick()
        else:
            with pytest.raises(StoppedError):
                g.guard.apply(STILL) if what == "action" else g.guard.hold()
        done.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert applying.wait(ENOUGH_S)
    g.guard.stop("a hand")
    go.set()
    assert done.wait(ENOUGH_S)
    thread.join(ENOUGH_S)
    assert g.robot.calls == ["apply", "stop", "stop"]


def test_a_reset_is_broken_off_once_the_worker_is_to_leave() -> None:
    g = Guarded()
    fails = [OSError("no answer")]

    def stop() -> None:
        if fails:
            raise fails.pop()

    def reset() -> None:
        g.robot.reset("t", 0)
        g.guard.tick()
        g.guard.tick()
        assert g.robot.calls == ["reset", "stop", "stop"]

    g.robot.on["stop"] = stop
    with pytest.raises(StoppedError, match="the bridge was told to leave"):
        g.guard.begin("e1", reset, leaving=lambda: True)
    assert g.guard.halted and not g.guard.stopped, "another worker may go on with it"
    assert g.warnings == ["cannot stop, trying again: no answer", "stopped now"]
    g.begin("e2")
    g.guard.apply(STILL)


def test_a_warning_that_fails_keeps_no_stop_from_being_tried_again() -> None:
    fails = [OSError("no answer")] * 2

    def stop() -> None:
        if fails:
            raise fails.pop()

    def full(message: str) -> None:
        raise OSError(28, "No space left on device")

    robot, clock = Robot(on={"stop": stop}), Clock()
    guard = Guard(robot, SafetyConfig(hold_after_s=0.5, stop_after_s=2.0), warn=full, clock=clock)
    guard.begin("e1", lambda: None)
    for passed_s in (0.6, 1.5, 0.05, 0.05):
        clock.work(passed_s)
        guard.tick()
    assert guard.state[0] == "stopped" and robot.calls.count("stop") == 3
    guard.obey(Orders(reset=True))
    assert not guard.stopped


def test_a_robot_that_is_being_reset_says_so_whatever_was_ordered() -> None:
    g = Guarded()
    states: list[str] = []

    def reset() -> None:
        g.guard.pause(True)
        g.guard.finish("success")  # of the episode before, most likely
        states.append(g.guard.state[0])
        g.robot.reset("t", 0)

    g.guard.begin("e1", reset)
    assert [*states, g.guard.state[0]] == ["resetting", "paused"] and not g.guard.ending


def test_before_the_policy_has_moved_the_robot_a_key_is_for_the_episode_before() -> None:
    g = Guarded()
    g.begin()
    g.guard.hold()
    assert g.guard.finish("success") == "" and not g.guard.ending
    g.guard.apply(STILL)
    assert g.guard.finish("success") == "e1" and g.guard.ending == "success"
    assert g.guard.rest(stop=True, ended="e1") == "success"
    assert g.guard.finish("failure") == "" and g.guard.ended == "e1"
    g.begin("e2")
    assert not g.guard.ending and g.guard.ended == "e1"
    g.guard.rest(stop=True)
    assert not g.guard.ended, "given up"


@pytest.mark.parametrize("sent", [f32(0), f32(0, np.nan), "nothing"])
def test_what_a_driver_says_it_has_sent_is_checked(sent: Any) -> None:
    g = Guarded()
    g.begin()
    g.robot.apply = lambda action: sent  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="fake"):
        g.guard.apply(STILL)
    g.robot.outcome = lambda: Outcome("running", float("nan"))  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="reward of nan"):
        g.guard.outcome()
    g.robot.outcome = lambda: None  # type: ignore[method-assign, return-value]
    with pytest.raises(BackendError, match="AttributeError"):
        g.guard.outcome()


def test_the_runtimes_orders_stop_pause_reset_and_end() -> None:
    g = Guarded()
    g.begin("e1")
    g.guard.obey(Orders(paused=True))
    assert g.guard.paused and g.guard.state[0] == "paused"
    g.guard.pause(True)
    g.guard.obey(Orders())
    assert g.guard.paused, "the operator at the robot has not resumed"
    g.guard.pause(False)
    assert not g.guard.paused
    g.guard.obey(Orders(episode="e0", end="success"))
    assert not g.guard.ending, "that was for another episode"
    g.guard.obey(Orders(episode="e1", end="success"))
    assert g.guard.ending == "success"
    g.guard.obey(Orders(stopped="a hand"))
    assert g.guard.stopped == "a hand"
    g.guard.obey(Orders())
    assert g.guard.stopped == "a hand", "only a reset lifts a stop"
    g.guard.obey(Orders(reset=True))
    assert not g.guard.stopped


def test_a_pause_by_the_robots_own_key_is_the_keys_and_that_of_the_runtime_the_runtimes() -> None:
    g = Guarded()
    g.guard.pause(True)
    assert g.guard.state == ("paused", "at the robot")
    g.guard.obey(Orders(paused=True))
    assert g.guard.state == ("paused", "") and g.guard.told_to_pause
    g.guard.obey(Orders())
    assert g.guard.state == ("paused", "at the robot") and not g.guard.told_to_pause
    g.guard.pause(False)
    assert g.guard.state == ("idle", "")


def test_a_paused_robot_says_so_also_while_the_runtime_is_silent() -> None:
    g = Guarded()
    g.begin()
    g.guard.obey(Orders(paused=True))
    g.pass_time(1.0, loop=True)
    assert g.guard.holding and g.guard.state == ("paused", "")


# --- in the control loop ----------------------------------------------------------------------------------------------


class Client:
    """Gives chunks of four small steps; `at` maps the number of a request to what happens before its answer."""

    def __init__(self, at: dict[int, Callable[[], None]], step: float = 0.01) -> None:
        self.at, self.step = at, step
        self.reports: list[dict[str, Any]] = []
        self.end: EndEpisode | None = None
        self._infers = 0

    def collect(self, request: int, kind: type) -> Any:
        assert request == self._infers
        self.at.get(self._infers, lambda: None)()
        start = self._infers * 4 * self.step
        actions = f32(*[[start + i * self.step, 0] for i in range(4)])
        return Chunk(episode="e1", decision=self._infers, version="v"), {"actions": actions}

    def post(self, message: Infer | EndEpisode, arrays: Any) -> int:
        self._note(message, arrays)
        if isinstance(message, EndEpisode):
            self.end = message
        else:
            self._infers += 1
        return self._infers

    def forget(self, request: int) -> None:
        assert request == self._infers

    def _note(self, message: Any, arrays: Any) -> None:
        if message.played:
            self.reports.append({name: arrays[name].tolist() for name in ("sent", "reward", "rules") if name in arrays})


def drive(g: Guarded, client: Client, horizon_steps: int = 12) -> Any:
    task = Assignment(episode="e1", task="t", seed=0, horizon_steps=horizon_steps)
    return EpisodeLoop(g.robot, client, WELCOME, task, g.guard, lambda: False, BridgeConfig()).run()  # type: ignore[arg-type]


WELCOME = Welcome(session="s", version="v", horizon=4)
FAST = replace(ROBOT, control_hz=1000.0, max_rate=(1000.0, 1000.0))


def test_an_old_chunk_is_not_played_and_the_next_is_asked_for() -> None:
    g = Guarded(Robot(FAST), chunk_age_s=1.0)
    client = Client({2: lambda: g.clock.work(1.5)})
    report = drive(g, client, 9)
    assert report.steps == 9
    first, second, third = client.reports
    # One hold in place of the chunk, where the robot was.
    assert second == {"sent": [first["sent"][-1]], "reward": [0.0], "rules": [CHUNK_AGE]}
    assert len(first["sent"]) == len(third["sent"]) == 4 and "rules" not in third


def test_a_chunk_that_grows_old_while_it_is_played_is_cut() -> None:
    robot = Robot(FAST)
    g = Guarded(robot, chunk_age_s=1.0)
    robot.on["apply"] = lambda: g.clock.work(0.4)
    client = Client({})
    drive(g, client, 6)
    # Begun at 0, 0.4 and 0.8 s; at 1.2 s it is too old.
    assert [len(report["sent"]) for report in client.reports] == [3, 3]
    assert all("rules" not in report for report in client.reports)


@pytest.mark.parametrize(("ending", "status"), [("end", "timeout"), ("success", "success"), ("failure", "failure")])
def test_the_operator_ends_the_episode(ending: Any, status: str) -> None:
    robot = Robot(FAST)
    g = Guarded(robot)
    robot.on["apply"] = lambda: g.guard.finish(ending) if len(robot.applied) == 5 else None
    client = Client({})
    report = drive(g, client)
    assert report.status == status and report.steps == 6
    assert client.end is not None and "operator" in client.end.reason and client.end.status == status
    assert [len(report["sent"]) for report in client.reports] == [4, 2]


def test_a_paused_robot_holds_and_then_goes_on_with_a_new_chunk() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)

    def applied() -> None:
        if len(robot.applied) == 1:
            g.guard.pause(True)
        if len(robot.applied) == 8:
            g.guard.pause(False)

    robot.on["apply"] = applied
    client = Client({})
    report = drive(g, client, 10)
    # Two of the first chunk, seven holds that are no steps of the episode, and two whole chunks.
    assert report.steps == 10 and [len(r["sent"]) for r in client.reports] == [2, 4, 4]
    assert len(robot.applied) == 10 + 7
    held = [action.tolist() for action in robot.applied[2:9]]
    assert held == [robot.applied[1].tolist()] * 7


def test_a_robot_that_is_paused_on_its_way_home_holds_at_the_start() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)
    asked: list[int] = []
    robot.on["reset"] = lambda: g.guard.pause(True)
    robot.on["observe"] = lambda: asked.append(len(robot.applied))
    robot.on["apply"] = lambda: g.guard.pause(len(robot.applied) < 5)
    drive(g, Client({}, step=0.1), 4)
    assert asked[0] == 6, "no chunk is asked for before"
    assert [action.tolist() for action in robot.applied[:6]] == [[0, 0]] * 6


def test_a_target_that_stays_too_far_is_never_approached() -> None:
    class Far(Client):
        def collect(self, request: int, kind: type) -> Any:
            chunk, _ = super().collect(request, kind)
            return chunk, {"actions": f32(*[[0.95, 0]] * 4)}

    robot = Robot(FAST)
    client = Far({})
    report = drive(Guarded(robot), client, 6)
    assert [r["rules"] for r in client.reports] == [[FIRST_JUMP]] * 6
    assert [r["sent"] for r in client.reports] == [[[0, 0]]] * 6
    assert not any(action.any() for action in robot.applied)
    assert (report.steps, report.decisions, report.ticks.held) == (6, 6, 6) and FIRST_JUMP & HELD


def test_what_was_changed_is_reported_with_its_rule_beside_what_was_sent() -> None:
    robot = Robot(replace(ROBOT, control_hz=1000.0))  # 2 mm of 2 rad a step: 0.002
    client = Client({})
    drive(Guarded(robot), client, 4)
    (report,) = client.reports
    assert report["rules"] == [RATE] * 4
    np.testing.assert_allclose(report["sent"], [[0.002 * (i + 1), 0] for i in range(4)], atol=1e-6)


def test_a_stop_in_mid_chunk_lets_no_further_action_through() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)

    def applied() -> None:
        if len(robot.applied) == 5:
            # From another thread, as it comes from the runtime or from a key; the lock is this action's.
            thread = threading.Thread(target=g.guard.stop, args=("a hand",))
            thread.start()
            thread.join(ENOUGH_S)

    robot.on["apply"] = applied
    client = Client({})
    with pytest.raises(StoppedError, match="a hand"):
        drive(g, client)
    assert client.end is None
    assert robot.calls.count("apply") == 6 and set(robot.calls[robot.calls.index("stop") :]) == {"stop"}


def test_a_target_may_be_a_read_only_array() -> None:
    action: Float32 = STILL.copy()
    action.flags.writeable = False
    g = Guarded()
    g.begin()
    assert g.guard.apply(action)[0].tolist() == [0, 0]
