"""Robots that note what is done to them and have faults on demand; the backends of the processes in these tests.

Each call is a line of the file `notes`. The file `fault` has the name of a fault of the dot, or nothing.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from bridge.backend import BackendSpec, Float32, Observation
from bridge.backends.point import Point, PointOptions
from bridge.backends.so101.arm import SO101, SO101Options

HZ = 20.0
SLOW_S = 1.5 / HZ  # longer than a period


class Noted:
    """Before a backend's class: notes its calls, and by which thread actions came."""

    def __init__(self, options: Any, notes: str) -> None:
        super().__init__(options)  # type: ignore[call-arg]
        self._notes = Path(notes).open("a", buffering=1)  # noqa: SIM115 - for as long as the process lives

    def note(self, *what: Any) -> None:
        self._notes.write(json.dumps(what) + "\n")

    def connect(self) -> None:
        self.note("connect")
        super().connect()  # type: ignore[misc]

    def reset(self, task: str, seed: int) -> None:
        self.note("reset", seed)
        super().reset(task, seed)  # type: ignore[misc]

    def apply(self, action: Float32) -> Float32:
        sent: Float32 = super().apply(action)  # type: ignore[misc]
        self.note("hold" if threading.current_thread().name == "guard" else "apply", sent.tolist())
        return sent

    def stop(self) -> None:
        self.note("stop")
        super().stop()  # type: ignore[misc]


class Dot(Noted, Point):
    """The dot as a robot: time passes by itself, and there is no goal to end at."""

    def __init__(self, notes: str, fault: str) -> None:
        super().__init__(PointOptions(size_px=8), notes)
        self._fault = Path(fault)

    @property
    def spec(self) -> BackendSpec:
        return replace(super().spec, paced=True, control_hz=HZ)

    @property
    def fault(self) -> str:
        return self._fault.read_text() if self._fault.exists() else ""

    def observe(self) -> Observation:
        seen = super().observe()
        match self.fault:
            case "shape":
                seen.state = seen.state[:1]
            case "dtype":
                seen.images = {name: image.astype(np.float32) for name, image in seen.images.items()}
            case "nan":
                seen.state = seen.state * np.float32(np.nan)
        return seen

    def apply(self, action: Float32) -> Float32:
        if self.fault == "slow":
            time.sleep(SLOW_S)
        return super().apply(action)

    def _distance(self) -> float:
        return 1.0


class Arm(Noted, SO101):
    """The arm, which also notes what its bus has counted when it is stopped."""

    def __init__(self, notes: str, **options: Any) -> None:
        super().__init__(msgspec.convert(options, SO101Options), notes)

    def stop(self) -> None:
        if self._servos is not None:
            self.note("counts", asdict(self.counts))
        super().stop()
