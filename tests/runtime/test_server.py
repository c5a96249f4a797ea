"""The server over real sockets: hello, swaps, addresses, and that nobody can harm anybody else's episode."""

import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from server_samples import ENOUGH_S, raw_socket, refused, row_of, until

from bridge.backend import ActionSpec, Backend, BackendSpec, CameraSpec, VectorSpec
from bridge.client import PolicyClient, RefusedError, SilentError
from bridge.config import ConfigError
from bridge.keys import make_keys
from bridge.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Announce,
    EndEpisode,
    EpisodeStored,
    GetStatus,
    Govern,
    Hello,
    Infer,
    Judge,
    Message,
    NextEpisode,
    Operate,
    Operated,
    Orders,
    Played,
    Serving,
    StatusReply,
    Watch,
    Welcome,
    decode_reply,
    encode,
)
from runtime import episode_file
from runtime.bundle import BundleError
from runtime.episodes import EpisodeLog
from runtime.reading import read_episode
from runtime.registry import RegistryError
from runtime.status import EpisodeBrief, Status

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
    tool.request(Govern(command="rollback", who="test", version="c" * 64), Serving)
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
    ("error", "code", "field", "text"),
    [
        (BundleError("weights.safetensors", "is missing"), "bundle", "weights.safetensors", "is missing"),
        (RegistryError("no version begins with 'abcd'"), "version", "version", "begins with 'abcd'"),
        (OSError(5, "Input/output error"), "bundle", "bundle", "Input/output error"),
        (ValueError("embedded null byte"), "bundle", "bundle", "embedded null byte"),
        (MemoryError("too big"), "bundle", "bundle", "too big"),
    ],
)
def test_a_swap_that_fails_is_refused_and_the_live_version_stays(
    serve: Any, point: Backend, error: Exception, code: str, field: str, text: str
) -> None:
    serving = serve()
    live = serving.live().version

    def change(wanted: str) -> Any:
        raise error

    serving.live.change = change
    answer = refused(lambda: serving.client().request(Announce(path="/x"), Serving))
    assert (answer.code, answer.field) == (code, field) and text in answer.message
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


def test_a_client_with_too_long_a_name_is_refused(serve: Any) -> None:
    client = serve().client()
    client.request(Hello(protocol=PROTOCOL, client="\N{ROBOT FACE}" * 50), Welcome)
    for message in (
        Hello(protocol=PROTOCOL, client="\N{ROBOT FACE}" * 51),
        Watch(bridge="b", client="r" * 201, session="", state="idle"),
    ):
        answer = refused(lambda: client.request(message, Welcome))  # noqa: B023 (called at once)
        assert (answer.code, answer.field) == ("malformed", "client")


def test_a_status_fits_into_its_header_whatever_was_said(serve: Any) -> None:
    serving = serve()
    client = serving.client()
    said = "\N{ROBOT FACE}" * 15_000
    client.request(Operate(command="stop", why=said), Operated)
    for i in range(10):
        watch = Watch(bridge=f"{i:08}", client=f"robot-{i}", session="", state="stopped", why=said)
        orders, _ = client.request(watch, Orders)
        assert said.startswith(orders.stopped) and len(orders.stopped.encode()) == 500
    now = msgspec.convert(serving.status(), Status)
    assert now.stopped == orders.stopped
    assert [*now.robots.values()] == [f"stopped: {now.stopped}"] * 10
    serving.server._counters.recent += [EpisodeBrief("t" * 2000, "success", i, "v" * 64, 0.0) for i in range(100)]
    now = msgspec.convert(serving.status(), Status)
    assert 10 < len(now.recent) < 100 and now.recent[-1].steps == 99, "the newest are left"
    for i in range(10, 150):
        watch = Watch(bridge=f"{i:08}", client=f"robot-{i}", session="", state="stopped", why=said)
        client.request(watch, Orders)
    now = msgspec.convert(serving.status(), Status)
    assert now.recent == () and [*now.robots.values()] == ["stopped"] * 150


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
    Govern(command="rollback", who="test", request=8, version="\0"),
    Watch(request=9, bridge="b", client="c", session="s", state="stopped", why="x"),
    Operate(request=10, command="pause", robot="nobody"),
    Judge(request=11, episode="e", label="discard", who="x"),
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


def test_a_server_that_can_log_nothing_any_more_ends(
    serve: Any, point: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda thread: said.append(str(thread.exc_value)))
    monkeypatch.setattr(episode_file, "write_all", lambda *_: 1 / 0)
    serving = serve()
    robot = serving.robot(point.spec)
    robot.next()
    with suppress(RefusedError, SilentError):
        robot.client.timeout_s = 1.0
        robot.infer(robot.observation(point.spec))
    serving.thread.join(ENOUGH_S)
    assert not serving.alive and said[-1].startswith("the episode log's writer has died")
    serving.stopped.set()
