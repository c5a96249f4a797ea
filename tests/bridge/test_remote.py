"""The remote backend over real sockets, against real processes where one of them dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from cable import Cable
from far_robot import Robot, Silent
from msgspec.structs import replace

from bridge.backend import Backend, BackendError, BackendSpec, HasExpert
from bridge.backends import make_backend
from bridge.backends.point import Point, PointOptions
from bridge.backends.remote import Remote, RemoteOptions
from bridge.client import RefusedError
from bridge.config import BackendConfig, BridgeConfig, ConfigError, SafetyConfig
from bridge.drive import drive
from bridge.guard import Guard
from bridge.keys import make_keys
from bridge.messages import TensorInfo
from bridge.remote.line import Line
from bridge.remote.messages import (
    REMOTE_PROTOCOL,
    Apply,
    Claim,
    Describe,
    Described,
    Done,
    Observe,
    Observed,
    Reset,
    Stop,
)
from bridge.remote.server import BackendServer

ENOUGH_S = 30.0
"""A deadline that only a broken program misses, even on a busy machine."""
LONG_S = 60.0
"""An owner that is not heard for so long is not there, even on a busy machine."""
PROGRAM = str(Path(__file__).with_name("far_robot.py"))


class Far:
    """A far side in a thread."""

    def __init__(self, robot: Point, endpoint: str, silence_s: float, keys: Path | None) -> None:
        self.robot: Any = robot
        self.said: list[str] = []
        self.server = BackendServer(
            robot, endpoint, silence_s=silence_s, keys=str(keys) if keys else None, say=self.said.append
        )
        self.endpoint = self.server.endpoint
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self.server.run, args=(self._stopped.is_set,), daemon=True)
        self.thread.start()
        self.near: list[Remote] = []

    def remote(self, **options: Any) -> Remote:
        """A near side; closed at the end."""
        self.near.append(Remote(RemoteOptions(self.endpoint, **{"timeout_s": ENOUGH_S, **options})))
        return self.near[-1]

    def connected(self, **options: Any) -> Remote:
        """One that drives the robot."""
        remote = self.remote(**options)
        remote.connect()
        return remote

    def stop(self) -> None:
        """What Ctrl-C does."""
        assert self._stopped.is_set() or self.thread.is_alive(), "the far side has died; its traceback is above"
        self._stopped.set()
        self.thread.join(ENOUGH_S)
        assert not self.thread.is_alive()


Start = Callable[..., Far]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Far] = []

    def make(
        robot: Point | None = None,
        endpoint: str = "tcp://127.0.0.1:*",
        silence_s: float = LONG_S,
        keys: Path | None = None,
    ) -> Far:
        running.append(Far(robot or Robot(), endpoint, silence_s, keys))
        return running[-1]

    yield make
    for far in running:
        for remote in far.near:
            remote.close()
        far.stop()


def wait_until(true: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + ENOUGH_S
    while not true():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.01)


def program(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- one that works -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_an_episode_is_what_it_is_with_the_backend_itself(start: Start, tmp_path: Path, transport: str) -> None:
    far = start(endpoint="tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/far/backend.sock")
    here: Any = Point(PointOptions(size_px=16))
    remote: Any = make_backend(BackendConfig("remote", {"endpoint": far.endpoint, "timeout_s": ENOUGH_S}))
    assert isinstance(remote, Backend) and isinstance(remote, HasExpert)
    assert remote.spec == here.spec
    for backend in (here, remote):
        backend.connect()
        backend.reset("reach", 7)
    steps = 0
    while here.outcome().status == "running":
        for one, other in zip(
            *([b.expert_action(), b.apply(3 * b.expert_action()), b.hold_action()] for b in (here, remote)), strict=True
        ):
            assert other.dtype == np.float32 and other.flags.writeable
            np.testing.assert_array_equal(one, other)
        assert here.outcome() == remote.outcome()
        one, other = here.observe(), remote.observe()
        np.testing.assert_array_equal(one.images["top"], other.images["top"])
        np.testing.assert_array_equal(one.state, other.state)
        np.testing.assert_array_equal(one.privileged, other.privileged)
        steps += 1
    assert steps > 3
    remote.stop()
    remote.close()
    remote.close()
    assert far.robot.calls == ["connect", "reset", *["apply"] * steps, "stop", "stop", "close"]


def test_an_observation_keeps_its_images_when_the_far_camera_fills_its_buffer_again(start: Start) -> None:
    far = start(Robot(size_px=256))  # larger than what ZeroMQ copies anyway
    remote = far.connected()
    remote.reset("reach", 0)
    seen = [remote.observe().images["top"]]
    kept = [seen[0].copy()]
    for _ in range(20):
        remote.apply(np.array([0.5, -0.5], np.float32))
        seen.append(remote.observe().images["top"])
        kept.append(seen[-1].copy())
    assert not np.array_equal(kept[0], kept[-1])
    for image, then in zip(seen, kept, strict=True):
        np.testing.assert_array_equal(image, then)
        assert not image.flags.writeable


def test_only_a_far_backend_with_an_expert_has_one_here(start: Start) -> None:
    assert isinstance(start(Robot()).remote(), HasExpert)
    assert not isinstance(start(Silent()).remote(), HasExpert)


def test_the_far_side_outlives_its_clients_and_connects_for_each_anew(start: Start) -> None:
    far = start()
    for _ in range(3):
        remote = far.connected()
        remote.reset("reach", 1)
        remote.close()
        with pytest.raises(BackendError, match="call connect"):
            remote.observe()
    assert far.robot.calls == ["connect", "reset", "stop", "close"] * 3
    remote.connect()
    remote.connect()  # once is enough
    remote.reset("reach", 1)
    far.stop()
    assert far.robot.calls[-4:] == ["connect", "reset", "stop", "close"]
    remote._session.lose("the far side was ended")  # type: ignore[union-attr]


def test_a_worker_drives_a_remote_backend_as_any_other(start: Start, serve: Callable[..., Any]) -> None:
    far = start(Robot(size_px=8))
    runtime = serve()
    summary = drive(
        far.remote(),
        runtime.client("robot"),
        BridgeConfig(),
        stopped=lambda: False,
        report=lambda result, assignment: None,
        warn=far.said.append,
        episodes=2,
    )
    assert (summary.episodes, summary.dropped_episodes) == (2, 0)
    assert far.robot.calls.count("apply") == summary.steps > 0
    assert far.robot.calls[-1] == "close"


# --- who drives -----------------------------------------------------------------------------------------------------


def test_a_second_client_is_refused_by_the_name_of_the_first_until_that_one_leaves(start: Start) -> None:
    far = start(silence_s=LONG_S)
    first, second = far.connected(), far.remote()
    name = first._client
    second._described = replace(second._described, silence_s=0.0)  # or it would wait for the first to be gone
    with pytest.raises(BackendError, match=f"driven by '{name}'"):
        second.connect()
    with pytest.raises(BackendError, match="call connect"):
        second.apply(np.zeros(2, np.float32))
    assert far.remote().spec == first.spec  # anybody may look
    first.reset("reach", 0)
    assert far.robot.calls == ["connect", "reset"], "the one refused has not touched the robot"
    first.close()
    second.connect()
    second.reset("reach", 0)


def test_a_second_process_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/far/backend.sock"
    far, first = program("serve", endpoint, "2"), program("drive", endpoint)
    try:
        assert first.stdout is not None and first.stdout.readline() == "drives\n"
        second = Remote(RemoteOptions(endpoint, timeout_s=ENOUGH_S))
        with pytest.raises(BackendError, match=rf"driven by '.*-{first.pid}'.*; stop that client first"):
            second.connect()
        assert first.poll() is None, "the first goes on"
        first.kill()
        second.connect()
        second.reset("reach", 0)
        second.close()
    finally:
        for process in (first, far):
            process.kill()
            process.communicate()


def test_the_owner_stays_it_while_it_makes_no_call(start: Start) -> None:
    far = start(silence_s=2.0)
    far.connected()
    owner: Any = far.server._ownership.owner
    began_s = owner.heard_s
    wait_until(lambda: owner.heard_s - began_s > 2.5, "no sign of life")
    assert far.server._ownership.owner is owner
    assert "stop" not in far.robot.calls


def test_a_killed_client_has_its_robot_stopped_and_the_next_one_gets_it(start: Start) -> None:
    far = start(silence_s=2.0)
    client = program("drive", far.endpoint)
    wait_until(lambda: "apply" in far.robot.calls, "the client does not drive")
    next_one = far.remote()
    client.kill()
    client.wait()
    next_one.connect()  # it waits for the dead one to be noticed
    assert "stop" in far.robot.calls
    said = [line for line in far.said if "is silent for 2 s: the robot was stopped" in line]
    assert len(said) == 1 and f"-{client.pid}'" in said[0]
    assert far.robot.calls[-4:] == ["stop", "stop", "close", "connect"]


def test_an_owner_that_was_silent_is_told_so_and_moves_nothing(start: Start) -> None:
    far = start(silence_s=0.2)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ids = count(1)
    line = Line(context, far.endpoint, None, number=lambda: next(ids), reach_s=ENOUGH_S)
    claim = Claim(protocol=REMOTE_PROTOCOL, session="s", client="mute")
    line.ask(claim, Described, timeout_s=ENOUGH_S)
    wait_until(lambda: "stop" in far.robot.calls, "the robot was not stopped")
    with pytest.raises(RefusedError, match="does not own the robot") as refused:
        line.ask(Apply(session="s"), Done, {"action": np.zeros(2, np.float32)}, timeout_s=ENOUGH_S)
    assert refused.value.refused.code == "session"
    assert far.robot.calls == ["connect", "stop"]
    context.destroy(linger=0)


def test_a_call_that_a_stop_has_overtaken_moves_nothing(start: Start) -> None:
    far = start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ids = iter([1, 3, 2, 1, 4])
    line = Line(context, far.endpoint, None, number=lambda: next(ids), reach_s=ENOUGH_S)
    line.ask(Claim(protocol=REMOTE_PROTOCOL, session="s", client="c"), Described, timeout_s=ENOUGH_S)
    line.ask(Stop(session="s"), Done, timeout_s=ENOUGH_S)
    with pytest.raises(RefusedError, match="too late"):
        line.ask(Apply(session="s"), Done, {"action": np.zeros(2, np.float32)}, timeout_s=ENOUGH_S)
    line.ask(Stop(session="s"), Done, timeout_s=ENOUGH_S)  # a stop is never too late
    with pytest.raises(RefusedError, match=r"tensors\.action: missing"):
        line.ask(Apply(session="s"), Done, timeout_s=ENOUGH_S)
    assert far.robot.calls == ["connect", "stop", "stop"]
    context.destroy(linger=0)


def test_a_call_that_a_stop_has_overtaken_does_not_lose_the_session(start: Start) -> None:
    far = start()
    remote = far.connected()
    remote._numbers = count(11)
    remote.stop()
    remote._numbers = count(10)
    with pytest.raises(BackendError, match="10 comes after 11 and is too late"):
        remote.reset("reach", 0)
    remote._numbers = count(12)
    remote.reset("reach", 0)
    assert far.robot.calls == ["connect", "stop", "reset"]


def test_a_stop_does_not_wait_for_the_answer_to_another_call(start: Start) -> None:
    far = start()
    remote = far.connected()
    line = remote._session.loop  # type: ignore[union-attr]
    with line._lock:  # as in a call that is not answered
        stopping = threading.Thread(target=remote.stop, daemon=True)
        stopping.start()
        stopping.join(ENOUGH_S)
        assert not stopping.is_alive()
    assert far.robot.calls == ["connect", "stop"]


class Homing(Robot):
    """Its reset goes on until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.homing, self.told = threading.Event(), threading.Event()
        self.heard = False
        """Whether it was told to stop since its reset began, and before that had ended."""

    def reset(self, task: str, seed: int) -> None:
        super().reset(task, seed)
        self.told.clear()  # as one does that has the torque on again
        self.homing.set()
        self.heard = self.told.wait(ENOUGH_S)

    def stop(self) -> None:
        super().stop()
        self.told.set()


