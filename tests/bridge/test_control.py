"""The control loop: what it executes, what it reports, and that the robot is stopped whenever something is wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from control_fakes import SPEC, TASK, WELCOME, Clock, D, FakeBackend, FakeClient, H
from msgspec.structs import replace

from bridge.backend import BackendError, Observation
from bridge.client import SilentError
from bridge.config import BridgeConfig, SafetyConfig
from bridge.control import EpisodeLoop, checked_actions
from bridge.guard import Guard
from bridge.messages import Assignment, Chunk, Played, WireError
from bridge.pacing import Pacer


def run(
    backend: FakeBackend,
    client: FakeClient,
    task: Assignment = TASK,
    stopped: Callable[[], bool] = lambda: False,
    play_steps: int | None = None,
):
    guard = Guard(backend, SafetyConfig(), warn=lambda message: None)
    return EpisodeLoop(backend, client, WELCOME, task, guard, stopped, BridgeConfig(play_steps=play_steps)).run()


def test_a_chunk_is_cut_at_success_and_only_what_was_executed_is_reported() -> None:
    backend, client = FakeBackend(ends={6: "success"}), FakeClient()
    report = run(backend, client)
    assert report is not None
    assert (report.status, report.steps, report.decisions, report.versions) == ("success", 6, 2, ("v1",))
    assert [action[0] for action in backend.applied] == [1, 1, 1, 1, 2, 2]
    assert [message.step for message, _ in client.infers] == [0, 4]
    assert [decision for decision, _ in client.reports] == [1, 2]
    assert "sent" not in client.infers[0][1] and client.infers[0][0].played == ()
    # The backend's clipping, not the policy's wish, is what was sent.
    np.testing.assert_array_equal(client.reports[1][1]["sent"], np.ones((2, D), np.float32))
    np.testing.assert_array_equal(client.reports[1][1]["reward"], np.array([2.5, 3.0], np.float32))
    end, final = client.ends[0]
    assert (end.session, end.episode, end.status, end.steps) == ("s1", "e1", "success", 6)
    np.testing.assert_array_equal(final["state"], [6])


def test_every_chunk_is_asked_for_with_the_observation_at_that_step() -> None:
    client = FakeClient()
    run(FakeBackend(), client)
    assert [float(arrays["state"][0]) for _, arrays in client.infers] == [0, 4, 8]
    assert all(message.episode == "e1" and message.session == "s1" for message, _ in client.infers)


def test_the_horizon_cuts_the_last_chunk_and_is_a_timeout() -> None:
    backend, client = FakeBackend(), FakeClient()
    report = run(backend, client)
    assert report is not None
    assert (report.status, report.steps, report.decisions) == ("timeout", 10, 3)
    assert [len(arrays["sent"]) for _, arrays in client.reports] == [4, 4, 2]
    assert client.ends[0][0].status == "timeout"


@pytest.mark.parametrize(("play", "sent"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (4, [4, 4, 2]), (9, [4, 4, 2])])
def test_only_the_first_actions_of_a_chunk_are_played(play: int, sent: list[int]) -> None:
    backend, client = FakeBackend(), FakeClient()
    report = run(backend, client, play_steps=play)
    assert report is not None
    assert (report.status, report.steps, report.decisions) == ("timeout", 10, len(sent))
    assert [len(arrays["sent"]) for _, arrays in client.reports] == sent
    assert [float(arrays["state"][0]) for _, arrays in client.infers] == [sum(sent[:i]) for i in range(len(sent))]


@pytest.mark.parametrize("status", ["success", "failure", "timeout"])
def test_what_the_backend_says_at_the_last_step_counts_more_than_the_horizon(status: str) -> None:
    client = FakeClient()
    report = run(FakeBackend(ends={10: status}), client)
    assert report is not None and report.status == status
    assert client.ends[0][0].status == status


def test_a_robot_that_cannot_judge_leaves_it_open_unless_somebody_says() -> None:
    blind = replace(SPEC, judges=False)
    client = FakeClient()
    report = run(FakeBackend(spec=blind), client)
    assert report is not None and report.status == client.ends[0][0].status == "unjudged"
    client = FakeClient()
    guard = Guard(backend := FakeBackend(spec=blind), SafetyConfig(), warn=lambda message: None)
    backend.observe = lambda: (guard.finish("success"), Observation({}, np.zeros(1, np.float32)))[1]  # type: ignore[method-assign]
    report = EpisodeLoop(backend, client, WELCOME, TASK, guard, lambda: False, BridgeConfig()).run()
    assert report is not None and report.status == "success"


def test_what_is_said_after_the_last_step_still_counts() -> None:
    client = FakeClient()
    backend = FakeBackend(spec=replace(SPEC, judges=False))
    guard = Guard(backend, SafetyConfig(), warn=lambda message: None)
    observe = backend.observe

    def late() -> Observation:
        if len(backend.applied) == TASK.horizon_steps:
            assert guard.finish("success") == TASK.episode
        return observe()

    backend.observe = late  # type: ignore[method-assign]
    report = EpisodeLoop(backend, client, WELCOME, TASK, guard, lambda: False, BridgeConfig()).run()
    assert report is not None and report.status == client.ends[0][0].status == "success"
    assert client.ends[0][0].reason == "marked by the operator"


@pytest.mark.parametrize("observation", [None, Observation({}, None), Observation({}, "nothing")])  # type: ignore[arg-type]
def test_an_observation_that_is_none_is_an_error_of_the_backend(observation: Any) -> None:
    backend = FakeBackend()
    backend.observe = lambda: observation  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="what fake observes is not as its spec says"):
        run(backend, FakeClient())


def spoiled(**changes: Any) -> FakeClient:
    """The second chunk is wrong."""

    def spoil(chunk: Chunk, arrays: dict[str, Any]) -> tuple[Chunk, dict[str, Any]]:
        if chunk.decision < 2:
            return chunk, arrays
        if "actions" in changes:
            return chunk, {name: value for name, value in changes.items() if value is not None}
        return replace(chunk, **changes), arrays

    return FakeClient(spoil)


BAD = np.full((H, D), np.nan, np.float32)
LAST_BAD = np.zeros((H, D), np.float32)
LAST_BAD[-1, -1] = np.inf


@pytest.mark.parametrize(
    ("client", "field"),
    [
        (spoiled(episode="e0"), "episode"),
        (spoiled(actions=BAD), "tensors.actions"),
        (spoiled(actions=LAST_BAD), "tensors.actions"),
        (spoiled(actions=None), "tensors.actions"),
        (spoiled(actions=np.zeros((H, D + 1), np.float32)), "tensors.actions"),
        (spoiled(actions=np.zeros((0, D), np.float32)), "tensors.actions"),
        (spoiled(actions=np.zeros(D, np.float32)), "tensors.actions"),
        (spoiled(actions=np.zeros((H, D), np.float64)), "tensors.actions"),
    ],
)
def test_nothing_of_a_wrong_chunk_is_executed_and_the_backend_is_stopped(client: FakeClient, field: str) -> None:
    backend = FakeBackend()
    with pytest.raises(WireError) as caught:
        run(backend, client)
    assert caught.value.field == field
    assert len(backend.applied) == H
    assert backend.stopped >= 1
    assert not client.ends
    ((told, arrays),) = client.given_up
    assert told.reason == str(caught.value) and told.steps == H
    assert not told.played and not arrays, "the request for the wrong chunk has reported all there was"


def test_checked_actions_passes_a_good_chunk() -> None:
    actions = np.ones((H, D), np.float32)
    assert checked_actions(Chunk(episode="e", decision=1, version="v"), {"actions": actions}, "e", D) is actions


@pytest.mark.parametrize("error", [SilentError("silent"), KeyboardInterrupt(), RuntimeError("bug")])
def test_whatever_goes_wrong_while_asking_stops_the_backend(error: BaseException) -> None:
    def spoil(chunk: Chunk, arrays: dict[str, Any]) -> Any:
        raise error

    backend = FakeBackend()
    with pytest.raises(type(error)):
        run(backend, FakeClient(spoil))
    assert backend.stopped >= 1 and not backend.applied


@pytest.mark.parametrize("paced", [False, True])
def test_a_backend_that_fails_is_stopped(paced: bool) -> None:
    backend, client = FakeBackend(fail_at=2, spec=replace(SPEC, paced=paced)), FakeClient()
    with pytest.raises(BackendError, match="the arm is in the way"):
        run(backend, client)
    assert backend.stopped >= 1
    ((told, arrays),) = client.given_up
    # A canary counts what a policy has made of a robot; a simulator's trouble is its own.
    assert told.reason == ("stopped by its own fault: " if paced else "") + "the arm is in the way"
    assert told.steps == 2 and told.played == (Played(1, 0, 2),)
    assert arrays["sent"].tolist() == [[1.0] * D] * 2, "what was executed until then is told too"


@pytest.mark.parametrize("state", [np.zeros(2, np.float32), np.zeros(1), np.full(1, np.nan, np.float32)])
def test_an_observation_that_is_not_as_its_spec_says_is_not_sent(state: Any) -> None:
    class Wrong(FakeBackend):
        def observe(self) -> Observation:
            return Observation({}, state) if self.applied else super().observe()

    backend, client = Wrong(), FakeClient()
    with pytest.raises(BackendError, match=r"what fake observes is not as its spec says: tensors\.state: "):
        run(backend, client)
    assert backend.stopped >= 1 and len(client.infers) == 1
    ((told, arrays),) = client.given_up
    assert told.steps == H and len(arrays["sent"]) == H


def test_leaving_in_mid_episode_gives_it_up_and_says_so() -> None:
    backend, client = FakeBackend(), FakeClient()
    assert run(backend, client, stopped=lambda: len(backend.applied) >= H) is None
    assert len(backend.applied) == H
    assert backend.stopped >= 1
    assert not client.ends
    ((told, _),) = client.given_up
    assert told.reason == "the bridge was told to leave" and told.steps == H


def test_a_robot_is_stopped_at_the_end_and_a_simulator_need_not_be() -> None:
    robot = FakeBackend(spec=replace(SPEC, paced=True))
    report = run(robot, FakeClient())
    assert report is not None and robot.stopped == 1
    simulator = FakeBackend()
    run(simulator, FakeClient())
    assert simulator.stopped == 0


def test_the_pace_does_not_drift() -> None:
    clock = Clock()
    pacer = Pacer(0.02, clock=clock, sleep=clock.sleep)
    pacer.start()
    for i in range(1000):
        clock.work(0.003 + 0.005 * (i % 3))
        pacer.wait()
    # 0.7 ms late at every tick, and no later at the thousandth.
    assert clock.now_s - 100.0 == pytest.approx(1000 * 0.02 + 0.0007, abs=1e-6)
    assert pacer.ticks.overruns == 0
    assert pacer.ticks.work_s == pytest.approx(sum(0.003 + 0.005 * (i % 3) for i in range(1000)))
    assert pacer.ticks.work_s + pacer.ticks.sleep_s == pytest.approx(clock.now_s - 100.0)


def test_an_overrun_is_counted_and_not_caught_up_by_hurrying() -> None:
    clock = Clock()
    pacer = Pacer(0.02, clock=clock, sleep=clock.sleep)
    pacer.start()
    pacer.wait()
    clock.work(0.1)
    pacer.wait()
    assert pacer.ticks.overruns == 1
    late_s = clock.now_s
    pacer.wait()
    assert clock.now_s - late_s == pytest.approx(0.0207)
    assert pacer.ticks.overruns == 1
    assert all(seconds >= 0 for seconds in clock.slept)
