"""The latched stop: nothing goes out after it, and it is repeated until the robot has stopped."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from guarded import ENOUGH_S, STILL, Clock, Guarded, Robot

from bridge.backend import BackendError
from bridge.config import SafetyConfig
from bridge.device import STOP_S
from bridge.guard import Guard, StoppedError
from bridge.messages import Orders

RESET = "`fieldtune operator CONFIG reset` lets it go on"


def _waited(event: threading.Event) -> None:
    assert event.wait(ENOUGH_S)


def unanswered(times: int) -> Callable[[], None]:
    """A stop that fails so often, and then does not."""
    fails = [OSError("no answer")] * times

    def stop() -> None:
        if fails:
            raise fails.pop()

    return stop


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
    g = Guarded(Robot(on={"stop": unanswered(2)}))
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
    g = Guarded(Robot(on={"stop": unanswered(1)}))
    g.begin()
    g.guard.stop("a hand")
    assert g.guard.state == ("stopping", "a hand; cannot stop: no answer")
    g.guard.tick()
    assert g.guard.state == ("stopped", "a hand")


def test_a_robot_that_cannot_be_stopped_after_its_episode_stays_stopped() -> None:
    g = Guarded(Robot(on={"stop": unanswered(2)}))
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

    def reset() -> None:
        g.robot.reset("t", 0)
        g.guard.tick()
        g.guard.tick()
        assert g.robot.calls == ["reset", "stop", "stop"]

    g.robot.on["stop"] = unanswered(1)
    with pytest.raises(StoppedError, match="the bridge was told to leave"):
        g.guard.begin("e1", reset, leaving=lambda: True)
    assert g.guard.halted and not g.guard.stopped, "another worker may go on with it"
    assert g.warnings == ["cannot stop, trying again: no answer", "stopped now"]
    g.begin("e2")
    g.guard.apply(STILL)


def test_a_warning_that_fails_keeps_no_stop_from_being_tried_again() -> None:
    def full(message: str) -> None:
        raise OSError(28, "No space left on device")

    robot, clock = Robot(on={"stop": unanswered(2)}), Clock()
    guard = Guard(robot, SafetyConfig(hold_after_s=0.5, stop_after_s=2.0), warn=full, clock=clock)
    guard.begin("e1", lambda: None)
    for passed_s in (0.6, 1.5, 0.05, 0.05):
        clock.work(passed_s)
        guard.tick()
    assert guard.state[0] == "stopped" and robot.calls.count("stop") == 3
    guard.obey(Orders(reset=True))
    assert not guard.stopped
