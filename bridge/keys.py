"""CURVE keys: who may talk to a runtime that is reachable from other computers.

    KEYS/server/server.key_secret        stays with the runtime
    KEYS/server/server.key
    KEYS/server/allowed/NAME.key         public keys of the clients that are let in
    KEYS/NAME/client.key_secret          goes to the computer of client NAME, with ...
    KEYS/NAME/server.key                 ... the public key of the runtime

CURVE alone lets in whoever knows the server's public key; the allow-list is what keeps others out.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from bridge.config import ConfigError

CURVE_DOMAIN = "*"


def make_keys(directory: Path, clients: list[str]) -> list[Path]:
    """Make the server's key pair unless it is there, and one for each new client; returns the clients' directories."""
    for name in clients:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name == "server":
            raise ConfigError(f"client name {name!r}: expected letters, digits, - and _ (and not `server`)")
    server = directory / "server"
    allowed = server / "allowed"
    allowed.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (server / "server.key_secret").exists():
        _certificate(server, "server")
    made = []
    for name in clients:
        home = directory / name
        if home.exists():
            raise ConfigError(f"{home}: exists already; remove it and {allowed / (name + '.key')} to make new keys")
        home.mkdir(mode=0o700)
        _certificate(home, "client")
        shutil.copyfile(home / "client.key", allowed / f"{name}.key")
        shutil.copyfile(server / "server.key", home / "server.key")
        made.append(home)
    return made


def _certificate(directory: Path, name: str) -> None:
    previous = os.umask(0o077)
    try:
        zmq.auth.create_certificates(directory, name)
    finally:
        os.umask(previous)


def secure_server(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], keys: Path
) -> ThreadAuthenticator:
    """Encrypt `socket` and let in only the clients in KEYS/allowed; stop the returned authenticator at the end.

    The list is read now: a client added later is let in after a restart. Raises `ConfigError` for keys that are missing
    or unreadable.
    """
    public, secret = _load(keys / "server.key_secret")
    allowed = keys / "allowed"
    if not allowed.is_dir():
        raise ConfigError(f"{allowed}: not found; make keys with `fieldtune keys DIRECTORY NAME`")
    for path in allowed.glob("*.key"):
        _certificate_keys(path)  # the authenticator itself would only log a bad file, and let nobody in
    socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain=CURVE_DOMAIN, location=str(allowed))
    return authenticator


def secure_client(socket: zmq.Socket[bytes], keys: Path) -> None:
    """Encrypt `socket` with this client's keys."""
    server_public, _ = _certificate_keys(keys / "server.key")
    public, secret = _load(keys / "client.key_secret")
    socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, server_public


def _load(path: Path) -> tuple[bytes, bytes]:
    public, secret = _certificate_keys(path)
    if secret is None:
        raise ConfigError(f"{path}: holds no secret key")
    return public, secret


def _certificate_keys(path: Path) -> tuple[bytes, bytes | None]:
    if not path.is_file():
        raise ConfigError(f"{path}: not found; make keys with `fieldtune keys DIRECTORY NAME`")
    try:
        return zmq.auth.load_certificate(path)
    except ValueError as error:
        raise ConfigError(f"{path}: is not a key file made by `fieldtune keys`") from error
