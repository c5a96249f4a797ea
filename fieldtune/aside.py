"""Saying something without waiting for a terminal, or a pipe, that takes nothing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

MOST_WAITING = 1000  # messages; more than that nobody will read
CLOSE_S = 1.0


class Aside:
    """Says what it is called with on a thread of its own, in order. For those who guard a robot."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._waiting: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="aside", daemon=True)
        self._thread.start()

    def __call__(self, message: str) -> None:
        """Say it soon; lost where too much waits already."""
        with suppress(queue.Full):
            self._waiting.put_nowait(message)

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (message := self._waiting.get()) is not None:
            with suppress(Exception):
                self._say(message)
