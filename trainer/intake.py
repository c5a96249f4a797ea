"""Which episodes an iteration learns from: waiting for enough of them, and what each may still be used for.

The log goes on while the trainer learns, and what stands in it may change: an operator labels an episode that was taken
long ago, or one that nobody had judged; a version that made it turns out too old.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.index import EpisodeIndex, EpisodeRow
from trainer.config import TrainerConfig
from trainer.versions import Versions

POLL_S = 0.2
STILL_WAITING_S = 60.0
PULL_ROWS = 1000
# More than this many times the wanted episodes are not learned from at once: updates that take longer than collecting
# their episodes would otherwise grow without end.
LARGEST_BATCH = 2


@dataclass(frozen=True, slots=True)
class Sorted:
    """What may be done with some rows of the log. Sets hold sequence numbers."""

    exploring: list[EpisodeRow]
    """Those in which the policy explored a task that is trained, and whose end is known."""
    taken: set[int]
    """Those that PPO has had its turn with: a label then changes the buffer only."""
    learnable: set[int]
    """The newest of those that PPO can learn from."""

    @property
    def stale_decisions(self) -> int:
        """Decisions of exploring episodes that PPO will never learn from."""
        return sum(row.decisions for row in self.exploring if row.seq not in self.learnable | self.taken)


class Intake:
    """The trainer's place in the log of its run."""

    def __init__(
        self,
        index: EpisodeIndex,
        versions: Versions,
        config: TrainerConfig,
        tasks: tuple[str, ...],
        *,
        cursor: int,
        labels: int,
        stop: threading.Event,
        warn: Callable[[str], None],
    ) -> None:
        """`tasks` are those that are trained; episodes up to sequence number `cursor` and labels up to number `labels`
        are taken.
        """
        self._index, self._versions, self._tasks = index, versions, tasks
        self._wanted = config.episodes_per_iteration * len(tasks)
        self._stop, self._warn = stop, warn
        self._cursor, self._labels = cursor, labels
        self._awaited: set[str] = set()
        self.waited_s = 0.0
        """How long the last `wait` took."""

    def wait(self, finished: Callable[[], bool], follow_live: Callable[[], None]) -> list[EpisodeRow] | None:
        """Wait for enough exploring episodes: all rows since the cursor, or None when training is `finished`.

        `follow_live` is called whenever another version may be live.
        """
        rows: list[EpisodeRow] = []
        useless: list[EpisodeRow] = []
        newest, ready = self._cursor, 0
        began_s = news_s = ready_s = time.monotonic()
        was_waiting = told = False
        while not finished():
            judged = self._judged(newest)
            known = {row.episode for row in judged}
            rows = [row for row in rows if row.episode not in known] + judged
            new = self._index.after(newest, PULL_ROWS)
            # Asked once: what ends below must not let rows through before what is live has been followed.
            waiting = self._versions.waiting
            if new:
                rows += new
                newest = new[-1].seq
                news_s = time.monotonic()
            if new or was_waiting:
                # Another version may be live, by rule or by hand: then everything is older than it was.
                follow_live()
            if new or judged or was_waiting:
                before, ready = ready, sum(self._is_fresh(row) and not self._was_taken(row) for row in rows)
                useless += new
                if ready > before:
                    ready_s, useless = time.monotonic(), []
            was_waiting = waiting
            if len(new) == PULL_ROWS:
                continue
            if ready >= self._wanted and not waiting:
                self.waited_s = time.monotonic() - began_s
                return rows
            if time.monotonic() - news_s > STILL_WAITING_S:
                self._warn(f"waiting for episodes: {ready} of {self._wanted}, none in the last {STILL_WAITING_S:g} s")
                news_s = time.monotonic()
            if (
                len(useless) >= self._wanted
                and not told
                and not waiting
                and time.monotonic() - ready_s > STILL_WAITING_S
            ):
                self._warn(self._why_useless(useless))
                told = True
            self._stop.wait(POLL_S)
        return None

    def sort(self, rows: list[EpisodeRow]) -> Sorted:
        """Say what each row may be used for."""
        exploring = [row for row in rows if self._is_exploring(row)]
        taken = {row.seq for row in rows if self._was_taken(row)}
        fresh = [row.seq for row in exploring if self._is_fresh(row) and row.seq not in taken]
        return Sorted(exploring, taken, set(fresh[-LARGEST_BATCH * self._wanted :]))

    def take(self, rows: list[EpisodeRow]) -> tuple[int, int]:
        """These rows have been learned from: the cursor and the number of the last label from now on."""
        self._cursor = max(self._cursor, *(row.seq for row in rows))
        self._awaited.clear()
        return self._cursor, self._labels

    def _why_useless(self, rows: list[EpisodeRow]) -> str:
        too_old = sum(self._is_exploring(row) for row in rows)
        return (
            f"the last {len(rows)} episodes cannot be learned from: {too_old} are of versions that are too old or "
            f"explored with another noise, {len(rows) - too_old} broke off, wait for a label, are deleted, or are of a "
            "task or a source that is not trained"
        )

    def _judged(self, newest: int) -> list[EpisodeRow]:
        """Rows up to `newest` that somebody has labelled since the last time, as they count now; those above come by
        themselves.
        """
        labels = self._index.labels_after(self._labels)
        if not labels:
            return []
        self._labels = labels[-1].number
        self._awaited |= {label.episode for label in labels if label.awaited}
        episodes = [*dict.fromkeys(label.episode for label in labels)]
        # The buffer may take in what was learned from long ago, and the file must last until it is held for that.
        self._index.hold_too(episodes)
        rows = [self._index.get(episode) for episode in episodes]
        return [row for row in rows if row is not None and row.seq <= newest]

    def _was_taken(self, row: EpisodeRow) -> bool:
        return row.seq <= self._cursor and row.episode not in self._awaited

    def _is_exploring(self, row: EpisodeRow) -> bool:
        # One that nobody has judged yet is taken when somebody does.
        if row.deleted or row.status in ("aborted", "unjudged"):
            return False
        return row.explore and row.source == "policy" and row.task in self._tasks

    def _is_fresh(self, row: EpisodeRow) -> bool:
        """Whether PPO can learn from some of its decisions."""
        return self._is_exploring(row) and any(
            self._versions.age(version) <= self._versions.max_staleness_versions for version in row.versions
        )
