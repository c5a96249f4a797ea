"""The episodes that are running now, read from the log's open files as they grow."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bridge.backend import UInt8
from bridge.messages import WireError
from runtime.episode import DecisionRecord, EpisodeStart, Record
from runtime.episode_file import SUFFIX
from runtime.records import RecordError, scan_records, tensor_arrays


@dataclass(slots=True)
class Running:
    """One episode as far as it has come."""

    start: EpisodeStart
    version: str = ""
    """Of the last decision."""
    step: int = 0
    """Environment step of the last decision."""
    decision: int = 0
    ended: bool = False
    images: dict[str, UInt8] = field(default_factory=dict)
    """Camera -> uint8 `[H, W, 3]`, what the last decision saw."""

    def add(self, record: Record) -> None:
        """Take in one record."""
        if isinstance(record, DecisionRecord):
            arrays = tensor_arrays(record.tensors)
            self.version, self.step, self.decision = record.version, record.step, record.decision
            self.images = {
                name.removeprefix("image/"): array for name, array in arrays.items() if name.startswith("image/")
            }


MOST_CLIENTS = 32  # whose last pictures are kept: a bridge that is started again has another name by default


class OpenEpisodes:
    """Follows `DIRECTORY/open`. Each look reads only what has been written since the last one. Thread-safe."""

    def __init__(self, directory: Path, evaluations: Path | None = None) -> None:
        """`directory` is that of the log, `evaluations` holds others; they need not exist yet."""
        self._directory, self._evaluations = directory / "open", evaluations
        self._lock = threading.Lock()
        self._offsets: dict[Path, int] = {}
        self._running: dict[Path, Running] = {}
        self._newest: dict[str, Running] = {}

    def look(self) -> dict[str, Running]:
        """Client -> its newest episode that has begun to act; one that has just ended stays until the next."""
        with self._lock:
            paths = [*self._directory.glob(f"*{SUFFIX}")]
            if self._evaluations is not None:
                paths += self._evaluations.glob(f"*/open/*{SUFFIX}")
            self._offsets = {path: self._offsets.get(path, 0) for path in paths}
            for path, running in self._running.items():
                running.ended = path not in self._offsets
            self._running = {path: running for path, running in self._running.items() if path in self._offsets}
            for path in paths:
                # Torn at the end: it is being written, the next look has the rest. Gone: it has just ended.
                with suppress(RecordError, WireError, FileNotFoundError):
                    self._read_on(path)
            for running in sorted(self._running.values(), key=lambda running: running.start.started_unix_s):
                if running.decision:
                    self._newest.pop(running.start.client, None)
                    self._newest[running.start.client] = running
            while len(self._newest) > MOST_CLIENTS:
                del self._newest[next(iter(self._newest))]
            return dict(self._newest)

    def _read_on(self, path: Path) -> None:
        with path.open("rb") as file:
            for record, offset in scan_records(file, self._offsets[path]):
                if isinstance(record, EpisodeStart):
                    self._running[path] = Running(record)
                elif path in self._running:
                    self._running[path].add(record)
                self._offsets[path] = offset
