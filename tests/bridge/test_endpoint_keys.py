"""Addresses that may be used without keys, the private ipc directory, and key files."""

import os
import stat
from pathlib import Path

import pytest
import zmq

from bridge.config import ConfigError
from bridge.endpoint import claim_ipc, is_local, require_private, resolve_endpoint
from bridge.keys import make_keys, secure_client, secure_server


def test_ipc_is_a_socket_of_the_run_in_the_users_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one = resolve_endpoint("ipc", tmp_path / "runs" / "one")
    assert one.startswith(f"ipc://{tmp_path}/")
    assert one == resolve_endpoint("ipc", tmp_path / "runs" / "x" / ".." / "one")
    assert one != resolve_endpoint("ipc", tmp_path / "runs" / "two")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(os.getuid()) in resolve_endpoint("ipc", tmp_path)


@pytest.mark.parametrize("endpoint", ["ipc:///x/y.sock", "tcp://127.0.0.1:5555", "tcp://robot.lan:1", "tcp://[::1]:5"])
def test_full_addresses_stay_as_they_are(endpoint: str, tmp_path: Path) -> None:
    assert resolve_endpoint(endpoint, tmp_path) == endpoint


@pytest.mark.parametrize(
    "endpoint", ["", "tcp", "tcp://host", "udp://1.2.3.4:5", "inproc://x", "5555", "ipc://@open", "ipc://*"]
)
def test_other_addresses_are_refused(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        resolve_endpoint(endpoint, tmp_path)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a Unix socket takes 107"):
        resolve_endpoint("ipc:///" + "x" * 107, tmp_path)
    resolve_endpoint("ipc:///" + "x" * 106, tmp_path)


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("ipc:///x/y.sock", True),
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.8.9.1:5555", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://10.0.0.5:5555", False),
        ("tcp://eth0:5555", False),
        ("tcp://127.evil.example:5555", False),
        ("tcp://localhost.evil.example:5555", False),
    ],
)
def test_only_loopback_and_ipc_are_local(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) is local


def test_claiming_makes_a_private_directory_and_locks_the_address(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/user/run/policy.sock"
    lock = claim_ipc(endpoint)
    for directory in (tmp_path / "user", tmp_path / "user" / "run"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="another runtime serves there"):
        claim_ipc(endpoint)
    lock.close()
    claim_ipc(endpoint).close()


def test_a_stale_socket_is_removed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "policy.sock").touch()
    claim_ipc(f"ipc://{tmp_path}/policy.sock").close()
    assert not (tmp_path / "policy.sock").exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    for check in (claim_ipc, require_private):
        with pytest.raises(ConfigError, match=f"chmod 700 {shared}"):
            check(f"ipc://{shared}/policy.sock")
    shared.chmod(0o700)
    require_private(f"ipc://{shared}/policy.sock")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to another user")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    os.chown(other, 12345, 12345)
    with pytest.raises(ConfigError, match="must belong to you"):
        claim_ipc(f"ipc://{other}/policy.sock")


def test_a_directory_that_is_not_there_yet_is_private_enough(tmp_path: Path) -> None:
    require_private(f"ipc://{tmp_path}/none/policy.sock")


def test_keys_are_made_where_the_documents_say_and_secret_ones_are_private(tmp_path: Path) -> None:
    (arm,) = make_keys(tmp_path / "keys", ["arm"])
    server = tmp_path / "keys" / "server"
    assert arm == tmp_path / "keys" / "arm"
    for secret in (server / "server.key_secret", arm / "client.key_secret"):
        assert stat.S_IMODE(secret.stat().st_mode) & 0o077 == 0
    assert (arm / "server.key").read_bytes() == (server / "server.key").read_bytes()
    assert (server / "allowed" / "arm.key").read_bytes() == (arm / "client.key").read_bytes()
    assert b"secret-key" not in (arm / "client.key").read_bytes()


def test_more_clients_keep_the_servers_keys(tmp_path: Path) -> None:
    make_keys(tmp_path, ["one"])
    before = (tmp_path / "server" / "server.key_secret").read_bytes()
    make_keys(tmp_path, ["two"])
    assert (tmp_path / "server" / "server.key_secret").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "server" / "allowed").iterdir()) == ["one.key", "two.key"]
    with pytest.raises(ConfigError, match="exists already"):
        make_keys(tmp_path, ["one"])


@pytest.mark.parametrize("name", ["", "server", "../x", "a/b", "a b", "x" * 65, ".hidden"])
def test_client_names_are_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="client name"):
        make_keys(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()


def test_keys_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    (arm,) = make_keys(tmp_path, ["arm"])
    server = tmp_path / "server"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    try:
        with pytest.raises(ConfigError, match=r"server\.key: not found; make keys"):
            secure_client(socket, tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"server\.key_secret: not found"):
            secure_server(context, socket, arm)
        (server / "allowed" / "bad.key").write_text("nonsense")
        with pytest.raises(ConfigError, match=r"bad\.key: is not a key file"):
            secure_server(context, socket, server)
        (arm / "client.key_secret").write_bytes((arm / "client.key").read_bytes())
        with pytest.raises(ConfigError, match="holds no secret key"):
            secure_client(socket, arm)
        (server / "allowed" / "bad.key").unlink()
        (server / "allowed" / "arm.key").unlink()
        (server / "allowed").rmdir()
        with pytest.raises(ConfigError, match="allowed: not found"):
            secure_server(context, socket, server)
    finally:
        context.destroy(linger=0)
