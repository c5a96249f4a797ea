"""MetaWorld v3: a Sawyer arm at a table, fifty tasks, seen through cameras.

MetaWorld's own environments do the physics, the rewards and the scripted experts. What is done differently here, for
speed: pictures are drawn only in `observe` (see `bridge.backends.rendering`), a reset starts from the settled arm that
was computed once instead of simulating 50 steps twice, and a step goes through quicker helpers that give the same
numbers (see `bridge.backends.metaworld_quick`).
"""

from __future__ import annotations

import difflib
import math
import warnings
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import (
    ActionSpec,
    BackendError,
    BackendSpec,
    CameraSpec,
    Float32,
    Observation,
    Outcome,
    VectorSpec,
)
from bridge.backends.metaworld_quick import quick_class
from bridge.backends.metaworld_tasks import GROUPS, HELD_OUT, TRAINING
from bridge.backends.rendering import Camera, Renderer, open_gl, prepare_gl, simplify
from bridge.config import ConfigError
from bridge.pacing import Pacer

# 5 physics steps of 2.5 ms for each action.
CONTROL_HZ = 80.0

# The Sawyer's visual meshes: 50,000 triangles that take part in no collision.
_ROBOT_MESHES = ("pedestal", "base", "head", "l0", "l1", "l2", "l3", "l4", "l5")
# The goal's marker is a ball of 4 cm or less: 3 pixels of 64. It is the only sign of the goal in reach, push and
# pick-place, so it is drawn larger than MetaWorld does.
_GOAL_SCALE = 1.5

_FRAME_NAMES = ("hand_x", "hand_y", "hand_z", "gripper", *(f"object_{i}" for i in range(14)))
_GOAL_NAMES = ("goal_x", "goal_y", "goal_z")
_FRAME_UNITS = ("m", "m", "m", "1", *("1" for _ in range(14)))

STATE = VectorSpec(names=_FRAME_NAMES[:4], units=_FRAME_UNITS[:4])
ACTION = ActionSpec(
    names=("dx", "dy", "dz", "gripper"),
    units=("cm", "cm", "cm", "1"),
    low=(-1.0,) * 4,
    high=(1.0,) * 4,
    kind="delta",
)
PRIVILEGED = VectorSpec(
    names=(*_FRAME_NAMES, *(f"previous_{name}" for name in _FRAME_NAMES), *_GOAL_NAMES),
    units=(*_FRAME_UNITS, *_FRAME_UNITS, "m", "m", "m"),
)


class MetaWorldOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `metaworld`."""

    tasks: tuple[str, ...] = ("mt10",)
    """Names such as `drawer-open-v3`; `mt10`, `mt40` (MT50 without MT10) and `mt50` stand for their lists."""
    cameras: tuple[Camera, ...] = (Camera("corner"),)
    """What the policy sees; none is allowed, and then no OpenGL is needed."""
    instructions: Literal["training", "held_out"] = "training"
    """Which wordings of the instructions an episode is told; `held_out` ones are for evaluation alone."""
    real_time: bool = False
    """A step takes as long as on a robot, 12.5 ms, so that people can watch."""


class MetaWorld:
    """The backend. One MuJoCo model a task is built when the task is first reset, and kept."""

    def __init__(self, options: MetaWorldOptions) -> None:
        """Check the options; nothing is imported or opened yet. Raises `ConfigError`."""
        tasks = _expand(options.tasks)
        names = [camera.name for camera in options.cameras]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(f"$.backend.options.cameras[{index}].name: {name!r} is the name of another camera")
        wordings = TRAINING if options.instructions == "training" else HELD_OUT
        self._cameras = options.cameras
        self._spec = BackendSpec(
            name="metaworld",
            cameras=tuple(CameraSpec(camera.name, camera.size_px, camera.size_px) for camera in options.cameras),
            state=STATE,
            action=ACTION,
            control_hz=CONTROL_HZ,
            instructions={task: wordings[task] for task in tasks},
            privileged=PRIVILEGED,
        )
        self._pacer = Pacer(1.0 / CONTROL_HZ) if options.real_time else None
        self._connected = False
        self._gl: Any = None
        self._scenes: dict[str, _Scene] = {}
        self._scene: _Scene | None = None

    @property
    def spec(self) -> BackendSpec:
        """Hand position and gripper opening as state, MetaWorld's 39 numbers as privileged state, 4 delta actions."""
        return self._spec

    def connect(self) -> None:
        """Import MetaWorld and open OpenGL. Raises `BackendError` where either is not to be had."""
        if self._connected:
            return
        prepare_gl()
        gl = open_gl(max(camera.size_px for camera in self._cameras)) if self._cameras else None
        try:
            import metaworld  # noqa: F401 (its import takes seconds and may fail: here is the place for both)
        except (ImportError, RuntimeError, AttributeError) as error:
            if gl is not None:
                gl.free()
            raise BackendError(
                f"metaworld cannot be imported: {type(error).__name__}: {error}; run "
                "pip install 'fieldtune[metaworld]' and see `fieldtune doctor`"
            ) from error
        self._gl = gl
        self._connected = True

    def reset(self, task: str, seed: int) -> None:
        """Start an episode. Object and goal are drawn by `seed` (0 or more) alone, whatever was run before."""
        if not self._connected:
            raise BackendError("metaworld is not connected; call connect() before reset()")
        if task not in self._spec.instructions:
            raise BackendError(
                f"metaworld has no task {task!r} here; its tasks are {', '.join(self._spec.instructions)}"
            )
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; MetaWorld's seeds are 0 or more")
        if task not in self._scenes:
            self._scenes[task] = _Scene(task, self._cameras, self._gl)
        self._scene = self._scenes[task]
        self._scene.reset(seed)
        if self._pacer:
            self._pacer.start()

    def observe(self) -> Observation:
        """Draw the cameras and read the state."""
        scene = self._running()
        images = scene.renderer.render(scene.env.data) if scene.renderer else {}
        privileged = scene.observation.astype(np.float32)
        return Observation(images=images, state=privileged[:4].copy(), privileged=privileged)

    def apply(self, action: Float32) -> Float32:
        """Clip to the limits and step once; returns the clipped action float32 `[4]`."""
        scene = self._running()
        if np.shape(action) != (4,) or not np.isfinite(action).all():
            raise BackendError(f"an action of metaworld is 4 finite numbers, not {action!r}")
        sent = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        scene.step(sent)
        if self._pacer:
            self._pacer.wait()
        return sent

    def outcome(self) -> Outcome:
        """Success if MetaWorld reported it at any step so far; the reward is MetaWorld's own, shaped, 0 to 10."""
        scene = self._running()
        return Outcome(status="success" if scene.succeeded else "running", reward=scene.reward)

    def hold_action(self) -> Float32:
        """No motion, and the gripper's effort as last sent (open at first)."""
        return np.array([0.0, 0.0, 0.0, self._running().gripper], np.float32)

    def expert_action(self) -> Float32:
        """MetaWorld's scripted policy on the present observation, clipped to the limits."""
        scene = self._running()
        with warnings.catch_warnings():
            # The scripts exceed the limits by design, and warn each time they do.
            warnings.simplefilter("ignore")
            action = scene.expert.get_action(scene.observation)
        return np.clip(np.asarray(action, np.float32), -1.0, 1.0)

    def stop(self) -> None:
        """Nothing moves between two calls of `apply`, so there is nothing to do."""

    def close(self) -> None:
        """Free models and OpenGL; `connect` opens them again."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()
        self._scene = None
        if self._gl is not None:
            self._gl.free()
            self._gl = None
        self._connected = False

    def _running(self) -> _Scene:
        if self._scene is None:
            raise BackendError("metaworld has no episode; call connect() and reset() first")
        return self._scene


class _Scene:
    """One task: MetaWorld's environment, its expert, its renderer, and how the running episode stands."""

    def __init__(self, task: str, cameras: tuple[Camera, ...], gl: Any) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self._mujoco = mujoco
        env: Any = quick_class(ALL_V3_ENVIRONMENTS[task])()
        self.env = env
        # What `metaworld.make_mt_envs` reaches through a pickled task: a visible goal, placed by the environment's
        # own generator. The scripted experts need the goal in the observation.
        env._partially_observable = False
        del env.sawyer_observation_space  # a cached property that was computed for the hidden goal
        env._set_task_called = True
        env.seeded_rand_vec = True
        expert: Any = ENV_POLICY_MAP[task]
        self.expert = expert()
        self._settled = self._settle()
        env._reset_hand = self._restore_hand
        self.renderer: Renderer | None = None
        if cameras:
            simplify(env.model, capsules=_ROBOT_MESHES)
            for site in range(env.model.nsite):
                if env.model.site(site).name == "goal":
                    env.model.site_size[site] *= _GOAL_SCALE
            self.renderer = Renderer(env.model, cameras, gl)
        self.observation: NDArray[np.float64] = np.zeros(len(PRIVILEGED.names))
        self.reward = 0.0
        self.succeeded = False
        self.gripper = -1.0

    def _settle(self) -> NDArray[np.float64]:
        """The simulator's whole state after MetaWorld has brought the hand to its start, which takes it 50 steps."""
        mujoco, env = self._mujoco, self.env
        mujoco.mj_resetData(env.model, env.data)
        env._reset_hand()
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, state, kind)
        return state

    def _restore_hand(self, steps: int = 50) -> None:
        """Stands in for MetaWorld's `_reset_hand`."""
        mujoco, env = self._mujoco, self.env
        mujoco.mj_setState(env.model, env.data, self._settled, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(env.model, env.data)
        env.init_tcp = env.tcp_center

    def reset(self, seed: int) -> None:
        """Draw object and goal by `seed`, and read the first observation."""
        env = self.env
        env.np_random = np.random.default_rng(seed)
        env._freeze_rand_vec = False
        env.reset_model()
        # Again with the same draw: window-open, window-close and dial-turn note where their object is before it has
        # been moved, and only a second pass notes the right place. A pass is cheap with the hand restored.
        env._freeze_rand_vec = True
        env.reset_model()
        # `reset_model` ends with an observation from before the last change of the model, wrong by up to 16 cm.
        self._mujoco.mj_forward(env.model, env.data)
        now = env._get_curr_obs_combined_no_goal()
        env._prev_obs = now
        space = env.sawyer_observation_space
        self.observation = np.clip(np.concatenate([now, now, env._get_pos_goal()]), space.low, space.high)
        self.reward = 0.0
        self.succeeded = False
        self.gripper = -1.0

    def step(self, action: Float32) -> None:
        """One control step with an action `[4]` inside the limits."""
        self.observation, reward, _, _, info = self.env.step(action)
        self.reward = float(reward)
        self.succeeded = self.succeeded or float(info["success"]) > 0.0
        self.gripper = float(action[3])
        if not math.isfinite(self.reward) or not np.isfinite(self.observation).all():
            raise BackendError(f"the simulation of {self.env.task_name} became unstable; reset to go on")

    def close(self) -> None:
        """Free the renderer and the environment."""
        if self.renderer:
            self.renderer.close()
        self.env.close()


def _expand(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Task names with the groups written out, each once. Raises `ConfigError`."""
    expanded: dict[str, None] = {}
    for index, name in enumerate(tasks):
        members = GROUPS.get(name, (name,))
        if members == (name,) and name not in TRAINING:
            near = difflib.get_close_matches(name, [*TRAINING, *GROUPS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"$.backend.options.tasks[{index}]: MetaWorld has no task {name!r}{hint} "
                "(expected names such as 'drawer-open-v3', or mt10 or mt50)"
            )
        expanded.update(dict.fromkeys(members))
    if not expanded:
        raise ConfigError("$.backend.options.tasks: is empty; expected at least one task, or mt10")
    return tuple(expanded)
