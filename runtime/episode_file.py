"""One episode's file while it is written, and the row of the index that follows from its records."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from bridge.errors import FieldtuneError
from runtime.durable import write_all
from runtime.episode import DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord, Record
from runtime.index import EpisodeRow
from runtime.records import frame

SUFFIX = ".ep"
# An episode's id is a file name and comes from outside: nothing that means something to a file system.
EPISODE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class EpisodeError(FieldtuneError):
    """An episode's file that cannot be used."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path
        self.what = what


class Tally:
    """Counts an episode's records as they go by."""

    def __init__(self, start: EpisodeStart) -> None:
        self.start = start
        self.decisions = 0
        self.steps = 0
        """Executed environment steps."""
        self._versions: dict[str, None] = {}

    def add(self, record: Record) -> None:
        """Count one record."""
        match record:
            case DecisionRecord():
                self.decisions += 1
                self._versions[record.version] = None
            case ExecutedRecord():
                sent = record.tensors.get("sent")
                self.steps += sent.shape[0] if sent is not None and sent.shape else 0

    def aborted(self, reason: str) -> EndRecord:
        """The end of an episode that stopped here."""
        return EndRecord(status="aborted", steps=self.steps, reason=reason, tensors={})

    def row(self, end: EndRecord, size_bytes: int, ended_unix_s: float) -> EpisodeRow:
        """The row of the index."""
        start = self.start
        return EpisodeRow(
            seq=0,
            episode=start.episode,
            file=start.episode + SUFFIX,
            task=start.task,
            seed=start.seed,
            source=start.source,
            explore=start.explore,
            status=end.status,
            steps=end.steps,
            decisions=self.decisions,
            versions=tuple(self._versions),
            client=start.client,
            started_unix_s=start.started_unix_s,
            ended_unix_s=ended_unix_s,
            reason=end.reason,
            bytes=size_bytes,
        )


class EpisodeFile:
    """`open/ID.ep` from its first record to its last, then `done/ID.ep`. Methods raise `OSError` or `RecordError`."""

    def __init__(self, directory: Path, start: EpisodeStart) -> None:
        """Create the file and write the first record."""
        name = start.episode + SUFFIX
        self._path, self._done = directory / "open" / name, directory / "done" / name
        if self._done.exists():
            raise FileExistsError(f"{self._done} exists; an episode's id is used once")
        self._descriptor: int | None = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self.tally = Tally(start)
        self.size_bytes = 0
        try:
            self.write(start)
        except BaseException:
            self.discard()
            raise

    def write(self, record: Record) -> int:
        """Append one record; returns its size in bytes. After an error the file must be discarded."""
        assert self._descriptor is not None
        header, payload = frame(record)
        write_all(self._descriptor, header, payload)
        size = len(header) + len(payload)
        self.size_bytes += size
        self.tally.add(record)
        return size

    def finish(self, end: EndRecord) -> EpisodeRow:
        """Write the last record, put all on the disk, move the file to `done/`. The caller syncs that directory."""
        assert self._descriptor is not None
        self.write(end)
        os.fsync(self._descriptor)
        self._close()
        self._path.rename(self._done)
        return self.tally.row(end, self.size_bytes, time.time())

    def discard(self) -> None:
        """Remove the file and so free its space."""
        try:
            self._close()
        finally:
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        # Forgotten first: a descriptor is closed even where close() reports an error, and its number may be given anew.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
