"""Episodes over real sockets: what is kept of what is driven, however it ends."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from server_samples import ENOUGH_S, aborted, refused, row_of, until

from bridge.backend import Backend
from bridge.messages import (
    PROTOCOL,
    Assignment,
    Chunk,
    EndEpisode,
    EpisodeStored,
    Hello,
    Infer,
    NoEpisode,
    Welcome,
)
from runtime.episodes import EpisodeLog
from runtime.policy import InstructionError
from runtime.reading import read_episode
from runtime.schedule import FixedList

# --- one episode ------------------------------------------------------------------------------------------------------


def test_an_episode_is_on_disk_and_indexed_when_it_is_acknowledged(serve: Any, point: Backend) -> None:
    serving = serve(explore=True)
    robot = serving.robot(point.spec)
    assignment = robot.next()
    assert isinstance(assignment, Assignment)
    chunks = []
    for k in (4, 1, 3):
        _, tensors = robot.infer(robot.observation(point.spec, robot.steps / 10))
        chunks.append(tensors["actions"])
        robot.executed(k)
    stored = robot.end(robot.observation(point.spec, 0.9), "success")
    # No waiting here: it is the promise of the acknowledgement.
    row = row_of(serving, stored.episode)
    assert row is not None and (row.status, row.steps, row.decisions) == ("success", 8, 3)
    episode = read_episode(serving.log.index.path(row))
    assert episode.start.episode == assignment.episode == stored.episode
    assert (episode.start.task, episode.start.seed) == (assignment.task, assignment.seed)
    assert (episode.start.instruction,) == point.spec.instructions[assignment.task]
    assert episode.start.client == "robot" and episode.start.explore and episode.start.source == "policy"
    assert [decision.step for decision in episode.decisions] == [0, 4, 5]
    assert [len(decision.sent) for decision in episode.decisions] == [4, 1, 3]
    for decision, chunk in zip(episode.decisions, chunks, strict=True):
        np.testing.assert_array_equal(decision.actions, chunk)
        assert decision.log_prob is not None
    assert [float(decision.observation.state[0]) for decision in episode.decisions] == pytest.approx([0, 0.4, 0.5])
    assert episode.final is not None and episode.final.state[0] == np.float32(0.9)


def test_without_exploration_the_mean_is_sent_and_no_log_prob_is_logged(
    serve: Any, point: Backend, fake_policy: Any
) -> None:
    serving = serve(policy=fake_policy(value=0.5), explore=False)
    robot = serving.robot(point.spec)
    robot.next()
    _, tensors = robot.infer(robot.observation(point.spec))
    np.testing.assert_array_equal(tensors["actions"], np.full((4, 2), 0.5, np.float32))
    robot.executed()
    episode = robot.end(robot.observation(point.spec)).episode
    logged = read_episode(serving.log.index.path(row_of(serving, episode)))
    assert not logged.start.explore and logged.decisions[0].log_prob is None


def test_many_robots_at_once_each_get_their_own_chunks(serve: Any, point: Backend) -> None:
    serving = serve(explore=False)
    errors: list[BaseException] = []
    stored: list[str] = []

    def work(i: int) -> None:
        try:
            robot = serving.robot(point.spec, f"robot-{i}")
            for _ in range(3):
                robot.next()
                for step in range(5):
                    x = i + step / 10
                    _, tensors = robot.infer(robot.observation(point.spec, x))
                    np.testing.assert_array_equal(tensors["actions"], np.full((4, 2), np.float32(x)))
                    robot.executed()
                stored.append(robot.end(robot.observation(point.spec)).episode)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENOUGH_S)
    assert not errors
    assert len(set(stored)) == 18
    assert serving.log.index.count(status="timeout") == 18
    status = serving.status()
    assert status["decisions"] == 90 and status["batches"] <= 90 and status["episodes"] == {"timeout": 18}


# --- ends that are not ordered ----------------------------------------------------------------------------------------


def test_asking_for_the_next_episode_aborts_the_open_one(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(3)
    robot.infer(robot.observation(point.spec))
    robot.executed(2)  # nobody is told any more
    first = robot.episode
    robot.next()
    assert robot.episode != first
    row = aborted(serving, first)
    assert row.steps == 3 and "next episode" in row.reason
    decisions = read_episode(serving.log.index.path(row)).decisions
    assert [len(decision.sent) for decision in decisions] == [3, 0]
    robot.infer(robot.observation(point.spec))


def test_an_episode_without_a_decision_leaves_no_trace(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed()
    robot.end(robot.observation(point.spec))
    assert serving.log.index.count() == 1
    assert serving.status()["episodes"] == {"timeout": 1}


def test_hello_again_on_the_same_connection_aborts_the_open_episode(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    hello = Hello(protocol=PROTOCOL, client="robot", spec=point.spec)
    robot.client.request(hello, Welcome)
    assert "hello again" in aborted(serving, robot.episode).reason
    assert refused(lambda: robot.infer(robot.observation(point.spec))).code == "session"


def test_a_silent_session_is_closed_and_its_episode_aborted(serve: Any, point: Backend) -> None:
    serving = serve(session_timeout_s=0.3)
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(2)
    robot.infer(robot.observation(point.spec))
    row = aborted(serving, robot.episode)
    assert row.steps == 2 and "silent" in row.reason
    assert refused(lambda: robot.infer(robot.observation(point.spec))).code == "session"


def ask_in_vain(robot: Any, policy: Any, point: Backend) -> None:
    """Ask for a chunk that the policy thinks about until its gate is set, and forget it."""
    policy.gate.clear()
    policy.waiting.clear()
    infer = Infer(session=robot.welcome.session, episode=robot.episode, step=0)
    late = robot.client.post(infer, robot.observation(point.spec))
    assert policy.waiting.wait(ENOUGH_S)
    robot.client.forget(late)


@pytest.mark.parametrize("waiting", [False, True])
def test_an_episode_that_is_given_up_says_why_and_what_was_executed(
    serve: Any, point: Backend, fake_policy: Any, waiting: bool
) -> None:
    policy = fake_policy()
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    if waiting:
        ask_in_vain(robot, policy, point)
    robot.executed(3)
    assert refused(lambda: robot.end(robot.observation(point.spec), "aborted")).field == "tensors"
    stored = robot.end({}, "aborted", reason="the camera is gone")
    policy.gate.set()
    row = row_of(serving, stored.episode)
    assert (row.status, row.steps, row.reason) == ("aborted", 3, "the camera is gone")
    episode = read_episode(serving.log.index.path(row))
    assert [len(decision.sent) for decision in episode.decisions] == [3] and episode.final is None
    assert serving.status()["episodes"] == {"aborted": 1}
    assert robot.run_episode(point.spec).episode != stored.episode


def test_a_chunk_that_is_ready_while_its_given_up_episode_is_stored_harms_nobody(
    serve: Any, point: Backend, fake_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = fake_policy()
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    ask_in_vain(robot, policy, point)
    ending, disk, sync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        ending.set()
        assert disk.wait(ENOUGH_S)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    robot.executed(3)
    end = EndEpisode(status="aborted", reason="the camera is gone", steps=3, **robot._fields())
    ended = robot.client.post(end, robot.report)
    assert ending.wait(ENOUGH_S)
    policy.gate.set()
    other = serving.robot(point.spec, "another")
    other.next()
    other.infer(other.observation(point.spec))
    disk.set()
    assert robot.client.collect(ended, EpisodeStored)[0].episode == robot.episode
    assert serving.status()["dropped"] == 1
    robot.run_episode(point.spec)


def test_an_episode_may_be_given_up_before_its_first_step(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    stored = robot.end({}, "aborted", reason="the arm is in the way")
    row = row_of(serving, stored.episode)
    assert (row.status, row.steps, row.reason) == ("aborted", 0, "the arm is in the way")


def test_a_server_that_stops_keeps_open_episodes_as_aborted(serve: Any, point: Backend, tmp_path: Path) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(1)
    robot.infer(robot.observation(point.spec))
    until(lambda: serving.status()["log"]["open"] == 1, "the log to open the episode")
    serving.stop()
    log = EpisodeLog(tmp_path / "episodes")
    row = log.index.get(robot.episode)
    log.close()
    assert row is not None and row.status == "aborted" and row.steps == 1


def test_a_chunk_whose_episode_is_over_is_dropped_and_counted(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy()
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    policy.gate.clear()
    infer = Infer(session=robot.welcome.session, episode=robot.episode, step=0)
    robot.client.post(infer, robot.observation(point.spec))
    assert policy.waiting.wait(ENOUGH_S)
    # The robot has had enough of waiting and starts anew.
    robot.next()
    policy.gate.set()
    until(lambda: serving.status()["dropped"] == 1, "the late chunk to be dropped")
    assert serving.status()["decisions"] == 0
    robot.infer(robot.observation(point.spec))


def test_nothing_is_computed_for_episodes_that_were_given_up(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy()
    serving = serve(policy=policy, max_batch=1)
    policy.gate.clear()
    first, hasty = serving.robot(point.spec, "first"), serving.robot(point.spec, "hasty")

    def ask(robot: Any) -> int:
        robot.next()
        infer = Infer(session=robot.welcome.session, episode=robot.episode, step=0)
        return int(robot.client.post(infer, robot.observation(point.spec)))

    asked = ask(first)
    assert policy.waiting.wait(ENOUGH_S)
    for _ in range(4):
        ask(hasty)
    last = ask(hasty)
    until(lambda: serving.status()["dropped"] == 4, "the first four to be dropped")
    policy.gate.set()
    assert first.client.collect(asked, Chunk)[0].episode == first.episode
    assert hasty.client.collect(last, Chunk)[0].episode == hasty.episode
    assert policy.batches == [1, 1] and serving.status()["dropped"] == 4


def test_a_reply_to_a_client_that_has_gone_is_counted(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy()
    serving = serve(policy=policy)

    def leave_before_the_chunk(pause_s: float) -> int:
        robot = serving.robot(point.spec)
        robot.next()
        policy.gate.clear()
        policy.waiting.clear()
        infer = Infer(session=robot.welcome.session, episode=robot.episode, step=0)
        robot.client.post(infer, robot.observation(point.spec))
        assert policy.waiting.wait(ENOUGH_S)
        before = serving.status()["decisions"]
        robot.client.close()
        # The server's end of the connection has to notice as well; nothing tells us when it has.
        time.sleep(pause_s)
        policy.gate.set()
        until(lambda: serving.status()["decisions"] == before + 1, "the chunk to be ready")
        return int(serving.status()["undeliverable"])

    assert any(leave_before_the_chunk(pause_s) == 1 for pause_s in (0.05, 0.2, 1.0, 3.0))
    serving.robot(point.spec).run_episode(point.spec)


def test_an_episode_is_told_the_wording_of_its_seed(serve: Any, point: Backend) -> None:
    spec = replace(point.spec, instructions={"reach": ("go", "move", "run")})
    serving = serve(schedule=FixedList([("reach", seed) for seed in range(4, 10)]))
    robot = serving.robot(spec)
    for seed in range(4, 10):
        stored = robot.run_episode(spec)
        row = row_of(serving, stored.episode)
        assert row is not None and row.seed == seed
        assert read_episode(serving.log.index.path(row)).start.instruction == ("go", "move", "run")[seed % 3]


def test_an_instruction_that_the_policy_cannot_read_is_refused_at_hello(
    serve: Any, point: Backend, fake_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = fake_policy()
    policy.spec = replace(policy.spec, tokens=3)

    def tokens(instruction: str) -> Any:
        if len(instruction) > 10:
            raise InstructionError("too long")
        return np.zeros(3, np.int64)

    monkeypatch.setattr(policy, "tokens", tokens)
    serving = serve(policy=policy)
    spec = replace(point.spec, instructions={"short": "go", "long": ("go", "go to the far end of the room")})
    answer = refused(lambda: serving.client().hello(spec))
    assert (answer.code, answer.field, answer.message) == ("spec", "spec.instructions.long", "too long")
    serving.client().hello(replace(spec, instructions={"short": "go"}))


def test_an_inference_that_fails_is_told_and_the_episode_can_go_on(
    serve: Any, point: Backend, fake_policy: Any
) -> None:
    policy = fake_policy(value=np.nan)
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    answer = refused(lambda: robot.infer(robot.observation(point.spec)))
    assert (answer.code, answer.field) == ("internal", "inference")
    policy.value = 0.0
    chunk, _ = robot.infer(robot.observation(point.spec))
    assert chunk.decision == 1
    # The report that comes with a request whose inference fails is taken; the next try has nothing to report.
    policy.value = np.nan
    robot.executed(2)
    assert refused(lambda: robot.infer(robot.observation(point.spec))).code == "internal"
    robot.report, policy.value = {}, 0.0
    chunk, _ = robot.infer(robot.observation(point.spec))
    assert chunk.decision == 2
    robot.executed()
    stored = robot.end(robot.observation(point.spec))
    decisions = read_episode(serving.log.index.path(row_of(serving, stored.episode))).decisions
    assert [len(decision.sent) for decision in decisions] == [2, 1]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_an_evaluation_ends_when_every_episode_is_stored(serve: Any, point: Backend) -> None:
    serving = serve(schedule=FixedList([("reach", 1), ("reach", 2)]))
    one, other = serving.robot(point.spec), serving.robot(point.spec)
    first, second = one.next(), other.next()
    assert {first.seed, second.seed} == {1, 2}
    third = serving.robot(point.spec)
    answer = third.next()
    assert isinstance(answer, NoEpisode) and not answer.finished
    one.infer(one.observation(point.spec))
    one.executed()
    one.end(one.observation(point.spec))
    # The second robot gives up; its episode goes to the third.
    other.infer(other.observation(point.spec))
    other.client.request(Hello(protocol=PROTOCOL, client="robot", spec=point.spec), Welcome)
    again = third.next()
    assert isinstance(again, Assignment) and again.seed == second.seed
    third.infer(third.observation(point.spec))
    third.executed()
    assert not serving.status()["finished"]
    third.end(third.observation(point.spec))
    answer = one.next()
    assert isinstance(answer, NoEpisode) and answer.finished
    assert serving.status()["finished"]


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The log's disk is full while this is set."""
    from runtime import episode_file

    real, full = episode_file.write_all, threading.Event()

    def write_all(descriptor: int, *parts: bytes) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        real(descriptor, *parts)

    monkeypatch.setattr(episode_file, "write_all", write_all)
    return full


