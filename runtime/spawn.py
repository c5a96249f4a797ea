"""Functions of ours in processes of their own, each at one end of a pipe. A closed pipe tells them to end."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

# A fresh interpreter for each process: threads and sockets of this one do not go along.
SPAWN = multiprocessing.get_context("spawn")

Spawned = tuple[SpawnProcess, Connection]
"""A process and this side's end of its pipe."""


def spawn(target: Callable[..., None], *arguments: Any) -> Spawned:
    """Start `target(connection, *arguments)`, which is to end when the other end of its connection is closed.

    That end is closed by `end`, and by whatever ends this process.
    """
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def end(spawned: Sequence[Spawned], timeout_s: float) -> None:
    """Close the pipes and wait for the processes; those that have not ended after `timeout_s` in all are killed."""
    for _, connection in spawned:
        connection.close()
    deadline_s = time.monotonic() + timeout_s
    for process, _ in spawned:
        process.join(max(0.0, deadline_s - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
