"""Atomic writes: the old content or the new one, and no litter."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from log_samples import names

from runtime import durable
from runtime.durable import (
    HOUR_S,
    MINUTE_S,
    atomic_directory,
    claim,
    remove_leftovers,
    write_all,
    write_atomic,
    write_json,
)


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_content_is_replaced(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    write_json(tmp_path / "b.json", {"n": 1, "path": ["x"]})
    assert (tmp_path / "a").read_bytes() == b"two" and names(tmp_path) == ["a", "b.json"]
    assert (tmp_path / "b.json").read_text() == '{\n  "n": 1,\n  "path": [\n    "x"\n  ]\n}\n'


@pytest.mark.parametrize("failing", ["writev", "fsync"])
def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write_atomic(tmp_path / "a", b"one")
    monkeypatch.setattr(durable.os, failing, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"two")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"one" and names(tmp_path) == ["a"]


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("replace"), replace(self, to)))
    write_atomic(tmp_path / "a", b"one")
    assert order == ["fsync", "replace", "fsync"]


def test_writes_that_are_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "writev", lambda fd, parts: write(fd, parts[0][:3]))
    descriptor = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    data = bytes(range(100))
    write_all(descriptor, data[:8], data[8:])
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == data


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "d") as making:
        (making / "deep").mkdir()
        (making / "deep" / "file").write_text("x")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "deep" / "file").read_text() == "x" and names(tmp_path) == ["d"]
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "e") as making:
        (making / "file").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == ["d"]
    with pytest.raises(FileExistsError, match="never replaced"), atomic_directory(tmp_path / "d"):
        pass


WRITER = """
import os, signal, sys
from pathlib import Path
from runtime.durable import atomic_directory, write_atomic
here = Path(sys.argv[1])
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    write_atomic(here / "a", b"one")
with atomic_directory(here / "d") as making:
    (making / "file").write_text("x")
"""


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_a_killed_process_left_half_written_is_removed_by_the_next_owner(tmp_path: Path, what: str) -> None:
    for name in (".a.tmp", ".a.0123456789ab.tmp.kept", "a.0123456789ab.tmp"):
        (tmp_path / name).write_text("somebody else's")
    others = names(tmp_path)
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), what], check=False, timeout=60)
    (left,) = set(names(tmp_path)) - set(others)
    claim(tmp_path).close()
    assert left in names(tmp_path), "it may be written just now, by another process"
    long_ago_unix_s = time.time() - 2 * MINUTE_S
    for name in names(tmp_path):
        os.utime(tmp_path / name, (long_ago_unix_s, long_ago_unix_s))
    remove_leftovers(tmp_path, HOUR_S)
    assert left in names(tmp_path)
    claim(tmp_path).close()
    assert names(tmp_path) == sorted([*others, "lock"])
