"""What the log does when it starts: finish what a crash has left, and bring files and index into agreement."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from runtime.durable import sync_directory, write_all
from runtime.episode import FORMAT, EndRecord, EpisodeStart
from runtime.episode_file import EPISODE_ID, SUFFIX, EpisodeError, Tally
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.records import RecordError, frame, scan_records

BATCH = 100  # files read between two notes of that: what a start that is killed has to read again, at most


def recover(directory: Path, index: EpisodeIndex) -> list[str]:
    """Make every readable episode in `directory` a closed and indexed one; returns what went wrong, in words.

    The directory must be locked. A file in `open/` is cut after its last good record and closed as aborted (one
    that had ended is only moved on); files in `done/` that the index does not know are added. What cannot be
    read is moved to `damaged/`; only what retention had marked is deleted. If it is killed, the next one goes on
    with the files that it had not read. Raises `runtime.database.DatabaseError`.
    """
    problems: list[str] = []
    known = index.known()

    def close(path: Path) -> None:
        if not path.stat().st_size:
            path.unlink()  # created, and nothing written yet
            return
        done = directory / "done" / path.name
        if path.stem in known or done.exists():
            raise EpisodeError(path, "another episode of this id is in the log")
        _close_torn(path)
        path.rename(done)

    _each(sorted((directory / "open").iterdir()), close, directory, problems)
    sync_directory(directory / "done")

    noted = index.recovered()
    rows: list[EpisodeRow] = []
    not_noted: list[EpisodeRow] = []
    present = set()

    def add(path: Path) -> None:
        if path.stem in noted:
            rows.append(noted[path.stem])
        elif path.stem not in known:
            rows.append(_row_of(path))
            not_noted.append(rows[-1])
            if len(not_noted) == BATCH:
                index.note_recovered(not_noted)
                not_noted.clear()
        elif known[path.stem]:
            path.unlink()  # retention was interrupted between the index and the file
            return
        present.add(path.stem)

    _each(sorted((directory / "done").iterdir()), add, directory, problems)
    rows.sort(key=lambda row: row.started_unix_s)  # the names of the files say nothing of which came first
    if rows:
        index.add_recovered(rows)
    index.restore_labels()
    gone = [episode for episode, deleted in known.items() if not deleted and episode not in present]
    if gone:
        index.mark_deleted(gone)
        problems.append(f"{len(gone)} files of {directory / 'done'} are gone, {gone[0]}{SUFFIX} among them")
    return problems


def _each(paths: list[Path], action: Callable[[Path], None], directory: Path, problems: list[str]) -> None:
    for path in paths:
        try:
            action(path)
        except EpisodeError as error:
            aside = directory / "damaged" / path.name
            problems.append(f"{error}; moved to {aside}")
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
        except OSError as error:
            # A full disk, say: the file stays where it is for the next start, and the robot can work meanwhile.
            problems.append(f"{path}: {error.strerror}; left for the next start")


def _close_torn(path: Path) -> None:
    """Cut the file after its last good record, let it end as aborted if it has no end, put it on the disk."""
    tally, end, good_bytes, records = _read(path, until_damage=True)
    with path.open("r+b") as file:
        file.truncate(good_bytes)
        if end is None:
            last = tally.aborted(f"the process ended before the episode; {records} records are left")
            file.seek(good_bytes)
            write_all(file.fileno(), *frame(last))
        os.fsync(file.fileno())


def _row_of(path: Path) -> EpisodeRow:
    """The row of a file in `done/`."""
    tally, end, size_bytes, _ = _read(path, until_damage=False)
    if end is None:
        raise EpisodeError(path, "the last record is missing")
    return tally.row(end, size_bytes, path.stat().st_mtime)


def _read(path: Path, *, until_damage: bool) -> tuple[Tally, EndRecord | None, int, int]:
    """Tally, end, bytes and number of the good records. Raises `EpisodeError` if there is no first record."""
    if path.suffix != SUFFIX or not EPISODE_ID.fullmatch(path.stem) or not path.is_file():
        raise EpisodeError(path, f"not an episode; expected files ID{SUFFIX} only")
    tally: Tally | None = None
    good_bytes = records = 0
    with path.open("rb") as file:
        try:
            for record, good_bytes in scan_records(file):
                records += 1
                if tally is None:
                    if not isinstance(record, EpisodeStart) or record.format != FORMAT or record.episode != path.stem:
                        raise EpisodeError(path, f"does not begin with the start (format {FORMAT}) of {path.stem}")
                    tally = Tally(record)
                elif isinstance(record, EndRecord):
                    if not until_damage and good_bytes != path.stat().st_size:
                        raise EpisodeError(path, "goes on after its last record")
                    return tally, record, good_bytes, records
                else:
                    tally.add(record)
        except RecordError as error:
            if not until_damage:
                raise EpisodeError(path, str(error)) from error
    if tally is None:
        raise EpisodeError(path, "the first record is missing")
    return tally, None, good_bytes, records
