"""The client against a socket that answers what the test says, late, wrongly or not at all."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from bridge.client import PolicyClient, RefusedError, SilentError, retry_hello
from bridge.config import ConfigError
from bridge.keys import make_keys, secure_server
from bridge.messages import (
    Announce,
    Chunk,
    GetStatus,
    Infer,
    Message,
    Refused,
    StatusReply,
    Welcome,
    WireError,
    decode_request,
    encode,
)

Answer = list[tuple[Message, dict[str, Any] | None]]
SHORT_S = 0.2
ENOUGH_S = 10.0


class FakeRuntime:
    """A ROUTER in a thread; `script(message, arrays)` gives the replies to each request."""

    def __init__(self, endpoint: str, script: Callable[[Message, dict[str, Any]], Answer], keys: Path | None) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.authenticator = secure_server(self.context, self.socket, keys) if keys else None
        self.socket.bind(endpoint)
        self.endpoint = self.socket.last_endpoint.decode()
        self.script = script
        self.received: list[Message] = []
        self.raw: list[list[bytes]] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stop.is_set():
            if self.socket.poll(20):
                identity, *frames = self.socket.recv_multipart()
                message, arrays = decode_request(frames)
                self.received.append(message)
                self.raw.append(frames)
                for reply, tensors in self.script(message, arrays):
                    self.socket.send_multipart([identity, *encode(reply, tensors)])

    def close(self) -> None:
        self.stop.set()
        self.thread.join(ENOUGH_S)
        if self.authenticator is not None:
            self.authenticator.stop()
        self.context.destroy(linger=0)


Start = Callable[..., FakeRuntime]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[FakeRuntime] = []

    def make(
        script: Callable[[Message, dict[str, Any]], Answer],
        endpoint: str = "tcp://127.0.0.1:*",
        keys: Path | None = None,
    ) -> FakeRuntime:
        running.append(FakeRuntime(endpoint, script, keys))
        return running[-1]

    yield make
    for runtime in running:
        runtime.close()


def status(message: Message, **fields: Any) -> StatusReply:
    return StatusReply(request=message.request, status=fields)


def echo(message: Message, arrays: dict[str, Any]) -> Answer:
    return [(status(message), arrays)]


def mute(message: Message, arrays: dict[str, Any]) -> Answer:
    return []


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_arrays_come_back_over_tcp_and_ipc(start: Start, tmp_path: Path, transport: str) -> None:
    runtime = start(echo, "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/policy.sock")
    arrays = {
        "image": np.arange(300_000, dtype=np.uint8).reshape(100, 1000, 3),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float64),
    }
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        _, back = client.request(GetStatus(), StatusReply, arrays)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].shape == array.shape


def test_an_array_may_be_overwritten_as_soon_as_it_is_sent(start: Start) -> None:
    runtime = start(echo)
    image = np.zeros((500, 500, 3), np.uint8)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        client.request(GetStatus(), StatusReply)
        for value in range(20):
            image[:] = value
            client.post(GetStatus(), {"image": image})
        image[:] = 255
        client.request(GetStatus(), StatusReply)
    for value, frames in enumerate(runtime.raw[1:21]):
        assert set(frames[1]) == {value}


def test_nobody_listens(tmp_path: Path) -> None:
    for endpoint in ("tcp://127.0.0.1:1", f"ipc://{tmp_path}/none.sock"):
        with (
            PolicyClient(endpoint, client="t") as client,
            pytest.raises(SilentError, match="nobody listens there"),
        ):
            client.request(GetStatus(), StatusReply, timeout_s=SHORT_S)


def test_an_address_that_is_none_is_named() -> None:
    for endpoint in ("tcp://127.0.0.1:port", "tcp://127.0.0.1:"):
        with pytest.raises(ConfigError, match=f"endpoint {endpoint}: cannot be used: Invalid argument"):
            PolicyClient(endpoint, client="t")


def test_a_mute_runtime(start: Start) -> None:
    runtime = start(mute)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=SHORT_S) as client:
        with pytest.raises(SilentError, match="no answer to GetStatus"):
            client.request(GetStatus(), StatusReply)
        with pytest.raises(SilentError, match="no answer to Hello"):
            client.hello()


def test_a_late_reply_is_dropped_and_counted_and_never_handed_to_the_next_request(start: Start) -> None:
    held: list[Message] = []

    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        if not held:
            held.append(message)
            return []
        # The late answer to the first question comes just before that to the second.
        return [(status(held[0], question=1), None), (status(message, question=2), None)]

    runtime = start(script)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        with pytest.raises(SilentError):
            client.request(GetStatus(), StatusReply, timeout_s=SHORT_S)
        reply, _ = client.request(GetStatus(), StatusReply)
        assert reply.status == {"question": 2}
        assert client.dropped == 1


def test_a_late_refusal_of_an_earlier_request_is_dropped_too(start: Start) -> None:
    held: list[Message] = []

    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        if not held:
            held.append(message)
            return []
        late = Refused(request=held[0].request, code="internal", field="inference", message="too late")
        return [(late, None), (status(message), None)]

    runtime = start(script)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        with pytest.raises(SilentError):
            client.request(GetStatus(), StatusReply, timeout_s=SHORT_S)
        client.request(GetStatus(), StatusReply)
        assert client.dropped == 1


def test_replies_of_an_earlier_connection_are_gone_after_hello(start: Start) -> None:
    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        if isinstance(message, GetStatus):
            return [(status(message), None)] * 3
        return [(Welcome(request=message.request, session="s", version="v", horizon=1), None)]

    runtime = start(script)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        client.request(GetStatus(), StatusReply)
        client.hello()
        assert client.dropped == 0


def test_a_refusal_is_raised_with_its_field(start: Start) -> None:
    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        return [(Refused(request=message.request, code="bundle", field="graph.onnx", message="is missing"), None)]

    runtime = start(script)
    with (
        PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client,
        pytest.raises(RefusedError, match=r"bundle: graph\.onnx: is missing") as caught,
    ):
        client.request(Announce(path="/x"), StatusReply)
    assert caught.value.refused.code == "bundle"


def test_a_message_that_the_runtime_could_not_read_has_no_id_and_is_raised(start: Start) -> None:
    runtime = start(lambda message, arrays: [(Refused(code="malformed", field="header", message="bad"), None)])
    with (
        PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client,
        pytest.raises(RefusedError, match="header"),
    ):
        client.request(GetStatus(), StatusReply)


def test_an_answer_of_another_kind_and_an_unreadable_one_are_wire_errors(start: Start) -> None:
    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        if isinstance(message, Infer):
            return [(Chunk(request=message.request, episode="e", decision=1, version="v"), None)]
        # A request, where a reply belongs.
        return [(GetStatus(request=message.request), None)]

    runtime = start(script)
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        with pytest.raises(WireError, match="Infer was answered by Chunk"):
            client.request(Infer(session="s", episode="e", step=0), StatusReply)
        with pytest.raises(WireError, match="header"):
            client.request(GetStatus(), StatusReply)


def test_request_ids_only_grow(start: Start) -> None:
    runtime = start(
        lambda message, arrays: [(Welcome(request=message.request, session="s", version="v", horizon=1), None)]
    )
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S) as client:
        for _ in range(3):
            client.hello()
            client.post(GetStatus())
            with pytest.raises(WireError):
                client.request(GetStatus(), StatusReply)
    ids = [message.request for message in runtime.received]
    # Those of one connection arrive in order; a posted one may be lost with its connection.
    assert len(set(ids)) == len(ids)
    assert ids[-1] == max(ids) == 9


def test_hello_is_repeated_until_the_runtime_is_there_or_patience_ends(start: Start, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/policy.sock"
    welcome = Welcome(session="s", version="v", horizon=1)
    with PolicyClient(endpoint, client="t") as client:
        with pytest.raises(SilentError):
            retry_hello(client, None, give_up_after_s=0.0, stopped=lambda: False)
        assert retry_hello(client, None, give_up_after_s=ENOUGH_S, stopped=lambda: True) is None

        tries = 0

        def stopped() -> bool:
            nonlocal tries
            tries += 1
            if tries == 2:
                start(lambda m, _: [(msgspec.structs.replace(welcome, request=m.request), None)], endpoint)
            return False

        answer = retry_hello(client, None, give_up_after_s=ENOUGH_S, stopped=stopped)
        assert answer is not None and answer.session == "s"
        assert tries >= 2


def test_a_socket_in_a_directory_open_to_others_is_not_trusted(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="must belong to you"):
        PolicyClient(f"ipc://{shared}/policy.sock", client="t")


def test_only_listed_clients_get_through_an_encrypted_socket(start: Start, tmp_path: Path) -> None:
    (arm,) = make_keys(tmp_path / "keys", ["arm"])
    # A stranger who knows the server's public key, with keys of his own.
    (stranger,) = make_keys(tmp_path / "other", ["stranger"])
    (stranger / "server.key").write_bytes((arm / "server.key").read_bytes())
    # One who has listed keys but takes another server for this one.
    (lost,) = make_keys(tmp_path / "third", ["lost"])
    (lost / "client.key_secret").write_bytes((arm / "client.key_secret").read_bytes())
    runtime = start(echo, keys=tmp_path / "keys" / "server")
    for keys in (None, stranger, lost):
        with (
            PolicyClient(runtime.endpoint, client="t", timeout_s=0.5, keys=keys) as client,
            pytest.raises(SilentError),
        ):
            client.request(GetStatus(), StatusReply)
    assert runtime.received == []
    with PolicyClient(runtime.endpoint, client="t", timeout_s=ENOUGH_S, keys=arm) as client:
        client.request(GetStatus(), StatusReply)
    assert len(runtime.received) == 1


def test_a_posted_request_is_answered_later_and_its_reply_is_kept_from_others(start: Start) -> None:
    def script(message: Message, arrays: dict[str, Any]) -> Answer:
        if message.request == 1:
            return []  # the disk is slow
        if message.request == 2:  # answered after the posted one, which came first
            return [(StatusReply(request=1, status={"late": True}), None), (status(message), None)]
        return [(Refused(request=message.request, code="storage", field="episode", message="disk full"), None)]

    runtime = start(script)
    with PolicyClient(runtime.endpoint, client="test", timeout_s=SHORT_S) as client:
        first = client.post(GetStatus())
        assert client.request(GetStatus(), StatusReply)[0].request == 2
        assert client.collect(first, StatusReply)[0].status == {"late": True}
        refused = client.post(GetStatus())
        with pytest.raises(RefusedError, match="disk full"):
            client.collect(refused, StatusReply)
        assert client.dropped == 0
        forgotten = client.post(GetStatus())
        client.forget(forgotten)
        runtime.script = lambda message, arrays: [(status(message), None)]
        assert client.collect(client.post(GetStatus()), StatusReply)[0].request == forgotten + 1
        assert client.dropped == 1
        runtime.script = mute
        silent = client.post(GetStatus())
        with pytest.raises(SilentError):
            client.collect(silent, StatusReply)
