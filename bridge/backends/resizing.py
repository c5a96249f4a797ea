"""Images in the size that the policy sees, without a library for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.backend import UInt8


class Resizer:
    """Resizes uint8 `[H, W, 3]` to `[height, width, 3]` by area: each new pixel is the mean of what it covers.

    Where the image grows this is the nearest pixel, mixed at borders. The aspect ratio is not kept.
    """

    def __init__(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """(height, width) of what comes in and of what goes out."""
        self._rows = area_weights(old[0], new[0])
        self._columns = area_weights(old[1], new[1])
        self._same = old == new

    def __call__(self, image: UInt8) -> UInt8:
        """The image resized, in memory of its own."""
        if self._same:
            return image.copy()
        rows = np.tensordot(self._rows, image.astype(np.float32), axes=(1, 0))
        resized = np.tensordot(rows, self._columns, axes=(1, 1)).transpose(0, 2, 1)
        return np.ascontiguousarray(np.rint(resized).astype(np.uint8))


def area_weights(old: int, new: int) -> NDArray[np.float32]:
    """`[new, old]`: the share of each old pixel in each new one; rows sum to 1."""
    edges = np.linspace(0.0, old, new + 1)
    pixel = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.asarray(np.maximum(overlap, 0.0) * (new / old), np.float32)
