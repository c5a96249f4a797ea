"""Batch sizes that come again, so that a trainer can run for days, and large images in parts, so that it has room.

On a CPU torch has its convolutions and bfloat16 products compiled for each batch size it meets and keeps up to a
thousand of these kernels. How many decisions an iteration has is random, so every batch would be of a new size: some
gigabytes of kernels, and the time to compile them. Therefore only sixteen sizes for each doubling are in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SIZES_A_DOUBLING = 16
MOST_PIXELS = 1 << 22
"""Of one camera at once: more than 500 images of 64 x 64."""


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


def image_parts(see: Callable[..., Tensor], image: Tensor, *others: Tensor) -> Tensor:
    """`see(image, *others)`, all `[B, ...]`, but of large images not more than `MOST_PIXELS` at once.

    What a layer gives of hundreds of large images takes gigabytes, and more while it is kept for the gradients. So the
    parts are seen again for these (1604.06174): a third more time.
    """
    if torch.compiler.is_compiling():
        return see(image, *others)  # the graph that is exported has any batch size
    rows = max(1, MOST_PIXELS // image[0, ..., 0].numel())
    if len(image) <= rows:
        return see(image, *others)
    count = -(-len(image) // rows)  # equal parts, so that few sizes come again
    parts = zip(*(torch.tensor_split(tensor, count) for tensor in (image, *others)), strict=True)
    return torch.cat([checkpoint(see, *part, use_reentrant=False) for part in parts])
