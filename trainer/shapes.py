"""Batch sizes that come again, so that a trainer can run for days.

On a CPU torch has its convolutions and bfloat16 products compiled for each batch size it meets and keeps up to a
thousand of these kernels. How many decisions an iteration has is random, so every batch would be of a new size: some
gigabytes of kernels, and the time to compile them. Therefore only sixteen sizes for each doubling are in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZES_A_DOUBLING = 16


def minibatches(order: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows `[N]` in random order as equal parts of about `size`, none for no rows. Left out: less than one row
    a part, and of all less than one in 17.
    """
    parts = max(1, round(len(order) / size))
    each = len(order) // parts
    each -= each % _spacing(each)
    return torch.split(order[: parts * each], each) if each else ()


def filled_up(rows: Tensor) -> Tensor:
    """Rows `[N]`, the first of them again behind the last until their number is a size in use."""
    return torch.cat([rows, rows[: -len(rows) % _spacing(len(rows))]])


def _spacing(size: int) -> int:
    """How far the sizes in use are apart there: 1 up to 31, 2 up to 63, and so on."""
    return max(1, (1 << size.bit_length() >> 1) // SIZES_A_DOUBLING)
