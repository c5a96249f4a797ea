"""Any registered Gymnasium environment with a continuous action."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Literal

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
    Status,
    UInt8,
    VectorSpec,
)
from bridge.backends.gymnasium_spaces import Part, is_image, parts_of, read, spaces_of
from bridge.backends.rendering import prepare_gl
from bridge.backends.resizing import Resizer
from bridge.config import ConfigError

_OPTIONS = "$.backend.options"
_DEFAULT_HZ = 20.0
_EXTRAS = {"gymnasium_robotics": "gymnasium-robotics"}


class GymnasiumCamera(Struct, frozen=True, forbid_unknown_fields=True):
    """One camera: what the environment renders, or an image in its observation, as uint8 `[size_px, size_px, 3]`."""

    name: str
    size_px: Annotated[int, Meta(ge=8, le=1024)] = 64
    source: str = "render"
    """`render`, or a key of the observation whose value is uint8 `[H, W, 3]`."""


class GymnasiumOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `gymnasium`. A Box observation counts as a Dict with the one key `observation`."""

    id: str
    """The id the environment is registered under."""
    kwargs: dict[str, Any] = {}
    """Passed to `gymnasium.make`."""
    imports: tuple[str, ...] = ()
    """Modules whose import registers the id."""
    cameras: tuple[GymnasiumCamera, ...] = ()
    state: tuple[str, ...] | None = None
    """What the policy sees beside the cameras: `KEY` or `KEY[START:STOP]` of the observation, one after the other.
    A Box observation is the state as a whole if this is absent, and an image gives no state."""
    privileged: tuple[str, ...] | None = None
    """What only the trainer's critic sees, in the same way: where the object and the goal are, say."""
    kind: Literal["absolute", "delta"] = "absolute"
    """Whether an action is a target, or relative to where the robot is."""
    success: str | None = None
    """Key in `info` that is true once the task is done."""
    terminated: Literal["success", "failure"] = "failure"
    """What it means when the environment terminates and `success` does not say that the task is done."""
    instruction: str | tuple[str, ...] = ""
    """What the policy is told: one text, or several wordings."""
    task: str | None = None
    """Name of the one task; the id if absent."""
    control_hz: Annotated[float, Meta(gt=0)] | None = None
    """Actions a second; the environment's `render_fps` if absent, else 20."""


