"""The client's end of the wire: requests with ids and deadlines over a DEALER socket."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import zmq
from numpy.typing import NDArray

from bridge.backend import BackendSpec
from bridge.config import ConfigError
from bridge.endpoint import require_private
from bridge.errors import FieldtuneError
from bridge.keys import secure_client
from bridge.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Arrays,
    Hello,
    Message,
    Refused,
    Reply,
    Welcome,
    WireError,
    decode_reply,
    encode,
)

R = TypeVar("R", bound=Message)


class SilentError(FieldtuneError):
    """The runtime did not answer within the deadline."""


class RefusedError(FieldtuneError):
    """The runtime refused a request; `refused` holds its code, field and message."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"{refused.code}: {refused.field}: {refused.message}" if refused.field else refused.message)
        self.refused = refused


@dataclass(slots=True)
class _Posted:
    """A posted request: what it was, until when it may be answered, and the answer."""

    what: str
    deadline: float
    reply: Reply | None = None
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)


class PolicyClient:
    """One conversation with a runtime. Not thread-safe.

    Replies carry the id of their request; a reply to anything but the request at hand (one that came after its
    deadline, say) is dropped and counted in `dropped`.
    """

    def __init__(self, endpoint: str, *, client: str, timeout_s: float = 10.0, keys: Path | None = None) -> None:
        self.endpoint = endpoint
        self.client = client
        self.timeout_s = timeout_s
        self.keys = keys
        self.dropped = 0
        self._request = 0
        self._posted: dict[int, _Posted] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._connect()

    def hello(self, spec: BackendSpec | None = None, timeout_s: float | None = None) -> Welcome:
        """Open a session on a fresh connection; with the backend's `spec` if it is to ask for chunks."""
        self._socket.close()
        self._posted.clear()
        self._socket = self._connect()
        reply, _ = self.request(Hello(protocol=PROTOCOL, client=self.client, spec=spec), Welcome, timeout_s=timeout_s)
        return reply

    def request(
        self, message: Message, kind: type[R], arrays: Arrays | None = None, timeout_s: float | None = None
    ) -> tuple[R, dict[str, NDArray[Any]]]:
        """Send a request and wait for its reply of type `kind`.

        Raises `SilentError` after the deadline, `RefusedError` if the runtime refuses, and `WireError` if what came
        cannot be read.
        """
        reply, tensors = self.ask(message, arrays, timeout_s)
        if not isinstance(reply, kind):
            raise WireError("kind", f"{type(message).__name__} was answered by {type(reply).__name__}")
        return reply, tensors

    def ask(
        self, message: Message, arrays: Arrays | None = None, timeout_s: float | None = None
    ) -> tuple[Reply, dict[str, NDArray[Any]]]:
        """`request` for a message that has replies of several types."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        sent = self._send(message, arrays, limit_s)
        deadline = time.monotonic() + limit_s
        while True:
            reply, tensors = self._receive(deadline, type(message).__name__)
            if self._was_posted(reply, tensors):
                continue
            # A message that could not be read has no id.
            if isinstance(reply, Refused) and reply.request in (0, sent):
                raise RefusedError(reply)
            if reply.request == sent:
                return reply, tensors
            self.dropped += 1

    def post(self, message: Message, arrays: Arrays | None = None) -> int:
        """Send a request and go on; `collect` waits for its reply. Returns the request's id."""
        request = self._send(message, arrays, self.timeout_s)
        self._posted[request] = _Posted(type(message).__name__, time.monotonic() + self.timeout_s)
        return request

    def ready(self, request: int) -> bool:
        """Whether `collect` would not wait: the reply to a posted request is here, or its deadline has passed."""
        posted = self._posted[request]
        while posted.reply is None and self._socket.poll(0):
            self._take_posted(posted)
        return posted.reply is not None or time.monotonic() > posted.deadline

    def collect(self, request: int, kind: type[R]) -> tuple[R, dict[str, NDArray[Any]]]:
        """The reply of type `kind` to a posted request, once; raises as `request` does. The deadline counts from when
        it was posted.
        """
        posted = self._posted[request]
        while posted.reply is None:
            self._take_posted(posted)
        del self._posted[request]
        if isinstance(posted.reply, Refused):
            raise RefusedError(posted.reply)
        if not isinstance(posted.reply, kind):
            raise WireError("kind", f"{posted.what} was answered by {type(posted.reply).__name__}, not {kind.__name__}")
        return posted.reply, posted.tensors

    def forget(self, request: int) -> None:
        """Nobody waits for the reply to this posted request any more."""
        self._posted.pop(request, None)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._socket.close()
        self._context.destroy(linger=0)

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_posted(self, posted: _Posted) -> None:
        """The next reply, which may be to another request than the one that is waited for."""
        reply, tensors = self._receive(posted.deadline, posted.what)
        if self._was_posted(reply, tensors):
            return
        # A message that could not be read has no id; another refusal is of a request that nobody waits for any more.
        if isinstance(reply, Refused) and reply.request == 0:
            raise RefusedError(reply)
        self.dropped += 1

    def _was_posted(self, reply: Reply, tensors: dict[str, NDArray[Any]]) -> bool:
        """Keep a reply for `collect`, if it is to a posted request."""
        posted = self._posted.get(reply.request)
        if posted is None:
            return False
        posted.reply, posted.tensors = reply, tensors
        return True

    def _receive(self, deadline: float, what: str) -> tuple[Reply, dict[str, NDArray[Any]]]:
        """The next reply, whatever it answers; raises `SilentError` after the deadline."""
        remaining_s = deadline - time.monotonic()
        try:
            self._socket.setsockopt(zmq.RCVTIMEO, max(0, int(remaining_s * 1000)))
            return decode_reply(self._socket.recv_multipart())
        except zmq.Again as error:
            raise SilentError(f"{self.endpoint}: no answer to {what} in time") from error

    def _send(self, message: Message, arrays: Arrays | None, limit_s: float) -> int:
        self._request += 1
        frames = encode(msgspec.structs.replace(message, request=self._request), arrays)
        self._socket.setsockopt(zmq.SNDTIMEO, max(1, int(limit_s * 1000)))
        try:
            # Copied once: an array that is overwritten while ZeroMQ still reads it would corrupt the message.
            self._socket.send_multipart(frames, copy=True)
        except zmq.Again as error:
            raise SilentError(f"{self.endpoint}: nobody listens there (waited {limit_s:g} s)") from error
        return self._request

    def _connect(self) -> zmq.Socket[bytes]:
        return connect_dealer(self._context, self.endpoint, self.keys)


def connect_dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Path | None) -> zmq.Socket[bytes]:
    """A DEALER socket to a runtime. Raises `ConfigError` for an address that is none, and for keys or a socket's
    directory that are not as they must.
    """
    if endpoint.startswith("ipc://"):
        # Somebody else's socket at a guessable address must not be taken for the runtime.
        require_private(endpoint)
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.immediate = True
    socket.maxmsgsize = MAX_FRAME_BYTES
    if keys is not None:
        secure_client(socket, keys)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"endpoint {endpoint}: cannot be used: {error.strerror}") from error
    return socket


def retry_hello(
    client: PolicyClient, spec: BackendSpec | None, *, give_up_after_s: float, stopped: Callable[[], bool]
) -> Welcome | None:
    """Say hello until the runtime answers; None if `stopped` first. Raises `SilentError` after `give_up_after_s`."""
    deadline = time.monotonic() + give_up_after_s
    while not stopped():
        try:
            return client.hello(spec, timeout_s=1.0)
        except SilentError:
            if time.monotonic() > deadline:
                raise
    return None
