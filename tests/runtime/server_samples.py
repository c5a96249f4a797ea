"""What the tests of the server and of its rollouts share."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from bridge.client import RefusedError
from bridge.messages import (
    Refused,
)

ENOUGH_S = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.01)


def refused(call: Callable[[], Any]) -> Refused:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.refused


def raw_socket(endpoint: str) -> tuple[zmq.Context[Any], zmq.Socket[bytes]]:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(endpoint)
    return context, socket


def row_of(serving: Any, episode: str) -> Any:
    return serving.log.index.get(episode)


def aborted(serving: Any, episode: str) -> Any:
    until(lambda: row_of(serving, episode) is not None, "the episode to be stored")
    row = row_of(serving, episode)
    assert row.status == "aborted"
    return row
