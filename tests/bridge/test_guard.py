"""The guard: the dead-man with a clock of the test's own, drivers that fail, and what operators wish."""

import threading
from typing import Any

import numpy as np
import pytest
from guarded import ENOUGH_S, ROBOT, STILL, TICK_S, Guarded, Robot, f32
from msgspec.structs import replace

from bridge.backend import BackendError, Outcome
from bridge.guard import StoppedError
from bridge.messages import Orders
from bridge.safety import FIRST_JUMP, HOLD

SIMULATOR = replace(ROBOT, paced=False)


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


# --- what operators wish ----------------------------------------------------------------------------------------------


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
