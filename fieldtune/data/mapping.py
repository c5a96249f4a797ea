"""What in a dataset is what in the backend: the `dataset` section of a deployment, and whether the two fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import ActionSpec, BackendSpec, Float32, all_instructions
from bridge.config import ConfigError
from fieldtune.data.lerobot_layout import ACTION, IMAGE, PRIVILEGED, STATE, Feature, Info


class ElementConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One number of a dataset, brought to the unit of the backend: `take` x `scale` + `offset`."""

    take: str
    """`COLUMN/NAME`, or `COLUMN/INDEX` where the column's elements have no names."""
    scale: float = 1.0
    """0.0174532925 makes radians of degrees."""
    offset: float = 0.0
    """In the unit of the backend."""
    change: bool = False
    """For an action that says how far a goal moves, from a dataset that says where the goal is: what it has changed
    since the frame before. Of a change beyond the backend's limits the rest follows in the frames after."""


class DatasetConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What `fieldtune demos import` takes from a LeRobotDataset (docs/data.md). What is not named here is looked for
    under the name that the backend gives it: `observation.images.CAMERA`, `observation.state/NAME`, `action/NAME`."""

    cameras: dict[str, str] = {}
    """Camera of the backend -> column of the dataset."""
    state: dict[str, str | ElementConfig] = {}
    """Element of the backend's state -> `COLUMN/NAME`, or `{take: COLUMN/NAME, scale: ..., offset: ...}`."""
    action: dict[str, str | ElementConfig] = {}
    """The same for elements of the action; `change: true` makes of a goal how far it moves."""
    tasks: dict[str, str] = {}
    """Text of a task in the dataset -> task of the backend. Texts that are the backend's own need no entry."""
    resize: bool = False
    """Resize images of another size by area; without it they are an error."""


@dataclass(frozen=True)
class Vector:
    """How one vector of the backend is made: element i is `columns[i]` at `positions[i]`, times scale, plus offset, or
    for `changes` (element -> limits) what that has changed since the frame before."""

    columns: tuple[str, ...]
    positions: tuple[int, ...]
    scale: Float32
    offset: Float32
    changes: Mapping[int, tuple[float, float]]

    def read(self, table: Mapping[str, NDArray[Any]]) -> Float32:
        """float32 `[n, k]` from columns `[n, ...]` of one episode."""
        taken = [
            table[column].reshape(len(table[column]), -1)[:, position]
            for column, position in zip(self.columns, self.positions, strict=True)
        ]
        rows = len(next(iter(table.values())))
        values = (np.stack(taken, 1) if taken else np.zeros((rows, 0))) * self.scale + self.offset
        for element, (low, high) in self.changes.items():
            values[:, element] = changes(values[:, element], low, high)
        return values.astype(np.float32)


