"""How often the canary's sequential test is wrong, and how soon it is right, in simulated deployments.

Every deployment is one candidate against one live version with success rates and steps that are known, so that each
decision can be called right or wrong. The same episodes go to a fixed-sample test, which looks once at the end, and to
the same fixed-sample test looked at after every episode, which is what people do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from fieldtune.bench.canary_fixed import fixed_sample_tests
from fieldtune.bench.common import Goal, Result
from runtime.betting import Float64, block_differences, block_ends
from runtime.canary import CanaryRule, faster_wealth, promotion_alpha, success_wealths
from trainer.statistics import wilson

DEPLOYMENTS = 10_000
QUICK_DEPLOYMENTS = 50
AT_ONCE = 500
"""Deployments simulated together: what fits into a few hundred MB."""
HORIZON_STEPS = 200
STEPS_MEAN = 80.0
STEPS_SHAPE = 16.0
"""Steps of a success: a gamma with this shape, its standard deviation a quarter of the mean, cut at the horizon."""
LIVE = (0.5, 0.8, 0.95)
DIFFERENCES = (-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3)
NEVER = np.iinfo(np.int64).max
FIXED_COLUMNS = ("fixed pro", "fixed back", "peek pro", "peek back")
METHODS = ("sequential", "fixed sample", "peeking")

Bool = NDArray[np.bool_]
Int = NDArray[np.int64]


class Scenario(Struct, frozen=True):
    """The truth of a deployment."""

    live: float
    difference: float
    """Of the success rates, candidate less live."""
    steps: float = 1.0
    """The candidate's mean steps over the live version's."""
    share: float = 0.5

    def must_not_promote(self, margin: float) -> bool:
        """Whether a promotion would be false: worse by the margin, or better in nothing."""
        # Rounding must not make a difference of the margin smaller than the margin.
        return self.difference <= -margin + 1e-9 or (self.difference <= 0 and self.steps >= 1)

    def must_not_roll_back(self) -> bool:
        """Whether a rollback would be false."""
        return self.difference >= 0


class Episodes(Struct, frozen=True):
    """Episodes of n deployments in their order, each array `[n, episodes]`."""

    candidate: Bool
    success: Bool
    steps: Float64


class Decided(Struct, frozen=True):
    """What one method did: whether it promoted or rolled back, and after how many episodes it ended, each `[n]`."""

    promoted: Bool
    rolled_back: Bool
    episodes: Int


def scenarios() -> list[Scenario]:
    """All rates and differences that exist, with the same steps and with a fifth fewer; some more."""
    pairs = [(live, d) for live in LIVE for d in DIFFERENCES if 0 <= live + d <= 1]
    return [
        *(Scenario(live, d) for live, d in pairs),
        *(Scenario(live, d, steps=0.8) for live, d in pairs),
        *(Scenario(live, 0.0, steps=1.25) for live in LIVE),
        *(Scenario(live, d, share=0.2) for live, d in pairs if live == 0.8),
    ]


def bench_canary(*, quick: bool = False) -> tuple[Result, Result]:
    """Errors and decisions of the canary's default rule."""
    deployments, rule = QUICK_DEPLOYMENTS if quick else DEPLOYMENTS, CanaryRule()
    whole = [(scenario, simulate(scenario, rule, deployments, seed)) for seed, scenario in enumerate(scenarios())]
    return errors(whole, rule, deployments), decisions(whole, rule)


def simulate(scenario: Scenario, rule: CanaryRule, deployments: int, seed: int) -> dict[str, Decided]:
    """What each of `METHODS` does in a number of deployments."""
    rule = replace(rule, share=scenario.share)
    rng = np.random.default_rng(seed)
    parts: list[tuple[Decided, ...]] = []
    for first in range(0, deployments, AT_ONCE):
        episodes = draw(scenario, rule.max_episodes, min(AT_ONCE, deployments - first), rng)
        parts.append((sequential(episodes, rule), *fixed_sample(episodes, rule)))
    return {method: join(found) for method, found in zip(METHODS, zip(*parts, strict=True), strict=True)}


