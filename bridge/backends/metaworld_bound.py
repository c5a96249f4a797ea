"""How few control steps MetaWorld's MT10 could take: a crude kinematic bound, for comparison with what policies take.

The hand follows a target that an action moves by at most 1 cm on each axis. So a task takes at least as long as the
hand needs, at its measured top speed and after its measured lag, for

    hand -> contact with the object, then object -> where the simulator calls it a success

both as Chebyshev distances (the axes move independently, so the longest one counts). For reach it is the tool's way to
the goal. Distances come from the privileged state at reset.

What it leaves out makes it too low: obstacles, the side from which the object has to be approached, closing the
gripper, lifting over an edge, arcs (a door's handle goes round its hinge), lag at turns. What makes it not strict: an
object that is flung or falls goes faster than the hand, and the contact distances are those of the scripted expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

from bridge.backends.metaworld import MetaWorld, MetaWorldOptions

Vector = NDArray[np.float64]

TOOL = (0.0, 0.0, -0.045)  # from the hand's position to the point between its fingers, in metres
PEG_HEAD = (-0.13, 0.0, -0.01)  # from where the peg is grasped, which the state holds, to its head
MEASURED_STEPS = 30
# The steps over which the hand goes steadily: it has caught up with its target, and is not yet at the arm's limits.
STEADY = (12, 20)


class Success(Struct, frozen=True):
    """When MetaWorld reports success: `norm(scale * (point - goal)) <= radius_m`, after its `evaluate_state`."""

    radius_m: float
    contact_m: float | None = None
    """Largest distance from hand to object at which the scripted expert's hand was seen to move the object, rounded up;
    None where there is no object and the tool itself has to be at the goal."""
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """From the object's position in the state (the hand's, without an object) to the point that counts."""


SUCCESS: dict[str, Success] = {
    "reach-v3": Success(0.05, offset_m=TOOL),
    "push-v3": Success(0.05, 0.04),
    "pick-place-v3": Success(0.07, 0.04),
    "door-open-v3": Success(0.08, 0.05, scale=(1, 0, 0)),
    "drawer-open-v3": Success(0.03, 0.03),
    "drawer-close-v3": Success(0.065, 0.04),
    "button-press-topdown-v3": Success(0.024, 0.055, scale=(0, 0, 1)),
    "peg-insert-side-v3": Success(0.07, 0.04, scale=(1, 2, 2), offset_m=PEG_HEAD),
    "window-open-v3": Success(0.05, 0.105, scale=(1, 0, 0)),
    "window-close-v3": Success(0.05, 0.105, scale=(1, 0, 0)),
}


class HandMotion(Struct, frozen=True):
    """How the hand follows the largest action along an axis, in its fastest direction."""

    travelled_m: tuple[float, ...]
    """After 1, 2, ... steps, up to the end of steady motion."""
    speed_m: float
    """Metres a step in steady motion."""
    lag_steps: float
    """Steps by which it is later than a hand that has this speed from the first step."""

    def steps(self, distance_m: float) -> int:
        """Fewest steps after which it has travelled this far."""
        within = int(np.searchsorted(self.travelled_m, distance_m - 1e-9))
        if within < len(self.travelled_m):
            return within + 1 if distance_m > 0 else 0
        return len(self.travelled_m) + int(np.ceil((distance_m - self.travelled_m[-1]) / self.speed_m - 1e-9))


class GoalBound(Struct, frozen=True):
    """The bound of one goal."""

    task: str
    seed: int
    steps: int


class KinematicBound(Struct, frozen=True):
    """The bounds of several goals and the motion of the hand that they were computed with."""

    hand: HandMotion
    goals: tuple[GoalBound, ...]


def kinematic_bound(goals: Iterable[tuple[str, int]]) -> KinematicBound:
    """The bound of each goal (task, seed), by a simulator of its own without cameras; tasks outside MT10 are left out.

    Raises `BackendError` where MetaWorld is not installed.
    """
    known = sorted({goal for goal in goals if goal[0] in SUCCESS})
    backend = MetaWorld(MetaWorldOptions(tasks=tuple(SUCCESS), cameras=()))
    backend.connect()
    try:
        hand = measure_hand(backend)
        bounds = []
        for task, seed in known:
            backend.reset(task, seed)
            bounds.append(GoalBound(task, seed, hand.steps(shortest_way_m(task, privileged(backend)))))
    finally:
        backend.close()
    return KinematicBound(hand, tuple(bounds))


def measure_hand(backend: MetaWorld) -> HandMotion:
    """Send the largest action both ways along each axis, from the start of `reach-v3`; the fastest direction counts."""
    motions = []
    for axis in range(3):
        for sign in (1.0, -1.0):
            backend.reset("reach-v3", 0)
            start = privileged(backend)[axis]
            action = np.zeros(4, np.float32)
            action[axis] = sign
            way = []
            for _ in range(MEASURED_STEPS):
                backend.apply(action)
                way.append(sign * (privileged(backend)[axis] - start))
            first, last = STEADY
            speed = (way[last - 1] - way[first - 1]) / (last - first)
            motions.append(HandMotion(tuple(map(float, way[:last])), float(speed), float(last - way[last - 1] / speed)))
    return max(motions, key=lambda motion: motion.travelled_m[-1])


def shortest_way_m(task: str, state: Vector) -> float:
    """The way that the hand has to go at least, in metres on the longest axis; `state` `[39]` is that at reset."""
    rule = SUCCESS[task]
    hand, thing, goal = state[:3], state[4:7], state[36:39]
    if rule.contact_m is None:
        return way_into_ball_m(goal - hand - rule.offset_m, rule.radius_m, rule.scale)
    contact = way_into_ball_m(thing - hand, rule.contact_m)
    return contact + way_into_ball_m(goal - thing - rule.offset_m, rule.radius_m, rule.scale)


def way_into_ball_m(distance: Vector, radius_m: float, scale: ArrayLike = (1.0, 1.0, 1.0)) -> float:
    """Smallest c such that moving each axis by at most c leaves `norm(scale * rest) <= radius_m`; by bisection."""
    away, scale = np.abs(distance), np.asarray(scale, np.float64)
    low, high = 0.0, float(away.max())
    if np.linalg.norm(scale * away) <= radius_m:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        inside = np.linalg.norm(scale * np.maximum(away - middle, 0.0)) <= radius_m
        low, high = (low, middle) if inside else (middle, high)
    return high


def privileged(backend: MetaWorld) -> Vector:
    """MetaWorld's 39 numbers: hand, gripper and objects now and a step before, then the goal."""
    state = backend.observe().privileged
    assert state is not None
    return state.astype(np.float64)
