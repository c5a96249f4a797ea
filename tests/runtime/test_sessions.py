"""Requests of a session over real sockets: what is refused out of order, and changes nothing."""

from typing import Any

import numpy as np
import pytest
from server_samples import ENOUGH_S, raw_socket, refused, row_of

from bridge.backend import Backend
from bridge.messages import (
    PROTOCOL,
    Assignment,
    Hello,
    Infer,
    Message,
    NextEpisode,
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
    assert field_of() == "executed"
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
        ({"sent": zeros(5), "reward": zeros(5)[:, 0]}, "malformed", "tensors.sent"),
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
    for call in (
        lambda: robot.infer({**observation, **arrays}, executed=1, step=1),
        lambda: robot.end({**observation, **arrays}, executed=1, steps=1),
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

    assert field_of(report, executed=1, step=1) == "executed"  # nothing was decided yet
    assert field_of(report, executed=0) == "tensors"
    robot.infer(observation)
    assert field_of(report, executed=2, step=1) == "executed"
    assert field_of(report, executed=0, step=1) == "executed"
    assert field_of(report, executed=1, step=1, episode="0" * 24) == "episode"
    robot.executed()
    robot.infer(observation)
    assert field_of(report, executed=1, step=2) == "executed"  # told twice
    robot.executed()
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
    assert refused(lambda: robot.end(observation)).field == "executed"
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
