"""The crash-safe episode log. Whoever serves hands records over and never waits: one thread owns the disk.

    DIRECTORY/lock            held by the one process that logs here
    DIRECTORY/open/ID.ep      episodes that are running
    DIRECTORY/done/ID.ep      episodes that have ended
    DIRECTORY/index.sqlite    one row for each of those (`runtime.index`)
    DIRECTORY/damaged/        what could not be read after a crash

An episode ends in this order: last record, fsync, rename into `done/`, fsync of `done/`, commit of its row with
SQLite's synchronous=FULL, and only then its `stored(None)`. Episodes that end together share the last two steps.
"""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

from msgspec import Struct

from bridge.errors import FieldtuneError
from runtime.database import DatabaseError
from runtime.durable import claim, sync_directory
from runtime.episode import DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episode_file import EPISODE_ID, EpisodeFile
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.record_queue import Item, LoggedEpisode, RecordQueue, Stored
from runtime.records import RecordError
from runtime.recovery import recover

CLOSE_TIMEOUT_S = 30.0
CLOSED = "the log is closed"
WRITER_DIED = "the log's writer has died; restart the runtime"
PROBLEMS_SHOWN = 20  # of those that were found when the log was opened
RECORD_OVERHEAD_BYTES = 200  # counted for each waiting record besides its tensors
COMMIT_AFTER_S = 0.02  # ended episodes wait no longer than this for others to share their commit
GATHER_S = 0.05
GATHER_BYTES = 8_000_000
COMMIT_EPISODES = 64
DAY_S = 86_400.0


class EpisodeLogError(FieldtuneError):
    """The log cannot be opened or closed; the message says what to do."""


class LogStats(Struct, frozen=True, kw_only=True):
    """What the log has done since it was opened."""

    open: int
    """Episodes that have started and not ended."""
    stored: int
    """Ended episodes on the disk and in the index, without aborted ones."""
    aborted: int
    """The same for aborted ones. Episodes recovered at the start are not counted."""
    lost: int
    """Episodes given up: the disk failed or the queue was over its limit. What is left may be kept as aborted."""
    queued_bytes: int
    """Records waiting for the disk now."""
    written_bytes: int
    deleted: int
    """Episodes deleted to save space."""
    error: str
    """What went wrong last; empty if nothing did."""


