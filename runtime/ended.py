"""The episodes of a log in the order in which they began, for whoever compares versions while episodes go on.

Short episodes end before long ones that began earlier; taken as they come, successes would be seen first.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.index import EpisodeIndex, EpisodeRow

PULL_ROWS = 1000


class EndedEpisodes:
    """Gives each row once; those that are not taken to the end of an iteration come with the next."""

    def __init__(self, index: EpisodeIndex, after_seq: int) -> None:
        """Begin behind the row `after_seq`."""
        self._index, self._seq = index, after_seq
        self._waiting: list[EpisodeRow] = []

    def before(self, open_since_unix_s: float) -> Iterator[EpisodeRow]:
        """All that began before then, which is when the oldest episode in progress began.

        That must be asked for before this is called: one that ends in between is then held back, and not passed over.
        """
        while new := self._index.after(self._seq, PULL_ROWS):
            self._seq = new[-1].seq
            self._waiting += new
        self._waiting.sort(key=lambda row: row.started_unix_s)
        while self._waiting and self._waiting[0].started_unix_s < open_since_unix_s:
            yield self._waiting.pop(0)
