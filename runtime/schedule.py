"""What the runtime gives a bridge to do next: a task and a seed.

In training the share of a task in all episodes follows its need (`runtime.balance: need`; fieldtune's own design):

    need_i  = 1 - (successes_i + 1) / (n_i + 2)        n_i: its last episodes that were judged, at most 50
    share_i = clip(c need_i, 3/(4N), 3/(2N))           N tasks; c such that the shares sum to 1

The rate is the mean of a Beta(1, 1) prior and the episodes, so that a task that was hardly tried counts as half solved
and no need is ever 0. A solved task keeps at least 3/4 of an equal share: it can still become faster, and a fall of
its success is seen. The neediest gets at most 3/2 of one, so that a task beyond the policy's reach does not
eat up the time of the others. `runtime.balance: equal` gives every task 1/N.

Episodes are given out by what is owed: each one given out adds share_i to what task i is owed, and the task that is
owed most gets it, for 1. What is owed stays above -1 and never exceeds H_N - 1, H_N = 1 + 1/2 + ... + 1/N (by
induction: the k largest debts have a mean of at most H_N - H_k). So no task is more than one episode ahead of its share
or H_N - 1 behind it, and with at least 3/(4N) it waits for at most 4/3 N H_N episodes. That holds where every bridge
offers every task; where one offers fewer, their shares among each other decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from runtime.episode import End

Balance = Literal["equal", "need"]

WINDOW_EPISODES = 50
LEAST, MOST = 0.75, 1.5  # of an equal share
BISECTIONS = 60  # the width is then below the rounding of a float


class Schedule(Protocol):
    """Where episodes come from. `next` is called when a bridge is free, `ended` when its episode is over."""

    def next(self, offered: Sequence[str]) -> tuple[str, int] | None:
        """(task, seed) among the `offered` tasks of this bridge, or None if there is nothing now."""
        ...

    def ended(self, task: str, seed: int, end: End) -> None:
        """The episode is over; an aborted one may be given out again."""
        ...

    @property
    def shares(self) -> dict[str, float]:
        """Share of each task in what is given out, for the status; empty where that is a fixed list."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no episode will come any more."""
        ...


class Training:
    """Tasks by their shares (see above), without end; seeds drawn at random from the training range."""

    finished = False

    def __init__(
        self,
        tasks: Sequence[str],
        first_seed: int,
        seeds: int,
        rng: np.random.Generator,
        *,
        balance: Balance = "need",
        recent: Mapping[str, Sequence[bool]] | None = None,
    ) -> None:
        """`recent`: whether the latest episodes of a task succeeded, oldest first, from before a restart."""
        self._first_seed, self._seeds = first_seed, seeds
        self._rng = rng
        self._balance = balance
        self._recent = {task: deque((recent or {}).get(task, ()), WINDOW_EPISODES) for task in tasks}
        self._owed = dict.fromkeys(tasks, 0.0)
        self._shares = self._share_out()

    @property
    def shares(self) -> dict[str, float]:
        """Share of each task in the episodes given out now; they sum to 1."""
        return self._shares

    def next(self, offered: Sequence[str]) -> tuple[str, int] | None:
        """The task that is owed most among those that the bridge offers, with a fresh seed."""
        tasks = [task for task in self._owed if task in offered]
        if not tasks:
            return None
        total = sum(self._shares[task] for task in tasks)
        for task in tasks:
            self._owed[task] += self._shares[task] / total
        task = max(tasks, key=self._owed.__getitem__)
        self._owed[task] -= 1.0
        return task, self._first_seed + int(self._rng.integers(self._seeds))

    def ended(self, task: str, seed: int, end: End) -> None:
        """An aborted episode says nothing of success, nor does one that nobody has judged. It has had its turn all the
        same: were that given back, a task that breaks off every time would take all turns.
        """
        if end not in ("aborted", "unjudged"):
            self._recent[task].append(end == "success")
            self._shares = self._share_out()

    def _share_out(self) -> dict[str, float]:
        if not self._recent:
            return {}
        if self._balance == "equal":
            return dict.fromkeys(self._recent, 1.0 / len(self._recent))
        need = [1.0 - (sum(recent) + 1) / (len(recent) + 2) for recent in self._recent.values()]
        return dict(zip(self._recent, shares_by_need(need), strict=True))


def shares_by_need(need: Sequence[float]) -> list[float]:
    """share_i = clip(c need_i, LEAST / N, MOST / N) with the c that makes them sum to 1; every need is above 0."""
    wanted = np.asarray(need, np.float64)
    least, most = LEAST / len(wanted), MOST / len(wanted)
    # The sum grows with c, from LEAST where all are at the least to MOST where all are at the most.
    low, high = 0.0, most / float(wanted.min())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if np.clip(middle * wanted, least, most).sum() < 1.0:
            low = middle
        else:
            high = middle
    shares = np.clip(high * wanted, least, most)
    return [float(share) for share in shares / shares.sum()]


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
    def shares(self) -> dict[str, float]:
        """None: the list is what it is."""
        return {}

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
