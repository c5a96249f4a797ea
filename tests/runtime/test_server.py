"""The server over real sockets: what it answers, what it refuses, and that nobody can harm anybody else's episode."""

import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.backend import ActionSpec, Backend, BackendSpec, CameraSpec, VectorSpec
from bridge.client import PolicyClient, RefusedError, SilentError
from bridge.config import ConfigError
from bridge.keys import make_keys
from bridge.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Announce,
    Assignment,
    EndEpisode,
    EpisodeStored,
    GetStatus,
    Hello,
    Infer,
    Message,
    NextEpisode,
    NoEpisode,
    Operate,
    Played,
    Refused,
    Rollback,
    Serving,
    StatusReply,
    Watch,
    Welcome,
    decode_reply,
    encode,
)
from runtime.bundle import BundleError
from runtime.episodes import EpisodeLog
from runtime.policy import InstructionError
from runtime.reading import read_episode
from runtime.schedule import FixedList
from runtime.status import Status

ENOUGH_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.01)


def refused(call: Callable[[], Any]) -> Refused:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.refused


def raw_socket(endpoint: str) -> tuple[zmq.Context[Any], zmq.Socket[bytes]]:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    return context, socket


def row_of(serving: Any, episode: str) -> Any:
    return serving.log.index.get(episode)


# --- hello ------------------------------------------------------------------------------------------------------------


def test_hello_tells_what_is_served(serve: Any, point: Backend) -> None:
    serving = serve()
    welcome = serving.client().hello(point.spec)
    assert welcome.version == serving.live.policy.version
    assert welcome.horizon == serving.live.policy.spec.horizon
    assert serving.client().hello().session != welcome.session
    assert serving.status()["sessions"] == 2


def changed(spec: BackendSpec, **changes: Any) -> BackendSpec:
    return replace(spec, **changes)


MISMATCHES: list[tuple[str, Callable[[BackendSpec], BackendSpec]]] = [
    ("cameras", lambda s: changed(s, cameras=())),
    ("cameras", lambda s: changed(s, cameras=(CameraSpec("other", 8, 8),))),
    ("height", lambda s: changed(s, cameras=(CameraSpec("top", 9, 8),))),
    ("width", lambda s: changed(s, cameras=(CameraSpec("top", 8, 9),))),
    ("state", lambda s: changed(s, state=VectorSpec((), ()))),
    ("state.names", lambda s: changed(s, state=VectorSpec(("y", "x"), s.state.units))),
    ("state.units", lambda s: changed(s, state=VectorSpec(s.state.names, ("1", "m")))),
    ("action", lambda s: changed(s, action=ActionSpec(("vx",), ("0.1",), (-1.0,), (1.0,), "delta"))),
    ("action.names", lambda s: changed(s, action=replace(s.action, names=("vy", "vx")))),
    ("action.units", lambda s: changed(s, action=replace(s.action, units=("0.1", "m")))),
    ("action.low", lambda s: changed(s, action=replace(s.action, low=(-1.0, -2.0)))),
    ("action.high", lambda s: changed(s, action=replace(s.action, high=(1.0, 2.0)))),
    ("action.kind", lambda s: changed(s, action=replace(s.action, kind="absolute"))),
    ("control_hz", lambda s: changed(s, control_hz=11.0)),
    ("control_hz", lambda s: changed(s, control_hz=float("nan"))),
]


@pytest.mark.parametrize(("field", "change"), MISMATCHES, ids=[f"{i}-{m[0]}" for i, m in enumerate(MISMATCHES)])
def test_a_backend_that_does_not_fit_is_refused_by_field(
    serve: Any, point: Backend, field: str, change: Callable[[BackendSpec], BackendSpec]
) -> None:
    serving = serve()
    answer = refused(lambda: serving.client().hello(change(point.spec)))
    assert answer.code == "spec"
    assert answer.field.startswith("spec.") and field in answer.field, answer.field
    assert serving.status()["sessions"] == 0


def test_what_the_policy_does_not_need_may_differ(serve: Any, point: Backend) -> None:
    spec = changed(
        point.spec,
        name="another",
        cameras=(*point.spec.cameras, CameraSpec("wrist", 5, 5)),
        instructions={"other": "do something else"},
        privileged=None,
        paced=True,
    )
    serve().client().hello(spec)


