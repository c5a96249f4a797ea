"""Records on their way to the disk, bounded in bytes: over the bound an episode is given up, never a caller stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.episode import Record
from runtime.episode_file import EpisodeFile

Stored = Callable[[str | None], None]


@dataclass(slots=True, eq=False)
class LoggedEpisode:
    """An episode between its start and its acknowledgement. `file` is the writer's, the log's lock guards the rest."""

    episode: str
    file: EpisodeFile | None = None
    queued_bytes: int = 0
    lost: str = ""
    """Why it was given up; empty while all is well."""


@dataclass(slots=True, eq=False)
class Item:
    """One record of an episode; `stored` comes with the last one."""

    episode: LoggedEpisode
    record: Record | None
    """None for the end of an episode that stops here: the writer makes it, for it knows the steps."""
    size_bytes: int
    stored: Stored | None = None


class RecordQueue:
    """First in, first out. Not safe from several threads by itself: the log's lock guards it."""

    def __init__(self, limit_bytes: int, given_up: Callable[[str], None]) -> None:
        """`given_up` is called with the reason, once for each episode that is given up."""
        self.queued_bytes = 0
        self.ends = 0
        """Ends that wait: somebody waits for each of them."""
        self._limit_bytes, self._given_up = limit_bytes, given_up
        self._items: deque[Item] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an item. While that is too much, the episode with the most bytes waiting is given up."""
        self._items.append(item)
        self._count(item, 1)
        while self.queued_bytes > self._limit_bytes:
            waiting = {item.episode.episode: item.episode for item in self._items if not item.episode.lost}
            if not waiting:
                break
            most = max(waiting.values(), key=lambda episode: episode.queued_bytes)
            self.give_up(most, f"more than {self._limit_bytes / 1e6:g} MB were waiting for the disk")

    def take(self) -> Item:
        """Remove the first item. Raises `IndexError` if there is none."""
        item = self._items.popleft()
        self._count(item, -1)
        return item

    def give_up(self, episode: LoggedEpisode, reason: str) -> None:
        """Keep no more of an episode: its records leave, its end stays without tensors, for somebody waits for it."""
        if episode.lost:
            return
        episode.lost = f"episode {episode.episode} was given up: {reason}"
        self._given_up(episode.lost)
        kept: deque[Item] = deque()
        for item in self._items:
            if item.episode is episode:
                self._count(item, -1)
                if item.stored is None:
                    continue
                item.record, item.size_bytes = None, 0
                self._count(item, 1)
            kept.append(item)
        self._items = kept

    def _count(self, item: Item, sign: int) -> None:
        self.ends += sign * (item.stored is not None)
        item.episode.queued_bytes += sign * item.size_bytes
        self.queued_bytes += sign * item.size_bytes
