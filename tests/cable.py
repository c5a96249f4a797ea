"""A cable between a client and a server, to be cut, stalled and healed."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Cable:
    """Carries bytes between clients and one TCP server.

    While `whole` is clear nothing arrives and nobody is told of that. While it is unplugged there is no connection.
    """

    def __init__(self, endpoint: str) -> None:
        self._far = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._plug = socket.create_server(("127.0.0.1", 0))
        assert self._plug.getsockname()[1] != self._far[1], "it would carry to itself without end"
        self._plugged = True
        self._ends: list[socket.socket] = []
        self.endpoint = f"tcp://127.0.0.1:{self._plug.getsockname()[1]}"
        self.whole = threading.Event()
        self.whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def unplug(self) -> None:
        """End all connections and refuse new ones."""
        self._plugged = False
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def plug(self) -> None:
        """Take connections again."""
        self._plugged = True

    def _accept(self) -> None:
        while True:
            near, _ = self._plug.accept()
            try:
                if not self._plugged:
                    raise ConnectionError
                far = socket.create_connection(self._far)
            except OSError:
                near.close()
                continue
            self._ends += near, far
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(1 << 16):
                self.whole.wait()
                there.sendall(data)
        for end in (here, there):  # the thread of the other direction waits in one of them
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
