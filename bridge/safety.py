"""The safety stage: what of a chunk may be sent to the backend. Rules only; `bridge.guard` stops and holds.

Each rule that changes an action leaves its bit beside it, so the log has what was proposed, what was sent, and why:

    finite      a chunk with a NaN or an infinity is refused whole (`WireError`)
    range       clipped to the limits of each element
    rate        clipped to the largest change from the action before it
    first_jump  a first target too far from where the robot is: the robot holds, the chunk is dropped, and the next
                target is a first one again
    workspace   the tip would leave its box, or go further out of it: the robot holds for that step
    chunk_age   the observation is too old: the robot holds, the chunk is dropped
    hold        paused, or the runtime is silent: the robot holds, the chunk is dropped
    starved     the chunk has ended and the next has not come: the robot holds

Range, rate and first jump are taken on a whole chunk at once; a simulator pays a few numpy calls for a chunk.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bridge.backend import Backend, BackendError, BackendSpec, Float32, HasTip, UInt8
from bridge.config import ConfigError, SafetyConfig
from bridge.messages import RULES, WireError

RANGE, RATE, FIRST_JUMP, WORKSPACE, CHUNK_AGE, HOLD, STARVED = (1 << i for i in range(len(RULES)))
HELD = FIRST_JUMP | CHUNK_AGE | HOLD | STARVED
"""Rules by which the hold action goes out in place of whatever was planned."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of each element of an action, float32 `[d]`; None where a rule does not apply."""

    low: Float32
    high: Float32
    step: Float32 | None
    """Largest change from one action to the next; infinite for elements without a limit."""
    jump: Float32 | None
    """Largest distance of a first target from the hold action."""
    chunk_age_s: float | None
    box: tuple[Float32, Float32] | None


def limits_of(spec: BackendSpec, config: SafetyConfig) -> Limits:
    """The spec's limits, tightened by the configuration.

    Raises `ConfigError` for a robot whose spec lacks a limit, a name that the action does not have, and a value that
    would loosen what the spec says.
    """
    names = spec.action.names
    spec_low, spec_high = _spec_range(spec)
    low, high = _by_name(config.low, "low", names, spec_low), _by_name(config.high, "high", names, spec_high)
    for name, limit, bound in zip(names, low, spec_low, strict=True):
        if not limit >= bound:
            raise _loosened("low", name, limit, "below", bound)
    for name, limit, bound in zip(names, high, spec_high, strict=True):
        if not limit <= bound:
            raise _loosened("high", name, limit, "above", bound)
    for name, lowest, highest in zip(names, low, high, strict=True):
        if not lowest < highest:
            raise ConfigError(f"$.bridge.safety.low.{name}: {lowest:g} is not below the highest value {highest:g}")
    none = np.full(len(names), np.inf)
    by_range = spec.paced and spec.action.kind == "absolute"
    # A robot's default is its whole range in a second: a limit that nobody has to think of, and none that is missing.
    spec_rate = _spec_rate(spec, spec_high - spec_low if by_range else none)
    rate = _by_name(config.max_rate, "max_rate", names, spec_rate)
    for name, limit, bound in zip(names, rate, spec_rate, strict=True):
        if not limit <= bound:
            raise _loosened("max_rate", name, limit, "above", bound)
    step = np.minimum(_by_name(config.max_step, "max_step", names, none), rate / spec.control_hz)
    box = None
    if config.workspace_low is not None and config.workspace_high is not None:
        box = np.asarray(config.workspace_low, np.float32), np.asarray(config.workspace_high, np.float32)
        if not (box[0] < box[1]).all():
            raise ConfigError("$.bridge.safety.workspace_low: is not below workspace_high in every element")
    return Limits(
        low=_inside(low, np.inf),
        high=_inside(high, -np.inf),
        step=step.astype(np.float32) if np.isfinite(step).any() else None,
        jump=(config.first_jump * (high - low)).astype(np.float32) if by_range else None,
        chunk_age_s=config.chunk_age_s if spec.paced else None,
        box=box,
    )


