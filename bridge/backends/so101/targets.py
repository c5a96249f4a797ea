"""Where the joints are told to be: from actions to goals of the servos, and back to the action that was really sent."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bridge.backend import ActionSpec, Float32
from bridge.backends.so101.calibration import Calibration

Float64 = NDArray[np.float64]
Kind = Literal["delta", "absolute"]

ARRIVED = 4.0
"""Degrees or percent from its goal at which a joint counts as arrived; gravity bends an arm by a few."""
LEAD_S = 0.3
"""How far ahead of its joint a goal may run, as time at the largest speed: several times the servos' lag, and little
enough that a joint that was blocked does not run off when it is let go."""


class Targets:
    """The goals `[joints]` of one arm, in the joints' units.

    An `absolute` action is the goal. A `delta` is added to the goal before it and not to where the joint is: what load
    bends down would otherwise sink, and a joint would never reach its speed. Goals are kept between the servos' ticks,
    so small steps add up.
    """

    def __init__(self, calibration: Calibration, kind: Kind, max_speed_deg_s: float, control_hz: float) -> None:
        """Deltas are at most what `max_speed_deg_s` makes in a period."""
        self._calibration, self._kind = calibration, kind
        self._low, self._high = calibration.low.astype(np.float64), calibration.high.astype(np.float64)
        rate = calibration.speed(max_speed_deg_s)
        self.max_rate = tuple(map(float, rate)) if kind == "absolute" else None
        """Largest change of an absolute action in a second; the limits of a delta say it already."""
        self._step = rate / control_hz
        self._lead = ARRIVED + LEAD_S * rate
        self.goal: Float64 = np.zeros(len(calibration.names))

    @property
    def spec(self) -> ActionSpec:
        """Names, units and limits of the actions."""
        low, high = (-self._step, self._step) if self._kind == "delta" else (self._low, self._high)
        names, units = self._calibration.names, self._calibration.units
        return ActionSpec(names, units, tuple(map(float, low)), tuple(map(float, high)), self._kind)

    def after(self, action: Float32, positions: Float32) -> Float64:
        """The goals after an action `[joints]`, within all limits, with the joints at `positions`."""
        if self._kind == "absolute":
            return self._calibration.positions(self._calibration.ticks(action)).astype(np.float64)
        goal = self.goal + np.clip(action, -self._step, self._step)
        goal = np.clip(goal, positions - self._lead, positions + self._lead)
        # Last, so that what brings a goal back does it no faster than an action may.
        return self.goal + np.clip(np.clip(goal, self._low, self._high) - self.goal, -self._step, self._step)

    def sent(self, goal: Float64) -> Float32:
        """The servos have been told to go there: the action `[joints]` that this was."""
        last, self.goal = self.goal, goal
        return self._action(goal, last)

    def hold(self, positions: Float32) -> Float32:
        """The action `[joints]` that stays at `positions`. A joint that is at its goal keeps the goal, so that it does
        not sink by being told again and again where its load has bent it to.
        """
        near = np.abs(self.goal - positions) <= ARRIVED
        return self.towards(np.where(near, self.goal, positions))

    def towards(self, goal: Float64) -> Float32:
        """The action `[joints]` that leads to `goal`, or as near to it as the limits let it."""
        return self._action(goal, self.goal)

    def _action(self, goal: Float64, last: Float64) -> Float32:
        action, limits = (goal - last if self._kind == "delta" else goal), self.spec
        return np.clip(action, limits.low, limits.high).astype(np.float32)
