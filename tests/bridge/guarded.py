"""A robot whose every call is noted, for tests of what stands between it and the policy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge.backend import ActionSpec, BackendSpec, Float32, Observation, Outcome, VectorSpec
from bridge.config import SafetyConfig
from bridge.guard import Guard
from bridge.messages import Orders

ROBOT = BackendSpec(
    name="fake",
    cameras=(),
    state=VectorSpec(("a", "b"), ("rad", "rad")),
    action=ActionSpec(("a", "b"), ("rad", "rad"), (-1.0, -2.0), (1.0, 2.0), "absolute"),
    control_hz=20.0,
    instructions={"t": "go"},
    paced=True,
)
"""At its whole range in a second, a step is at most 0.1 rad of a and 0.2 rad of b; a first jump 0.5 and 1.0 rad."""

TICK_S = 1 / ROBOT.control_hz
ENOUGH_S = 30.0


def f32(*rows: Any) -> Float32:
    """A float32 array."""
    return np.array(rows, np.float32)


STILL = f32(0, 0)


@dataclass
class Clock:
    """Time that passes only when told."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Robot:
    """Goes at once where it is sent; `on` maps the name of a method to what happens when it is called."""

    spec: BackendSpec = ROBOT
    at: Float32 = field(default_factory=lambda: np.zeros(2, np.float32))
    calls: list[str] = field(default_factory=list)
    applied: list[Float32] = field(default_factory=list)
    on: dict[str, Callable[[], None]] = field(default_factory=dict)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.on.get(name, lambda: None)()

    def connect(self) -> None:
        self._called("connect")

    def reset(self, task: str, seed: int) -> None:
        self._called("reset")

    def observe(self) -> Observation:
        self._called("observe")
        return Observation({}, self.at.copy())

    def apply(self, action: Float32) -> Float32:
        self._called("apply")
        self.at = np.array(action, np.float32)
        self.applied.append(self.at)
        return self.at

    def outcome(self) -> Outcome:
        return Outcome("running", 0.0)

    def hold_action(self) -> Float32:
        return self.at.copy()

    def stop(self) -> None:
        self._called("stop")

    def close(self) -> None:
        self._called("close")


class Guarded:
    """A guard, the robot behind it, and a clock."""

    def __init__(self, robot: Robot | None = None, **config: Any) -> None:
        self.clock, self.robot = Clock(), robot or Robot()
        self.warnings: list[str] = []
        settings = SafetyConfig(**{"hold_after_s": 0.5, "stop_after_s": 2.0, **config})
        self.guard = Guard(self.robot, settings, warn=self.warnings.append, clock=self.clock)

    def begin(self, episode: str = "e1") -> None:
        self.guard.begin(episode, lambda: self.robot.reset("t", 0))
        self.robot.calls.clear()

    def tick(self) -> None:
        """Tick once, and wait for the hold that this may have begun."""
        self.guard.tick()
        for thread in threading.enumerate():
            if thread.name == "guard":
                thread.join(ENOUGH_S)

    def pass_time(self, seconds: float, *, runtime: bool = False, loop: bool = False) -> None:
        """Tick at the control rate; the runtime or the loop may be alive meanwhile."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.work(TICK_S)
            if runtime:
                self.guard.obey(Orders())
            if loop:
                self.guard.apply(STILL)
            self.tick()
