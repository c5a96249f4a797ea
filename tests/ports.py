"""Ports for servers that a test starts as processes of their own."""

from __future__ import annotations

import os
import random
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(20_000 + _WORKER % 8, 32_000, 8)
"""Below those that systems give to a socket that names none, so that none takes a port before its server does.

Tests that run beside each other have different ones.
"""


def free_endpoint() -> str:
    """An address on this computer at which nobody listens yet."""
    for port in random.sample(_PORTS, len(_PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return f"tcp://127.0.0.1:{port}"
    raise OSError(f"no port of {_PORTS} is free")
