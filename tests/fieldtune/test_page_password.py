"""The password of the operator's page: its file, and the command that makes it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from passwords import PASSWORD, password_file

from bridge.config import ConfigError
from fieldtune.cli import run
from fieldtune.page.password import PasswordFile, write_password


def test_the_file_holds_no_password_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "password"
    previous = os.umask(0)
    try:
        write_password(path, PASSWORD)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]
    read = PasswordFile.read(path)
    assert (read.log2_n, read.r, read.p) == (14, 8, 5)
    assert read.matches(PASSWORD) and not read.matches(PASSWORD[:-1])
    assert PASSWORD not in path.read_text()
    assert PasswordFile.make(PASSWORD, 1, p=1).salt != PasswordFile.make(PASSWORD, 1, p=1).salt


def test_scrypt_is_that_of_the_rfc() -> None:
    """RFC 7914, section 12, third vector, its first 32 bytes."""
    expected = bytes.fromhex("7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2")
    assert PasswordFile(b"SodiumChloride", expected, 14, 8, 1).matches("pleaseletmein")


def test_a_password_typed_where_the_locale_is_not_utf_8_is_the_same() -> None:
    typed = PASSWORD.encode().decode("ascii", "surrogateescape")
    assert typed != PASSWORD and PasswordFile.make(typed, log2_n=1, p=1).matches(PASSWORD)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = Path(password_file(tmp_path / "password"))
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"\$\.page\.password: .*chmod 600"):
        PasswordFile.read(path)


@pytest.mark.parametrize(
    "change",
    [{"log2_n": 40}, {"log2_n": 0}, {"r": 1}, {"p": 0}, {"salt": ""}, {"hash": "AAAA"}, {"hash": None}, {"more": 1}],
)
def test_a_file_that_cannot_be_checked_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = Path(password_file(tmp_path / "password"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match="is not a password file"):
        PasswordFile.read(path)


def test_the_costliest_file_that_is_read_can_be_checked(tmp_path: Path) -> None:
    path = Path(password_file(tmp_path / "password"))
    for change in ({"log2_n": 16, "r": 16}, {"log2_n": 2, "p": 16, "r": 8}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert not PasswordFile.read(path).matches("x")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What comes on a standard input that is no terminal."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_password_from_a_pipe(
    typed: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "password"
    typed("first password\nsecond line\n")
    assert run(["page", "password", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert PasswordFile.read(path).matches("first password")
    typed("another password\n")
    assert run(["page", "password", str(path)]) == 2
    assert "--replace" in capsys.readouterr().err and PasswordFile.read(path).matches("first password")
    path.chmod(0o644)
    typed("another password")
    assert run(["page", "password", str(path), "--replace"]) == 0
    assert PasswordFile.read(path).matches("another password")


@pytest.mark.parametrize("text", ["", "\n", "seven77\n", "short\nlong enough but second\n"])
def test_a_short_password_is_refused(
    text: str, typed: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(text)
    assert run(["page", "password", str(tmp_path / "password")]) == 2
    assert "expected 8 or more" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_named(
    typed: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("long enough\n")
    assert run(["page", "password", str(tmp_path / "no" / "password")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def in_terminal(path: Path, *answers: bytes) -> tuple[int, bytes]:
    """Ask for a password in a terminal, answer its prompts; exit code, and what was shown."""
    terminal, theirs = pty.openpty()
    # Its own terminal, whose keys are signals for it.
    command = ["setsid", "--ctty", sys.executable, "-m", "fieldtune", "page", "password", str(path)]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    for prompt, answer in zip((b"Password of the page: ", b"Once more: "), answers, strict=False):
        while prompt not in shown:
            shown += os.read(terminal, 1024)
        os.write(terminal, answer)
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 1024):
            shown += more
    os.close(terminal)
    return child.wait(60), shown


@pytest.mark.parametrize(
    ("key", "code", "said"), [(b"\x03", 1, b"interrupted"), (b"\x04", 2, b"no password was typed; nothing was written")]
)
def test_whoever_leaves_the_terminal_gets_a_line_and_no_traceback(
    key: bytes, code: int, said: bytes, tmp_path: Path
) -> None:
    ended, shown = in_terminal(tmp_path / "password", key)
    assert ended == code and b"fieldtune: " + said in shown and b"Traceback" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("second", "code"), [("long enough é", 0), ("long enough e", 2)])
def test_a_terminal_is_asked_twice_and_shows_nothing(second: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "password"
    ended, shown = in_terminal(path, "long enough é\n".encode(), f"{second}\n".encode())
    assert ended == code
    assert b"long enough" not in shown
    assert path.exists() == (code == 0) and (code or PasswordFile.read(path).matches("long enough é"))
