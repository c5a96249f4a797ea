"""The server's socket: one thread receives, and whoever has an answer sends it."""

from __future__ import annotations

import select
import threading
from collections import Counter

import zmq

from bridge.listener import Bell, Listener
from bridge.messages import Arrays, Code, Message, Refused, encode

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
        self._listener = Listener(endpoint, keys, setting="$.runtime.serve.endpoint", receive_hwm=RECEIVE_HWM)
        self._socket = self._listener.socket
        self._bell = Bell()
        self.undeliverable = 0
        """Messages to clients that were gone."""
        self.refused: Counter[str] = Counter()
        """Refusals by code."""
        self.endpoint = self._listener.endpoint
        self._receiver = 0
        self._poll = select.poll()
        self._poll.register(int(self._socket.getsockopt(zmq.FD)), select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)

    def wait(self, timeout_ms: int) -> None:
        """Sleep until something may have arrived. Only after `waiting` was false: it tells of news alone."""
        self._receiver = threading.get_ident()
        for descriptor, _ in self._poll.poll(timeout_ms):
            if descriptor == self._bell.fileno():
                self._bell.hear()

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
            self._bell.ring()

    def refuse(self, identity: bytes, request: int, code: Code, field: str, message: str) -> None:
        """Answer a request with a refusal."""
        self.refused[code] += 1
        self.send(identity, Refused(request=request, code=code, field=field, message=message))

    def close(self) -> None:
        """Let what was sent leave for a moment, then close the socket; idempotent."""
        self._listener.close()
        self._bell.close()
