"""What the rules of the conformance suite share: one backend, how it is moved, and how a rule gives its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.backend import Backend, BackendError, BackendSpec, Float32, NotSeenError, Observation
from bridge.messages import observation_tensors

SMALL = 0.02
"""A small move of a robot, as a share of each element's range."""

SEEN_WITHIN_STEPS = 1000
"""In so many steps a recording must have seen something."""


class Verdict(Exception):  # noqa: N818 (a skipped check is no error)
    """Ends a rule with anything but `passed`."""

    def __init__(self, state: Literal["warned", "failed", "skipped"], found: str, mend: str = "") -> None:
        super().__init__(found)
        self.state: Literal["warned", "failed", "skipped"] = state
        self.found = found
        self.mend = mend


@dataclass
class Bench:
    """The backend under test. Its rules leave an episode running wherever the backend may be moved."""

    make: Callable[[], Backend]
    backend: Backend
    may_move: bool
    samples: int
    ended: bool = True
    """The last step ended the episode, or there has been none."""
    observe_p99_s: float = 0.0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    spec_before: BackendSpec = field(init=False)

    def __post_init__(self) -> None:
        self.spec_before = self.backend.spec

    @property
    def spec(self) -> BackendSpec:
        """The spec as the backend gives it now."""
        return self.backend.spec

    @property
    def low(self) -> Float32:
        """Lower limits `[d]`."""
        return np.array(self.spec.action.low, np.float32)

    @property
    def high(self) -> Float32:
        """Upper limits `[d]`."""
        return np.array(self.spec.action.high, np.float32)

    def start(self, seed: int = 0) -> None:
        """Reset to the first task."""
        self.backend.reset(next(iter(self.spec.instructions)), seed)
        self.ended = False

    def observe(self) -> Observation:
        """In an episode where the backend may be moved; a robot that may not be is looked at as it stands.

        A recording, which saw something at some of its steps only, is played on to the next of them.
        """
        try:
            for _ in range(SEEN_WITHIN_STEPS):
                if self.may_move and self.ended:
                    self.start()
                try:
                    return self.backend.observe()
                except NotSeenError:
                    if self.spec.paced:  # the time of a robot is no recording's
                        raise
                    self.step(self.hold())
            return self.backend.observe()
        except BackendError as error:
            if self.may_move:
                raise
            raise Verdict("skipped", f"it observes in an episode only: {error}", "give --moves") from error

    def tensors(self) -> dict[str, NDArray[Any]]:
        """An observation's tensors, copied: a backend that hands out one buffer twice is found by its own rule."""
        return {name: np.array(array) for name, array in observation_tensors(self.observe()).items()}

    def hold(self) -> Float32:
        """The hold action `[d]`, copied."""
        return np.array(self.backend.hold_action(), np.float32)

    def gentle_action(self) -> Float32:
        """An action inside the limits: any for a simulator, a small move from here for a robot."""
        low, high = self.low, self.high
        if self.spec.paced:
            move = SMALL * (high - low) * self.random.choice([-1.0, 1.0], len(low))
            return np.asarray(np.clip(self.hold() + move, low, high), np.float32)
        share = self.random.uniform(0.25, 0.75, len(low)).astype(np.float32)
        return low + (high - low) * share

    def step(self, action: Float32) -> Any:
        """Apply one action in a running episode and give what `apply` returned; a robot then waits out its period."""
        if self.ended:
            self.start()
        started_s = time.monotonic()
        sent = self.backend.apply(action)
        self.note_end()
        if self.spec.paced:
            time.sleep(max(0.0, started_s + 1.0 / self.spec.control_hz - time.monotonic()))
        return sent

    def note_end(self) -> None:
        """After a step: whether it ended the episode."""
        try:
            self.ended = self.backend.outcome().status != "running"
        # What `outcome` does wrong is found by its own rule.
        except Exception:  # noqa: BLE001
            self.ended = False


def bad_action_vector(action: Any, low: Float32, high: Float32) -> str:
    """What is wrong with an action that a backend gave: empty if it is finite float32 `[d]` inside the limits."""
    if not isinstance(action, np.ndarray) or action.dtype != np.float32 or action.shape != low.shape:
        shape = f"{action.dtype}{list(action.shape)}" if isinstance(action, np.ndarray) else type(action).__name__
        return f"gives {shape}, expected float32[{len(low)}]"
    if not np.isfinite(action).all():
        return f"gives {action}, which is not finite"
    rounding = 1e-6 * (high - low)
    if ((action < low - rounding) | (action > high + rounding)).any():
        return f"gives {action}, outside the limits"
    return ""


def refuses(call: Callable[[], Any], what: str) -> None:
    """Raise `Verdict` unless the call raises `BackendError`."""
    try:
        call()
    except BackendError:
        return
    except Exception as error:
        raise Verdict(
            "failed", f"{what} raises {type(error).__name__}: {error}", "raise BackendError with what to do"
        ) from error
    raise Verdict("failed", f"{what} is taken", "raise BackendError before anything is sent")
