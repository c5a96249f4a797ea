"""The server's socket: one thread receives, and whoever has an answer sends it."""

from __future__ import annotations

import select
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from bridge.config import ConfigError
from bridge.endpoint import claim_ipc, is_local
from bridge.keys import secure_server
from bridge.messages import MAX_FRAME_BYTES, Arrays, Code, Message, Refused, encode

# As plain numbers: pyzmq's flags are Python enums, and each operation on one makes another object.
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
RECEIVE_HWM = 16  # messages waiting per client; a client has one request under way, so more is a client gone wrong


class Router:
    """A bound ROUTER socket. `wait` is for the thread that receives; everything else is called under one lock.

    ZeroMQ lets a socket move between threads, but not be used by two at once. So the receiver waits for the socket's
    descriptor without touching the socket. That descriptor is edge-triggered: whatever is done with the socket may use
    up the sign that a message has arrived, hence a sender on another thread looks again and wakes the receiver.
    """

    def __init__(self, endpoint: str, keys: str | None) -> None:
        """Bind. Raises `ConfigError` for an address that is taken, or open to others without keys."""
        if not is_local(endpoint) and keys is None:
            raise ConfigError(
                f"$.runtime.serve.endpoint: {endpoint} can be reached from other computers; give `keys` "
                "(fieldtune keys makes them) or listen on ipc or tcp://127.0.0.1"
            )
        self._claim = claim_ipc(endpoint) if endpoint.startswith("ipc://") else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._wake_send, self._wake_receive = socket.socketpair()
        self._wake_send.setblocking(False)
        self._wake_receive.setblocking(False)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 200
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.router_mandatory = True
        self._socket.router_handover = True
        self._socket.rcvhwm = RECEIVE_HWM
        try:
            if keys is not None:
                self._authenticator = secure_server(self._context, self._socket, Path(keys))
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"$.runtime.serve.endpoint: cannot listen on {endpoint}: {error}") from error
        except ConfigError:
            self.close()
            raise
        self.undeliverable = 0
        """Messages to clients that were gone."""
        self.refused: Counter[str] = Counter()
        """Refusals by code."""
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._receiver = 0
        self._poll = select.poll()
        self._poll.register(int(self._socket.getsockopt(zmq.FD)), select.POLLIN)
        self._poll.register(self._wake_receive, select.POLLIN)

    def wait(self, timeout_ms: int) -> None:
        """Sleep until something may have arrived. Only after `waiting` was false: it tells of news alone."""
        self._receiver = threading.get_ident()
        for descriptor, _ in self._poll.poll(timeout_ms):
            if descriptor == self._wake_receive.fileno():
                self._wake_receive.recv(4096)

    @property
    def waiting(self) -> bool:
        """Whether a message can be received."""
        return bool(int(self._socket.getsockopt(EVENTS)) & POLLIN)

    def receive(self) -> tuple[bytes, list[memoryview]]:
        """The next message and its sender; `waiting` was true. Not copied: an image stays in ZeroMQ's memory."""
        identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        return identity.bytes, [frame.buffer for frame in frames]

    def send(self, identity: bytes, message: Message, arrays: Arrays | None = None) -> None:
        """Send to a client; if it has gone or does not read, that is counted."""
        try:
            self._socket.send_multipart([identity, *encode(message, arrays)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.undeliverable += 1
        if threading.get_ident() != self._receiver and self.waiting:
            self._wake()

    def refuse(self, identity: bytes, request: int, code: Code, field: str, message: str) -> None:
        """Answer a request with a refusal."""
        self.refused[code] += 1
        self.send(identity, Refused(request=request, code=code, field=field, message=message))

    def close(self) -> None:
        """Let what was sent leave for a moment, then close the socket; idempotent."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close()
        self._context.destroy(linger=200)
        self._wake_send.close()
        self._wake_receive.close()
        if self._claim is not None:
            self._claim.close()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # enough wake-ups are already waiting to be read
            self._wake_send.send(b"\0")
