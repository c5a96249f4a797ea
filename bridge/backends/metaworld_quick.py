"""MetaWorld's environments made quicker, with every number they compute kept to the last bit.

More than half of a stock step is not physics: rotations through scipy, contacts wrapped one by one to report a grasp,
arrays of one number. `quick_class` replaces the helpers and keeps MetaWorld's own rewards and success rules, which run
as they are with those helpers under the names they know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The quaternion that points the hand down, as MetaWorld writes it: MuJoCo normalises it.
_HAND_DOWN = (1.0, 0.0, 1.0, 0.0)
# Far below the 1e-12 from which on scipy takes a matrix for one that is not orthogonal.
_ORTHOGONAL = 1e-13


def quick_class(stock: type) -> Any:
    """A subclass of `stock`, one of MetaWorld's fifty environments, that computes the same in less time.

    What it leaves out is never read here: the truncation of an episode, and forces between bodies outside contacts.
    """
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
    from metaworld.utils import reward_utils

    tolerance = _quick_tolerance(reward_utils)
    helpers = {
        "reward_utils": SimpleNamespace(**(vars(reward_utils) | {"tolerance": tolerance})),
        "tolerance": tolerance,
        "Rotation": _Rotation,
    }
    members: dict[str, Any] = {}
    for base in stock.__mro__[: stock.__mro__.index(SawyerXYZEnv)]:
        for name, member in vars(base).items():
            if isinstance(member, FunctionType) and member.__module__ == base.__module__:
                members.setdefault(name, _with_globals(member, helpers))
    members["_reward_utils"] = helpers["reward_utils"]
    # A task's own methods stand before those of `_Quick`, and these before those of MetaWorld's common base.
    return type(stock.__name__, (_Quick, stock), members)


def _with_globals(function: FunctionType, replaced: dict[str, Any]) -> FunctionType:
    """A copy of a function that sees other values for those of its module's global names."""
    names = function.__globals__ | {name: value for name, value in replaced.items() if name in function.__globals__}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _quick_tolerance(reward_utils: Any) -> Callable[..., Any]:
    """`reward_utils.tolerance`, without arrays where `x` is one number."""
    stock, sigmoids = reward_utils.tolerance, reward_utils._sigmoids

    def tolerance(
        x: Any,
        bounds: tuple[float, float] = (0.0, 0.0),
        margin: float = 0.0,
        sigmoid: str = "gaussian",
        value_at_margin: float = 0.1,
    ) -> Any:
        lower, upper = bounds
        if not isinstance(x, float) or lower > upper or not margin > 0:
            return stock(x, bounds, margin, sigmoid, value_at_margin)
        if lower <= x <= upper:
            return 1.0
        outside = lower - x if x < lower else x - upper
        return float(sigmoids(np.float64(outside / margin), value_at_margin, sigmoid))

    return tolerance


