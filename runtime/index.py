"""The index of an episode log: one row an episode, in the order in which they were stored."""

from __future__ import annotations

import builtins
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bridge.messages import Label
from runtime.database import Database, DatabaseError
from runtime.episode import End, Source
from runtime.labels import StoredLabel, append_label, read_labels

_SCHEMA = (
    # AUTOINCREMENT: a seq is never given twice, so a reader's cursor can only move forward.
    """CREATE TABLE IF NOT EXISTS episodes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, episode TEXT NOT NULL UNIQUE, file TEXT NOT NULL, task TEXT NOT NULL,
        seed INTEGER NOT NULL, source TEXT NOT NULL, explore INTEGER NOT NULL, status TEXT NOT NULL,
        steps INTEGER NOT NULL, decisions INTEGER NOT NULL, versions TEXT NOT NULL, client TEXT NOT NULL,
        started_unix_s REAL NOT NULL, ended_unix_s REAL NOT NULL, reason TEXT NOT NULL, bytes INTEGER NOT NULL,
        deleted INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS on_disk ON episodes (seq) WHERE deleted = 0",
    "CREATE INDEX IF NOT EXISTS unjudged ON episodes (episode) WHERE status = 'unjudged'",
    "CREATE TABLE IF NOT EXISTS taken (one INTEGER PRIMARY KEY CHECK (one = 1), through_seq INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS held (episode TEXT PRIMARY KEY)",
    """CREATE TABLE IF NOT EXISTS labels (
        number INTEGER PRIMARY KEY AUTOINCREMENT, episode TEXT NOT NULL, label TEXT NOT NULL, who TEXT NOT NULL,
        unix_s REAL NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS labels_of ON labels (episode)",
    # Rows of files that a recovery has read and not added yet, as JSON: they get their seq together, in order.
    "CREATE TABLE IF NOT EXISTS recovered (episode TEXT PRIMARY KEY, row TEXT NOT NULL)",
    # An episode as it counts: its last label is above what the robot said.
    """CREATE VIEW IF NOT EXISTS rated AS SELECT
        seq, e.episode, file, task, seed, source, explore,
        CASE label WHEN 'discard' THEN 'aborted' WHEN 'success' THEN 'success' WHEN 'failure' THEN 'failure'
            ELSE status END AS status,
        steps, decisions, versions, client, started_unix_s, ended_unix_s,
        CASE label WHEN 'discard' THEN 'discarded by ' || who ELSE reason END AS reason,
        bytes, deleted, COALESCE(who, '') AS labelled_by
        FROM episodes e LEFT JOIN labels l
        ON l.number = (SELECT MAX(number) FROM labels WHERE labels.episode = e.episode)""",
)


class EpisodeRow(Struct, frozen=True, kw_only=True):
    """What the index knows of an episode."""

    seq: int
    """1, 2, 3, ... in the order of storing; 0 in a row that is not in the index yet."""
    episode: str
    file: str
    """Name of the file in `done/`."""
    task: str
    seed: int
    source: Source
    explore: bool
    status: End
    """As it counts: a label is above what the robot said, and a discarded episode counts as aborted."""
    steps: int
    decisions: int
    versions: tuple[str, ...]
    """The policy versions that acted, in order of first use."""
    client: str
    started_unix_s: float
    ended_unix_s: float
    reason: str
    """Why it was aborted; empty otherwise."""
    bytes: int
    deleted: bool = False
    """The file is gone: retention has deleted it, or somebody else."""
    labelled_by: str = ""
    """Who has labelled it; empty if nobody has."""


class LabelRow(Struct, frozen=True, kw_only=True):
    """One label that somebody gave."""

    number: int
    """1, 2, 3, ... over all episodes."""
    episode: str
    label: Label
    who: str
    unix_s: float
    awaited: bool
    """It is the first of an episode that the robot could not judge."""


class Tally(Struct, frozen=True, kw_only=True):
    """Episodes of one version and status, summed up."""

    version: str
    status: End
    episodes: int
    steps: int
    """Of all of them together."""
    steps_squared: int
    """Sum of the squares."""


_COLUMNS = EpisodeRow.__struct_fields__
_STORED = _COLUMNS[1:-1]
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM rated"  # noqa: S608 (names of our own columns)
_INSERT = (
    f"INSERT INTO episodes ({', '.join(_STORED)}) VALUES ({', '.join('?' * len(_STORED))}) "  # noqa: S608
    "ON CONFLICT (episode) DO NOTHING"
)
_INSERT_LABEL = "INSERT INTO labels (episode, label, who, unix_s) VALUES (?, ?, ?, ?)"
_FILTER = (
    " WHERE (?1 IS NULL OR task = ?1) AND (?2 IS NULL OR status = ?2) AND (?3 IS NULL OR EXISTS "
    "(SELECT 1 FROM json_each(versions) WHERE substr(value, 1, length(?3)) = ?3))"
)


class EpisodeIndex:
    """`DIRECTORY/index.sqlite`. Any number of processes and threads may read and write it at once.

    Methods raise `runtime.database.DatabaseError`. Reading one that is not there gives nothing and makes nothing.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is that of the log."""
        self.directory = directory
        self._labels = directory / "labels.jsonl"
        self._database = Database(directory / "index.sqlite", _SCHEMA, version=4)

    def after(self, seq: int, limit: int = 1000) -> builtins.list[EpisodeRow]:
        """The first `limit` rows above `seq`, in order; all statuses, deleted ones too."""
        return [
            _row(values)
            for values in self._database.rows(f"{_SELECT} WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
        ]

    def get(self, episode: str) -> EpisodeRow | None:
        """The row of an episode, by its whole id."""
        found = self._database.rows(f"{_SELECT} WHERE episode = ?", (episode,))
        return _row(found[0]) if found else None

    def list(
        self, *, limit: int, task: str | None = None, status: End | None = None, version: str | None = None
    ) -> builtins.list[EpisodeRow]:
        """The last `limit` rows that fit, newest first. `version` (an id or its beginning) is one that acted in it."""
        query = f"{_SELECT}{_FILTER} ORDER BY seq DESC LIMIT ?4"
        return [_row(values) for values in self._database.rows(query, (task, status, version, limit))]

    def count(self, *, task: str | None = None, status: End | None = None, version: str | None = None) -> int:
        """How many rows fit; see `list`."""
        found = self._database.rows(f"SELECT COUNT(*) FROM rated{_FILTER}", (task, status, version))  # noqa: S608
        return int(found[0][0]) if found else 0

    def waiting(self) -> int:
        """How many episodes wait for somebody to say how they went."""
        found = self._database.rows(
            "SELECT COUNT(*) FROM episodes WHERE status = 'unjudged' AND episode NOT IN (SELECT episode FROM labels)"
        )
        return int(found[0][0]) if found else 0

    def recent_successes(self, task: str, limit: int) -> builtins.list[bool]:
        """Whether each of the last `limit` episodes of a task of which that is known succeeded, oldest first."""
        found = self._database.rows(
            "SELECT status FROM rated WHERE task = ? AND status NOT IN ('aborted', 'unjudged') "
            "ORDER BY seq DESC LIMIT ?",
            (task, limit),
        )
        return [status == "success" for (status,) in reversed(found)]

    def next_to(
        self, seq: int, older: int, *, task: str | None = None, status: End | None = None, version: str | None = None
    ) -> str | None:
        """The id of the episode that fits (see `list`) just before `seq` (`older` 1) or just after it (-1); None at the
        end.
        """
        where, order = ("seq < ?4", "DESC") if older > 0 else ("seq > ?4", "ASC")
        query = f"SELECT episode FROM rated{_FILTER} AND {where} ORDER BY seq {order} LIMIT 1"  # noqa: S608 (no input)
        found = self._database.rows(query, (task, status, version, seq))
        return str(found[0][0]) if found else None

    def tallies(self, last: int) -> builtins.list[Tally]:
        """The last `last` episodes by version and status; those in which several versions acted are left out."""
        rows = self._database.rows(
            "SELECT json_extract(versions, '$[0]'), status, COUNT(*), SUM(steps), SUM(steps * steps) FROM rated "
            "WHERE seq > (SELECT MAX(seq) FROM episodes) - ? AND json_array_length(versions) = 1 GROUP BY 1, 2",
            (last,),
        )
        return [
            Tally(version=version, status=status, episodes=episodes, steps=steps, steps_squared=squared)
            for version, status, episodes, steps, squared in rows
        ]

    def path(self, row: EpisodeRow) -> Path:
        """The file of an episode; it may be gone if `row.deleted`, now or since the row was read."""
        return self.directory / "done" / row.file

    def hold(self, taken_through_seq: int, taken_labels: int, held: Iterable[str]) -> None:
        """Say what may be deleted to save space: rows up to `taken_through_seq` that are not in `held` (episode ids).
        One that the robot could not judge stays, too, until its label is among the first `taken_labels`.

        Replaces what was said before. Call it only once the state that counts on it (the trainer's checkpoint with its
        cursor and buffer) is on the disk. Until the first call nothing is ever deleted.
        """
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO taken VALUES (1, ?)", (taken_through_seq,))
            connection.execute("DELETE FROM held")
            connection.executemany("INSERT OR IGNORE INTO held VALUES (?)", [(episode,) for episode in held])
            connection.execute(
                "INSERT OR IGNORE INTO held SELECT episode FROM episodes WHERE status = 'unjudged' AND deleted = 0 "
                "AND seq <= ? AND episode NOT IN (SELECT episode FROM labels WHERE number <= ?)",
                (taken_through_seq, taken_labels),
            )

    def hold_too(self, episodes: Iterable[str]) -> None:
        """These stay, too, until the next `hold`: somebody is about to read them."""
        with self._database.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO held VALUES (?)", [(episode,) for episode in episodes])

    # --- labels ---------------------------------------------------------------------------------------------------

    def label(self, episode: str, label: Label, who: str) -> EpisodeRow:
        """Say how an episode went, now or again; gives its row. It is on the disk on return. Raises `DatabaseError` if
        there is no such episode.
        """
        with self._database.transaction() as connection:
            if not connection.execute("SELECT 1 FROM episodes WHERE episode = ?", (episode,)).fetchone():
                raise DatabaseError(f"no episode {episode} in {self.directory}")
            # The file first: the index can be made anew from it, and not the other way round.
            given = StoredLabel(episode, label, who, time.time())
            append_label(self._labels, given)
            connection.execute(_INSERT_LABEL, msgspec.structs.astuple(given))
        row = self.get(episode)
        assert row is not None
        return row

    def labels_after(self, number: int) -> builtins.list[LabelRow]:
        """All labels above `number`, in the order in which they were given."""
        rows = self._database.rows(
            "SELECT number, episode, label, who, unix_s, status = 'unjudged' AND NOT EXISTS (SELECT 1 FROM labels "
            "before WHERE before.episode = labels.episode AND before.number < labels.number) "
            "FROM labels JOIN episodes USING (episode) WHERE number > ? ORDER BY number",
            (number,),
        )
        return [
            LabelRow(number=number, episode=episode, label=label, who=who, unix_s=unix_s, awaited=bool(awaited))
            for number, episode, label, who, unix_s, awaited in rows
        ]

    # --- for the log ----------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[EpisodeRow]) -> None:
        """Add rows in one transaction, in their order; the index gives the seq. An episode known already stays."""
        with self._database.transaction() as connection:
            connection.executemany(_INSERT, map(_values, rows))

    def note_recovered(self, rows: Sequence[EpisodeRow]) -> None:
        """Keep rows for a recovery that has not read all files yet; they are not in the index by that."""
        values = [(row.episode, msgspec.json.encode(row).decode()) for row in rows]
        with self._database.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO recovered VALUES (?, ?)", values)

    def recovered(self) -> dict[str, EpisodeRow]:
        """What `note_recovered` has kept, by episode."""
        found = self._database.rows("SELECT episode, row FROM recovered")
        return {episode: msgspec.json.decode(row, type=EpisodeRow) for episode, row in found}

    def add_recovered(self, rows: Sequence[EpisodeRow]) -> None:
        """As `add`, and what `note_recovered` has kept is not needed any more. Nobody ever sees a part of them."""
        with self._database.transaction() as connection:
            connection.executemany(_INSERT, map(_values, rows))
            connection.execute("DELETE FROM recovered")

    def restore_labels(self) -> None:
        """Take in the labels of the file that are not in the index: all of them in one that was made anew."""
        with self._database.transaction() as connection:
            (there,) = connection.execute("SELECT COUNT(*) FROM labels").fetchone()
            missing = [msgspec.structs.astuple(label) for label in read_labels(self._labels)[there:]]
            connection.executemany(_INSERT_LABEL, missing)

    def known(self) -> dict[str, bool]:
        """All episode ids, and whether their file is deleted."""
        return {
            episode: bool(deleted) for episode, deleted in self._database.rows("SELECT episode, deleted FROM episodes")
        }

    def bytes_on_disk(self) -> int:
        """Size of all episodes that are not deleted."""
        found = self._database.rows("SELECT COALESCE(SUM(bytes), 0) FROM episodes WHERE deleted = 0")
        return int(found[0][0]) if found else 0

    def retire(self, need_bytes: int, failures_before_unix_s: float = math.inf) -> builtins.list[EpisodeRow]:
        """Mark the oldest episodes that may go as deleted until they free `need_bytes`; the caller removes the files.

        Failures and time-outs may go only if they ended before `failures_before_unix_s`, what waits for somebody to say
        how it went not at all. Gives fewer, or none, if too few are taken and not held.
        """
        retired: list[EpisodeRow] = []
        with self._database.transaction() as connection:
            candidates = connection.execute(
                f"{_SELECT} WHERE deleted = 0 AND seq <= (SELECT through_seq FROM taken) "  # noqa: S608
                "AND episode NOT IN (SELECT episode FROM held) "
                "AND status != 'unjudged' AND (status NOT IN ('failure', 'timeout') OR ended_unix_s < ?) ORDER BY seq",
                (failures_before_unix_s,),
            )
            for values in candidates:
                if need_bytes <= 0:
                    break
                retired.append(_row(values))
                need_bytes -= retired[-1].bytes
            _mark_deleted(connection, [row.episode for row in retired])
        return retired

    def mark_deleted(self, episodes: Iterable[str]) -> None:
        """Note that the files of these episodes are gone."""
        with self._database.transaction() as connection:
            _mark_deleted(connection, episodes)

    def close(self) -> None:
        """Close the file; idempotent, and the next call opens it again."""
        self._database.close()


def _mark_deleted(connection: Any, episodes: Iterable[str]) -> None:
    connection.executemany("UPDATE episodes SET deleted = 1 WHERE episode = ?", [(episode,) for episode in episodes])


def _values(row: EpisodeRow) -> tuple[Any, ...]:
    """The row for `_INSERT`."""
    return tuple(
        msgspec.json.encode(v).decode() if isinstance(v, tuple) else v for v in msgspec.structs.astuple(row)[1:-1]
    )


def _row(values: tuple[Any, ...]) -> EpisodeRow:
    named = dict(zip(_COLUMNS, values, strict=True))
    named["versions"] = msgspec.json.decode(named["versions"])
    # Lax, for the booleans: SQLite has integers only.
    return msgspec.convert(named, EpisodeRow, strict=False)
