"""Whether a backend's spec is honest: what can be said of it without touching the robot."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from bridge.backend import BackendSpec, VectorSpec


def type_faults(spec: BackendSpec) -> Iterator[str]:
    """What could not go over the wire: Structs do not check the types they are made of."""
    try:
        back = msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(spec)), BackendSpec)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        yield f"the spec cannot be sent: {error}"
        return
    if back != spec:
        yield "the spec comes back changed from the wire; use tuples, and Python's own numbers"


def name_faults(spec: BackendSpec) -> Iterator[str]:
    """Names that are missing or twice, units and limits that are not one for each name, images without a size."""
    if not spec.name:
        yield "name is empty"
    yield from _twice_or_empty("cameras", [camera.name for camera in spec.cameras])
    for camera in spec.cameras:
        if camera.height < 1 or camera.width < 1:
            yield f"camera {camera.name} is {camera.height}x{camera.width}"
    action = spec.action
    if not action.names:
        yield "action has no element"
    vectors = {"state": spec.state, "action": VectorSpec(action.names, action.units)}
    if spec.privileged is not None:
        vectors["privileged"] = spec.privileged
    for where, vector in vectors.items():
        yield from _twice_or_empty(f"{where}.names", list(vector.names))
        if len(vector.units) != len(vector.names):
            yield f"{where} has {len(vector.names)} names and {len(vector.units)} units"
        if "" in vector.units:
            yield f"{where}.units has an empty one; write `1` for a pure number"
    for where, limit in (("low", action.low), ("high", action.high)):
        if len(limit) != len(action.names):
            yield f"action has {len(action.names)} names and {len(limit)} limits in `{where}`"


def limit_faults(spec: BackendSpec) -> Iterator[str]:
    """Limits that do not limit."""
    for name, low, high in zip(spec.action.names, spec.action.low, spec.action.high, strict=False):
        if not (math.isfinite(low) and math.isfinite(high)):
            yield f"action {name} goes from {low} to {high}, which is not finite"
        elif low >= high:
            yield f"action {name} goes from {low} up to {high}"


def rate_faults(spec: BackendSpec) -> Iterator[str]:
    """A rate that is none, no task, or a task with nothing to tell the policy."""
    if not (math.isfinite(spec.control_hz) and spec.control_hz > 0):
        yield f"control_hz is {spec.control_hz}"
    if not spec.instructions:
        yield "instructions has no task"
    for task, texts in spec.instructions.items():
        if not task:
            yield "a task has an empty name"
        if len(set(texts)) != len(texts):
            yield f"task {task} has one wording twice"


def _twice_or_empty(where: str, names: list[str]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        if not name:
            yield f"{where} has an empty name"
        elif names.count(name) > 1:
            yield f"{where} has {name!r} {names.count(name)} times"
