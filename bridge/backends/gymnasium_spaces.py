"""Which elements of a Gymnasium observation make up a vector: `KEY`, or `KEY[START:STOP]` of its flattened value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.backend import Float32
from bridge.config import ConfigError

WHOLE = "observation"
"""The key that stands for an observation that is no Dict."""
_ENTRY = re.compile(r"(?P<key>.+?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` (excluded) of the flattened value at `key`."""

    key: str
    start: int
    stop: int

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each element, with its place in the whole value."""
        return tuple(f"{self.key}_{i}" for i in range(self.start, self.stop))


def spaces_of(space_or_observation: Any) -> dict[str, Any]:
    """By key, of a Dict space or of an observation from one; anything else lies under `WHOLE`."""
    inner = getattr(space_or_observation, "spaces", space_or_observation)
    return inner if isinstance(inner, dict) else {WHOLE: space_or_observation}


def is_image(space: Any) -> bool:
    """Whether it is a Box of uint8 `[H, W, 3]`."""
    from gymnasium.spaces import Box

    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def parts_of(space: Any, entries: tuple[str, ...] | None, where: str) -> list[Part]:
    """The parts that `entries` name; None means all of a Box that is no image. Raises `ConfigError` at `where`."""
    from gymnasium.spaces import Box, Dict

    boxes = {key: int(np.prod(part.shape)) for key, part in spaces_of(space).items() if isinstance(part, Box)}
    if entries is None:
        if isinstance(space, Dict):
            raise ConfigError(f"{where}: missing; name keys of the observation: {', '.join(space.spaces)}")
        if not boxes:
            raise ConfigError(f"{where}: the observation is {space}, expected a Box or a Dict of them")
        return [] if is_image(space) else [Part(WHOLE, 0, boxes[WHOLE])]
    parts = []
    for index, entry in enumerate(entries):
        match = _ENTRY.fullmatch(entry)
        key = match["key"] if match else entry
        if match is None or key not in boxes:
            found = spaces_of(space).get(key)
            raise ConfigError(f"{where}[{index}]: {key!r} is {found}, expected one of {', '.join(boxes)}")
        part = Part(key, int(match["start"] or 0), int(match["stop"] or boxes[key]))
        if not part.start < part.stop <= boxes[key]:
            raise ConfigError(f"{where}[{index}]: {entry} is not part of {key}, which has {boxes[key]} elements")
        parts.append(part)
    return parts


def read(observation: Any, parts: list[Part]) -> Float32:
    """The parts of one observation, one after the other: float32 `[n]`, an array of its own."""
    values = spaces_of(observation)
    flat = [np.asarray(values[part.key], np.float32).ravel()[part.start : part.stop] for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, np.float32)