class EpisodeLog:
    """Writes episodes into one directory. Methods may be called from any thread, never wait for the disk and never
    raise because of it. Arrays are referred to until they are written: whoever appends must not change them after.
    """

    def __init__(
        self, directory: Path, *, queue_mb: float = 256.0, keep_gb: float = 10.0, keep_failures_days: float = 0.0
    ) -> None:
        """Lock the directory, recover what a crash has left there, start the writer.

        `queue_mb` bounds the records that wait for the disk, `keep_gb` the size of `done/` (`EpisodeIndex.hold` says
        what may be deleted), from which failures of the last `keep_failures_days` are excepted. Raises
        `ClaimedError` if another process logs here, `DatabaseError` for a broken index, `OSError` where the
        directory cannot be made.
        """
        self.directory = directory
        for name in ("open", "done"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._lock_file = claim(directory)
        self.index = EpisodeIndex(directory)
        try:
            problems = recover(directory, self.index)
            self._kept_bytes = self.index.bytes_on_disk()
        except BaseException:
            self._lock_file.close()
            raise
        self._keep_limit_bytes = int(keep_gb * 1e9)
        self._keep_failures_s = keep_failures_days * DAY_S
        self._changed = threading.Condition()
        self._episodes: dict[str, LoggedEpisode] = {}
        self._queue = RecordQueue(int(queue_mb * 1e6), self._given_up)
        self._closed = ""
        self._counts = {"stored": 0, "aborted": 0, "lost": 0, "written_bytes": 0, "deleted": 0}
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        self._error = "; ".join(problems[:PROBLEMS_SHOWN]) + more
        # Of the writer thread alone:
        self._ended: list[tuple[EpisodeRow, LoggedEpisode, Stored]] = []
        self._ended_since_s = 0.0
        self._gathered = False
        self._not_indexed: list[EpisodeRow] = []
        self._writer = threading.Thread(target=self._run, name="episode-log", daemon=True)
        self._writer.start()

    # --- for callers ----------------------------------------------------------------------------------------------

    def start(self, record: EpisodeStart) -> None:
        """Begin an episode. Raises `ValueError` for an id or a seed that cannot be kept, or an id that is open."""
        if not EPISODE_ID.fullmatch(record.episode):
            raise ValueError(f"episode id {record.episode!r}; expected 1 to 64 of A-Z a-z 0-9 _ -")
        if not -(2**63) <= record.seed < 2**63:
            raise ValueError(f"seed {record.seed} of episode {record.episode} does not fit 64 bits")
        with self._changed:
            if record.episode in self._episodes:
                raise ValueError(f"episode {record.episode} is open already")
            if self._closed:
                return
            logged = self._episodes[record.episode] = LoggedEpisode(record.episode)
            self._put(Item(logged, record, RECORD_OVERHEAD_BYTES))

    def append(self, episode: str, record: DecisionRecord | ExecutedRecord) -> None:
        """Add a record to an open episode. Raises `ValueError` if it is not open."""
        item_bytes = _size_bytes(record)
        with self._changed:
            if self._closed:
                return
            logged = self._find(episode)
            if not logged.lost:
                self._put(Item(logged, record, item_bytes))

    def end(self, episode: str, record: EndRecord, stored: Stored) -> None:
        """End an open episode. Raises `ValueError` if it is not open.

        `stored` is called once, on the writer's thread: with None when the episode is on the disk and in the index,
        else with the reason why that is not certain. It must be quick and must not raise.
        """
        with self._changed:
            if not self._closed:
                logged = self._find(episode)
                del self._episodes[episode]
                self._put(Item(logged, record, _size_bytes(record), stored))
                return
        stored(self._closed)

    def stats(self) -> LogStats:
        """The counters now."""
        with self._changed:
            return LogStats(
                open=len(self._episodes), queued_bytes=self._queue.queued_bytes, error=self._error, **self._counts
            )

    @property
    def writer_died(self) -> bool:
        """Whether nothing is written any more, because of a bug; its traceback is on stderr."""
        return self._closed == WRITER_DIED

    def close(self) -> None:
        """End open episodes as aborted, write all that waits, release the directory; idempotent.

        What is started or appended afterwards is ignored, and an `end` is answered with an error. Raises
        `EpisodeLogError` if the disk does not take what waits within 30 s; the directory then stays locked until this
        process ends, and the next start recovers what was written.
        """
        with self._changed:
            if not self._closed:
                for logged in self._episodes.values():
                    self._put(Item(logged, None, RECORD_OVERHEAD_BYTES, _ignore))
                self._episodes.clear()
                self._closed = CLOSED
                self._changed.notify()
        self._writer.join(CLOSE_TIMEOUT_S)
        if self._writer.is_alive():
            raise EpisodeLogError(
                f"{self.directory}: the disk did not take the last {self.stats().queued_bytes} bytes within "
                f"{CLOSE_TIMEOUT_S:g} s; the next start recovers what was written"
            )
        self.index.close()
        self._lock_file.close()

    # The three below are called with the lock held.

    def _put(self, item: Item) -> None:
        self._queue.put(item)
        if self._urgent():
            self._changed.notify()

    def _urgent(self) -> bool:
        """Whether the writer should write now rather than gather more."""
        return self._queue.ends > 0 or self._queue.queued_bytes > GATHER_BYTES or bool(self._closed)

    def _find(self, episode: str) -> LoggedEpisode:
        logged = self._episodes.get(episode)
        if logged is None:
            raise ValueError(f"episode {episode!r} is not open in {self.directory}")
        return logged

    def _given_up(self, reason: str) -> None:
        self._error = reason
        self._counts["lost"] += 1

    # --- the writer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                item = self._take()
                if item is not None:
                    self._write(item)
                elif not self._ended:
                    return
                waited_s = time.monotonic() - self._ended_since_s
                if self._ended and (item is None or len(self._ended) >= COMMIT_EPISODES or waited_s > COMMIT_AFTER_S):
                    self._commit()
        finally:
            self._abandon()

    def _take(self) -> Item | None:
        """The next record; None if nothing waits and there is something to commit, or the log is closed.

        Records are gathered for a moment, unless the end of an episode is among them: a thread that wakes for each one
        takes the interpreter from the threads that serve. What is lost with a killed process was not acknowledged.
        """
        with self._changed:
            while True:
                if not len(self._queue):
                    self._gathered = False
                    if self._ended or self._closed:
                        return None
                    self._changed.wait(GATHER_S)
                elif self._gathered or self._ended or self._urgent():
                    self._gathered = True
                    return self._queue.take()
                else:
                    self._gathered = not self._changed.wait(GATHER_S)

    def _write(self, item: Item) -> None:
        logged = item.episode
        try:
            if item.stored is not None:
                self._finish(item, item.stored)
            elif not logged.lost and isinstance(item.record, EpisodeStart):
                # Retention may have deleted the file of an episode; its id stays used.
                if self.index.get(logged.episode) is not None:
                    raise FileExistsError(errno.EEXIST, "an episode of this id is in the log")
                logged.file = EpisodeFile(self.directory, item.record)
                self._counts["written_bytes"] += logged.file.size_bytes
            elif not logged.lost and item.record is not None and logged.file is not None:
                self._counts["written_bytes"] += logged.file.write(item.record)
        except (OSError, RecordError, DatabaseError) as error:
            with self._changed:
                self._queue.give_up(logged, str(error))
            self._discard(logged)
            if item.stored is not None:
                item.stored(logged.lost)

    def _finish(self, item: Item, stored: Stored) -> None:
        logged = item.episode
        if logged.file is None:
            stored(logged.lost)
            return
        end = item.record
        if logged.lost or not isinstance(end, EndRecord):
            end = logged.file.tally.aborted(logged.lost or CLOSED)
        row = logged.file.finish(end)
        if not self._ended:
            self._ended_since_s = time.monotonic()
        self._ended.append((row, logged, stored))

    def _discard(self, logged: LoggedEpisode) -> None:
        file, logged.file = logged.file, None
        try:
            if file is not None:
                file.discard()
        except OSError as error:
            # It stays in `open/`; the next start keeps it as aborted.
            self._error = f"{self.directory}: what is left of episode {logged.episode} cannot be removed: {error}"

    def _commit(self) -> None:
        """Index what has ended, in one transaction, and acknowledge it."""
        ended, self._ended = self._ended, []
        rows = [*self._not_indexed, *(row for row, _, _ in ended)]
        try:
            sync_directory(self.directory / "done")
            self.index.add(rows)
        except (OSError, DatabaseError) as error:
            # The files are whole and stay; they are indexed with the next ones, or by the next start.
            self._not_indexed = rows
            for _, logged, stored in ended:
                with self._changed:
                    self._queue.give_up(logged, str(error))
                stored(logged.lost)
            return
        self._not_indexed = []
        aborted = sum(row.status == "aborted" for row in rows)
        with self._changed:
            self._counts["aborted"] += aborted
            self._counts["stored"] += len(rows) - aborted
        for _, logged, stored in ended:
            stored(logged.lost or None)
        self._kept_bytes += sum(row.bytes for row in rows)
        self._retain()

    def _retain(self) -> None:
        """Delete episodes that are not needed any more while `done/` is over its limit."""
        if self._kept_bytes <= self._keep_limit_bytes:
            return
        try:
            # The index first: a row must not promise a file that is gone. Left-over files go at the next start.
            failures_before = time.time() - self._keep_failures_s
            for row in self.index.retire(self._kept_bytes - self._keep_limit_bytes, failures_before):
                self._kept_bytes -= row.bytes
                self._counts["deleted"] += 1
                self.index.path(row).unlink(missing_ok=True)
        except (OSError, DatabaseError) as error:
            self._error = f"{self.directory}: old episodes cannot be deleted: {error}"

    def _abandon(self) -> None:
        """Nobody may wait for a writer that is gone. After a close nothing is left to do here."""
        with self._changed:
            if not self._closed:
                self._closed = self._error = WRITER_DIED
                self._counts["lost"] += len(self._episodes)
                self._episodes.clear()
            waiting = [self._queue.take().stored for _ in range(len(self._queue))]
        for stored in [*(stored for _, _, stored in self._ended), *waiting]:
            if stored is not None:
                stored(WRITER_DIED)


def _size_bytes(record: DecisionRecord | ExecutedRecord | EndRecord) -> int:
    return RECORD_OVERHEAD_BYTES + sum(tensor.data.nbytes for tensor in record.tensors.values())


def _ignore(_error: str | None) -> None:
    """For ends that nobody waits for."""
