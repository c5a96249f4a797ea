"""What stands around the emulated arm: where its tip is, a target to reach, and a side view of both.

The arm is three straight links in a vertical plane that the pan joint turns. Lengths are those of an SO-101 to about a
centimetre. At 0 degrees the upper arm is upright and the forearm level; positive angles bend down and forward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.backend import Float32, UInt8
from bridge.backends.so101.calibration import Calibration

Float64 = NDArray[np.float64]

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
HOME = {"shoulder_lift": -30.0, "gripper": 20.0}
"""Start of an episode in the joints' units; the others at 0."""
SHOULDER_M = 0.12
"""Height of the shoulder above the table."""
LINKS_M = (0.116, 0.135, 0.10)
TOLERANCE_M = 0.04
"""Success is the tip this near to the target."""
START_SPREAD = 4.0
"""Episodes start at home but for so many degrees (percent of the gripper) in each joint: what must be put right is
seen in the demonstrations, also of joints that noise alone would move."""
EXPERT_STEP_DEG = 2.5
"""How far the expert moves the goal of a joint in a step, at most: 75 degrees a second at 30 Hz."""

_LIFT_DEG, _ELBOW_DEG = (0.0, 50.0), (-45.0, 15.0)
_MIN_HEIGHT_M, _MIN_WAY_M = 0.03, 0.10
_DRAWS = 64

_VIEW_M = 0.6  # width and height of the side view
_LEFT_M, _BOTTOM_M = -0.2, -0.08
_ARM_WIDTH_M = (0.018, 0.015, 0.011)  # half of it, by link
_TARGET_RADIUS_M = 0.03
_BACKGROUND, _TABLE, _TARGET = (32, 34, 40), (90, 80, 70), (40, 200, 80)
_ARM = ((230, 160, 40), (240, 190, 90), (250, 225, 170))


def arm_points(positions: Float32 | Float64) -> Float64:
    """Shoulder, elbow, wrist and tip `[4, 3]`, metres, x forward, y left, z up, of joints `[6]` in degrees."""
    pan, lift, elbow, wrist = np.radians(positions[:4].astype(np.float64))
    # Pitches of the links, from upright.
    pitch = np.cumsum([lift, np.pi / 2 + elbow, wrist])
    reach, height = np.sin(pitch) * LINKS_M, np.cos(pitch) * LINKS_M
    out = np.concatenate([[0.0], np.cumsum(reach)])
    up = np.concatenate([[0.0], np.cumsum(height)]) + SHOULDER_M
    return np.stack([out * np.cos(pan), out * np.sin(pan), up], axis=1)


class Reach:
    """The task: bring the tip to a target in the plane straight ahead, from near home."""

    def __init__(self, home: Float32, calibration: Calibration) -> None:
        """`home` `[6]` is about where episodes start."""
        self._home, self._calibration = home, calibration
        self._goal = home.astype(np.float64)
        self.start: Float32 = home
        """Where this episode starts `[6]`, in the joints' units."""
        self.target: Float64 = arm_points(home)[-1]
        """`[3]`, metres."""

    def reset(self, seed: int) -> None:
        """Place the target by the seed, above the table and away from home, where the arm can get to; and the start."""
        random = np.random.default_rng(seed)
        goals = np.repeat(self._home[None].astype(np.float64), _DRAWS, axis=0)
        goals[:, 1] = random.uniform(*_LIFT_DEG, _DRAWS)
        goals[:, 2] = random.uniform(*_ELBOW_DEG, _DRAWS)
        tips = np.stack([arm_points(goal)[-1] for goal in goals])
        far = np.linalg.norm(tips - arm_points(self._home)[-1], axis=1) >= _MIN_WAY_M
        # The first that will do; most of the draws do.
        index = int(np.argmax(far & (tips[:, 2] >= _MIN_HEIGHT_M)))
        self._goal, self.target = goals[index], tips[index]
        start = self._home + random.uniform(-START_SPREAD, START_SPREAD, len(self._home))
        self.start = np.clip(start, self._calibration.low, self._calibration.high).astype(np.float32)

    def distance_m(self, positions: Float32) -> float:
        """From the tip to the target."""
        return float(np.linalg.norm(arm_points(positions)[-1] - self.target))

    def reached(self, positions: Float32) -> bool:
        """Whether the tip is at the target."""
        return self.distance_m(positions) <= TOLERANCE_M

    def expert_goal(self, goals: Float64) -> Float64:
        """The next goals `[6]` after these, on the straight way in joint space to where the tip is at the target."""
        way = self._goal - goals
        # The gripper and the roll do not matter to the tip, but the expert keeps them, so that they can be learned.
        largest = max(float(np.abs(way).max()), 1e-9)
        return np.asarray(goals + way * min(1.0, EXPERT_STEP_DEG / largest), np.float64)

    def draw(self, positions: Float32, height: int, width: int) -> UInt8:
        """The side view, uint8 `[height, width, 3]`: table, target, and the arm in front of it."""
        x = _LEFT_M + (np.arange(width) + 0.5) * (_VIEW_M / width)
        z = _BOTTOM_M + _VIEW_M - (np.arange(height) + 0.5) * (_VIEW_M / height)
        grid = np.stack(np.broadcast_arrays(x[None, :], z[:, None]), axis=-1)
        pixel_m = _VIEW_M / min(height, width)
        image = np.empty((height, width, 3))
        image[:] = _BACKGROUND
        image[z < 0] = _TABLE
        _paint(image, np.linalg.norm(grid - self.target[[0, 2]], axis=-1) - _TARGET_RADIUS_M, pixel_m, _TARGET)
        points = arm_points(positions)[:, [0, 2]]
        for start, end, half_width, colour in zip(points[:-1], points[1:], _ARM_WIDTH_M, _ARM, strict=True):
            _paint(image, _to_segment(grid, start, end) - half_width, pixel_m, colour)
        return np.rint(image).astype(np.uint8)


def _to_segment(grid: Float64, start: Float64, end: Float64) -> Float64:
    """Distance of each point `[..., 2]` from the segment."""
    along = end - start
    share = np.clip((grid - start) @ along / max(float(along @ along), 1e-12), 0.0, 1.0)
    return np.asarray(np.linalg.norm(grid - start - share[..., None] * along, axis=-1))


def _paint(image: Float64, outside_m: Float64, pixel_m: float, colour: tuple[int, int, int]) -> None:
    """Paint what is inside a shape; a pixel on its edge gets its share of it."""
    share = np.clip(0.5 - outside_m / pixel_m, 0.0, 1.0)[..., None]
    image += share * (np.array(colour) - image)
