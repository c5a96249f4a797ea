"""The file with the page's password: what is kept of it cannot be turned back into it.

It is one JSON object, `{"log2_n": 14, "r": 8, "p": 5, "salt": BASE64, "hash": BASE64}`, that only its owner may read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from bridge.config import ConfigError
from runtime.durable import write_json

MIN_CHARACTERS = 8


class PasswordFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A password as scrypt (RFC 7914) has left it. The bounds keep a check below 1 GB and every value valid."""

    salt: Annotated[bytes, Meta(min_length=16)]
    hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    log2_n: Annotated[int, Meta(ge=1, le=18)]
    r: Annotated[int, Meta(ge=8, le=16)]
    p: Annotated[int, Meta(ge=1, le=16)]

    @classmethod
    def make(cls, password: str, log2_n: int = 14, r: int = 8, p: int = 5) -> PasswordFile:
        """Hash a password. The costs are those that OWASP's Password Storage Cheat Sheet gives for 16 MiB of memory."""
        salt = secrets.token_bytes(16)
        return cls(salt, _scrypt(password, salt, log2_n, r, p), log2_n, r, p)

    @classmethod
    def read(cls, path: Path) -> PasswordFile:
        """Raises `ConfigError` for a file that is missing, of another format, or open to other users."""
        make = "make one with `fieldtune page password FILE`"
        try:
            with path.open("rb") as file:
                mode, content = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read()
            password = msgspec.json.decode(content, type=cls)
        except FileNotFoundError as error:
            raise ConfigError(f"$.page.password: {path} is not there; {make}") from error
        except OSError as error:
            raise ConfigError(f"$.page.password: {path} cannot be read: {error.strerror}") from error
        except msgspec.MsgspecError as error:
            raise ConfigError(f"$.page.password: {path} is not a password file ({error}); {make}") from error
        if mode & 0o077:
            raise ConfigError(f"$.page.password: {path} is open to other users of this computer; chmod 600 {path}")
        return password

    def matches(self, password: str) -> bool:
        """Whether this is the password; takes a tenth of a second or more of a core, and the same for every answer."""
        return hmac.compare_digest(_scrypt(password, self.salt, self.log2_n, self.r, self.p), self.hash)


def write_password(path: Path, password: str, *, replace: bool = False) -> None:
    """Write the file, mode 0600. Raises `ConfigError` for a password that is too short and a file that is there."""
    if len(password) < MIN_CHARACTERS:
        raise ConfigError(f"the password has {len(password)} characters; expected {MIN_CHARACTERS} or more")
    if path.exists() and not replace:
        raise ConfigError(f"{path}: exists already; --replace makes it the file of a new password")
    previous = os.umask(0o077)
    try:
        write_json(path, PasswordFile.make(password))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        os.umask(previous)


def _scrypt(password: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    n = 1 << log2_n
    # A terminal whose locale is not UTF-8 gives surrogates for what it cannot decode; those are the bytes again.
    text = password.encode(errors="surrogateescape")
    return hashlib.scrypt(text, salt=salt, n=n, r=r, p=p, maxmem=256 * r * (n + p + 2), dklen=32)