def test_a_stop_reaches_the_backend_while_it_is_in_another_call(start: Start) -> None:
    robot = Homing()
    far = start(robot)
    remote = far.connected()
    resetting = threading.Thread(target=remote.reset, args=("reach", 0))
    resetting.start()
    assert robot.homing.wait(ENOUGH_S)
    remote.stop()
    resetting.join(ENOUGH_S)
    assert not resetting.is_alive()
    assert robot.heard
    assert robot.calls[:4] == ["connect", "reset", "stop", "stop"], "beside it, and in its turn"


def test_a_stop_reaches_the_backend_also_right_before_another_call(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot = Homing()
    far = start(robot)
    remote = far.connected()
    work = far.server._work

    def late(job: Any) -> Any:
        if isinstance(getattr(job, "message", None), Reset):
            assert robot.told.wait(ENOUGH_S), "a reset that is about to begin is a call too"
        return work(job)

    monkeypatch.setattr(far.server, "_work", late)
    resetting = threading.Thread(target=remote.reset, args=("reach", 0))
    resetting.start()
    wait_until(lambda: far.server._jobs.unfinished_tasks, "the reset has not come")
    remote.stop()
    resetting.join(ENOUGH_S)
    assert not resetting.is_alive()
    assert robot.heard
    assert [call for call, _ in groupby(robot.calls)] == ["connect", "stop", "reset", "stop"]
    beside: Any = far.server._beside
    beside.join(ENOUGH_S)
    assert not beside.is_alive(), "the next reset would be stopped too"


def test_the_stop_of_a_lost_session_is_confirmed_or_an_error(start: Start) -> None:
    far = start(silence_s=1.0)
    remote = far.connected(timeout_s=1.0)
    remote._session.lose("an answer came too late")  # type: ignore[union-attr]
    remote.stop()
    assert far.robot.calls[-1] == "stop"
    wait_until(lambda: any("the robot was stopped" in line for line in far.said), "the owner stays one for ever")
    remote.stop()  # nobody's by now; it says all the same that it is stopped
    remote._session.cut()  # type: ignore[union-attr]
    with pytest.raises(BackendError):
        remote.stop()


def test_a_far_side_that_was_started_again_has_stopped_nothing_and_a_reset_drives_on(
    start: Start, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/far/backend.sock"
    first = start(endpoint=endpoint)
    remote = first.connected()
    remote.reset("reach", 0)
    first.stop()
    remote._session.lose("no answer")  # type: ignore[union-attr]
    remote._options = replace(remote._options, timeout_s=0.2, slow_timeout_s=0.2)
    for call in (lambda: remote.reset("reach", 0), remote.stop):  # one that cannot connect makes nothing stopped
        with pytest.raises(BackendError, match="nobody listens"):
            call()
    second = start(endpoint=endpoint)
    remote._options = replace(remote._options, timeout_s=ENOUGH_S, slow_timeout_s=ENOUGH_S)
    with pytest.raises(BackendError, match="started again"):
        remote.stop()
    remote.reset("reach", 0)
    remote.stop()
    assert second.robot.calls == ["connect", "reset", "stop"]


def test_a_stop_that_comes_while_a_reset_connects_anew_keeps_the_robot_where_it_is(start: Start) -> None:
    connecting, stopped = threading.Event(), threading.Event()

    class Slow(Robot):
        def connect(self) -> None:
            super().connect()
            if self.calls.count("connect") == 2:
                connecting.set()
                assert stopped.wait(ENOUGH_S)

    far = start(Slow(), silence_s=2.0)
    remote = far.connected()
    remote._session.lose("no answer")  # type: ignore[union-attr]
    said: list[str] = []

    def reset() -> None:
        try:
            remote.reset("reach", 0)
        except BackendError as error:
            said.append(str(error))

    resetting = threading.Thread(target=reset)
    resetting.start()
    assert connecting.wait(ENOUGH_S)
    with pytest.raises(BackendError, match="does not own the robot"):
        remote.stop()
    stopped.set()
    resetting.join(ENOUGH_S)
    assert said == ["remote was stopped while it connected anew"] and "reset" not in far.robot.calls
    remote.stop()


def test_a_robot_whose_far_side_cannot_stop_it_is_not_called_stopped(start: Start) -> None:
    class Deaf(Robot):
        deaf = True

        @property
        def spec(self) -> BackendSpec:
            return replace(super().spec, paced=True)

        def stop(self) -> None:
            super().stop()
            if self.deaf:
                raise BackendError("servo 3 has not confirmed it")

    far = start(Deaf(), silence_s=0.5)
    remote = far.connected(timeout_s=1.0)
    guard = Guard(remote, SafetyConfig(), warn=lambda text: None)
    guard.begin("e", lambda: remote.reset("reach", 0))
    remote._session.lose("an answer came too late")  # type: ignore[union-attr]
    guard.stop("by the operator")
    for _ in range(3):
        guard.tick()
        assert guard.state[0] == "stopping" and "servo 3" in guard.state[1]
    far.robot.deaf = False
    guard.tick()
    assert guard.state[0] == "stopped"


def test_a_robot_that_did_not_stop_for_a_silent_owner_is_told_until_it_does(start: Start) -> None:
    class Deaf(Robot):
        times = 0

        def stop(self) -> None:
            super().stop()
            Deaf.times += 1
            if Deaf.times < 4:
                raise OSError("a damaged packet")

    far = start(Deaf(), silence_s=0.2)
    remote = far.connected()
    remote._session.lose("as if the process had been killed")  # type: ignore[union-attr]
    wait_until(lambda: any("the robot was stopped" in line for line in far.said), "it was never stopped")
    assert len([line for line in far.said if "stop() failed, trying again: OSError: a damaged" in line]) == 1
    assert far.robot.calls.count("stop") >= 4


# --- what goes wrong there ------------------------------------------------------------------------------------------


def test_errors_of_the_far_backend_come_back_with_their_text_and_end_nothing(start: Start) -> None:
    far = start()
    remote = far.connected()
    with pytest.raises(BackendError, match=r"call reset\(\) first"):
        remote.observe()
    with pytest.raises(BackendError, match="its task is 'reach'"):
        remote.reset("push", 0)
    remote.reset("reach", 0)
    far.robot.raises = OSError("the bus is unplugged")
    with pytest.raises(BackendError, match="OSError: the bus is unplugged"):
        remote.apply(np.zeros(2, np.float32))
    assert "Apply: OSError: the bus is unplugged" in far.said
    far.robot.raises = None
    remote.apply(np.zeros(2, np.float32))

    far.robot.observe = lambda: Point(PointOptions(size_px=8)).observe()
    with pytest.raises(BackendError, match=r"call reset\(\) first"):
        remote.observe()
    wrong = replace_images(Robot(size_px=8))
    far.robot.observe = lambda: wrong
    with pytest.raises(BackendError, match=r"does not fit the spec: tensors\.image/top"):
        remote.observe()
    wrong.state = np.array(["x", "y"])
    with pytest.raises(BackendError, match=r"<U1 does not travel"):
        remote.observe()
    wrong.state = None
    with pytest.raises(BackendError, match="object does not travel"):
        remote.observe()
    far.robot.observe = lambda: None
    with pytest.raises(BackendError, match="AttributeError"):
        remote.observe()
    far.robot.apply = lambda action: np.zeros(3)
    with pytest.raises(BackendError, match=r"not float32 \[2\]"):
        remote.apply(np.zeros(2, np.float32))
    del far.robot.observe
    remote.observe()


def replace_images(other: Robot) -> Any:
    """An observation of another size than the spec says."""
    other.reset("reach", 0)
    return other.observe()


def test_a_backend_that_does_not_connect_says_why_and_the_next_client_tries_again(start: Start) -> None:
    far = start()
    far.robot.raises = BackendError("/dev/ttyACM0: no such device; plug the arm in")
    remote = far.remote()
    with pytest.raises(BackendError, match="plug the arm in"):
        remote.connect()
    far.robot.raises = None
    remote.connect()
    remote.reset("reach", 0)
    assert far.robot.calls == ["connect", "stop", "close", "connect", "reset"]


def test_a_far_side_that_is_killed_in_an_episode_is_an_error_by_the_deadline(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/far/backend.sock"
    far = program("serve", endpoint, "5")
    remote = Remote(RemoteOptions(endpoint, timeout_s=ENOUGH_S))
    remote.connect()
    remote.reset("reach", 0)
    remote.apply(np.zeros(2, np.float32))
    far.kill()
    far.wait()
    remote._options = replace(remote._options, timeout_s=0.3, slow_timeout_s=0.3)
    with pytest.raises(BackendError, match="fieldtune backend serve"):
        remote.apply(np.zeros(2, np.float32))
    with pytest.raises(BackendError, match="nobody listens"):
        remote.stop()
    remote._options = replace(remote._options, timeout_s=ENOUGH_S, slow_timeout_s=ENOUGH_S)
    with pytest.raises(BackendError, match=r"call connect\(\) again"):
        remote.observe()  # at once

    far = program("serve", endpoint, "60")
    remote.connect()
    remote.reset("reach", 0)
    remote.close()
    far.kill()
    far.wait()


def test_a_cut_network_stops_the_robot_and_what_comes_late_moves_nothing(start: Start) -> None:
    far = start(silence_s=2.0)
    cable = Cable(far.endpoint)
    remote = Remote(RemoteOptions(cable.endpoint, timeout_s=ENOUGH_S))
    far.near.append(remote)
    remote.connect()
    remote.reset("reach", 0)
    cable.whole.clear()
    remote._options = replace(remote._options, timeout_s=0.3)
    with pytest.raises(BackendError, match="no answer to Apply"):
        remote.apply(np.ones(2, np.float32))
    with pytest.raises(BackendError, match=r"no answer to Stop|nobody listens"):  # its own connection may be new yet
        remote.stop()
    wait_until(lambda: "stop" in far.robot.calls, "the robot was not stopped")
    cable.whole.set()  # the old command and the old stop arrive
    remote._options = replace(remote._options, timeout_s=ENOUGH_S)
    remote.connect()
    remote.reset("reach", 0)
    remote.close()
    calls = [call for call, _ in groupby(far.robot.calls)]  # stopped for its silence, and by the late stop
    assert calls == ["connect", "reset", "stop", "close", "connect", "reset", "stop", "close"]


def test_nobody_answers(tmp_path: Path) -> None:
    for endpoint in ("tcp://127.0.0.1:1", f"ipc://{tmp_path}/none.sock"):
        with pytest.raises(BackendError, match=r"nobody listens there.*fieldtune backend serve"):
            make_backend(BackendConfig("remote", {"endpoint": endpoint, "timeout_s": 0.2}))


def test_another_spec_than_before_is_refused(start: Start) -> None:
    far = start()
    remote = far.remote()
    remote._described = replace(remote._described, spec=Point(PointOptions(size_px=99)).spec)
    with pytest.raises(BackendError, match="another spec"):
        remote.connect()
    assert far.robot.calls == ["connect", "stop", "close"]
    far.connected()


# --- who may talk, and how ------------------------------------------------------------------------------------------


def test_another_version_is_refused(start: Start) -> None:
    far = start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ids = count(1)
    line = Line(context, far.endpoint, None, number=lambda: next(ids), reach_s=ENOUGH_S)
    for message in (Describe(protocol=99), Claim(protocol=99, session="s", client="c")):
        with pytest.raises(RefusedError, match="is 99, this side speaks") as refused:
            line.ask(message, Described, timeout_s=ENOUGH_S)
        assert refused.value.refused.code == "protocol"
    context.destroy(linger=0)
    far.connected()


def test_bytes_that_are_no_message_are_refused_and_change_nothing(start: Start) -> None:
    far = start()
    remote = far.connected()
    remote.reset("reach", 0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(far.endpoint)
    forged = Observe(session="x", tensors=(TensorInfo("a", "<f4", (2,)),))
    for frames in ([b""], [b"\xc1"], [b"x" * 70_000], [b"\x80", b"1"], *([h, b"123"] for h in [_header(forged)])):
        socket.send_multipart(frames)
        assert socket.poll(int(ENOUGH_S * 1000))
        assert b"malformed" in socket.recv_multipart()[0]
    context.destroy(linger=0)
    remote.apply(np.zeros(2, np.float32))
    assert far.robot.calls == ["connect", "reset", "apply"]


def _header(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def test_an_answer_that_cannot_be_read_loses_the_session() -> None:
    """A far side that talks nonsense is not to be given commands."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    endpoint = router.last_endpoint.decode()
    spec = Point(PointOptions(size_px=16)).spec

    def answer() -> None:
        described = Described(spec=spec, expert=False, silence_s=LONG_S)
        for _ in range(2):
            identity, header = router.recv_multipart()
            router.send_multipart([identity, _header(replace(described, request=_request(header)))])
        identity, header = router.recv_multipart()
        nonsense = Observed(request=_request(header), tensors=(TensorInfo("state", "<f4", (2,)),))
        router.send_multipart([identity, _header(nonsense), b"123"])

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    remote = Remote(RemoteOptions(endpoint, timeout_s=ENOUGH_S))
    remote.connect()
    with pytest.raises(BackendError, match=r"tensors\.state"):
        remote.observe()
    with pytest.raises(BackendError, match="connect"):
        remote.observe()
    remote.close()
    thread.join(ENOUGH_S)
    context.destroy(linger=0)


def _request(header: bytes) -> int:
    return int(msgspec.msgpack.decode(header)["request"])


def test_only_listed_clients_get_through_and_only_loopback_goes_without_keys(start: Start, tmp_path: Path) -> None:
    for endpoint in ("tcp://0.0.0.0:*", "tcp://192.0.2.1:5"):
        with pytest.raises(ConfigError, match="other computers"):
            BackendServer(Robot(), endpoint)
    with pytest.raises(ConfigError, match=r"\$\.backend\.options\.keys: missing"):
        make_backend(BackendConfig("remote", {"endpoint": "tcp://192.0.2.1:5"}))
    (arm,) = make_keys(tmp_path / "keys", ["arm"])
    (stranger,) = make_keys(tmp_path / "other", ["stranger"])
    (stranger / "server.key").write_bytes((arm / "server.key").read_bytes())
    far = start(endpoint="tcp://0.0.0.0:*", keys=tmp_path / "keys" / "server")
    endpoint = far.endpoint.replace("0.0.0.0", "127.0.0.1")
    for keys in (None, str(stranger)):
        with pytest.raises(BackendError, match="keys the right ones"):
            Remote(RemoteOptions(endpoint, keys=keys, timeout_s=0.5))
    remote = Remote(RemoteOptions(endpoint, keys=str(arm), timeout_s=ENOUGH_S))
    remote.connect()
    remote.reset("reach", 0)
    remote.close()


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "missing required field `endpoint`"),
        ({"endpoint": "ipc"}, "$.backend.options.endpoint"),
        ({"endpoint": "5556"}, "expected `ipc`, `ipc://PATH` or `tcp://HOST:PORT`"),
        ({"endpoint": "ipc:///x", "timeout_s": 0}, "$.backend.options.timeout_s"),
    ],
)
def test_options_are_refused_by_path(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_backend(BackendConfig("remote", options))
    assert path in str(refused.value)
