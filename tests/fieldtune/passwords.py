"""A password of the page, and its file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fieldtune.page.password import PasswordFile

PASSWORD = "correct horse é"


def password_file(path: Path, password: str = PASSWORD) -> str:
    """A cheap one."""
    path.touch(0o600)
    path.write_bytes(msgspec.json.encode(PasswordFile.make(password, log2_n=1, p=1)))
    return str(path)
