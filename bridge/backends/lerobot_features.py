"""What a LeRobot `Robot` says of itself, and the options, as a `BackendSpec`.

A LeRobot feature has a name and a type, nothing more: `float` for one number, `(height, width, 3)` for a colour image.
Units, limits and rate are in no feature, so the options must say them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, VectorSpec
from bridge.backends.frozen import FROZEN_S
from bridge.config import ConfigError, Positive

OPTIONS = "$.backend.options"

Side = Annotated[int, Meta(ge=8, le=1024)]


class LeRobotAction(Struct, frozen=True, forbid_unknown_fields=True):
    """One number of the action. There are no default limits: a robot without limits is not driven."""

    low: float
    high: float
    unit: str
    hold: float | None = None
    """What is sent to stand still: a number (0 for a velocity), or, if null, what is read under the same name."""


class LeRobotCamera(Struct, frozen=True, forbid_unknown_fields=True):
    """The size in which the policy sees a camera; the robot's image is resized by area, whatever its aspect ratio."""

    height: Side
    width: Side


class LeRobotOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `lerobot`."""

    robot: str
    """`module:Class` of the robot, e.g. `lerobot.robots.so_follower:SO101Follower`."""
    control_hz: Positive
    """Actions a second."""
    actions: dict[str, LeRobotAction]
    """Every action feature of the robot, by its name; the order is the robot's."""
    instructions: dict[str, str | tuple[str, ...]]
    """Each task, and what the policy is told: one text, or several wordings."""
    config: dict[str, Any] = {}
    """Fields of the robot's configuration. A mapping with a key `class` (`module:Class`) becomes an object of that
    class, so a camera is `{class: "lerobot.cameras.opencv:OpenCVCameraConfig", index_or_path: 0, ...}`; at the top that
    key is only needed where the robot's `config_class` is not the one wanted."""
    state: dict[str, str] | None = None
    """Number features that the policy sees, and the unit of each; the order is the robot's. If null: those that have
    the name of an action."""
    cameras: dict[str, LeRobotCamera] = {}
    """Image features that the policy sees."""
    kind: Literal["absolute", "delta"] = "absolute"
    """Whether actions are targets, or relative to where the robot is."""
    frozen_after_s: Positive | None = FROZEN_S
    """A camera that has sent the very same picture for longer is frozen, and the robot stops. null: never, for pictures
    that are drawn."""


def read_spec(observations: Mapping[str, Any], actions: Mapping[str, Any], options: LeRobotOptions) -> BackendSpec:
    """The spec of a robot with these features. Raises `ConfigError` naming the option that does not fit them."""
    numbers = [name for name, kind in observations.items() if _is_number(kind)]
    images = [name for name, kind in observations.items() if _is_image(kind)]
    _check_actions(actions, options, numbers)
    if options.state is None:
        state = {name: options.actions[name].unit for name in numbers if name in options.actions}
    else:
        _check_known(f"{OPTIONS}.state", options.state, numbers, "number")
        state = {name: options.state[name] for name in numbers if name in options.state}
    _check_known(f"{OPTIONS}.cameras", options.cameras, images, "image")
    if not options.instructions:
        raise ConfigError(f"{OPTIONS}.instructions: is empty; name at least one task and what the policy is told")
    ordered = [options.actions[name] for name in actions]
    try:
        return BackendSpec(
            name="lerobot",
            cameras=tuple(
                CameraSpec(name, options.cameras[name].height, options.cameras[name].width)
                for name in images
                if name in options.cameras
            ),
            state=VectorSpec(names=tuple(state), units=tuple(state.values())),
            action=ActionSpec(
                names=tuple(actions),
                units=tuple(action.unit for action in ordered),
                low=tuple(action.low for action in ordered),
                high=tuple(action.high for action in ordered),
                kind=options.kind,
            ),
            control_hz=options.control_hz,
            instructions=dict(options.instructions),
            paced=True,
            judges=False,
        )
    except ValueError as error:
        raise ConfigError(f"{OPTIONS}.instructions: {error}") from error


def _check_actions(actions: Mapping[str, Any], options: LeRobotOptions, numbers: list[str]) -> None:
    for name, kind in actions.items():
        if not _is_number(kind):
            raise ConfigError(f"{OPTIONS}.robot: its action {name!r} is {kind!r}; only numbers can be commanded")
        if name not in options.actions:
            raise ConfigError(
                f"{OPTIONS}.actions: {name!r} is missing; every action of the robot needs low, high and unit "
                f"(its actions: {', '.join(actions)})"
            )
    _check_known(f"{OPTIONS}.actions", options.actions, list(actions), "action")
    for name, action in options.actions.items():
        where = f"{OPTIONS}.actions.{name}"
        if not (math.isfinite(action.low) and math.isfinite(action.high) and action.low < action.high):
            raise ConfigError(f"{where}: low {action.low} must be below high {action.high}, and both finite")
        if action.hold is not None and options.kind == "delta":
            raise ConfigError(f"{where}.hold: {action.hold}, and a delta holds at 0; leave it out")
        if action.hold is not None and not action.low <= action.hold <= action.high:
            raise ConfigError(f"{where}.hold: {action.hold} is outside the limits {action.low} to {action.high}")
        if options.kind == "absolute" and action.hold is None:
            if name not in numbers:
                raise ConfigError(
                    f"{where}.hold: missing, and the robot reads nothing of this name; say what makes it stand still"
                )
            # Sending a velocity that was read would keep the robot moving.
            if "/s" in action.unit or name.endswith(".vel"):
                raise ConfigError(f"{where}.hold: missing; a velocity needs it, and 0 is what stands still")


def _check_known(where: str, named: Mapping[str, Any], known: list[str], what: str) -> None:
    for name in named:
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: the robot has no {what} feature of this name (known: {', '.join(known) or 'none'})"
            )


def _is_number(kind: Any) -> bool:
    return kind in (float, int)


def _is_image(kind: Any) -> bool:
    return isinstance(kind, tuple | list) and len(kind) == 3 and kind[2] == 3