def changes(goals: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """How far a goal that is to follow `goals` `[n]`, from the first of them on, moves in each frame; between `low` and
    `high`, so that it may be behind for a while."""
    moved = np.zeros(len(goals))
    at = float(goals[0]) if len(goals) else 0.0
    for frame, goal in enumerate(goals):
        moved[frame] = min(max(goal - at, low), high)
        at += moved[frame]
    return moved


@dataclass(frozen=True)
class DatasetMap:
    """A dataset's columns as the backend's."""

    cameras: dict[str, str]
    """Camera -> column."""
    state: Vector
    action: Vector
    privileged: Vector | None
    tasks: dict[str, str]
    """Text -> task."""


def map_dataset(info: Info, texts: Sequence[str], spec: BackendSpec, config: DatasetConfig) -> DatasetMap:
    """How a dataset with this `info.json` and these texts becomes demonstrations of the backend.

    Raises `ConfigError` naming the first thing that does not fit: rate, camera, size, element, unit, text.
    """
    if info.fps != spec.control_hz:
        raise ConfigError(
            f"$.dataset: the dataset has {info.fps:g} frames a second and {spec.name} is controlled at "
            f"{spec.control_hz:g} Hz; the two must be equal"
        )
    features = info.features
    _known("cameras", config.cameras, [camera.name for camera in spec.cameras], "camera")
    cameras = {
        camera.name: _camera(features, camera.name, (camera.height, camera.width), spec, config)
        for camera in spec.cameras
    }
    state, action = spec.state, spec.action
    _known("state", config.state, state.names, "element of the state")
    _known("action", config.action, action.names, "element of the action")
    privileged = None
    theirs = features.get(PRIVILEGED)
    if spec.privileged is not None and theirs is not None and theirs.elements == list(spec.privileged.names):
        privileged = _vector(features, PRIVILEGED, PRIVILEGED, spec.privileged.names, spec.privileged.units, {}, None)
    return DatasetMap(
        cameras=cameras,
        state=_vector(features, "state", STATE, state.names, state.units, config.state, None),
        action=_vector(features, "action", ACTION, action.names, action.units, config.action, spec.action),
        privileged=privileged,
        tasks=_tasks(texts, spec, config),
    )


def check_limits(action: Float32, spec: BackendSpec, where: str) -> None:
    """Raise `ConfigError` for the first action `[n, d]` that the backend does not take."""
    limits = spec.action
    low, high = np.array(limits.low, np.float32), np.array(limits.high, np.float32)
    slack = 1e-6 * (high - low)
    wrong = np.argwhere((action < low - slack) | (action > high + slack) | ~np.isfinite(action))
    if len(wrong):
        frame, i = wrong[0]
        raise ConfigError(
            f"$.dataset.action.{limits.names[i]}: {action[frame, i]:g} {limits.units[i]} at frame {frame} of {where} "
            f"is outside of {limits.low[i]:g} to {limits.high[i]:g}; is the unit right (scale, offset)?"
            + (" Is it a goal, and not how far the goal moves (change: true)?" if limits.kind == "delta" else "")
        )


def _known(section: str, given: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for name in given:
        if name not in names:
            raise ConfigError(f"$.dataset.{section}.{name}: the backend has no such {what} ({', '.join(names)})")


def _camera(
    features: Mapping[str, Feature], name: str, size: tuple[int, int], spec: BackendSpec, config: DatasetConfig
) -> str:
    column = config.cameras.get(name, IMAGE + name)
    feature = features.get(column)
    if feature is None or not feature.is_image:
        images = [key for key, own in features.items() if own.is_image]
        raise ConfigError(
            f"$.dataset.cameras.{name}: the dataset has no images in a column {column!r} (it has "
            f"{', '.join(images) or 'none'})"
        )
    shape = feature.shape
    if feature.elements[:1] in (["channel"], ["channels"]):
        shape = [*shape[1:], shape[0]]
    if shape != [*size, 3] and not config.resize:
        raise ConfigError(
            f"$.dataset.cameras.{name}: {column} is {' x '.join(map(str, shape))} and the camera of {spec.name} "
            f"{size[0]} x {size[1]} x 3; dataset.resize: true resizes it"
        )
    return column


def _vector(
    features: Mapping[str, Feature],
    section: str,
    default: str,
    names: Sequence[str],
    units: Sequence[str],
    given: Mapping[str, str | ElementConfig],
    limits: ActionSpec | None,
) -> Vector:
    columns, positions, elements = [], [], []
    changing: dict[int, tuple[float, float]] = {}
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        entry = given.get(name, f"{default}/{name}")
        element = entry if isinstance(entry, ElementConfig) else ElementConfig(entry)
        where = f"$.dataset.{section}.{name}"
        column, position = _find(features, element.take, where)
        if element.change:
            if limits is None or limits.kind != "delta":
                raise ConfigError(f"{where}.change: is for an action that says how far its goal moves (kind delta)")
            changing[i] = limits.low[i], limits.high[i]
        wanted = None if limits is None else "absolute" if element.change else limits.kind
        if wanted and features[column].kind == {"absolute": "delta", "delta": "absolute"}[wanted]:
            mend = "; change: true makes moves of goals" if wanted == "delta" else ""
            raise ConfigError(f"{where}: {element.take} is {features[column].kind}, not {wanted}{mend}")
        theirs = dict(enumerate(features[column].units or ())).get(position, unit)
        if theirs != unit and element == ElementConfig(element.take):
            raise ConfigError(f"{where}: {element.take} is in {theirs} and the backend's in {unit}; give a scale")
        columns.append(column)
        positions.append(position)
        elements.append(element)
    return Vector(
        tuple(columns),
        tuple(positions),
        np.array([element.scale for element in elements], np.float32),
        np.array([element.offset for element in elements], np.float32),
        changing,
    )


def _find(features: Mapping[str, Feature], take: str, where: str) -> tuple[str, int]:
    """Column and position of `COLUMN/NAME` or `COLUMN/INDEX`."""
    column, slash, element = take.partition("/")
    feature = features.get(column)
    if feature is None or not feature.is_number:
        numbers = [key for key, own in features.items() if own.is_number]
        raise ConfigError(f"{where}: the dataset has no numbers in a column {column!r} (it has {', '.join(numbers)})")
    if len(feature.shape) != 1:
        raise ConfigError(f"{where}: {column} has rows of shape {feature.shape}; expected one number a name")
    names, size = feature.elements, feature.shape[0]
    if element in names:
        return column, names.index(element)
    if slash and element.isdigit() and int(element) < size:
        return column, int(element)
    has = ", ".join(names) if names else f"elements 0 to {size - 1} without names"
    raise ConfigError(f"{where}: {column} has no element {element!r} ({has})")


def _tasks(texts: Sequence[str], spec: BackendSpec, config: DatasetConfig) -> dict[str, str]:
    own = {text: task for task, told in spec.instructions.items() for text in told}
    for text, task in config.tasks.items():
        if task not in spec.instructions:
            known = ", ".join(spec.instructions)
            raise ConfigError(f"$.dataset.tasks: {spec.name} has no task {task!r}, given for {text!r} (known: {known})")
    tasks = {}
    for text in texts:
        tasks[text] = config.tasks.get(text, own.get(text, ""))
        if not tasks[text]:
            raise ConfigError(
                f"$.dataset.tasks: the dataset's text {text!r} is no instruction of {spec.name} "
                f"({', '.join(map(repr, all_instructions(spec)))}); say which task it is"
            )
    return tasks
