"""A socket that others connect to: bound, encrypted where it must be, and claimed; and a bell for who waits at it."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from bridge.config import ConfigError
from bridge.endpoint import claim_ipc, is_local
from bridge.keys import secure_server
from bridge.messages import MAX_FRAME_BYTES

LINGER_MS = 200


class Bell:
    """Wakes a thread that waits in a poll for this object, which polls take for its descriptor. Any thread may ring."""

    def __init__(self) -> None:
        self._send, self._receive = socket.socketpair()
        self._send.setblocking(False)
        self._receive.setblocking(False)

    def fileno(self) -> int:
        """Readable once it was rung."""
        return self._receive.fileno()

    def ring(self) -> None:
        """Wake who waits, or who will wait next."""
        with suppress(BlockingIOError):  # enough rings are already waiting to be heard
            self._send.send(b"\0")

    def hear(self) -> None:
        """Forget the rings so far."""
        with suppress(BlockingIOError):
            self._receive.recv(4096)

    def close(self) -> None:
        """Idempotent."""
        self._send.close()
        self._receive.close()


class Listener:
    """A bound ROUTER socket and all that it needs. Not thread-safe."""

    def __init__(self, endpoint: str, keys: str | None, *, setting: str, receive_hwm: int) -> None:
        """Bind. Raises `ConfigError`, naming `setting`, for an address taken, or open to others without keys."""
        if not is_local(endpoint) and keys is None:
            raise ConfigError(
                f"{setting}: {endpoint} can be reached from other computers; give `keys` "
                "(fieldtune keys makes them) or listen on ipc or tcp://127.0.0.1"
            )
        self._claim = claim_ipc(endpoint) if endpoint.startswith("ipc://") else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = LINGER_MS
        self.socket.maxmsgsize = MAX_FRAME_BYTES
        self.socket.router_mandatory = True
        self.socket.router_handover = True
        self.socket.rcvhwm = receive_hwm
        try:
            if keys is not None:
                self._authenticator = secure_server(self._context, self.socket, Path(keys))
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{setting}: cannot listen on {endpoint}: {error}") from error
        except ConfigError:
            self.close()
            raise
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """Let what was sent leave for a moment, then close the socket; idempotent."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self.socket.close()
        self._context.destroy(linger=LINGER_MS)
        if self._claim is not None:
            self._claim.close()
