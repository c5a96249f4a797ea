"""The page as a child of `fieldtune up`: the deployment goes on, whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fieldtune.extras import EXTRAS
from runtime.supervisor import Child, ChildFailedError

START_S = 30.0


class PageChild:
    """Serves the page of a run from `start` to `stop`."""

    def __init__(self, command: list[str], url_file: Path, log: Path) -> None:
        """`command` is that of `fieldtune page`; the address appears in `url_file`."""
        self.url = ""
        """Where it is; empty until it is there, and where it could not come up."""
        self._url_file = url_file
        self._child: Child | None = Child("page", command, log)

    def start(self, stopped: Callable[[], bool]) -> str:
        """Start it; gives what there is to say: where the page is, or why there is none. Returns when `stopped`."""
        assert self._child is not None
        for package in ("nicegui", "PIL"):
            if find_spec(package) is None:
                self._child = None
                return f"no page: {package} is not installed; pip install 'fieldtune[{EXTRAS[package]}]'"
        self._url_file.unlink(missing_ok=True)
        self._child.start()
        process = self._child.process
        assert process is not None
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s and process.poll() is None and not stopped():
            if self._url_file.exists():
                self.url = self._url_file.read_text()
                return f"page: {self.url}"
            time.sleep(0.05)
        if process.poll() is None:
            return f"the page has not come up within {START_S:g} s; its log is {self._child.log}"
        return self._given_up(self._child)

    def tend(self) -> str:
        """Call often: starts it again after a failure; gives what there is to say, mostly nothing."""
        said: list[str] = []
        if self._child is not None:
            try:
                self._child.keep_alive(said.append)
            except ChildFailedError:
                said.append(self._given_up(self._child))
        return "; ".join(said)

    def stop(self) -> None:
        """Stop it; idempotent."""
        if self._child is not None:
            self._child.stop()

    def _given_up(self, child: Child) -> str:
        self._child = None
        return f"no page: it ended{child.tail()}"
