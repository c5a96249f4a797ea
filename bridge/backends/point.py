"""A dot that has to reach a square: enough to try the wire, the log and the trainer without a simulator."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from bridge.backend import (
    ActionSpec,
    BackendError,
    BackendSpec,
    CameraSpec,
    Float32,
    Observation,
    Outcome,
    UInt8,
    VectorSpec,
)

STEP = 0.1
"""How far an action of 1 moves the dot; the plane is 2 wide."""
RADIUS = 0.1
"""Success is to be this near to the goal."""
MIN_START_DISTANCE = 0.5
EXPERT_SPEED = 0.5

_GOAL_COLOUR = (0, 200, 0)
_POINT_COLOUR = (255, 255, 255)


class PointOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `point`."""

    size_px: Annotated[int, Meta(ge=8, le=512)] = 32
    """Side of the camera's image."""


class Point:
    """A dot in the square from -1 to 1, moved by a velocity; the expert goes straight to the goal at half speed."""

    def __init__(self, options: PointOptions) -> None:
        """Nothing can fail."""
        self._size_px = options.size_px
        self._spec = BackendSpec(
            name="point",
            cameras=(CameraSpec("top", options.size_px, options.size_px),),
            state=VectorSpec(names=("x", "y"), units=("1", "1")),
            action=ActionSpec(
                names=("vx", "vy"), units=("0.1", "0.1"), low=(-1.0, -1.0), high=(1.0, 1.0), kind="delta"
            ),
            control_hz=10.0,
            instructions={"reach": "move the dot to the square"},
            privileged=VectorSpec(names=("x", "y", "goal_x", "goal_y"), units=("1",) * 4),
        )
        self._point = self._goal = np.zeros(2)
        self._running = False

    @property
    def spec(self) -> BackendSpec:
        """One camera, the dot's position, a velocity of two elements; the goal is privileged."""
        return self._spec

    def connect(self) -> None:
        """Nothing to open."""

    def reset(self, task: str, seed: int) -> None:
        """Place dot and goal by `seed` (0 or more), at least `MIN_START_DISTANCE` apart."""
        if task not in self._spec.instructions:
            raise BackendError(f"point has no task {task!r}; its task is 'reach'")
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; seeds are 0 or more")
        random = np.random.default_rng(seed)
        self._point = random.uniform(-0.9, 0.9, 2)
        draws = random.uniform(-0.9, 0.9, (32, 2))
        # The first draw that is far enough.
        distances = np.linalg.norm(draws - self._point, axis=1)
        self._goal = draws[np.argmax(np.minimum(distances, MIN_START_DISTANCE))]
        self._running = True

    def observe(self) -> Observation:
        """Draw the picture and read the position."""
        self._check_running()
        return Observation(
            images={"top": self._draw()},
            state=self._point.astype(np.float32),
            privileged=np.concatenate([self._point, self._goal]).astype(np.float32),
        )

    def apply(self, action: Float32) -> Float32:
        """Clip to the limits and move; the dot stops at the edge. Returns the clipped action float32 `[2]`."""
        self._check_running()
        if np.shape(action) != (2,) or not np.isfinite(action).all():
            raise BackendError(f"an action of point is 2 finite numbers, not {action!r}")
        sent = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        self._point = np.clip(self._point + STEP * sent, -1.0, 1.0)
        return sent

    def outcome(self) -> Outcome:
        """Success within `RADIUS`; the reward is minus the distance."""
        self._check_running()
        distance = self._distance()
        return Outcome(status="success" if distance <= RADIUS else "running", reward=-distance)

    def hold_action(self) -> Float32:
        """No velocity."""
        return np.zeros(2, np.float32)

    def expert_action(self) -> Float32:
        """Straight to the goal at half speed, slower for the last step."""
        self._check_running()
        way = (self._goal - self._point) / STEP
        return (way * min(1.0, EXPERT_SPEED / max(float(np.linalg.norm(way)), 1e-9))).astype(np.float32)

    def stop(self) -> None:
        """Nothing moves between two calls of `apply`."""

    def close(self) -> None:
        """Forget the episode."""
        self._running = False

    def _distance(self) -> float:
        return float(np.linalg.norm(self._goal - self._point))

    def _check_running(self) -> None:
        if not self._running:
            raise BackendError("point has no episode; call reset() first")

    def _draw(self) -> UInt8:
        """Goal below, dot above it; x to the right, y upwards."""
        image = np.zeros((self._size_px, self._size_px, 3), np.uint8)
        for centre, half, colour in (
            (self._goal, self._size_px // 12, _GOAL_COLOUR),
            (self._point, self._size_px // 24, _POINT_COLOUR),
        ):
            column, row = np.round((centre * (1.0, -1.0) + 1.0) / 2.0 * (self._size_px - 1)).astype(int)
            image[max(row - half, 0) : row + half + 1, max(column - half, 0) : column + half + 1] = colour
        return image
