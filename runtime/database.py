"""SQLite as the index and the registry use it: several processes, several threads, commits that survive a power cut."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.errors import FieldtuneError
from runtime.durable import sync_directory

BUSY_S = 10.0  # how long a statement waits for another process's transaction; ours last milliseconds


class DatabaseError(FieldtuneError):
    """A database that cannot be read or written; the message names the file and what to do."""


class Database:
    """One SQLite file with a write-ahead log. Safe from several threads, and from several processes on one computer
    (not over a network file system). The file is made by the first transaction; before that it reads as empty.
    """

    def __init__(
        self, path: Path, schema: Sequence[str], error: type[DatabaseError] = DatabaseError, *, version: int = 1
    ) -> None:
        """`schema` are the statements that make the tables where they are not there yet, `version` its number: a file
        with an older one gets what it lacks. Whatever fails is raised as `error`.
        """
        self.path = path
        self._schema, self._error, self._version = schema, error, version
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query, as tuples."""
        with self._lock, self._translated():
            if not self.path.exists():
                return []
            return self._open().execute(query, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The only writer until the block ends; what it did is then on the disk, or undone if it raised."""
        with self._lock, self._translated():
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, a full disk among them.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "; free some space" if "full" in str(error) else ""
            if "malformed" in str(error) or "not a database" in str(error):
                hint = "; the file is damaged, move it away (an episode index is made anew from the episodes)"
            raise self._error(f"{self.path}: {error}{hint}") from error
        except OSError as error:
            raise self._error(f"{self.path}: {error.strerror}") from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            if self._file == self._identity():
                return self._connection
            # The run was put aside and another is in its place: what is written now must not go to the one before.
            self._connection.close()
            self._connection = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Threads share the connection under our own lock; transactions are begun by hand.
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file = connection, self._identity()
        return connection

    def _identity(self) -> tuple[int, int]:
        """Which file is there now; (0, 0) for none."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_dev, status.st_ino

    def _prepare(self, connection: sqlite3.Connection) -> None:
        deadline_s = time.monotonic() + BUSY_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                # Two processes that switch a new file at once: SQLite does not wait by itself here.
                if "locked" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
        connection.execute("PRAGMA synchronous=FULL")
        if self._made(connection):
            return
        connection.execute("BEGIN IMMEDIATE")
        # Asked again: another process may have made the tables while this one waited.
        if not self._made(connection):
            for statement in self._schema:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={self._version}")
        connection.execute("COMMIT")
        sync_directory(self.path.parent)

    def _made(self, connection: sqlite3.Connection) -> bool:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > self._version:
            raise self._error(
                f"{self.path}: made by a newer fieldtune (format {found}, this one knows {self._version}); upgrade"
            )
        return bool(found == self._version)
