"""An episode of the log for its player: what was sent, and where in the file each picture is; no pictures in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bridge.backend import UInt8
from bridge.messages import RULES, WireError
from runtime.episode import DecisionRecord, EpisodeStart, ExecutedRecord, Record
from runtime.episode_file import EpisodeError
from runtime.reading import read_start
from runtime.records import RecordError, scan_records, tensor_arrays


@dataclass(slots=True)
class Seen:
    """One decision: its number, environment step and version, and at which byte of the file its record begins."""

    number: int
    step: int
    version: str
    offset: int


@dataclass(slots=True)
class Logged:
    """What the player shows of one episode."""

    path: Path
    start: EpisodeStart
    decisions: list[Seen] = field(default_factory=list)
    sent: list[tuple[int, list[float]]] = field(default_factory=list)
    """Environment step, and the action that was sent there."""
    changed: dict[str, list[int]] = field(default_factory=dict)
    """Rule of the safety stage -> the steps that it changed."""

    def picture(self, at: int, camera: str) -> UInt8:
        """What decision `at` (0, 1, ...) saw, uint8 `[H, W, 3]`. Raises `LookupError`, or `EpisodeError` if the file is
        gone.
        """
        with _readable(self.path) as file:
            record, _ = next(scan_records(file, self.decisions[at].offset))
        assert isinstance(record, DecisionRecord)
        return tensor_arrays({camera: record.tensors[f"image/{camera}"]})[camera]


def read_logged(path: Path) -> Logged:
    """Read an episode's file once. Raises `EpisodeError` for one that is gone or damaged."""
    logged = Logged(path, read_start(path))
    steps: dict[int, int] = {}
    try:
        with _readable(path) as file:
            for record, begins in _with_beginnings(file):
                if isinstance(record, DecisionRecord):
                    steps[record.decision] = record.step
                    logged.decisions.append(Seen(record.decision, record.step, record.version, begins))
                elif isinstance(record, ExecutedRecord):
                    _execute(logged, record, steps[record.decision] + record.start)
    except (RecordError, WireError, KeyError) as error:
        raise EpisodeError(path, f"is damaged: {error}") from error
    return logged


def _with_beginnings(file: BinaryIO) -> Iterator[tuple[Record, int]]:
    begins = 0
    for record, ends in scan_records(file):
        yield record, begins
        begins = ends


def _execute(logged: Logged, record: ExecutedRecord, step: int) -> None:
    arrays = tensor_arrays(record.tensors)
    logged.sent += [(step + i, [round(float(value), 4) for value in action]) for i, action in enumerate(arrays["sent"])]
    for i, bits in enumerate(arrays.get("rules", ())):
        for bit, rule in enumerate(RULES):
            if int(bits) >> bit & 1:
                logged.changed.setdefault(rule, []).append(step + i)


def _readable(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise EpisodeError(path, f"cannot be read: {error.strerror}") from error
