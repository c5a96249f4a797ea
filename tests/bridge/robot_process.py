"""A bridge as a process of its own: `robot_process.py ENDPOINT NAME NOTES STOP_AFTER_S` drives a paced dot.

Each call of the backend is a line of NOTES with the time at which it came; what the bridge says goes to stderr.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bridge.backend import BackendSpec, Float32
from bridge.backends.point import Point, PointOptions
from bridge.client import PolicyClient
from bridge.config import BridgeConfig, SafetyConfig
from bridge.drive import drive

HOLD_AFTER_S = 1.0


class PacedPoint(Point):
    """The dot as a robot: time passes by itself, and there is no goal to end at."""

    def __init__(self, notes: Path) -> None:
        super().__init__(PointOptions(size_px=8))
        self._notes = notes.open("a", buffering=1)

    @property
    def spec(self) -> BackendSpec:
        return replace(super().spec, paced=True)

    def _note(self, *what: Any) -> None:
        self._notes.write(f"{time.monotonic()} {' '.join(map(str, what))}\n")

    def reset(self, task: str, seed: int) -> None:
        self._note("reset")
        super().reset(task, seed)

    def apply(self, action: Float32) -> Float32:
        self._note("apply", round(float(action[0]), 4))
        return super().apply(action)

    def _distance(self) -> float:
        return 1.0

    def stop(self) -> None:
        self._note("stop")


def main(endpoint: str, name: str, notes: str, stop_after: str) -> None:
    """Drive until SIGTERM."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    stop_after_s = float(stop_after)
    config = BridgeConfig(
        request_timeout_s=stop_after_s + 1.0,
        safety=SafetyConfig(hold_after_s=HOLD_AFTER_S, stop_after_s=stop_after_s),
    )
    with PolicyClient(endpoint, client=name, timeout_s=config.request_timeout_s) as client:
        drive(
            PacedPoint(Path(notes)),
            client,
            config,
            stopped=stopped.is_set,
            report=lambda report, assignment: None,
            warn=lambda message: print(message, file=sys.stderr, flush=True),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