def test_another_protocol_is_refused(serve: Any) -> None:
    client = serve().client()
    answer = refused(lambda: client.request(Hello(protocol=PROTOCOL + 1, client="new"), Welcome))
    assert (answer.code, answer.field) == ("protocol", "protocol")


def test_a_tool_without_a_backend_gets_no_episode(serve: Any) -> None:
    client = serve().client()
    session = client.hello().session
    assert refused(lambda: client.ask(NextEpisode(session=session))).code == "spec"


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


# --- requests out of order --------------------------------------------------------------------------------------------


@pytest.fixture
def robot(serve: Any, point: Backend) -> Any:
    """A robot with an open episode."""
    robot = serve().robot(point.spec)
    robot.next()
    return robot


def test_an_unknown_session_is_refused(serve: Any, point: Backend) -> None:
    serving = serve()
    one, other = serving.robot(point.spec), serving.robot(point.spec)
    observation = one.observation(point.spec)
    one.next()
    other.next()
    # Another client's session is as unknown as one that never was.
    for session in ("", "nonsense", other.welcome.session):
        for call in (
            lambda s=session: one.infer(observation, session=s),
            lambda s=session: one.client.ask(NextEpisode(session=s)),
            lambda s=session: one.end(observation, session=s),
        ):
            assert refused(call).code == "session"
    one.infer(observation)
    other.infer(observation)


def test_chunks_are_refused_out_of_order(robot: Any, point: Backend) -> None:
    observation = robot.observation(point.spec)

    def field_of(**changes: Any) -> str:
        answer = refused(lambda: robot.infer(observation, **changes))
        assert answer.code == "episode"
        return answer.field

    assert field_of(episode="0" * 24) == "episode"
    assert field_of(step=1) == "step"
    assert field_of(step=-1) == "step"
    robot.infer(observation)
    assert field_of(step=1) == "step"
    robot.executed(2)
    assert field_of(step=0) == "step"
    assert field_of(step=4) == "step"
    chunk, _ = robot.infer(observation)
    assert chunk.decision == 2


def test_a_second_request_while_one_is_computed_is_refused(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy()
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    policy.gate.clear()
    infer = Infer(session=robot.welcome.session, episode=robot.episode, step=0)
    robot.client.post(infer, robot.observation(point.spec))
    assert "still being computed" in refused(lambda: robot.infer(robot.observation(point.spec))).message
    policy.gate.set()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("image/top", np.zeros((9, 8, 3), np.uint8)),
        ("image/top", None),
        ("state", np.zeros(3, np.float32)),
        ("state", np.array([np.nan, 0], np.float32)),
        ("privileged", None),
        ("surprise", np.zeros(1, np.float32)),
    ],
)
def test_a_wrong_observation_is_refused_by_tensor(robot: Any, point: Backend, name: str, array: Any) -> None:
    observation = {**robot.observation(point.spec), name: array}
    observation = {key: value for key, value in observation.items() if value is not None}
    answer = refused(lambda: robot.infer(observation))
    assert (answer.code, answer.field) == ("malformed", f"tensors.{name}")
    chunk, _ = robot.infer(robot.observation(point.spec))
    assert chunk.decision == 1
    robot.executed()
    assert refused(lambda: robot.end(observation)).field == f"tensors.{name}"
    robot.end(robot.observation(point.spec))


def zeros(k: int, d: int = 2) -> Any:
    return np.zeros((k, d), np.float32)


