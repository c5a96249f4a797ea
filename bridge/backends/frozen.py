"""A camera that sends the very same picture again and again is frozen: what the robot does is no longer in it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

FROZEN_S = 2.0
"""Noise changes every picture of a sensor; one that stays the same for longer comes from a driver that hangs."""


class Frozen:
    """How long the pictures of one camera have been the same, to the last bit."""

    def __init__(self) -> None:
        # A checksum and no picture: a driver may fill one and the same array each time.
        self._checksum: int | None = None
        self._changed_s = 0.0

    def same_s(self, picture: NDArray[Any], taken_s: float) -> float:
        """Seconds from the first picture that was like this one, with no other between them, to this one, which was
        taken at `taken_s` of a monotonic clock.
        """
        checksum = zlib.crc32(np.ascontiguousarray(picture).data)
        if checksum != self._checksum:
            self._checksum, self._changed_s = checksum, taken_s
        return taken_s - self._changed_s