def test_a_full_disk_loses_the_episode_says_so_and_serves_on(serve: Any, point: Backend, disk: threading.Event) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed()
    disk.set()
    robot.infer(robot.observation(point.spec))
    robot.executed()
    lost = robot.episode
    answer = refused(lambda: robot.end(robot.observation(point.spec), "success"))
    assert answer.code == "storage" and "No space left" in answer.message
    status = serving.status()
    assert status["episodes"] == {"lost": 1}
    assert status["log"]["lost"] == 1 and "No space left" in status["log"]["error"]
    assert status["refused"]["storage"] == 1
    disk.clear()
    stored = robot.run_episode(point.spec)
    assert row_of(serving, stored.episode).status == "timeout"
    row = row_of(serving, lost)
    assert row is None or row.status == "aborted"


def test_an_episode_of_an_evaluation_that_was_lost_is_driven_again(
    serve: Any, point: Backend, disk: threading.Event
) -> None:
    serving = serve(schedule=FixedList([("reach", 7)]))
    robot = serving.robot(point.spec)
    disk.set()
    assert refused(lambda: robot.run_episode(point.spec)).code == "storage"
    assert not serving.status()["finished"]
    disk.clear()
    robot.run_episode(point.spec)
    assert serving.status()["finished"]
    (row,) = serving.log.index.list(limit=10, status="timeout")
    assert row.seed == 7
