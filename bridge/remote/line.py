"""The near side's connection to the far side of a remote backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import zmq
from msgspec.structs import replace
from numpy.typing import NDArray

from bridge.client import RefusedError, SilentError, connect_dealer
from bridge.messages import Arrays, Message, Refused, WireError, encode
from bridge.remote.messages import decode_far_reply

R = TypeVar("R", bound=Message)


class Line:
    """One DEALER socket. Threads that use the same one wait for each other."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: Path | None,
        *,
        number: Callable[[], int],
        reach_s: float,
    ) -> None:
        """`number` gives the next request id, over all lines of one owner; `reach_s` is how long to wait for somebody
        who takes a message. Raises `ConfigError` for bad keys.
        """
        self.endpoint = endpoint
        self._reach_s = reach_s
        self._number = number
        self._lock = threading.Lock()
        self._socket = connect_dealer(context, endpoint, keys)

    def ask(
        self, message: Message, kind: type[R], arrays: Arrays | None = None, *, timeout_s: float
    ) -> tuple[R, dict[str, NDArray[Any]]]:
        """Send a message and wait for its answer of type `kind`; the arrays of that are views that cannot be written.

        Raises `SilentError` after the deadline, `RefusedError` if the far side refuses, and `WireError` if what came
        cannot be read.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            request = self._number()
            reach_s = min(timeout_s, self._reach_s)
            self._socket.setsockopt(zmq.SNDTIMEO, max(1, int(reach_s * 1000)))
            try:
                self._socket.send_multipart(encode(replace(message, request=request), arrays))
            except zmq.Again as error:
                raise SilentError(f"{self.endpoint}: nobody listens there (waited {reach_s:g} s)") from error
            while True:
                left_ms = max(0, int(1000 * (deadline_s - time.monotonic())))
                if not self._socket.poll(left_ms):
                    raise SilentError(f"{self.endpoint}: no answer to {type(message).__name__} in {timeout_s:g} s")
                reply, tensors = decode_far_reply([f.buffer for f in self._socket.recv_multipart(copy=False)])
                # A message that could not be read has no id.
                if isinstance(reply, Refused) and reply.request in (0, request):
                    raise RefusedError(reply)
                if reply.request == request:
                    break
                # It answers a question that was given up.
        if not isinstance(reply, kind):
            raise WireError("kind", f"{type(message).__name__} was answered by {type(reply).__name__}")
        return reply, tensors

    def tell(self, message: Message) -> None:
        """Send a message if somebody is there to take it; whoever answers is not heard."""
        with self._lock, suppress(zmq.Again):
            self._socket.send_multipart(encode(replace(message, request=self._number())), zmq.NOBLOCK)

    def cut(self) -> None:
        """Leave the far side without a word; what is asked from now on has no answer."""
        with self._lock, suppress(zmq.ZMQError):
            self._socket.disconnect(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            self._socket.close()
