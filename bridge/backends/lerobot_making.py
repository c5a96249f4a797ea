"""The LeRobot robot that the options name, with its configuration, by the names of their classes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.backends.lerobot_features import OPTIONS, LeRobotOptions
from bridge.config import ConfigError

_PROPERTIES = ("observation_features", "action_features")
_METHODS = ("connect", "get_observation", "send_action", "disconnect")


def make_robot(options: LeRobotOptions) -> Any:
    """The robot that the options name, not connected; raises `ConfigError`."""
    kind = _find_class(options.robot, f"{OPTIONS}.robot")
    where = f"{OPTIONS}.config"
    fields = dict(options.config)
    if "class" not in fields:
        default = getattr(kind, "config_class", None)
        if default is None:
            raise ConfigError(f"{where}.class: missing; {options.robot} has no config_class, so name module:Class")
        config = _call(default, _built(fields, where), where)
    else:
        config = _built(fields, where)
    try:
        robot = kind(config)
    except Exception as error:
        raise ConfigError(f"{OPTIONS}.robot: {options.robot} cannot be made: {said(error)}") from error
    for name in _PROPERTIES:
        if not isinstance(getattr(robot, name, None), Mapping):
            raise ConfigError(f"{OPTIONS}.robot: {options.robot} has no {name}; it is not a LeRobot robot")
    for name in _METHODS:
        if not callable(getattr(robot, name, None)):
            raise ConfigError(f"{OPTIONS}.robot: {options.robot} has no method {name}(); it is not a LeRobot robot")
    return robot


def _built(value: Any, where: str) -> Any:
    """`value` with each mapping that has a key `class` made into an object of that class, from the inside out."""
    if isinstance(value, list):
        return [_built(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    fields = {key: _built(item, f"{where}.{key}") for key, item in value.items() if key != "class"}
    if "class" not in value:
        return fields
    return _call(_find_class(value["class"], f"{where}.class"), fields, where)


def _call(kind: Any, fields: dict[str, Any], where: str) -> Any:
    try:
        return kind(**_with_paths(kind, fields))
    except Exception as error:
        raise ConfigError(f"{where}: {getattr(kind, '__name__', kind)} refuses it: {said(error)}") from error


def _with_paths(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with each text that the dataclass `kind` wants as a `Path` made into one: YAML has no paths."""
    if not dataclasses.is_dataclass(kind):
        return fields
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError, AttributeError):  # types that only a checker sees
        return fields
    made = dict(fields)
    for key, value in fields.items():
        kinds = (hints.get(key), *typing.get_args(hints.get(key)))
        if isinstance(value, str) and Path in kinds and str not in kinds:
            made[key] = Path(value).expanduser()
    return made


def _find_class(name: Any, where: str) -> Any:
    module_name, _, class_name = str(name).partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"{where}: expected module:Class (found {name!r})")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{where}: the module of {name!r} cannot be imported: {error}; install it in this environment (LeRobot's "
            "own robots: pip install lerobot, with the extra of their motors), or use the backend `remote`"
        ) from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise ConfigError(f"{where}: {module_name} has no class {class_name!r}")
    return kind


def said(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def forget_late_answers(robot: Any) -> None:
    """Empty what came in on the robot's serial ports, or on those of its arms.

    Feetech's SDK does not, as Dynamixel's does: after one answer that came too late, each reading is the one before.
    """
    for part in (robot, *getattr(robot, "__dict__", {}).values()):
        # What has no such port is let be, and a port that is gone says so in the call that follows.
        with contextlib.suppress(Exception):
            part.bus.port_handler.ser.reset_input_buffer()
