"""Numbers that have to be finite: a gradient that is not would be in every weight after one step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from bridge.errors import FieldtuneError


class NotFiniteError(FieldtuneError):
    """Something learned is not finite; the message names it. Nothing of it has been published."""


def finite_norm(norm: Tensor, losses: Mapping[str, Tensor]) -> float:
    """The length of a gradient, as `clip_grad_norm_` gives it. Raises `NotFiniteError` naming the `losses` it is of."""
    length = float(norm)
    if not math.isfinite(length):
        found = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
        raise NotFiniteError(
            f"the gradient is {length:g} ({found}), so nothing is learned from this batch; are all observations and "
            "rewards of its episodes finite? If they are, lower the learning rates (trainer.ppo)"
        )
    return length
