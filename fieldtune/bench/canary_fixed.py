"""The fixed-sample test that the canary's sequential test is compared with, after every number of episodes at once."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from runtime.canary import CanaryRule, promotion_alpha

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]

FIRST_LOOK = 10
"""Episodes of each version before anybody would look."""


def fixed_sample_tests(candidate: Bool, success: Bool, steps: Float64, rule: CanaryRule) -> tuple[Bool, Bool]:
    """Whether tests on the first 1, 2, ... episodes would promote, and roll back; all arrays `[n, episodes]`.

    One-sided, at the levels that the canary uses. Success against an equal one: pooled two-proportion z-test. Against
    the margin: Wald z-test on one more success and one more failure of each version (Agresti and Caffo 2000). Steps of
    the successes: Welch's z-test.
    """
    critical = NormalDist().inv_cdf(1 - promotion_alpha(rule))
    sides = [_sums(mask, success, steps) for mask in (candidate, ~candidate)]
    (n, s, total, squares), (n_live, s_live, total_live, squares_live) = sides
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = (s + s_live) / (n + n_live)
        equal = (s / n - s_live / n_live) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n_live))
        p, p_live = (s + 1) / (n + 2), (s_live + 1) / (n_live + 2)
        deviation = np.sqrt(p * (1 - p) / (n + 2) + p_live * (1 - p_live) / (n_live + 2))
        margin = (p - p_live + rule.margin) / deviation
        mean, mean_live = total / s, total_live / s_live
        variance = (squares / s - mean**2) / (s - 1) + (squares_live / s_live - mean_live**2) / (s_live - 1)
        faster = (mean_live - mean) / np.sqrt(variance)
    # Comparisons with what 0 / 0 gave are false: no evidence.
    enough = np.minimum(n, n_live) >= FIRST_LOOK
    if rule.promote == "not_worse":
        promote = margin >= critical
    else:
        fast_enough = (faster >= critical) & (np.minimum(s, s_live) >= FIRST_LOOK)
        promote = (equal >= critical) | ((margin >= critical) & fast_enough)
    roll_back = equal <= -NormalDist().inv_cdf(1 - rule.false_rollback)
    return promote & enough, roll_back & enough


def _sums(mask: Bool, success: Bool, steps: Float64) -> tuple[Float64, Float64, Float64, Float64]:
    """Episodes, successes, and the sums of the successes' steps and of their squares, so far."""
    won = mask & success
    columns = (mask, won, won * steps, won * steps**2)
    n, s, total, squares = (np.cumsum(column, axis=1, dtype=np.float64) for column in columns)
    return n, s, total, squares