@pytest.mark.parametrize(
    ("arrays", "code", "field"),
    [
        ({}, "malformed", "tensors"),
        ({"sent": zeros(1)}, "malformed", "tensors"),
        ({"sent": zeros(1), "reward": zeros(1)[:, 0], "more": zeros(1)}, "malformed", "tensors.more"),
        ({"sent": zeros(0), "reward": zeros(0)[:, 0]}, "malformed", "tensors.sent"),
        ({"sent": zeros(5), "reward": zeros(5)[:, 0]}, "malformed", "played[0].steps"),
        ({"sent": zeros(1, 3), "reward": zeros(1)[:, 0]}, "malformed", "tensors.sent"),
        ({"sent": zeros(1)[0], "reward": zeros(1)[:, 0]}, "malformed", "tensors.sent"),
        ({"sent": np.float32(0).reshape(()), "reward": zeros(1)[:, 0]}, "malformed", "tensors.sent"),
        ({"sent": zeros(1).astype(np.float64), "reward": zeros(1)[:, 0]}, "malformed", "tensors.sent"),
        ({"sent": zeros(2), "reward": zeros(1)[:, 0]}, "malformed", "tensors.reward"),
        ({"sent": zeros(1), "reward": zeros(1)}, "malformed", "tensors.reward"),
        ({"sent": zeros(1) * np.nan, "reward": zeros(1)[:, 0]}, "malformed", "tensors"),
        ({"sent": zeros(1), "reward": zeros(1)[:, 0] + np.inf}, "malformed", "tensors"),
    ],
)
def test_a_wrong_report_is_refused_and_the_right_one_is_still_taken(
    serve: Any, point: Backend, arrays: dict[str, Any], code: str, field: str
) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    observation = robot.observation(point.spec)
    robot.infer(observation)
    played = (Played(1, 0, max(1, len(np.atleast_2d(arrays.get("sent", zeros(1)))))),)
    for call in (
        lambda: robot.infer({**observation, **arrays}, played=played, step=1),
        lambda: robot.end({**observation, **arrays}, played=played, steps=1),
    ):
        answer = refused(call)
        assert (answer.code, answer.field) == (code, field)
    robot.executed(1)
    assert robot.infer(observation)[0].decision == 2
    robot.executed(3)
    episode = read_episode(serving.log.index.path(row_of(serving, robot.end(observation).episode)))
    assert [len(decision.sent) for decision in episode.decisions] == [1, 3]


