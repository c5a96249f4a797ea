"""Chunks that are asked for while others play: what is played when, what is told, and what is not played."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from control_fakes import SPEC, TASK, WELCOME, Clock, FakeBackend, FakeClient, H
from msgspec.structs import replace

from bridge.backend import BackendSpec, Float32
from bridge.config import BridgeConfig, SafetyConfig
from bridge.control import EpisodeLoop
from bridge.guard import Guard
from bridge.messages import Message


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
