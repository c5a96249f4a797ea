"""Exports the finished episodes of a log, one at a time: the log is only read, and memory holds one episode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from fieldtune.data.frames import FramesError
from runtime.episode import End, Episode
from runtime.episode_file import EpisodeError
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import read_episode

PAGE = 1000  # rows of the index read at once


class Target(Protocol):
    """Where episodes go."""

    def has(self, episode: str) -> bool:
        """Whether an episode, by its id, is there."""
        ...

    def add(self, row: EpisodeRow, episode: Episode) -> bool:
        """Write one; False if nothing in it can be written. After a crash it is there whole or not at all."""
        ...

    def finish(self) -> None:
        """After the last one."""
        ...

    def close(self) -> None:
        """Release the place; idempotent."""
        ...


class Wanted(Struct, frozen=True):
    """Which episodes: all that fit each of these. None fits all."""

    status: tuple[End, ...] = ()
    """Ended in one of these ways; empty: all but aborted, and those that nobody has judged."""
    task: str | None = None
    version: str | None = None
    """A version, or the beginning of its id, acted in it."""
    since_unix_s: float | None = None
    """Started then or later."""

    def fits(self, row: EpisodeRow) -> bool:
        """Whether an episode is wanted."""
        return (
            (row.status in self.status if self.status else row.status not in ("aborted", "unjudged"))
            and self.task in (None, row.task)
            and (self.version is None or any(version.startswith(self.version) for version in row.versions))
            and (self.since_unix_s is None or row.started_unix_s >= self.since_unix_s)
        )


class Exported(Struct, frozen=True):
    """What became of the episodes that were wanted."""

    written: int
    there: int
    """Written by an earlier export."""
    left_out: dict[str, str]
    """Episode -> why it could not be exported."""
    unjudged: int = 0
    """Episodes that fit but for their status, which nobody has asked for: it says neither success nor failure."""


def export(
    index: EpisodeIndex,
    target: Target,
    wanted: Wanted,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Exported:
    """Write the wanted episodes, oldest first, and close the target. `progress(done, of)` counts the wanted ones.

    What is there stays as it is. If `stopped`, what was written is finished nevertheless, and the next call goes on.
    """
    written = there = done = 0
    left_out: dict[str, str] = {}
    try:
        total = sum(1 for _ in _rows(index, wanted))
        for row in _rows(index, wanted):
            if stopped():
                break
            if target.has(row.episode):
                there += 1
            else:
                try:
                    if target.add(row, read_episode(index.path(row))):
                        written += 1
                    else:
                        left_out[row.episode] = "nothing was executed in it"
                except (EpisodeError, FramesError) as error:
                    # Damaged, deleted by retention meanwhile, or of another backend than the rest.
                    left_out[row.episode] = str(error)
            done += 1
            progress(done, total)
        target.finish()
    finally:
        target.close()
    waiting = 0 if wanted.status else sum(1 for _ in _rows(index, replace(wanted, status=("unjudged",))))
    return Exported(written, there, left_out, waiting)


def _rows(index: EpisodeIndex, wanted: Wanted) -> Iterator[EpisodeRow]:
    seq = 0
    while page := index.after(seq, PAGE):
        seq = page[-1].seq
        yield from (row for row in page if not row.deleted and wanted.fits(row))
