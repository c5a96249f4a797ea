"""Addresses: where the socket of a run is, and which addresses may be used without keys."""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
import stat
import tempfile
from pathlib import Path
from typing import IO

from bridge.config import ConfigError

MAX_IPC_PATH_BYTES = 107  # sun_path of a Unix socket


def resolve_endpoint(endpoint: str, run_dir: Path) -> str:
    """The ZeroMQ address that a configuration means; `ipc` alone is a socket of this run in a private directory.

    Raises `ConfigError` for anything that is neither ipc nor tcp.
    """
    if endpoint == "ipc":
        # A run directory can be too deep for a Unix socket, so the socket lies in the user's runtime directory.
        run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        root = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        endpoint = f"ipc://{root}/fieldtune-{os.getuid()}/{run}/policy.sock"
    if endpoint.startswith(("ipc://@", "ipc://*")):
        raise ConfigError(f"endpoint {endpoint}: expected a path; an abstract socket is open to every user")
    if endpoint.startswith("ipc://"):
        length = len(os.fsencode(endpoint.removeprefix("ipc://")))
        if length > MAX_IPC_PATH_BYTES:
            raise ConfigError(
                f"endpoint {endpoint}: the path has {length} bytes, a Unix socket takes {MAX_IPC_PATH_BYTES}"
            )
        return endpoint
    if endpoint.startswith("tcp://") and ":" in endpoint.removeprefix("tcp://"):
        return endpoint
    raise ConfigError(f"endpoint {endpoint!r}: expected `ipc`, `ipc://PATH` or `tcp://HOST:PORT`")


def is_local(endpoint: str) -> bool:
    """Whether only this computer can reach the address; every other one needs keys."""
    if endpoint.startswith("ipc://"):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_private(endpoint: str) -> None:
    """Raise `ConfigError` if the directory of an ipc address exists and is not this user's alone."""
    directory = Path(endpoint.removeprefix("ipc://")).parent
    try:
        status = directory.stat()
    except FileNotFoundError:
        return
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"endpoint {endpoint}: {directory} must belong to you with mode 0700 (chmod 700 {directory})")


def claim_ipc(endpoint: str) -> IO[str]:
    """Make the 0700 directory of an ipc address and lock the address; keep the file open while serving.

    A second bind of a Unix socket would silently take it from the first, hence the lock. Raises `ConfigError` when the
    directory is open to others or another runtime serves there.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    if not path.parent.is_dir():
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    require_private(endpoint)
    lock = path.with_suffix(".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"endpoint {endpoint}: another runtime serves there; stop it first (fieldtune status)"
        ) from error
    path.unlink(missing_ok=True)
    return lock