class Gymnasium:
    """The backend. Time-outs of the environment count as `timeout`, terminations as the options say."""

    def __init__(self, options: GymnasiumOptions) -> None:
        """Make the environment, as its spaces are the spec. Raises `ConfigError` naming the option that is wrong."""
        self._options = options
        self._task = options.task or options.id
        self._env = _make(options)
        try:
            self._state = parts_of(self._env.observation_space, options.state, f"{_OPTIONS}.state")
            self._privileged = self._privileged_parts()
            self._spec = self._read_spec()
        except ConfigError:
            self._env.close()
            raise
        self._observation: Any = None
        self._outcome = Outcome("running", 0.0)
        self._saw_success_key = False
        self._resizers: dict[tuple[int, int, int], Resizer] = {}
        self._closed = False

    @property
    def spec(self) -> BackendSpec:
        """Read from the environment's spaces; it names no units, so they are `unknown`."""
        return self._spec

    def connect(self) -> None:
        """Make the environment again if it was closed."""
        if self._closed:
            self._env = _make(self._options)
            self._closed = False

    def reset(self, task: str, seed: int) -> None:
        """Reset the environment with the seed (0 or more)."""
        if self._closed:
            raise BackendError("gymnasium is not connected; call connect() before reset()")
        if task != self._task:
            raise BackendError(f"gymnasium has no task {task!r} here; its task is {self._task!r}")
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; Gymnasium's seeds are 0 or more")
        self._observation, _ = self._env.reset(seed=seed)
        self._outcome = Outcome("running", 0.0)
        self._saw_success_key = False

    def observe(self) -> Observation:
        """Render or copy the cameras, resized by area, and flatten the state."""
        self._check_running()
        images = {camera.name: self._image(camera) for camera in self._options.cameras}
        privileged = read(self._observation, self._privileged) if self._privileged else None
        return Observation(images=images, state=read(self._observation, self._state), privileged=privileged)

    def apply(self, action: Float32) -> Float32:
        """Clip to the limits and step once; returns the clipped action float32 `[d]`."""
        self._check_running()
        space = self._env.action_space
        size = len(self._spec.action.names)
        if np.shape(action) != (size,) or not np.isfinite(action).all():
            raise BackendError(f"an action of {self._options.id} is {size} finite numbers, not {action!r}")
        sent = np.clip(np.asarray(action, np.float32), self._spec.action.low, self._spec.action.high)
        sent = sent.astype(np.float32)
        step = self._env.step(sent.reshape(space.shape).astype(space.dtype))
        self._observation, reward, terminated, truncated, info = step
        self._outcome = Outcome(self._status(terminated, truncated, info), float(reward))
        return sent

    def outcome(self) -> Outcome:
        """Status after the last step, and the environment's reward for it."""
        self._check_running()
        return self._outcome

    def hold_action(self) -> Float32:
        """Zero, or the limit nearest to it."""
        limits = self._spec.action
        return np.clip(np.zeros(len(limits.names)), limits.low, limits.high).astype(np.float32)

    def stop(self) -> None:
        """Nothing moves between two calls of `apply`."""

    def close(self) -> None:
        """Close the environment; `connect` makes it again."""
        if not self._closed:
            self._env.close()
            self._observation = None
            self._closed = True

    def _check_running(self) -> None:
        if self._observation is None:
            raise BackendError("gymnasium has no episode; call connect() and reset() first")

    def _status(self, terminated: bool, truncated: bool, info: dict[str, Any]) -> Status:
        """Success outlasts later steps; a termination without it is what the options say; a truncation is a timeout."""
        key = self._options.success
        if key is not None and key in info:
            self._saw_success_key = True
            if bool(info[key]):
                return "success"
        if self._outcome.status == "success":
            return "success"
        if key is not None and (terminated or truncated) and not self._saw_success_key:
            raise BackendError(
                f"{self._options.id} never put {key!r} into info (last keys: {', '.join(info) or 'none'}); "
                f"correct {_OPTIONS}.success or leave it out"
            )
        if terminated:
            return self._options.terminated
        return "timeout" if truncated else "running"

    def _privileged_parts(self) -> list[Part]:
        if self._options.privileged is None:
            return []
        return parts_of(self._env.observation_space, self._options.privileged, f"{_OPTIONS}.privileged")

    def _image(self, camera: GymnasiumCamera) -> UInt8:
        source = self._render() if camera.source == "render" else spaces_of(self._observation)[camera.source]
        image = np.asarray(source)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BackendError(
                f"camera {camera.name}: {camera.source} of {self._options.id} gives {image.dtype}{list(image.shape)}, "
                "expected uint8 [H, W, 3]"
            )
        key = (image.shape[0], image.shape[1], camera.size_px)
        if key not in self._resizers:
            self._resizers[key] = Resizer(key[:2], (camera.size_px, camera.size_px))
        return self._resizers[key](image)

    def _render(self) -> Any:
        try:
            return self._env.render()
        # MuJoCo, PyOpenGL and pygame raise whatever they stumble over where there is no screen or no driver.
        except Exception as error:
            raise BackendError(
                f"{self._options.id} cannot draw: {type(error).__name__}: {error}; see `fieldtune doctor`"
            ) from error

    def _read_spec(self) -> BackendSpec:
        from gymnasium.spaces import Box

        options, env = self._options, self._env
        action = env.action_space
        if not isinstance(action, Box) or not np.issubdtype(action.dtype, np.floating):
            raise ConfigError(f"{_OPTIONS}.id: the action of {options.id} is {action}, expected a Box of floats")
        low, high = (tuple(float(x) for x in bound.ravel()) for bound in (action.low, action.high))
        if not np.isfinite(low + high).all():
            raise ConfigError(
                f"{_OPTIONS}.id: the action of {options.id} is {action}, expected finite limits; register it with "
                "a wrapper that gives it some"
            )
        return BackendSpec(
            name="gymnasium",
            cameras=tuple(self._camera_spec(index) for index in range(len(options.cameras))),
            state=_vector_spec(self._state),
            action=ActionSpec(
                names=tuple(f"action_{i}" for i in range(len(low))),
                units=("unknown",) * len(low),
                low=low,
                high=high,
                kind=options.kind,
            ),
            control_hz=options.control_hz or float(env.metadata.get("render_fps") or _DEFAULT_HZ),
            instructions={self._task: options.instruction},
            privileged=_vector_spec(self._privileged) if self._privileged else None,
        )

    def _camera_spec(self, index: int) -> CameraSpec:
        camera, where = self._options.cameras[index], f"{_OPTIONS}.cameras[{index}]"
        if camera.name in [other.name for other in self._options.cameras[:index]]:
            raise ConfigError(f"{where}.name: {camera.name!r} is the name of another camera")
        if camera.source != "render":
            space = self._env.observation_space
            part = spaces_of(space).get(camera.source)
            if not is_image(part):
                raise ConfigError(
                    f"{where}.source: {camera.source!r} is {part}, expected `render` or a key of the observation that "
                    f"holds uint8 [H, W, 3] (the observation is {space})"
                )
        return CameraSpec(camera.name, camera.size_px, camera.size_px)


def _vector_spec(parts: list[Part]) -> VectorSpec:
    names = tuple(name for part in parts for name in part.names)
    return VectorSpec(names=names, units=("unknown",) * len(names))


def _make(options: GymnasiumOptions) -> Any:
    """The environment; raises `ConfigError` where the id, its module or its arguments are wrong."""
    if any(camera.source == "render" for camera in options.cameras):
        # Before anything imports mujoco, which looks at it once.
        prepare_gl()
    import gymnasium

    for index, name in enumerate(options.imports):
        try:
            importlib.import_module(name)
        except ImportError as error:
            extra = _EXTRAS.get(name)
            hint = f"; run pip install 'fieldtune[{extra}]'" if extra else ""
            raise ConfigError(f"{_OPTIONS}.imports[{index}]: {name} cannot be imported: {error}{hint}") from error
    kwargs = dict(options.kwargs)
    if any(camera.source == "render" for camera in options.cameras):
        kwargs.setdefault("render_mode", "rgb_array")
    try:
        return gymnasium.make(options.id, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"{_OPTIONS}.id: {options.id} cannot be made: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{_OPTIONS}.kwargs: {options.id} refuses them: {error}") from error
