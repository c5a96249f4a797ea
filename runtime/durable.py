"""Writing files so that a crash or a power cut leaves the old content or the new one, never something in between; and
keeping others out of a directory meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from bridge.errors import FieldtuneError

LOCK = "lock"
MINUTE_S, HOUR_S = 60.0, 3600.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk: what was created, renamed or removed in it."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def write_all(descriptor: int, *parts: bytes) -> None:
    """Write all `parts` in one call; the system may take less. Raises `OSError`, then a part may have been written."""
    written, size = os.writev(descriptor, parts), sum(map(len, parts))
    while written < size:
        rest = b"".join(parts)[written:]
        written += os.write(descriptor, rest)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path`: after this returns it is on the disk, if it raises the old content is untouched.

    The directory must exist. Raises `OSError`.
    """
    temporary = _temporary(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


class ClaimedError(FieldtuneError):
    """A directory that another process works in; the message says which and what to do."""


def claim(directory: Path) -> IO[str]:
    """Lock a directory, which must exist, for this process; the lock goes with the file, or with the process. What an
    owner that was killed left half-written is removed.

    Raises `ClaimedError` if another has it.
    """
    file = (directory / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read(20).strip()
        file.close()
        raise ClaimedError(
            f"{directory}: process {owner} is at work here already; stop it first, or choose another run"
        ) from error
    except OSError:
        file.close()
        raise
    # Others may write a small file beside the owner's, which takes no minute.
    remove_leftovers(directory, MINUTE_S)
    return file


def require_unclaimed(directory: Path) -> None:
    """Raise `ClaimedError` if a process works in this directory, which need not exist."""
    if (directory / LOCK).exists():
        claim(directory).close()


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a value (builtins, Structs) as indented JSON."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Make a directory that is there whole or not at all.

    Yields an empty temporary directory beside `path` to write into; when the block ends, everything in it is put on the
    disk and it is renamed to `path`. If the block raises, it is removed. Raises `FileExistsError` if `path` exists: a
    directory cannot be replaced atomically.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; a directory is made once and never replaced")
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for directory, _, files in os.walk(temporary):
            for name in files:
                sync_file(Path(directory) / name)
            sync_directory(Path(directory))
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(directory: Path, older_than_s: float) -> None:
    """Remove what processes that were killed left half-written in a directory, if it is older than that."""
    newest_unix_s = time.time() - older_than_s
    for path in directory.iterdir() if directory.is_dir() else ():
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError):  # its owner lives, or it can be removed another time
            if path.stat().st_mtime > newest_unix_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _temporary(path: Path) -> Path:
    # Hidden and random: two processes that write the same path do not meet, a leftover is not taken for the real thing.
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
