"""What the runtime gives a bridge to do next: a task and a seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.episode import End


class Schedule(Protocol):
    """Where episodes come from. `next` is called when a bridge is free, `ended` when its episode is over."""

    def next(self, offered: Sequence[str]) -> tuple[str, int] | None:
        """(task, seed) among the `offered` tasks of this bridge, or None if there is nothing now."""
        ...

    def ended(self, task: str, seed: int, end: End) -> None:
        """The episode is over; an aborted one may be given out again."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no episode will come any more."""
        ...


class Training:
    """Tasks in turn, by the fewest episodes so far; seeds drawn at random from the training range, without end."""

    finished = False

    def __init__(self, tasks: Sequence[str], first_seed: int, seeds: int, rng: np.random.Generator) -> None:
        self._counts = dict.fromkeys(tasks, 0)
        self._first_seed, self._seeds = first_seed, seeds
        self._rng = rng

    def next(self, offered: Sequence[str]) -> tuple[str, int] | None:
        """The least driven task that the bridge offers, with a fresh seed."""
        tasks = [task for task in self._counts if task in offered]
        if not tasks:
            return None
        task = min(tasks, key=self._counts.__getitem__)
        self._counts[task] += 1
        return task, self._first_seed + int(self._rng.integers(self._seeds))

    def ended(self, task: str, seed: int, end: End) -> None:
        """An aborted episode does not count, so its task comes again sooner."""
        if end == "aborted":
            self._counts[task] -= 1


class FixedList:
    """Every (task, seed) once, an aborted one again: an evaluation."""

    MAX_TRIES = 5

    def __init__(self, episodes: Sequence[tuple[str, int]]) -> None:
        self._waiting = deque(episodes)
        self._tries = dict.fromkeys(episodes, 0)
        self._running: set[tuple[str, int]] = set()
        self.given_up: list[tuple[str, int]] = []
        self.ended_count = 0

    @property
    def finished(self) -> bool:
        """All episodes are over."""
        return not self._waiting and not self._running

    def next(self, offered: Sequence[str]) -> tuple[str, int] | None:
        """The next episode of a task that the bridge offers."""
        for episode in self._waiting:
            if episode[0] in offered:
                self._waiting.remove(episode)
                self._running.add(episode)
                self._tries[episode] += 1
                return episode
        return None

    def ended(self, task: str, seed: int, end: End) -> None:
        """An aborted episode is given out again, at most `MAX_TRIES` times in all."""
        episode = (task, seed)
        self._running.discard(episode)
        if end != "aborted":
            self.ended_count += 1
            return
        if self._tries[episode] < self.MAX_TRIES:
            self._waiting.append(episode)
        else:
            self.given_up.append(episode)
