"""Tests that may be looked at after every observation: an e-process for a mean, and confidence sequences from it.

A gambler starts with 1 and, before each value x in [0, 1] is seen, puts a share c of the wealth on an asset that pays
x / mean. While the true mean is not above `mean`, the bet gains nothing on average, so the wealth is a non-negative
supermartingale, and by Ville's inequality (1939) it reaches 1 / alpha, at any time at all, with probability at most
alpha. The wealth is the e-value: evidence that the true mean is larger. Values need not be independent or of one
distribution: it is enough that each has, given those before it, an expectation of at most `mean`.

The capital process and its inversion are Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting" (arXiv 2010.09686). The wealth is shared equally among several constant c, their "diversified Kelly"; with c
spread over (0, 1) it is close to Cover's universal portfolio (Orabona and Jun, arXiv 2110.14099), so nothing is tuned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

SHARES: Float64 = np.arange(0.05, 1.0, 0.1)
"""The c: shares of the wealth that are staked. Below 1, so that no single value can ruin the gambler."""
MOST = 1e300
_HALVINGS = 40


def wealth(values: Float64, mean: float) -> Float64:
    """e-value against "the mean is at most `mean`" after each value: float64 `[..., n]` for values `[..., n]`.

    Values are in [0, 1] and `mean` in (0, 1). Wealth above 1e300 is given as 1e300.
    """
    factors = SHARES[:, None] * (values[..., None, :] / mean) + (1 - SHARES)[:, None]
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.minimum(np.cumprod(factors, axis=-1).mean(axis=-2), MOST))


def largest(wealths: Float64) -> float:
    """The most that a wealth `[n]` ever was, 1 being the start: by Ville's inequality this is what may be judged."""
    return max(1.0, float(wealths.max(initial=1.0)))


def lower_bound(values: Float64, alpha: float) -> float:
    """Lower confidence bound of the mean of values `[n]` in [0, 1], valid at every n at once with error `alpha`.

    It is the smallest mean that the e-process has never rejected, to 1e-12; it never falls as values are added.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # The wealth falls in `mean`, so what is rejected is an interval from 0.
        if largest(wealth(values, middle)) >= 1 / alpha:
            low = middle
        else:
            high = middle
    return low


def difference_interval(differences: Float64, alpha: float) -> tuple[float, float]:
    """Confidence sequence of the mean of differences `[n]` in [-1, 1]: right at every n at once but for `alpha`."""
    low = 2 * lower_bound((1 + differences) / 2, alpha / 2) - 1
    high = 1 - 2 * lower_bound((1 - differences) / 2, alpha / 2)
    return low, high


def block_ends(blocks: int, share: float) -> NDArray[np.int64]:
    """How many live values the first 1, 2, ... blocks take when each takes one candidate value; int64 `[blocks]`.

    `share` in (0, 0.5] is the candidate's share of all. The sizes follow it as evenly as whole numbers can (a share of
    0.3 gives 2, 2, 3, ...) and depend on nothing that is observed, which is what keeps the test valid.
    """
    # The small number keeps 0.2 from giving 3.9999999 live values.
    ends = np.floor(np.arange(1, blocks + 1) * ((1 - share) / share) + 1e-9)
    return np.asarray(ends, np.int64)


def block_differences(candidate: Float64, live: Float64, share: float) -> Float64:
    """Candidate value less mean of the live values, block by block: `[..., blocks]` for `[..., n]` and `[..., m]`.

    Blocks are filled in the order of the values, candidate and live each by itself; what fills no block yet waits.
    """
    ends = block_ends(candidate.shape[-1], share)
    ends = ends[ends <= live.shape[-1]]
    if not len(ends):
        return np.zeros((*candidate.shape[:-1], 0))
    starts = np.concatenate([[0], ends[:-1]])
    sums = np.add.reduceat(live[..., : ends[-1]], starts, axis=-1)
    return np.asarray(candidate[..., : len(ends)] - sums / (ends - starts))