class SafetyStage:
    """Checks chunks against the limits. Remembers the last action sent, which the next one is compared with."""

    def __init__(self, backend: Backend, config: SafetyConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Work the limits out. Raises `ConfigError`; the backend need not be connected."""
        self.limits = limits_of(backend.spec, config)
        self._backend, self._clock = backend, clock
        self._tip_after: Callable[[Float32], Float32] | None = None
        if self.limits.box is not None:
            if not isinstance(backend, HasTip):
                raise ConfigError(
                    f"$.bridge.safety.workspace_low: backend {backend.spec.name} cannot say where its tip is "
                    "(it has no method tip_after)"
                )
            self._tip_after = backend.tip_after
        self._last: Float32 | None = None

    def restart(self) -> None:
        """The robot may be anywhere, after a reset or a hold: what comes next is a first action."""
        self._last = None

    def sent(self, action: Float32) -> None:
        """Remember what went out."""
        self._last = action

    def hold_action(self) -> Float32:
        """The backend's hold action `[d]`. Not clipped: a robot outside its limits holds there too, and is brought back
        no faster than its steps allow. Raises `BackendError` where it is none."""
        hold = np.asarray(self._backend.hold_action(), np.float32)
        if hold.shape != self.limits.low.shape or not np.isfinite(hold).all():
            raise BackendError(f"hold_action() gave {hold!r}; expected {len(self.limits.low)} finite numbers")
        return hold

    def check(self, actions: Float32) -> tuple[Float32, UInt8]:
        """What may be sent of the chunk `actions` `[k, d]`: the actions `[m, d]`, and for each the bits `[m]` of the
        rules that changed it. m is k, or 1 where the robot is to hold instead of the chunk.

        Raises `WireError` for a chunk that is not finite: nobody knows what else is wrong with it.
        """
        if not np.isfinite(actions).all():
            raise WireError("tensors.actions", "holds a value that is not finite")
        limits = self.limits
        allowed = np.minimum(np.maximum(actions, limits.low), limits.high)
        rules = (allowed != actions).any(1).astype(np.uint8)
        if limits.step is None and limits.jump is None:
            return allowed, rules
        last = self._last
        if last is None:
            last = self.hold_action()
            if limits.jump is not None and (np.abs(allowed[0] - last) > limits.jump).any():
                return last[None], np.array([FIRST_JUMP], np.uint8)  # what comes next is a first action still
            self._last = last
        if limits.step is not None:
            self._limit_steps(allowed, rules, last, limits.step)
        return allowed, rules

    def too_old(self, observed_s: float) -> bool:
        """Whether a chunk for an observation of that time may not be played any more."""
        age_s = self.limits.chunk_age_s
        return age_s is not None and self._clock() - observed_s > age_s

    def keep_inside(self, action: Float32) -> tuple[Float32, int]:
        """The action, or the hold action if its tip would be outside the workspace, and the bit of the rule.

        A tip that is outside already, by hand or by an earlier configuration, may come back.
        """
        if self._tip_after is None:
            return action, 0
        rule, step, last = 0, self.limits.step, self._last
        if step is not None and last is not None:
            # The chunk went on in thought while the robot was held at the wall; it must not jump after it.
            limited = _near(action, last, step)
            if (limited != action).any():
                action, rule = limited, RATE
        after = self._outside(action)
        if after == 0.0:
            return action, rule
        hold = self.hold_action()
        return (action, rule) if after < self._outside(hold) else (hold, WORKSPACE)

    def _outside(self, action: Float32) -> float:
        """How far outside the box the tip is after this action, m; nowhere is infinitely far."""
        assert self.limits.box is not None and self._tip_after is not None
        tip = np.asarray(self._tip_after(action), np.float32)
        if tip.shape != (3,) or not np.isfinite(tip).all():
            return math.inf
        low, high = self.limits.box
        return float(np.linalg.norm(np.maximum(np.maximum(low - tip, tip - high), 0.0)))

    @staticmethod
    def _limit_steps(allowed: Float32, rules: UInt8, last: Float32, step: Float32) -> None:
        """Bring each action within `step` of the one before it, in place."""
        before = np.concatenate([last[None], allowed[:-1]])
        if (_near(allowed, before, step) == allowed).all():
            return
        # What one action is cut by shifts all that follow it, so this cannot be done at once.
        for i, action in enumerate(allowed):
            limited = _near(action, last, step)
            if (limited != action).any():
                allowed[i] = limited
                rules[i] |= RATE
            last = allowed[i]


def _near(action: Float32, last: Float32, step: Float32) -> Float32:
    """The action brought within `step` of the one before it."""
    near: Float32 = np.minimum(np.maximum(action, last - step), last + step)
    return near


def _spec_range(spec: BackendSpec) -> tuple[Float64, Float64]:
    action, d = spec.action, len(spec.action.names)
    low, high = np.asarray(action.low, np.float64), np.asarray(action.high, np.float64)
    if len(low) != d or len(high) != d:
        raise ConfigError(
            f"$.backend: {spec.name} has {d} elements in its action, but {len(low)} and {len(high)} limits"
        )
    for name, lowest, highest in zip(action.names, low, high, strict=True):
        if spec.paced and not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ConfigError(
                f"$.backend: {spec.name} gives no limits for {name} ({lowest:g} to {highest:g}); a robot needs them"
            )
        if not lowest < highest:
            raise ConfigError(f"$.backend: {spec.name} has limits {lowest:g} to {highest:g} for {name}")
    return low, high


def _spec_rate(spec: BackendSpec, default: Float64) -> Float64:
    if spec.max_rate is None:
        return default
    rate = np.asarray(spec.max_rate, np.float64)
    if len(rate) != len(default) or not (rate > 0).all():
        raise ConfigError(f"$.backend: max_rate of {spec.name} must be {len(default)} positive numbers, not {rate}")
    return rate


def _by_name(values: Mapping[str, float], key: str, names: tuple[str, ...], default: Float64) -> Float64:
    limits = default.copy()
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"$.bridge.safety.{key}.{name}: the action has no such element{hint} (it has {', '.join(names)})"
            )
        if not math.isfinite(value):
            raise ConfigError(f"$.bridge.safety.{key}.{name}: {value} is no limit")
        limits[names.index(name)] = value
    return limits


def _loosened(key: str, name: str, limit: float, side: str, bound: float) -> ConfigError:
    return ConfigError(
        f"$.bridge.safety.{key}.{name}: {limit:g} is {side} the backend's own limit {bound:g}; "
        "limits can only be tightened here"
    )


def _inside(limits: Float64, towards: float) -> Float32:
    """As float32, and not outside the float64 limit by its rounding."""
    rounded = limits.astype(np.float32)
    outside = rounded < limits if towards > 0 else rounded > limits
    return np.where(outside, np.nextafter(rounded, np.float32(towards)), rounded)
