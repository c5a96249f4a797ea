"""Requests of a session over real sockets: what is refused out of order, and changes nothing."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from server_samples import ENOUGH_S, raw_socket, refused, row_of

from bridge.backend import Backend
from bridge.messages import (
    PROTOCOL,
    Assignment,
    Hello,
    Infer,
    Message,
    NextEpisode,
    Played,
    Refused,
    decode_reply,
    encode,
)
from runtime.reading import read_episode


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


def test_a_chunk_does_not_play_over_what_was_committed(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy()
    policy.spec = replace(policy.spec, prefix_steps=2)
    serving = serve(policy=policy)
    robot = serving.robot(point.spec)
    robot.next()
    observation = robot.observation(point.spec)
    assert robot.welcome.prefix_steps == 2
    assert refused(lambda: robot.infer({**observation, "prefix": zeros(3)})).field == "tensors.prefix"
    assert refused(lambda: robot.infer({**observation, "prefix": np.nan + zeros(1)})).field == "tensors.prefix"
    robot.infer(observation)
    robot.executed(1)
    committed = np.array([[0.5, 0.25], [0.125, 0.0]], np.float32)
    _, tensors = robot.infer({**observation, "prefix": committed})
    np.testing.assert_array_equal(tensors["actions"][:2], committed)
    report = {"sent": zeros(3), "reward": zeros(3)[:, 0]}
    played = (Played(1, 1, 1), Played(2, 1, 2))
    assert refused(lambda: robot.infer({**observation, **report}, step=4, played=played)).field == "played[1].start"
    played = (Played(1, 1, 2), Played(2, 2, 1))
    robot.infer({**observation, **report}, step=4, played=played)
    robot.steps = 4
    stored = robot.end(observation)
    second = read_episode(serving.log.index.path(row_of(serving, stored.episode))).decisions[1]
    np.testing.assert_array_equal(second.prefix, committed)
    assert second.start == 2 and second.log_prob is not None
    assert second.log_prob[:2].tolist() == [0.0, 0.0] and second.log_prob[2:].all()


def test_chunks_that_nobody_plays_are_not_given_for_ever(robot: Any, point: Backend, monkeypatch: Any) -> None:
    monkeypatch.setattr("runtime.sessions.MOST_UNPLAYED", 3)
    observation = robot.observation(point.spec)
    for _ in range(4):
        robot.infer(observation)
    assert refused(lambda: robot.infer(observation)).field == "played"
    robot.executed()
    robot.infer(observation)
    robot.infer(observation, step=1)


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
