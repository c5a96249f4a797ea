"""The operator over the wire: orders that do not wait to be asked for, and a log that says who ended what, and why."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from server_samples import ENOUGH_S, until

from bridge.backend import Backend
from bridge.client import PolicyClient, RefusedError, connect_dealer
from bridge.messages import (
    Assignment,
    Command,
    Infer,
    Judge,
    Judged,
    Message,
    NextEpisode,
    NoEpisode,
    Operate,
    Operated,
    Orders,
    Played,
    RobotState,
    Watch,
    decode_reply,
    encode,
)
from runtime.reading import read_episode


class Bridge:
    """The connection on which a bridge watches for orders."""

    def __init__(self, endpoint: str, client: str, session: str) -> None:
        self.client, self.session, self.bridge = client, session, client
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect_dealer(self._context, endpoint, None)
        self._request = 0

    def beat(self, state: RobotState = "driving", why: str = "", *, paused: bool = False) -> Orders:
        """Say something, and read the answer; orders that came unasked must have been read before."""
        self._request += 1
        beat = Watch(
            request=self._request,
            bridge=self.bridge,
            client=self.client,
            session=self.session,
            state=state,
            why=why,
            paused=paused,
        )
        self._socket.send_multipart(encode(beat))
        orders = self.orders()
        assert orders.request == self._request
        return orders

    def orders(self) -> Orders:
        """The next orders."""
        assert self._socket.poll(int(ENOUGH_S * 1000)), "no orders"
        reply: Message
        reply, _ = decode_reply(self._socket.recv_multipart())
        assert isinstance(reply, Orders)
        return reply

    def close(self) -> None:
        self._context.destroy(linger=0)


class Scene:
    """A server with one robot in an episode, its watch, and an operator."""

    def __init__(self, serving: Any, point: Backend) -> None:
        self.serving, self.spec = serving, point.spec
        self.robot = serving.robot(point.spec, "arm")
        self.robot.next()
        self.robot.infer(self.robot.observation(self.spec))
        self.bridge = Bridge(serving.endpoint, "arm", self.robot.welcome.session)
        self.tool: PolicyClient = serving.client("operator")

    def operate(self, command: Command, **fields: Any) -> tuple[str, ...]:
        reply, _ = self.tool.request(Operate(command=command, **fields), Operated)
        return reply.robots

    def row(self, episode: str) -> Any:
        until(lambda: self.serving.log.index.get(episode) is not None, "the episode to be kept")
        return self.serving.log.index.get(episode)


@pytest.fixture
def scene(serve: Any, point: Backend) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(**options: Any) -> Scene:
        scenes.append(Scene(serve(**options), point))
        return scenes[-1]

    yield make
    for each in scenes:
        each.bridge.close()


def test_a_stop_is_told_unasked_closes_the_episode_and_stays_until_a_reset(scene: Callable[..., Scene]) -> None:
    s = scene()
    assert s.bridge.beat() == Orders(request=1, episode=s.robot.episode)
    assert s.operate("stop", why="a hand") == ("arm",)
    assert s.bridge.orders().stopped == "a hand"
    row = s.row(s.robot.episode)
    assert (row.status, row.reason) == ("aborted", "stopped: a hand")
    s.robot.executed()
    with pytest.raises(RefusedError, match="no episode is open"):
        s.robot.infer(s.robot.observation(s.spec))
    assert s.bridge.beat("stopped", "a hand").stopped == "a hand"
    answer = s.robot.next()
    assert isinstance(answer, NoEpisode) and not answer.finished
    status = s.serving.status()
    assert status["stopped"] == "a hand" and status["robots"] == {"arm": "stopped: a hand"}
    s.operate("reset")
    assert s.bridge.orders() == Orders(reset=True)
    assert not s.bridge.beat("idle").reset, "a reset lifts one stop and not the next"
    assert isinstance(s.robot.next(), Assignment)


def test_a_stop_also_ends_the_episodes_of_those_who_do_not_watch(scene: Callable[..., Scene], point: Backend) -> None:
    s = scene()
    deaf = s.serving.robot(point.spec, "deaf")
    deaf.next()
    deaf.infer(deaf.observation(point.spec))
    assert s.operate("stop") == ()
    assert s.row(deaf.episode).reason == "stopped: by the operator"
    assert isinstance(deaf.next(), NoEpisode)


def test_a_robot_that_waits_for_a_chunk_while_it_is_stopped_gets_an_answer(
    scene: Callable[..., Scene], fake_policy: Any
) -> None:
    policy = fake_policy()
    s = scene(policy=policy)
    s.robot.executed()
    policy.gate.clear()
    policy.waiting.clear()
    infer = Infer(session=s.robot.welcome.session, episode=s.robot.episode, step=1, played=(Played(1, 0, 1),))
    request = s.robot.client.post(infer, {**s.robot.observation(s.spec), **s.robot.report})
    assert policy.waiting.wait(ENOUGH_S)
    s.operate("stop")
    policy.gate.set()
    with pytest.raises(RefusedError, match="closed before its chunk was ready"):
        s.robot.client.collect(request, Assignment)


def test_a_robot_that_was_stopped_by_its_own_guard_says_why_in_the_log(scene: Callable[..., Scene]) -> None:
    s = scene()
    orders = s.bridge.beat("stopped", "the control loop has been reading the observation for 2.05 s")
    assert not orders.stopped
    row = s.row(s.robot.episode)
    assert row.status == "aborted"
    assert row.reason == "stopped: the control loop has been reading the observation for 2.05 s"
    assert isinstance(s.robot.next(), Assignment), "its session goes on after a reset"


def test_one_robot_or_all_are_paused_and_so_is_who_comes_later(scene: Callable[..., Scene]) -> None:
    s = scene()
    other = Bridge(s.serving.endpoint, "arm2", "")
    late = Bridge(s.serving.endpoint, "arm3", "")
    try:
        assert not s.bridge.beat().paused and not other.beat("idle").paused
        assert s.operate("pause", robot="arm2") == ("arm2",)
        assert other.orders().paused
        assert not s.bridge.beat().paused and other.beat("paused").paused
        assert s.operate("pause") == ("arm", "arm2")
        assert s.bridge.orders().paused and other.orders().paused
        assert late.beat("idle").paused
        assert s.operate("resume") == ("arm", "arm2", "arm3")
        assert not s.bridge.orders().paused and not other.orders().paused and not late.orders().paused
        assert s.operate("pause", robot="nobody") == ()
    finally:
        other.close()
        late.close()


@pytest.mark.parametrize("state", ["paused", "resetting", "stopped"])
def test_a_robot_that_was_told_to_pause_stays_so_until_somebody_resumes_it(
    scene: Callable[..., Scene], state: RobotState
) -> None:
    s = scene()
    # The runtime has started anew: it knows of no pause, the robot does.
    assert s.bridge.beat(state, paused=True).paused
    # The bridge has started anew: it knows of no pause, the runtime does.
    first, again = Bridge(s.serving.endpoint, "arm2", ""), Bridge(s.serving.endpoint, "arm2", "")
    try:
        first.beat("idle")
        s.operate("pause", robot="arm2")
        again.client = "arm2"
        again._socket.send_multipart(encode(Watch(request=1, bridge="new", client="arm2", session="", state="idle")))
        assert again.orders().paused
        s.operate("resume", robot="arm2")
        third = Watch(request=2, bridge="newer", client="arm2", session="", state="idle")
        again.orders()
        again._socket.send_multipart(encode(third))
        assert not again.orders().paused
    finally:
        first.close()
        again.close()


def test_a_robot_that_is_paused_gets_no_episode(scene: Callable[..., Scene], point: Backend) -> None:
    s = scene()
    early, other = s.serving.robot(point.spec, "arm2"), s.serving.robot(point.spec, "arm")
    bridge = Bridge(s.serving.endpoint, "arm", other.welcome.session)
    bridge._socket.send_multipart(
        encode(Watch(request=1, bridge="x", client="arm", session=other.welcome.session, state="idle"))
    )
    bridge.orders()
    s.bridge.beat()
    try:
        s.operate("pause", robot="arm (x)")
        answer = other.next()
        assert isinstance(answer, NoEpisode) and not answer.finished and answer.retry_s < 1
        assert isinstance(s.robot.next(), Assignment), "another one of that name"
        s.operate("pause")
        assert isinstance(s.robot.next(), NoEpisode)
        assert isinstance(early.next(), NoEpisode), "it has not watched yet"
        s.operate("resume")
        assert all(isinstance(robot.next(), Assignment) for robot in (s.robot, early, other))
    finally:
        bridge.close()


def test_a_pause_that_is_the_robots_own_is_left_to_it(scene: Callable[..., Scene]) -> None:
    s = scene()
    # The runtime has started anew, and hears of a pause by the robot's own key.
    assert not s.bridge.beat("paused", "at the robot").paused
    assert s.serving.status()["robots"] == {"arm": "paused: at the robot"}
    assert s.operate("pause") == ("arm",)
    assert s.bridge.orders().paused and s.bridge.beat("paused").paused
    s.operate("resume")
    assert not s.bridge.orders().paused and not s.bridge.beat("paused", "at the robot").paused


def test_a_robot_whose_reset_takes_long_is_not_silent_but_one_whose_reset_hangs_is(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = scene(session_timeout_s=0.5)

    def resetting_for(seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            s.bridge.beat("resetting")
            time.sleep(0.05)

    resetting_for(1.5)
    assert s.serving.status()["sessions"] == 1
    monkeypatch.setattr("runtime.operator.LONGEST_RESET_S", 1.0)
    resetting_for(1.0)
    assert s.serving.status()["sessions"] == 0


@pytest.mark.parametrize("command", ["end", "success", "failure"])
def test_an_episode_is_ended_once_and_the_next_one_is_not(scene: Callable[..., Scene], command: Command) -> None:
    s = scene()
    s.bridge.beat()
    s.operate(command)
    orders = s.bridge.orders()
    assert (orders.episode, orders.end) == (s.robot.episode, command)
    assert s.bridge.beat().end == command, "until it has ended"
    s.robot.executed()
    s.robot.end(s.robot.observation(s.spec), "failure", reason="marked by the operator")
    row = s.row(s.robot.episode)
    assert (row.status, row.reason) == ("failure", "marked by the operator")
    assert s.bridge.beat().end == ""
    s.robot.next()
    assert s.bridge.beat() == Orders(request=4, episode=s.robot.episode)


def test_a_verdict_is_for_the_episode_that_it_names_and_for_no_other(scene: Callable[..., Scene]) -> None:
    s = scene()
    s.bridge.beat()
    over = s.robot.episode
    s.robot.executed()
    s.robot.end(s.robot.observation(s.spec), "failure")
    assert s.operate("success") == (), "no episode is open"
    s.robot.next()
    assert s.operate("success") == (), "it has not begun: the word is for the one before"
    assert s.operate("success", episode=over) == ()
    assert s.bridge.beat().end == ""
    assert s.operate("success", episode=s.robot.episode) == ("arm",)
    assert s.bridge.orders().end == "success"


def test_robots_of_one_name_are_told_apart(scene: Callable[..., Scene]) -> None:
    s = scene()
    s.bridge.beat("stopped", "by its guard")
    other = Bridge(s.serving.endpoint, "arm", "")
    other._socket.send_multipart(encode(Watch(request=1, bridge="x", client="arm", session="", state="driving")))
    other.orders()
    assert s.serving.status()["robots"] == {"arm": "stopped: by its guard", "arm (x)": "driving"}
    assert s.operate("pause", robot="arm (x)") == ("arm (x)",)
    assert other.orders().paused and not s.bridge.beat("stopped").paused
    assert s.operate("success", robot="arm (x)") == (), "it is in no episode"
    # The first may be what a robot that was started again left behind.
    assert s.operate("pause", robot="arm") == ("arm", "arm (x)")
    assert s.bridge.orders().paused and other.orders().paused
    other.close()


def test_a_robot_that_waits_for_the_operator_is_not_silent(scene: Callable[..., Scene]) -> None:
    s = scene(session_timeout_s=1.0)
    deadline_s = time.monotonic() + 2.5
    while time.monotonic() < deadline_s:
        s.bridge.beat("paused")
        time.sleep(0.05)
    assert s.serving.status()["sessions"] == 1
    until(lambda: s.serving.status()["sessions"] == 0, "the session to be closed when nothing is heard")
    assert s.serving.status()["robots"] == {}


def test_what_the_safety_stage_changed_is_in_the_log_and_in_the_status(scene: Callable[..., Scene]) -> None:
    s = scene()
    s.robot.executed(3)
    s.robot.report["rules"] = np.array([0b1, 0b11, 0], np.uint8)
    s.robot.infer(s.robot.observation(s.spec))
    s.robot.executed(1)
    stored = s.robot.end(s.robot.observation(s.spec))
    path = s.serving.log.index.path(s.row(stored.episode))
    first, second = read_episode(path).decisions
    assert first.rules is not None and first.rules.tolist() == [1, 3, 0] and second.rules is None
    assert s.serving.status()["interventions"] == {"range": 2, "rate": 1}
    assert b"interventions" in path.read_bytes()


@pytest.mark.parametrize(
    "rules",
    [np.zeros(2, np.uint8), np.zeros((1, 1), np.uint8), np.zeros(1, np.int8), np.array([128], np.uint8)],
)
def test_rules_that_do_not_fit_are_refused(scene: Callable[..., Scene], rules: Any) -> None:
    s = scene()
    s.robot.executed(1)
    s.robot.report["rules"] = rules
    with pytest.raises(RefusedError, match=r"tensors\.rules"):
        s.robot.infer(s.robot.observation(s.spec))


def test_next_episode_still_needs_a_session_while_all_is_stopped(scene: Callable[..., Scene]) -> None:
    s = scene()
    s.operate("stop")
    with pytest.raises(RefusedError, match="say hello first"):
        s.tool.ask(NextEpisode(session="nobody"))


def test_a_stop_outlives_runtime_and_bridge_as_long_as_one_of_them_lives(scene: Callable[..., Scene]) -> None:
    s = scene()
    assert not s.bridge.beat("driving").stopped
    # A runtime that was started anew hears of the stop from the bridge, and the next bridge of the robot from it.
    s.bridge.beat("stopped", "a hand")
    later = Bridge(s.serving.endpoint, "arm", "")
    later.bridge = "another process"
    assert later.beat("idle").stopped == "a hand"
    assert later.beat("idle").stopped == "a hand"
    s.operate("reset")
    assert later.orders().reset
    assert not later.beat("idle").stopped
    later.close()
    third = Bridge(s.serving.endpoint, "arm", "")
    third.bridge = "a third process"
    assert not third.beat("idle").stopped
    third.close()


def test_an_episode_that_has_ended_is_judged_and_one_that_is_not_stored_is_refused(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = scene()
    with pytest.raises(RefusedError, match=f"episode: no episode {s.robot.episode} is stored here"):
        s.tool.request(Judge(episode=s.robot.episode, label="success", who="ada"), Judged)
    s.robot.executed(1)
    stored = s.robot.end(s.robot.observation(s.spec), status="unjudged")
    for label, counts_as in (("success", "success"), ("discard", "aborted"), ("failure", "failure")):
        judge = Judge(episode=stored.episode, label=label, who="ada")  # type: ignore[arg-type]
        reply, _ = s.tool.request(judge, Judged)
        assert (reply.episode, reply.status) == (stored.episode, counts_as)
    index = s.serving.log.index
    assert s.row(stored.episode).status == "failure" and s.row(stored.episode).labelled_by == "ada"
    assert [row.label for row in index.labels_after(0)] == ["success", "discard", "failure"]
    monkeypatch.setattr("runtime.index.append_label", _full)
    with pytest.raises(RefusedError, match="No space left on device"):
        s.tool.request(Judge(episode=stored.episode, label="success", who="ada"), Judged)
    assert s.row(stored.episode).status == "failure"


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