def join(parts: Sequence[Decided]) -> Decided:
    """Several lots of deployments as one."""
    return Decided(
        np.concatenate([part.promoted for part in parts]),
        np.concatenate([part.rolled_back for part in parts]),
        np.concatenate([part.episodes for part in parts]),
    )


def draw(scenario: Scenario, episodes: int, deployments: int, rng: np.random.Generator) -> Episodes:
    """Episodes of a number of deployments; each is the candidate's with the probability of its share."""
    shape = (deployments, episodes)
    candidate = rng.random(shape) < scenario.share
    success = rng.random(shape) < np.where(candidate, scenario.live + scenario.difference, scenario.live)
    mean = np.where(candidate, STEPS_MEAN * scenario.steps, STEPS_MEAN)
    steps = np.clip(np.round(rng.standard_gamma(STEPS_SHAPE, shape) / STEPS_SHAPE * mean), 1, HORIZON_STEPS)
    return Episodes(candidate, success, steps)


def sequential(episodes: Episodes, rule: CanaryRule) -> Decided:
    """`runtime.canary.Canary` on many deployments at once."""
    candidate, live, success = episodes.candidate, ~episodes.candidate, episodes.success
    everything = np.ones_like(candidate)
    successes, ends = blocks(success.astype(np.float64), candidate, live, everything, rule.share)
    steps, steps_ends = blocks(episodes.steps / HORIZON_STEPS, candidate, live, success, rule.share)
    needed = 1 / promotion_alpha(rule)
    better, not_worse, worse = success_wealths(successes, rule.margin)
    better_at, not_worse_at = reached(better, ends, needed), reached(not_worse, ends, needed)
    faster_at = reached(faster_wealth(-steps), steps_ends, needed)
    worse_at = reached(worse, ends, 1 / rule.false_rollback)
    if rule.promote == "not_worse":
        promote_at = not_worse_at
    else:
        promote_at = np.minimum(better_at, np.maximum(not_worse_at, faster_at))
    return decided(promote_at, worse_at, rule.max_episodes)


def blocks(values: Float64, candidate: Bool, live: Bool, among: Bool, share: float) -> tuple[Float64, Int]:
    """Block differences of the values where `among`, and after how many episodes each block is full.

    Both are `[n, blocks]` with as many blocks as there could be; those that are never full have a time beyond the last
    episode, and their difference means nothing.
    """
    length = values.shape[1]
    ends = block_ends(length, share)
    most = int(np.count_nonzero(np.arange(1, length + 1) + ends <= length))
    ends = ends[:most]
    own, own_at = stream(values, candidate & among, most)
    other, other_at = stream(values, live & among, int(ends[-1]))
    return block_differences(own, other, share), np.maximum(own_at, other_at[:, ends - 1])


def stream(values: Float64, mask: Bool, most: int) -> tuple[Float64, Int]:
    """The first `most` values of each row where the mask is true, and their times; missing ones come after the end."""
    order = np.argsort(~mask, axis=1, kind="stable")[:, :most]
    there = np.arange(most) < mask.sum(axis=1)[:, None]
    return np.take_along_axis(values, order, axis=1), np.where(there, order + 1, values.shape[1] + 1)


def reached(evidence: Float64 | Bool, times: Int, needed: float) -> Int:
    """When evidence `[n, blocks]` first is what is needed; beyond every episode where it never is."""
    return np.asarray(np.where(evidence >= needed, times, NEVER).min(axis=1, initial=NEVER))


def decided(promote_at: Int, roll_back_at: Int, max_episodes: int) -> Decided:
    """The first of both decides, at the same episode the rollback; neither after the last episode."""
    rolled_back = (roll_back_at <= max_episodes) & (roll_back_at <= promote_at)
    promoted = (promote_at <= max_episodes) & ~rolled_back
    return Decided(promoted, rolled_back, np.minimum(np.minimum(promote_at, roll_back_at), max_episodes))


