"""The versions of a run: where each comes from, and which one is live now and was before."""

from __future__ import annotations

import builtins
import math
import sqlite3
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from runtime.database import Database, DatabaseError

SHORTEST_PREFIX = 4

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS versions (
        number INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL UNIQUE, parent TEXT NOT NULL,
        made TEXT NOT NULL, created_unix_s REAL NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS history (
        number INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL REFERENCES versions (version),
        previous TEXT NOT NULL, why TEXT NOT NULL, unix_s REAL NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS stages (
        number INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL REFERENCES versions (version),
        stage TEXT NOT NULL, why TEXT NOT NULL, who TEXT NOT NULL, evidence TEXT NOT NULL, unix_s REAL NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS pins (
        number INTEGER PRIMARY KEY AUTOINCREMENT, who TEXT NOT NULL, pinned INTEGER NOT NULL, unix_s REAL NOT NULL)""",
)
_LIVE = "SELECT version, previous FROM history ORDER BY number DESC LIMIT 1"
_SELECT = f"""SELECT version, parent, made, created_unix_s, number,
    version IS (SELECT version FROM ({_LIVE})) FROM versions"""  # noqa: S608 (no input in it)


class RegistryError(DatabaseError):
    """The registry does not know such a version, or cannot be read or written."""


class VersionRow(Struct, frozen=True, kw_only=True):
    """One version."""

    version: str
    parent: str
    """The version it was trained from; empty for a root."""
    made: dict[str, Any]
    """How it was made."""
    created_unix_s: float
    """When it was added."""
    live: bool
    number: int
    """1, 2, 3, ... in the order of adding."""


class LiveChange(Struct, frozen=True, kw_only=True):
    """One change of the live version."""

    version: str
    previous: str
    """What a rollback from here brings back; empty if nothing. See `Registry.previous`."""
    why: str
    unix_s: float


Stage = Literal["candidate", "canary", "live", "retired", "rejected"]
"""candidate: made, and at the gate. canary: drives a share of the episodes. live: drives the others. retired: was live.
rejected: will never be live, unless by hand."""


class StageChange(Struct, frozen=True, kw_only=True):
    """One step of a version, with what led to it."""

    version: str
    stage: Stage
    why: str
    who: str
    """`rule`, or who did it by hand."""
    evidence: dict[str, Any]
    """Figures: of the gate, or of the canary."""
    unix_s: float


class Registry:
    """`runs/NAME/registry.sqlite`. Any number of processes and threads may use it at once.

    Methods raise `RegistryError`. Reading one that is not there gives nothing and makes nothing.
    """

    def __init__(self, path: Path) -> None:
        """`path` is the SQLite file."""
        self.path = path
        self._database = Database(path, _SCHEMA, RegistryError, version=2)

    def add(self, version: str, *, parent: str, made: dict[str, Any]) -> None:
        """Remember a version; adding it again changes nothing."""
        values = (version, parent, msgspec.json.encode(made).decode(), time.time())
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO versions (version, parent, made, created_unix_s) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (version) DO NOTHING",
                values,
            )

    def set_live(self, version: str, *, why: str) -> None:
        """Make a version live and note when and why; nothing happens if it is live already."""
        with self._database.transaction() as connection:
            if not connection.execute("SELECT 1 FROM versions WHERE version = ?", (version,)).fetchone():
                raise RegistryError(f"{self.path}: unknown version {version!r}; add it before it goes live")
            trail = _trail(connection)
            if trail and trail[-1] == version:
                return
            if version in trail:
                trail = trail[: trail.index(version)]
            connection.execute(
                "INSERT INTO history (version, previous, why, unix_s) VALUES (?, ?, ?, ?)",
                (version, trail[-1] if trail else "", why, time.time()),
            )

    def enter(
        self, version: str, stage: Stage, *, why: str, who: str = "rule", evidence: dict[str, Any] | None = None
    ) -> None:
        """Note that a version has come to a stage. What serves is changed by `set_live` alone."""
        values = (version, stage, why, who, msgspec.json.encode(evidence or {}).decode(), time.time())
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO stages (version, stage, why, who, evidence, unix_s) VALUES (?, ?, ?, ?, ?, ?)", values
            )

    def stages(self, version: str = "") -> builtins.list[StageChange]:
        """The steps of a version (all of it), or of all, oldest first."""
        rows = self._database.rows(
            "SELECT version, stage, why, who, evidence, unix_s FROM stages "
            "WHERE ?1 = '' OR version = ?1 ORDER BY number",
            (version,),
        )
        return [
            StageChange(
                version=name, stage=stage, why=why, who=who, evidence=msgspec.json.decode(evidence), unix_s=unix_s
            )
            for name, stage, why, who, evidence, unix_s in rows
        ]

    def stage(self, version: str) -> Stage | None:
        """Where a version is; None if it never was staged, as where every version goes live at once."""
        found = self.stages(version)
        return found[-1].stage if found else None

    def acted(self) -> builtins.list[str]:
        """The versions that drove episodes, oldest first, each as often as its turn came: live ones, and canaries.
        After one that was rejected it is the live version's turn again.
        """
        # The clock may have been put back: no change sorts before those that were noted before it.
        changes: builtins.list[tuple[float, str, str]] = []
        first_live_s: dict[str, float] = {}
        time_s = -math.inf
        for went_live in self.history():
            time_s = max(time_s, went_live.unix_s)
            changes.append((time_s, "live", went_live.version))
            first_live_s.setdefault(went_live.version, time_s)
        time_s = -math.inf
        for change in self.stages():
            time_s = max(time_s, change.unix_s)
            if change.stage == "live":
                # It stands in the history already.
                time_s = max(time_s, first_live_s.get(change.version, time_s))
            else:
                changes.append((time_s, change.stage, change.version))
        acted: builtins.list[str] = []
        live = ""
        for _, stage, version in sorted(changes, key=lambda change: change[0]):
            live = version if stage == "live" else live
            turn = {"live": live, "canary": version, "rejected": live}.get(stage, "")
            if turn and turn != (acted[-1] if acted else ""):
                acted.append(turn)
        return acted

    def pin(self, who: str, *, pinned: bool) -> None:
        """Keep the live version until it is unpinned: no rule replaces it."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO pins (who, pinned, unix_s) VALUES (?, ?, ?)", (who, int(pinned), time.time())
            )

    def pinned(self) -> str:
        """Who has pinned the live version; empty if nobody has."""
        found = self._database.rows("SELECT who, pinned FROM pins ORDER BY number DESC LIMIT 1")
        return str(found[0][0]) if found and found[0][1] else ""

    def live(self) -> str | None:
        """The live version; None if there was never one."""
        found = self._database.rows(_LIVE)
        return str(found[0][0]) if found else None

    def previous(self) -> str | None:
        """The version that a rollback brings back; None if there is none.

        Versions that went live form a trail, and one that goes live again cuts the trail back to itself. So after A, B,
        C the previous of C is B; rolled back to B it is A (not C, which somebody has just left); if D then goes live it
        is B. Rolling back again and again ends at the first version and never goes round in circles.
        """
        found = self._database.rows(_LIVE)
        return str(found[0][1]) or None if found else None

    def get(self, version_or_prefix: str) -> VersionRow:
        """The version with this id, or the only one whose id begins so (four characters or more)."""
        if exact := self._rows("WHERE version = ?", version_or_prefix):
            return exact[0]
        if len(version_or_prefix) < SHORTEST_PREFIX:
            raise RegistryError(f"{version_or_prefix!r} is too short; give at least {SHORTEST_PREFIX} characters")
        found = self._rows("WHERE substr(version, 1, length(?1)) = ?1", version_or_prefix)
        if not found:
            raise RegistryError(
                f"{self.path}: no version begins with {version_or_prefix!r}; `fieldtune policies list` shows all"
            )
        if len(found) > 1:
            names = ", ".join(row.version[: len(version_or_prefix) + 8] for row in found[:5])
            raise RegistryError(
                f"{version_or_prefix!r} is the beginning of {len(found)} versions ({names}); give more of it"
            )
        return found[0]

    def list(self) -> builtins.list[VersionRow]:
        """All versions in the order of adding."""
        return self._rows("ORDER BY number")

    def first(self) -> VersionRow:
        """The version that the run started from, as a rule what supervised fine-tuning made. Raises `RegistryError`."""
        served = self.served()
        if not served:
            raise RegistryError(f"{self.path}: no version has been live yet")
        return served[0]

    def served(self) -> builtins.list[VersionRow]:
        """The versions that were ever live, in the order in which they first were.

        Others were added only, to be evaluated beside them.
        """
        by_version = {row.version: row for row in self.list()}
        return [by_version[version] for version in dict.fromkeys(change.version for change in self.history())]

    def history(self) -> builtins.list[LiveChange]:
        """All changes of the live version, oldest first."""
        rows = self._database.rows("SELECT version, previous, why, unix_s FROM history ORDER BY number")
        return [LiveChange(version=v, previous=previous, why=why, unix_s=unix_s) for v, previous, why, unix_s in rows]

    def lineage(self, version: str) -> builtins.list[VersionRow]:
        """The version itself (an id or a prefix), its parent, and so on up to the root or the last one known here."""
        by_version = {row.version: row for row in self.list()}
        row: VersionRow | None = self.get(version)
        line: dict[str, VersionRow] = {}
        # An id is the hash of its content with the parent in it, so a circle can only come from a registry gone wrong.
        while row is not None and row.version not in line:
            line[row.version] = row
            row = by_version.get(row.parent)
        return [*line.values()]

    def close(self) -> None:
        """Close the file; idempotent, and the next call opens it again."""
        self._database.close()

    def _rows(self, where: str, *parameters: str) -> builtins.list[VersionRow]:
        return [
            VersionRow(
                version=version,
                parent=parent,
                made=msgspec.json.decode(made),
                created_unix_s=created_unix_s,
                number=number,
                live=bool(live),
            )
            for version, parent, made, created_unix_s, number, live in self._database.rows(
                f"{_SELECT} {where}", parameters
            )
        ]


def _trail(connection: sqlite3.Connection) -> list[str]:
    """The versions that rolling back from here would bring, the first one first, the live one last."""
    trail: list[str] = []
    # The last row of a version says what was before it then; following that from the live version gives the trail.
    before = dict(connection.execute("SELECT version, previous FROM history ORDER BY number").fetchall())
    newest = connection.execute(_LIVE).fetchone()
    version = newest[0] if newest else ""
    while version:
        trail.append(version)
        version = before[version]
    return trail[::-1]