class _Rotation:
    """What MetaWorld uses of `scipy.spatial.transform.Rotation`: from a rotation matrix to x, y, z, w."""

    def __init__(self, quat: Array) -> None:
        self._quat = quat

    @classmethod
    def from_matrix(cls, matrix: Array) -> _Rotation:
        """`matrix` float64 `[3, 3]`; the formulas, and their order, are those of scipy."""
        (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
        skew = max(abs(a * d + b * e + c * f), abs(a * g + b * h + c * i), abs(d * g + e * h + f * i))
        stretch = max(abs(a * a + b * b + c * c - 1), abs(d * d + e * e + f * f - 1), abs(g * g + h * h + i * i - 1))
        if not (skew < _ORTHOGONAL and stretch < _ORTHOGONAL):
            from scipy.spatial.transform import Rotation

            return cls(Rotation.from_matrix(matrix).as_quat())
        trace = a + e + i
        largest = max(a, e, i, trace)
        if a == largest:
            quat = (1 - trace + 2 * a, d + b, g + c, h - f)
        elif e == largest:
            quat = (b + d, 1 - trace + 2 * e, h + f, c - g)
        elif i == largest:
            quat = (c + g, f + h, 1 - trace + 2 * i, d - b)
        else:
            quat = (h - f, c - g, d - b, 1 + trace)
        x, y, z, w = quat
        norm = math.sqrt(x * x + y * y + z * z + w * w)
        return cls(np.array((x / norm, y / norm, z / norm, w / norm)))

    def as_quat(self) -> Array:
        """The unit quaternion float64 `[4]`, scalar last."""
        return self._quat


class _Quick:
    """Stands in for methods of MetaWorld's `SawyerXYZEnv`; arguments and results are those of the one replaced."""

    def step(self: Any, action: NDArray[np.float32]) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One control step; never truncated, however long the episode is."""
        import mujoco

        data, space = self.data, self.sawyer_observation_space
        moved = data.mocap_pos[0] + np.minimum(np.maximum(action[:3], -1), 1) * self.action_scale
        data.mocap_pos[0] = np.minimum(np.maximum(moved, self.mocap_low), self.mocap_high)
        data.mocap_quat[0] = _HAND_DOWN
        data.ctrl[:] = action[-1], -action[-1]
        mujoco.mj_step(self.model, data, nstep=self.frame_skip)
        # Not only for the positions: it also leaves the solver's start for the next step.
        mujoco.mj_forward(self.model, data)
        observation = np.minimum(np.maximum(self._get_obs(), space.low), space.high)
        reward, info = self.evaluate_state(observation, action)
        return observation, reward, False, False, info

    def _get_obs(self: Any) -> Array:
        goal = self._get_pos_goal()
        now = self._get_curr_obs_combined_no_goal()
        observation = np.concatenate((now, self._prev_obs, np.zeros(3) if self._partially_observable else goal))
        self._prev_obs = now
        return observation

    def _get_curr_obs_combined_no_goal(self: Any) -> Array:
        data = self.data
        observation = np.zeros(4 + self._obs_obj_max_len)
        observation[:3] = data.body("hand").xpos
        opening = np.linalg.norm(data.body("rightclaw").xpos - data.body("leftclaw").xpos) / 0.1
        observation[3] = min(max(opening, 0.0), 1.0)
        positions, quats = self._get_pos_objects(), self._get_quat_objects()
        for index in range(len(positions) // 3):
            start = 4 + 7 * index
            observation[start : start + 3] = positions[3 * index : 3 * index + 3]
            observation[start + 3 : start + 7] = quats[4 * index : 4 * index + 4]
        return observation

    def touching_object(self: Any, object_geom_id: int) -> bool:
        data = self.data
        contacts = list(zip(data.contact.geom.tolist(), data.contact.efc_address.tolist(), strict=True))
        for pad in ("leftpad_geom", "rightpad_geom"):
            pad_geom_id = data.geom(pad).id
            force = sum(
                data.efc_force[address]
                for geoms, address in contacts
                if pad_geom_id in geoms and object_geom_id in geoms
            )
            if not force > 0:
                return False
        return True

    def _gripper_caging_reward(
        self: Any,
        action: NDArray[np.float32],
        obj_pos: Array,
        obj_radius: float,
        pad_success_thresh: float,
        object_reach_radius: float,
        xz_thresh: float,
        desired_gripper_effort: float = 1.0,
        high_density: bool = False,
        medium_density: bool = False,
    ) -> float:
        if high_density and medium_density:
            raise ValueError("Can only be either high_density or medium_density")
        tolerance, product = self._reward_utils.tolerance, self._reward_utils.hamacher_product
        start, init_tcp, tcp = self.obj_init_pos, self.init_tcp, self.tcp_center
        caging_of = []
        for pad in ("leftpad", "rightpad"):
            pad_y = self.data.body(pad).xpos[1]
            margin = abs(abs(pad_y - start[1]) - pad_success_thresh)
            x = abs(pad_y - obj_pos[1])
            caging_of.append(tolerance(x, (obj_radius, pad_success_thresh), margin, "long_tail"))
        xz = slice(0, 3, 2)
        margin_xz = np.linalg.norm(start[xz] - init_tcp[xz]) - xz_thresh
        caging_xz = tolerance(np.linalg.norm(tcp[xz] - obj_pos[xz]), (0, xz_thresh), margin_xz, "long_tail")
        closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
        caging = product(product(*caging_of), float(caging_xz))
        reward: float = product(caging, closed if caging > 0.97 else 0.0)
        if high_density:
            reward = (reward + caging) / 2
        if medium_density:
            margin = abs(np.linalg.norm(start - init_tcp) - object_reach_radius)
            reach = tolerance(np.linalg.norm(obj_pos - tcp), (0, object_reach_radius), margin, "long_tail")
            reward = (reward + float(reach)) / 2
        return reward
