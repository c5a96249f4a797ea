"""A backend for the far side that tells what was done to it, and programs that processes of the tests run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bridge.backend import BackendError, Float32, Observation
from bridge.backends.point import Point, PointOptions
from bridge.backends.remote import Remote, RemoteOptions
from bridge.remote.server import BackendServer


class Robot(Point):
    """The point, with a list and perhaps a file of what was called, one camera buffer, and ways to go wrong."""

    def __init__(self, log: str = "", size_px: int = 16) -> None:
        super().__init__(PointOptions(size_px=size_px))
        self.calls: list[str] = []
        self.raises: Exception | None = None
        self._log = Path(log) if log else None
        self._image = np.zeros((size_px, size_px, 3), np.uint8)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self._log:
            with self._log.open("a") as file:
                file.write(call + "\n")

    def connect(self) -> None:
        self._note("connect")
        if self.raises is not None:
            raise self.raises

    def reset(self, task: str, seed: int) -> None:
        self._note("reset")
        super().reset(task, seed)

    def observe(self) -> Observation:
        seen = super().observe()
        self._image[:] = seen.images["top"]
        seen.images["top"] = self._image
        return seen

    def apply(self, action: Float32) -> Float32:
        if self.raises is not None:
            raise self.raises
        if not np.isfinite(action).all():
            raise BackendError("an action is finite numbers")
        self._note("apply")
        np.clip(action, -1, 1, out=action)  # in place, as some do
        return super().apply(action)

    def stop(self) -> None:
        self._note("stop")

    def close(self) -> None:
        self._note("close")
        super().close()


class Silent(Robot):
    """One that cannot demonstrate."""

    expert_action = None


def serve(endpoint: str, silence_s: str) -> None:
    """The far side, for as long as nobody kills it."""
    BackendServer(Robot(), endpoint, silence_s=float(silence_s)).run(lambda: False)


def drive(endpoint: str) -> None:
    """The near side: an episode that does not end."""
    remote = Remote(RemoteOptions(endpoint, timeout_s=30.0))
    remote.connect()
    remote.reset("reach", 0)
    print("drives", flush=True)
    for i in range(1_000_000):
        try:
            remote.apply(np.full(2, (-1) ** i * 0.1, np.float32))
        except BackendError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    {"serve": serve, "drive": drive}[sys.argv[1]](*sys.argv[2:])