def fixed_sample(episodes: Episodes, rule: CanaryRule) -> tuple[Decided, Decided]:
    """The fixed-sample test, once at the end; and looked at after every episode."""
    promote, roll_back = fixed_sample_tests(episodes.candidate, episodes.success, episodes.steps, rule)
    last = rule.max_episodes
    times = np.arange(1, last + 1)
    once = decided(np.where(promote[:, -1], last, NEVER), np.where(roll_back[:, -1], last, NEVER), last)
    looking = decided(reached(promote, times, True), reached(roll_back, times, True), last)
    return once, looking


def errors(whole: list[tuple[Scenario, dict[str, Decided]]], rule: CanaryRule, deployments: int) -> Result:
    """The worst scenario of each method for both errors."""
    rows: list[tuple[str | float, ...]] = []
    goals = []
    for error, limit in (("false promotion", rule.false_promotion), ("false rollback", rule.false_rollback)):
        for method in METHODS:
            counts = [
                (wrong, scenario)
                for scenario, by_method in whole
                if (wrong := mistakes(error, scenario, by_method[method], rule)) is not None
            ]
            count, worst = max(counts, key=lambda pair: pair[0])
            low, high = wilson(count, deployments)
            where = f"{worst.live:g} {worst.difference:+.2f} steps x {worst.steps:g} share {worst.share:g}"
            rows.append((error, method, count / deployments, f"{low:.4f} to {high:.4f}", where))
            if method == "sequential":
                goals.append(Goal(f"{error}, worst of {len(counts)} scenarios", count / deployments, limit))
    return Result(
        bench="canary",
        title=f"wrong decisions in {deployments} simulated deployments of each scenario",
        columns=("error", "test", "rate", "Wilson 95 %", "in the worst scenario: live rate, difference"),
        rows=rows,
        goals=goals,
        notes=[
            f"false promotion: promoted though success is lower by {rule.margin:g} or more, or neither success nor "
            "steps are better",
            "false rollback: rolled back though success is the same or better",
            "fixed sample: pooled or Agresti-Caffo z-tests of success and Welch's z-test of steps at the same levels, "
            f"once after {rule.max_episodes} episodes; peeking: the same after every episode, until one decides",
        ],
    )


def mistakes(error: str, scenario: Scenario, found: Decided, rule: CanaryRule) -> int | None:
    """How many deployments made this error; None where the scenario cannot show it."""
    if error == "false promotion":
        return int(np.count_nonzero(found.promoted)) if scenario.must_not_promote(rule.margin) else None
    return int(np.count_nonzero(found.rolled_back)) if scenario.must_not_roll_back() else None


def decisions(whole: list[tuple[Scenario, dict[str, Decided]]], rule: CanaryRule) -> Result:
    """What each method decides in each scenario, and how soon."""
    rows: list[tuple[str | float, ...]] = []
    for scenario, by_method in whole:
        row: list[str | float] = [f"{scenario.share:g}", f"{scenario.live:g}", f"{scenario.difference:+.2f}"]
        row.append(f"x {scenario.steps:g}")
        for method in METHODS:
            found = by_method[method]
            row += [float(found.promoted.mean()), float(found.rolled_back.mean())]
            if method == "sequential":
                row.append(float(np.median(found.episodes)))
        rows.append(tuple(row))
    return Result(
        bench="canary",
        title="shares promoted and rolled back, and how soon",
        columns=("share", "live", "diff", "steps", "pro", "back", "median", *FIXED_COLUMNS),
        rows=rows,
        goals=[],
        notes=[
            "pro: promoted; back: rolled back; fixed, peek: the same of the fixed-sample test, and of peeking at it",
            f"median: number of episodes until it ends, undecided and not promoted after {rule.max_episodes}; the "
            "fixed-sample test always needs them all",
            "steps: the candidate's mean over the live version's; share: the candidate's share of the episodes",
            f"rule, but for the share: {rule}",
        ],
    )
