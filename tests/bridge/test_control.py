"""The control loop: what it executes, what it reports, and that the robot is stopped whenever something is wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from bridge.backend import ActionSpec, BackendError, BackendSpec, Float32, Observation, Outcome, VectorSpec
from bridge.client import SilentError
from bridge.config import BridgeConfig, SafetyConfig
from bridge.control import EpisodeLoop, checked_actions
from bridge.guard import Guard
from bridge.messages import Assignment, Chunk, EndEpisode, Infer, Message, Played, Welcome, WireError
from bridge.pacing import Pacer

H, D = 4, 2
SPEC = BackendSpec(
    name="fake",
    cameras=(),
    state=VectorSpec(("step",), ("1",)),
    action=ActionSpec(("a", "b"), ("1", "1"), (-100.0, -100.0), (100.0, 100.0), "delta"),
    control_hz=1000.0,
    instructions={"t": "go"},
)
WELCOME = Welcome(session="s1", version="v1", horizon=H)
TASK = Assignment(episode="e1", task="t", seed=3, horizon_steps=10)


@dataclass
class FakeBackend:
    """Counts what is done to it; `ends` maps a step to the status after it."""

    ends: dict[int, Any] = field(default_factory=dict)
    spec: BackendSpec = SPEC
    fail_at: int | None = None
    applied: list[Float32] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    stopped: int = 0

    def connect(self) -> None:
        self.calls.append("connect")

    def reset(self, task: str, seed: int) -> None:
        self.calls.append(f"reset {task} {seed}")

    def observe(self) -> Observation:
        self.calls.append("observe")
        return Observation({}, np.array([len(self.applied)], np.float32))

    def apply(self, action: Float32) -> Float32:
        if len(self.applied) == self.fail_at:
            raise BackendError("the arm is in the way")
        self.applied.append(action.copy())
        return np.clip(action, -1, 1)

    def outcome(self) -> Outcome:
        return Outcome(self.ends.get(len(self.applied), "running"), 0.5 * len(self.applied))

    def hold_action(self) -> Float32:
        return np.zeros(D, np.float32)

    def stop(self) -> None:
        self.stopped += 1

    def close(self) -> None:
        self.calls.append("close")


@dataclass
class FakeClient:
    """Gives chunk n the actions n, n, ...; `spoil` may change or raise before a chunk is given."""

    spoil: Callable[[Chunk, dict[str, Any]], tuple[Chunk, dict[str, Any]]] = lambda chunk, arrays: (chunk, arrays)
    infers: list[tuple[Infer, dict[str, Any]]] = field(default_factory=list)
    ends: list[tuple[EndEpisode, dict[str, Any]]] = field(default_factory=list)
    given_up: list[tuple[EndEpisode, dict[str, Any]]] = field(default_factory=list)

    def request(self, message: Message, kind: type, arrays: Any = None, timeout_s: float | None = None) -> None:
        assert isinstance(message, EndEpisode) and message.status == "aborted"
        self.given_up.append((message, arrays))

    def post(self, message: Message, arrays: Any = None) -> int:
        if isinstance(message, Infer):
            self.infers.append((message, arrays))
            return len(self.infers)
        assert isinstance(message, EndEpisode)
        self.ends.append((message, arrays))
        return -len(self.ends)

    def collect(self, request: int, kind: type) -> tuple[Any, Any]:
        assert kind is Chunk
        message, _ = self.infers[request - 1]
        chunk = Chunk(episode=message.episode, decision=request, version=f"v{(request + 1) // 2}")
        return self.spoil(chunk, {"actions": np.full((H, D), request, np.float32)})

    def forget(self, request: int) -> None:
        assert 0 < request <= len(self.infers)

    @property
    def reports(self) -> list[tuple[int, dict[str, Any]]]:
        """(decision, `sent` and `reward`) of every request that reports one, in order."""
        return [
            (message.played[0].decision, {"sent": arrays["sent"], "reward": arrays["reward"]})
            for message, arrays in [*self.infers, *self.ends]
            if message.played
        ]


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
    backend.observe = lambda: guard.finish("success") or Observation({}, np.zeros(1, np.float32))  # type: ignore[method-assign, func-returns-value]
    report = EpisodeLoop(backend, client, WELCOME, TASK, guard, lambda: False, BridgeConfig()).run()
    assert report is not None and report.status == "success"


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


def test_a_backend_that_fails_is_stopped() -> None:
    backend, client = FakeBackend(fail_at=2), FakeClient()
    with pytest.raises(BackendError, match="the arm is in the way"):
        run(backend, client)
    assert backend.stopped >= 1
    ((told, arrays),) = client.given_up
    assert told.reason == "the arm is in the way" and told.steps == 2 and told.played == (Played(1, 0, 2),)
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


@dataclass
class Clock:
    """Time that passes only by sleeping and by `work`."""

    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        # A real sleep is never exact.
        self.now_s += seconds + 0.0007

    def work(self, seconds: float) -> None:
        self.now_s += seconds


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


# --- asynchronous chunks ------------------------------------------------------------------------------------------


def run_async(
    backend: FakeBackend, client: FakeClient, *, prefix_steps: int = 0, horizon_steps: int = 24, **config: Any
) -> tuple[Any, Guard]:
    guard = Guard(backend, SafetyConfig(), warn=lambda message: None)
    welcome = replace(WELCOME, prefix_steps=prefix_steps)
    task = replace(TASK, horizon_steps=horizon_steps)
    config = BridgeConfig(**{"merge": "switch", **config})
    return EpisodeLoop(backend, client, welcome, task, guard, lambda: False, config).run(), guard


def slices(client: FakeClient) -> list[tuple[int, int, int]]:
    return [(p.decision, p.start, p.steps) for message, _ in [*client.infers, *client.ends] for p in message.played]


def takeovers(client: FakeClient) -> dict[int, int]:
    """Decision -> index of its first action that was played."""
    return {decision: start for decision, start, _ in reversed(slices(client))}


def test_the_next_chunk_is_asked_for_while_one_plays() -> None:
    backend, client = FakeBackend(), FakeClient()
    report, _ = run_async(backend, client, horizon_steps=8)
    # Half of a chunk of 4, and no delay: chunk n acts from its first action on.
    assert [message.step for message, _ in client.infers] == [0, 2, 4]
    assert [action[0] for action in backend.applied] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert slices(client) == [(1, 0, 2), (2, 0, 2), (3, 0, 4)]  # the last one reaches the end of the episode
    assert (report.status, report.steps, report.ticks.starved, report.ticks.held) == ("timeout", 8, 0, 0)


@pytest.mark.parametrize("play_steps", [1, 2, 3])
def test_a_delay_of_a_simulator_is_counted_in_steps_and_the_chunk_is_trimmed(play_steps: int) -> None:
    backend, client = FakeBackend(), FakeClient()
    report, _ = run_async(backend, client, delay_steps=2, play_steps=play_steps)
    seen = {message.step: number for number, (message, _) in enumerate(client.infers, start=1)}
    steps = {number: step for step, number in seen.items()}
    at, last = 0, 0
    for decision, start, count in slices(client):
        # Each slice begins where its chunk's own clock says, and none is of an older chunk than the one before.
        assert start == at - steps[decision] and decision >= last
        at, last = at + count, decision
    assert at == 24 and {start for _, start, _ in slices(client)} > {0}
    sent = [float(action[0]) for action in backend.applied]
    expected = [float(decision) for decision, start, count in slices(client) for _ in range(min(count, H - start))]
    assert [value for value in sent if value] == expected
    assert report.ticks.starved == 24 - len(expected) == (0 if play_steps < 3 else sent.count(0.0))


def test_a_tick_without_an_action_is_starved_and_says_so() -> None:
    backend, client = FakeBackend(), FakeClient()
    report, _ = run_async(backend, client, delay_steps=9, play_steps=4, horizon_steps=60)
    assert report.ticks.starved > 0 and report.steps == 60
    flagged = sum(int((arrays["rules"] == 64).sum()) for _, arrays in client.infers + client.ends if "rules" in arrays)
    assert flagged == report.ticks.starved == sum(not action.any() for action in backend.applied)


def test_with_prefix_the_policy_is_told_what_will_play_and_takes_over_behind_it() -> None:
    backend, client = FakeBackend(), FakeClient()
    run_async(backend, client, merge="prefix", prefix_steps=2, delay_steps=2, play_steps=2, horizon_steps=40)
    told = {number: arrays["prefix"] for number, (_, arrays) in enumerate(client.infers, start=1) if "prefix" in arrays}
    assert {len(prefix) for prefix in told.values()} == {1, 2}
    for decision, start in takeovers(client).items():
        # What was committed was played, by the chunk before.
        assert start == len(told.get(decision, ()))
        if start:
            assert (told[decision] == decision - 1).all()
    assert sum(takeovers(client).values()) > 0


def test_a_chunk_that_is_not_needed_is_not_asked_for_and_one_under_way_is_waited_for_at_the_end() -> None:
    backend, client = FakeBackend(ends={3: "success"}), FakeClient()
    report, _ = run_async(backend, client, play_steps=2, delay_steps=3)
    asked = len(client.infers)
    assert report.decisions == asked and report.status == "success"
    end, _ = client.ends[0]
    assert sum(p.steps for message, _ in [*client.infers, *client.ends] for p in message.played) == end.steps == 3


PACED = replace(SPEC, paced=True)


@dataclass
class Robot(FakeBackend):
    """A robot whose ticks are counted; `each` runs in each of them."""

    spec: BackendSpec = PACED
    each: Callable[[int], None] = lambda step: None

    def apply(self, action: Float32) -> Float32:
        self.each(len(self.applied))
        return super().apply(action)


@dataclass
class SlowClient(FakeClient):
    """A chunk is ready when the robot has made `late` more ticks since it was asked for."""

    robot: Any = None
    late: int = 2
    asked_at: list[int] = field(default_factory=list)

    def post(self, message: Message, arrays: Any = None) -> int:
        self.asked_at.append(len(self.robot.applied))
        return super().post(message, arrays)

    def ready(self, request: int) -> bool:
        return len(self.robot.applied) >= self.asked_at[request - 1] + self.late


def test_a_robot_plays_on_while_it_waits_and_does_not_starve() -> None:
    robot = Robot()
    client = SlowClient(robot=robot)
    report, _ = run_async(robot, client, horizon_steps=12)
    assert [message.step for message, _ in client.infers] == [0, 2, 4, 6, 8]
    assert [action[0] for action in robot.applied] == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert slices(client) == [(1, 0, 2), (1, 2, 2), (2, 2, 2), (3, 2, 2), (4, 2, 2), (5, 2, 2)]
    assert report.ticks.starved == 0 and report.ticks.ticks == 12


def test_a_robot_whose_chunks_come_too_late_holds_until_one_has_come() -> None:
    robot = Robot()
    client = SlowClient(robot=robot, late=3)
    report, _ = run_async(robot, client, horizon_steps=11)
    # Seen at 2 and here at 5, when the first has ended: one tick is starved, then the rest of the chunk is played.
    assert [action[0] for action in robot.applied] == [1, 1, 1, 1, 0, 2, 0, 0, 3, 0, 0]
    assert report.ticks.starved == 5


def test_what_was_under_way_during_a_pause_is_not_played() -> None:
    robot = Robot()
    client = SlowClient(robot=robot, late=3)
    paused = []

    def each(step: int) -> None:
        if step == 2:
            guard.pause(True)
        elif step == 6:
            paused.append(len(client.infers))
            guard.pause(False)

    robot.each = each
    guard = Guard(robot, SafetyConfig(), warn=lambda message: None)
    EpisodeLoop(robot, client, WELCOME, TASK, guard, lambda: False, BridgeConfig(merge="switch")).run()
    # Two were asked for when it was paused; after it the robot stood still until a third had come for where it was.
    assert paused == [2]
    assert [action[0] for action in robot.applied[:3]] == [1, 1, 1]
    assert all(not action.any() for action in robot.applied[3:7])
    assert [action[0] for action in robot.applied[7:9]] == [3, 3]
    assert client.infers[2][0].step == 3


def test_nothing_is_played_that_a_prefix_was_told_but_did_not_come() -> None:
    """The chunk that played grew too old; the one under way was planned on from it."""
    robot = Robot(spec=replace(SPEC, paced=True, control_hz=20.0))
    clock = Clock()
    client = SlowClient(robot=robot, late=2)
    guard = Guard(robot, SafetyConfig(chunk_age_s=5.0), warn=lambda message: None, clock=clock)
    robot.each = lambda step: clock.work(10.0) if step == 7 else None
    welcome = replace(WELCOME, prefix_steps=2)
    task = replace(TASK, horizon_steps=14)
    EpisodeLoop(robot, client, welcome, task, guard, lambda: False, BridgeConfig(merge="prefix")).run()
    told = [message.step for message, arrays in client.infers if "prefix" in arrays]
    assert told, "some chunk was planned on from a prefix"
    stale = max(step for step in told if step <= 8)
    number = [message.step for message, _ in client.infers].index(stale) + 1
    assert number not in {decision for decision, _, _ in slices(client)}