def test_a_refused_request_takes_no_report(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    observation = robot.observation(point.spec)
    robot.infer(observation)
    robot.executed(3)
    # The report is good, the rest of the request is not.
    assert refused(lambda: robot.infer({**observation, "state": zeros(1)})).field == "tensors.state"
    assert refused(lambda: robot.infer(observation, step=2)).field == "step"
    assert refused(lambda: robot.end(observation, steps=2)).field == "steps"
    assert refused(lambda: robot.end({**observation, "state": zeros(1)})).field == "tensors.state"
    robot.infer(observation)
    robot.executed(1)
    episode = read_episode(serving.log.index.path(row_of(serving, robot.end(observation).episode)))
    assert [len(decision.sent) for decision in episode.decisions] == [3, 1]


def test_reports_are_refused_out_of_order(robot: Any, point: Backend) -> None:
    observation = robot.observation(point.spec)
    report = {"sent": zeros(1), "reward": zeros(1)[:, 0]}

    def field_of(arrays: dict[str, Any], **changes: Any) -> str:
        return refused(lambda: robot.infer({**observation, **arrays}, **changes)).field

    one = (Played(1, 0, 1),)
    assert field_of(report, played=one, step=1) == "played[0].decision"  # nothing was decided yet
    assert field_of(report, played=()) == "tensors"
    robot.infer(observation)
    assert field_of(report, played=(Played(2, 0, 1),), step=1) == "played[0].decision"
    assert field_of(report, played=(Played(1, 1, 1),), step=1) == "played[0].start"
    assert field_of(report, played=(Played(1, 0, 0), Played(1, 0, 1)), step=1) == "played[0].steps"
    assert field_of({}, played=(), step=1) == "step"
    assert field_of(report, played=one, step=1, episode="0" * 24) == "episode"
    robot.executed()
    robot.infer(observation)
    assert field_of(report, played=one, step=2) == "played[0].start"  # told twice
    robot.executed()
    robot.infer(observation)
    assert field_of(report, played=(Played(1, 2, 1),), step=3) == "played[0].decision"  # the second plays already


def test_chunks_that_came_late_or_not_in_time_are_logged_as_they_were_played(serve: Any, point: Backend) -> None:
    """Chunks have 4 actions. The second is asked for at step 2 and comes at step 3; the third at 5, and comes at 8."""
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    observation = robot.observation(point.spec)

    def infer(step: int, *played: Played, starved: int = 0) -> None:
        k = sum(slice_.steps for slice_ in played)
        robot.report = {"sent": step + zeros(k), "reward": zeros(k)[:, 0]} if k else {}
        if starved:
            robot.report["rules"] = np.array([0] * (k - starved) + [64] * starved, np.uint8)
        robot.infer(observation, step=step, played=played)

    infer(0)
    infer(2, Played(1, 0, 2))
    assert refused(lambda: infer(5, Played(1, 2, 1), Played(2, 0, 2))).field == "played[1].start"
    assert refused(lambda: infer(5, Played(2, 1, 3))).field == "played[0].start"
    infer(5, Played(1, 2, 1), Played(2, 1, 2))
    assert refused(lambda: infer(8, Played(2, 3, 3))).field == "played[0].steps"  # beyond the chunk, and not starved
    assert refused(lambda: infer(8, Played(1, 5, 3), starved=2)).field == "played[0].decision"  # it has been replaced
    infer(8, Played(2, 3, 3), starved=2)
    robot.steps, robot.report = 8, {}
    stored = robot.end(observation)
    episode = read_episode(serving.log.index.path(row_of(serving, stored.episode)))
    first, second, third, fourth = episode.decisions
    assert [(d.step, d.start, len(d.sent)) for d in episode.decisions] == [(0, 0, 3), (2, 1, 5), (5, 0, 0), (8, 0, 0)]
    assert first.sent[:, 0].tolist() == [2, 2, 5] and second.sent[:, 0].tolist() == [5, 5, 8, 8, 8]
    assert first.executed == slice(0, 3) and second.executed == slice(1, 4) and first.rules is None
    assert second.rules is not None and second.rules.tolist() == [0, 0, 0, 64, 64]
    assert third.executed == slice(0, 0) and fourth.rules is None


@pytest.mark.parametrize("prefix", [np.zeros((1, 2), np.float32), np.zeros(2, np.float32)])
def test_a_policy_that_takes_no_prefix_is_told_none(robot: Any, point: Backend, prefix: Any) -> None:
    observation = robot.observation(point.spec)
    assert refused(lambda: robot.infer({**observation, "prefix": prefix})).field == "tensors.prefix"
    assert robot.welcome.prefix_steps == 0
    robot.infer(observation)


def test_the_horizon_holds(serve: Any, point: Backend) -> None:
    robot = serve(horizon_steps=5).robot(point.spec)
    assignment = robot.next()
    assert isinstance(assignment, Assignment) and assignment.horizon_steps == 5
    observation = robot.observation(point.spec)
    robot.infer(observation)
    robot.executed(4)
    robot.infer(observation)
    robot.executed(2)
    assert "may have 5 steps" in refused(lambda: robot.end(observation)).message
    robot.steps = 4
    robot.executed(1)
    robot.end(observation)


def test_an_end_must_account_for_every_step(robot: Any, point: Backend) -> None:
    observation = robot.observation(point.spec)
    assert refused(lambda: robot.end(observation)).field == "decision"
    robot.infer(observation)
    assert refused(lambda: robot.end(observation)).field == "played"
    robot.executed(3)
    assert refused(lambda: robot.end(observation, steps=4)).field == "steps"
    assert refused(lambda: robot.end(observation, episode="0" * 24)).field == "episode"
    robot.end(observation)
    robot.report = {}
    assert refused(lambda: robot.end(observation)).field == "episode"
    assert refused(lambda: robot.infer(observation)).field == "episode"


def test_replayed_requests_are_refused_and_change_nothing(serve: Any, point: Backend) -> None:
    serving = serve()
    context, socket = raw_socket(serving.endpoint)
    try:

        def ask(message: Message, arrays: Any = None) -> Any:
            socket.send_multipart(encode(message, arrays))
            assert socket.poll(int(ENOUGH_S * 1000))
            return decode_reply(socket.recv_multipart())[0]

        welcome = ask(Hello(request=10, protocol=PROTOCOL, client="raw", spec=point.spec))
        episode = ask(NextEpisode(request=11, session=welcome.session)).episode
        # A copy of the request, or an older one, must not open another episode.
        for request in (11, 10, 0, -1):
            answer = ask(NextEpisode(request=request, session=welcome.session))
            assert isinstance(answer, Refused) and answer.code == "replayed"
        robot = serving.robot(point.spec)
        infer = Infer(request=12, session=welcome.session, episode=episode, step=0)
        assert ask(infer, robot.observation(point.spec)).decision == 1
        assert ask(infer, robot.observation(point.spec)).code == "replayed"
        # Over another connection the session is another's.
        other, copy = raw_socket(serving.endpoint)
        copy.send_multipart(encode(infer, robot.observation(point.spec)))
        assert copy.poll(int(ENOUGH_S * 1000))
        assert decode_reply(copy.recv_multipart())[0].code == "session"
        other.destroy(linger=0)
        assert serving.status()["refused"] == {"replayed": 5, "session": 1}
    finally:
        context.destroy(linger=0)


# --- ends that are not ordered ----------------------------------------------------------------------------------------


def aborted(serving: Any, episode: str) -> Any:
    until(lambda: row_of(serving, episode) is not None, "the episode to be stored")
    row = row_of(serving, episode)
    assert row.status == "aborted"
    return row


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


# --- swaps ------------------------------------------------------------------------------------------------------------


def test_swaps_are_answered_when_the_new_version_is_live(serve: Any, point: Backend, fake_policy: Any) -> None:
    serving = serve(explore=False)
    serving.live.change = lambda wanted: fake_policy(version=wanted, value=5.0)
    robot = serving.robot(point.spec)
    robot.next()
    before, _ = robot.infer(robot.observation(point.spec))
    robot.executed()
    tool = serving.client()
    answer, _ = tool.request(Announce(path="b" * 64), Serving)
    assert (answer.version, answer.previous) == ("b" * 64, before.version)
    after, tensors = robot.infer(robot.observation(point.spec))
    assert after.version == "b" * 64
    np.testing.assert_array_equal(tensors["actions"], np.full((4, 2), 5.0, np.float32))
    tool.request(Rollback(version="c" * 64), Serving)
    status = serving.status()
    assert (status["version"], status["previous"], status["swaps"]) == ("c" * 64, "b" * 64, 2)


def test_serving_goes_on_while_a_bundle_is_loaded(serve: Any, point: Backend, fake_policy: Any) -> None:
    serving = serve()
    loading, loaded = threading.Event(), threading.Event()

    def change(wanted: str) -> Any:
        loading.set()
        assert loaded.wait(ENOUGH_S)
        return fake_policy(version=wanted)

    serving.live.change = change
    tool = serving.client()
    tool.post(Announce(path="b" * 64))
    assert loading.wait(ENOUGH_S)
    serving.robot(point.spec).run_episode(point.spec)
    loaded.set()
    until(lambda: serving.status()["version"] == "b" * 64, "the swap")


@pytest.mark.parametrize(
    ("error", "field", "text"),
    [
        (BundleError("weights.safetensors", "is missing"), "weights.safetensors", "is missing"),
        (OSError(5, "Input/output error"), "bundle", "Input/output error"),
        (ValueError("embedded null byte"), "bundle", "embedded null byte"),
        (MemoryError("too big"), "bundle", "too big"),
    ],
)
def test_a_swap_that_fails_is_refused_and_the_live_version_stays(
    serve: Any, point: Backend, error: Exception, field: str, text: str
) -> None:
    serving = serve()
    live = serving.live().version

    def change(wanted: str) -> Any:
        raise error

    serving.live.change = change
    answer = refused(lambda: serving.client().request(Announce(path="/x"), Serving))
    assert (answer.code, answer.field) == ("bundle", field) and text in answer.message
    status = serving.status()
    assert (status["version"], status["swaps"], status["refused_swaps"]) == (live, 0, 1)
    serving.robot(point.spec).run_episode(point.spec)


# --- status -----------------------------------------------------------------------------------------------------------


def test_the_counters_add_up(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.run_episode(point.spec, decisions=2)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(3)
    robot.end(robot.observation(point.spec), "success")
    robot.next()
    robot.infer(robot.observation(point.spec))
    refused(lambda: robot.infer(robot.observation(point.spec), step=1))
    robot.next()
    now = msgspec.convert(serving.status(), Status)
    assert now.version == serving.live().version and now.previous == ""
    assert now.sessions == 1
    assert now.decisions == 4 and now.batches == 4
    assert now.episodes == {"timeout": 1, "success": 1, "aborted": 1}
    assert now.refused == {"episode": 1}
    assert (now.undeliverable, now.dropped, now.swaps, now.refused_swaps) == (0, 0, 0, 0)
    assert set(now.latency_ms) == {"p50", "p99", "max"}
    assert 0 < now.latency_ms["p50"] <= now.latency_ms["p99"] <= now.latency_ms["max"]
    assert 0 < now.inference_share <= 1 and now.uptime_s > 0
    assert [(brief.status, brief.steps) for brief in now.recent] == [("timeout", 2), ("success", 3), ("aborted", 0)]
    assert now.log["stored"] == 2
    assert not now.finished


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555"])
def test_an_address_open_to_others_needs_keys(serve: Any, endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\.runtime\.serve\.endpoint: .*other computers; give `keys`"):
        serve(endpoint=endpoint)


def test_an_address_that_is_taken_is_refused(serve: Any, tmp_path: Path) -> None:
    taken = serve()
    with pytest.raises(ConfigError, match="cannot listen on"):
        serve(endpoint=taken.endpoint, log=EpisodeLog(tmp_path / "other"))


def test_a_second_server_on_the_same_ipc_address_is_refused(serve: Any, point: Backend, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/run/policy.sock"
    serving = serve(endpoint=endpoint)
    with pytest.raises(ConfigError, match="another runtime serves there"):
        serve(endpoint=endpoint, log=EpisodeLog(tmp_path / "other"))
    serving.robot(point.spec).run_episode(point.spec)
    serving.stop()
    serve(endpoint=endpoint).robot(point.spec).run_episode(point.spec)


def test_missing_keys_are_named(serve: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.key_secret: not found"):
        serve(keys=str(tmp_path / "nowhere"))


def test_with_keys_only_listed_clients_get_an_answer(serve: Any, point: Backend, tmp_path: Path) -> None:
    (arm,) = make_keys(tmp_path / "keys", ["arm"])
    (stranger,) = make_keys(tmp_path / "strange", ["stranger"])
    (stranger / "server.key").write_bytes((arm / "server.key").read_bytes())
    serving = serve(endpoint="tcp://0.0.0.0:*", keys=str(tmp_path / "keys" / "server"))
    endpoint = serving.endpoint.replace("0.0.0.0", "127.0.0.1")
    for keys in (None, stranger):
        with (
            PolicyClient(endpoint, client="stranger", timeout_s=0.5, keys=keys) as client,
            pytest.raises(SilentError),
        ):
            client.hello(point.spec)
    with PolicyClient(endpoint, client="arm", timeout_s=ENOUGH_S, keys=arm) as client:
        client.hello(point.spec)
        reply, _ = client.request(GetStatus(), StatusReply)
    assert reply.status["sessions"] == 1


# --- garbage ----------------------------------------------------------------------------------------------------------


def test_too_large_a_frame_cuts_its_sender_off_and_nobody_else(serve: Any, point: Backend) -> None:
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    context, socket = raw_socket(serving.endpoint)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        socket.send_multipart([b"x", bytes(MAX_FRAME_BYTES + 1)])
        assert monitor.poll(int(ENOUGH_S * 1000)), "the sender of the large frame was not cut off"
    finally:
        socket.disable_monitor()
        context.destroy(linger=0)
    robot.executed()
    robot.end(robot.observation(point.spec))
    assert serving.alive


HEADERS: list[Message] = [
    Hello(request=1, protocol=PROTOCOL, client="fuzz"),
    NextEpisode(request=2, session="s"),
    Infer(request=3, session="s", episode="e", step=0),
    Infer(request=4, session="s", episode="e", step=1, played=(Played(1, 0, 1),)),
    EndEpisode(request=5, session="s", episode="e", status="timeout", steps=1, played=(Played(1, 0, 1),)),
    GetStatus(request=6),
    Announce(request=7, path="\0"),
    Rollback(request=8, version="\0"),
    Watch(request=9, bridge="b", client="c", session="s", state="stopped", why="x"),
    Operate(request=10, command="pause", robot="nobody"),
]


@st.composite
def damaged(draw: st.DrawFn) -> list[bytes]:
    """A message with some bytes changed, some lost, and frames added."""
    arrays = {"state": np.zeros(2, np.float32)} if draw(st.booleans()) else {}
    frames = [bytes(frame) for frame in encode(draw(st.sampled_from(HEADERS)), arrays)]
    first = bytearray(frames[0])
    for _ in range(draw(st.integers(0, 3))):
        first[draw(st.integers(0, len(first) - 1))] = draw(st.integers(0, 255))
    frames[0] = bytes(first[: draw(st.integers(0, len(first)))]) if draw(st.booleans()) else bytes(first)
    return [*frames, *draw(st.lists(st.binary(max_size=20), max_size=2))]


garbage = st.one_of(st.lists(st.binary(max_size=60), min_size=1, max_size=5), damaged())


def test_garbage_does_not_touch_anybody_elses_episode(serve: Any, point: Backend, fake_policy: Any) -> None:
    serving = serve(explore=False)

    def change(wanted: str) -> Any:
        raise BundleError("policy.yaml", "is missing")

    serving.live.change = change
    robot = serving.robot(point.spec)
    robot.next()
    context, socket = raw_socket(serving.endpoint)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(messages=st.lists(garbage, min_size=1, max_size=5))
    def throw(messages: list[list[bytes]]) -> None:
        for frames in messages:
            socket.send_multipart(frames)
        while socket.poll(0):
            decode_reply(socket.recv_multipart())
        assert serving.alive

    try:
        for i in range(4):
            _, tensors = robot.infer(robot.observation(point.spec, i / 10))
            np.testing.assert_array_equal(tensors["actions"], np.full((4, 2), np.float32(i / 10)))
            throw()
            robot.executed(2)
        stored = robot.end(robot.observation(point.spec), "success")
    finally:
        context.destroy(linger=0)
    assert isinstance(stored, EpisodeStored)
    episode = read_episode(serving.log.index.path(row_of(serving, stored.episode)))
    assert (episode.status, episode.steps, len(episode.decisions)) == ("success", 8, 4)
    assert serving.status()["refused"]["malformed"] > 100


def test_bytes_that_are_not_zeromq_at_all(serve: Any, point: Backend) -> None:
    import socket as sockets

    serving = serve()
    host, port = serving.endpoint.removeprefix("tcp://").split(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, struct.pack("<Q", 2**63) * 10):
        with sockets.create_connection((host, int(port)), timeout=ENOUGH_S) as raw:
            raw.sendall(data)
    serving.robot(point.spec).run_episode(point.spec)
    assert serving.alive


def test_a_garbled_backend_spec_is_refused_or_welcomed_and_nothing_else(serve: Any, point: Backend) -> None:
    serving = serve()
    client = serving.client()
    texts = st.text(max_size=3)
    numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**63), 2**63 - 1).map(float)
    spec = st.builds(
        BackendSpec,
        name=texts,
        cameras=st.lists(
            st.builds(CameraSpec, st.sampled_from(["top", "x"]), st.integers(-2, 2**62), st.just(8)), max_size=3
        ).map(tuple),
        state=st.sampled_from([point.spec.state, VectorSpec(("x",), ())]),
        action=st.sampled_from([point.spec.action, ActionSpec(("vx",), (), (), (1.0,), "delta")]),
        control_hz=st.just(10.0) | numbers,
        instructions=st.dictionaries(texts, texts | st.lists(texts, min_size=1, max_size=3), max_size=3),
        privileged=st.none() | st.builds(VectorSpec, st.tuples(texts), st.just(())),
    )

    @settings(max_examples=100, deadline=None)
    @given(spec)
    def say_hello(garbled: BackendSpec) -> None:
        try:
            client.request(Hello(protocol=PROTOCOL, client="c", spec=garbled), Welcome)
        except RefusedError as error:
            assert error.refused.code == "spec"

    say_hello()
    serving.robot(point.spec).run_episode(point.spec)
    assert serving.alive


def test_nothing_of_the_servers_insides_is_told(serve: Any, point: Backend, fake_policy: Any) -> None:
    def error(inputs: Any) -> None:
        raise RuntimeError("boom")

    robot = serve(policy=fake_policy(error=error)).robot(point.spec)
    robot.next()
    answer = refused(lambda: robot.infer(robot.observation(point.spec)))
    assert answer.message == "inference failed: boom"
    assert "Traceback" not in answer.message
