"""The canary's sequential test: after every episode, promote the candidate, roll it back, or go on.

Episodes are cut into blocks of one of the candidate and, in the proportion of the candidate's share, some of the live
version. The difference of a block is the candidate's outcome less the mean of the live ones; its expectation is the
difference of the two versions, and the e-processes of `runtime.betting` test that. So there is no pairing of goals, no
horizon of the test and no distribution to assume. docs/canary.md says what is guaranteed and under which conditions.

Four nulls, each with an e-process of its own:

    better     the candidate's success is at most the live version's
    not_worse  it is below the live version's by the margin or more
    faster     its successes take as many steps on average, or more
    worse      its success is at least the live version's

`worse` rejected rolls back. `better` rejected promotes, and so does `not_worse` together with `faster`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from bridge.errors import FieldtuneError
from runtime.betting import Float64, block_differences, difference_interval, largest, wealth

Decision = Literal["promote", "rollback", "undecided", "go on"]

Probability = Annotated[float, Meta(gt=0, lt=1)]
DISPLAY_ALPHA = 0.05


class CanaryError(FieldtuneError):
    """An outcome that does not belong to this canary."""


class CanaryRule(Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of a candidate, and how often the answer may be wrong."""

    promote: Literal["better", "not_worse"] = "better"
    """better: success is better, or it is not worse by the margin and the successes are faster. not_worse: success is
    not worse by the margin, which is all; over many promotions margins add up."""
    margin: Probability = 0.1
    """A candidate whose success rate is lower by this much or more is worse, whatever its steps."""
    false_promotion: Probability = 0.05
    """Most that the probability may be of promoting what does not deserve it."""
    false_rollback: Probability = 0.05
    """Most that the probability may be of rolling back what is not worse in success."""
    max_episodes: Annotated[int, Meta(ge=2)] = 500
    """Episodes of both versions after which a canary without a decision ends, not promoted."""
    share: Annotated[float, Meta(gt=0, le=0.5)] = 0.5
    """The candidate's share of the episodes."""


class CanaryOutcome(Struct, frozen=True, array_like=True):
    """What one episode tells the canary. A list of these is the canary's whole state."""

    version: str
    success: bool
    steps: int


class Evidence(Struct, frozen=True, kw_only=True):
    """How a canary stands, for the operator. An e-value of 1 says nothing, one that reaches its `needed` decides."""

    decision: Decision
    candidate_episodes: int
    live_episodes: int
    candidate_success: float | None
    """Share of successes; None before the first episode. So for the live version."""
    live_success: float | None
    blocks: int
    """Blocks that are full; the episodes beyond them wait for theirs."""
    success_difference: tuple[float, float]
    """95 % confidence sequence of the candidate's success rate less the live version's: it may be watched."""
    steps_difference: tuple[float, float]
    """The same of the mean steps of successes; negative where the candidate is faster."""
    better: float
    """Largest e-value so far, so the other three."""
    not_worse: float
    faster: float
    worse: float
    needed_to_promote: float
    needed_to_roll_back: float


class Canary:
    """One candidate against one live version.

    Give it the episodes of both in the order in which they started (see docs/canary.md), aborted ones left out. The
    state is `outcomes`: a canary made with those of another stands where that one stood.
    """

    def __init__(
        self,
        candidate: str,
        live: str,
        horizon_steps: int,
        rule: CanaryRule | None = None,
        outcomes: Iterable[CanaryOutcome] = (),
    ) -> None:
        """`horizon_steps` is the most that an episode can take. Raises `CanaryError` as `add` does."""
        if candidate == live or horizon_steps < 1:
            raise CanaryError(f"a canary needs two versions and a horizon, not {candidate}, {live}, {horizon_steps}")
        self.rule = CanaryRule() if rule is None else rule
        self.candidate, self.live, self.horizon_steps = candidate, live, horizon_steps
        self.outcomes: list[CanaryOutcome] = []
        self.decision: Decision = "go on"
        for outcome in outcomes:
            self.add(outcome.version, outcome.success, outcome.steps)

    def add(self, version: str, success: bool, steps: int) -> Decision:
        """Take in one whole episode and decide. Once decided nothing changes: later episodes are left out.

        Raises `CanaryError` for another version, or steps that are not between 0 and the horizon.
        """
        if version not in (self.candidate, self.live):
            raise CanaryError(f"version {version[:12]} is neither the candidate nor the live version of this canary")
        if not 0 <= steps <= self.horizon_steps:
            raise CanaryError(f"an episode of {steps} steps, and the horizon is {self.horizon_steps}")
        if self.decision == "go on":
            self.outcomes.append(CanaryOutcome(version, success, steps))
            self.decision = self._decide()
        return self.decision

    def evidence(self) -> Evidence:
        """How it stands."""
        successes, steps = self._differences()
        better, not_worse, faster, worse = self._e_values()
        candidate, live = self._of(self.candidate), self._of(self.live)
        low, high = difference_interval(steps, DISPLAY_ALPHA)
        return Evidence(
            decision=self.decision,
            candidate_episodes=len(candidate),
            live_episodes=len(live),
            candidate_success=_share(candidate),
            live_success=_share(live),
            blocks=len(successes),
            success_difference=difference_interval(successes, DISPLAY_ALPHA),
            # `steps` is how much faster the candidate is, as a share of the horizon.
            steps_difference=(-high * self.horizon_steps, -low * self.horizon_steps),
            better=better,
            not_worse=not_worse,
            faster=faster,
            worse=worse,
            needed_to_promote=1 / promotion_alpha(self.rule),
            needed_to_roll_back=1 / self.rule.false_rollback,
        )

    def _decide(self) -> Decision:
        better, not_worse, faster, worse = self._e_values()
        needed = 1 / promotion_alpha(self.rule)
        # Safety first: both can hold at once, for one that is faster and worse by less than the margin.
        if worse >= 1 / self.rule.false_rollback:
            return "rollback"
        if self.rule.promote == "not_worse":
            promote = not_worse >= needed
        else:
            promote = better >= needed or (not_worse >= needed and faster >= needed)
        if promote:
            return "promote"
        return "undecided" if len(self.outcomes) >= self.rule.max_episodes else "go on"

    def _e_values(self) -> tuple[float, float, float, float]:
        """Largest e-value so far of better, not_worse, faster, worse."""
        successes, steps = self._differences()
        better, not_worse, worse = success_wealths(successes, self.rule.margin)
        return largest(better), largest(not_worse), largest(faster_wealth(steps)), largest(worse)

    def _differences(self) -> tuple[Float64, Float64]:
        """Differences by block: of success, candidate less live, and of steps over the horizon, live less candidate."""
        candidate, live = self._of(self.candidate), self._of(self.live)
        successes = block_differences(_successes(candidate), _successes(live), self.rule.share)
        steps = block_differences(
            _steps(candidate) / self.horizon_steps, _steps(live) / self.horizon_steps, self.rule.share
        )
        return successes, -steps

    def _of(self, version: str) -> list[CanaryOutcome]:
        return [outcome for outcome in self.outcomes if outcome.version == version]


def promotion_alpha(rule: CanaryRule) -> float:
    """The level of each test that promotes.

    Two ways lead to a promotion under `better`, so each gets half. Within the second way nothing is split: it needs
    both rejections, and where it would be wrong at least one of the two nulls is true.
    """
    return rule.false_promotion if rule.promote == "not_worse" else rule.false_promotion / 2


def success_wealths(differences: Float64, margin: float) -> tuple[Float64, Float64, Float64]:
    """e-processes of better, not_worse, worse for block differences `[..., n]` of success, candidate less live."""
    scaled = (1 + differences) / 2
    return wealth(scaled, 0.5), wealth(scaled, (1 - margin) / 2), wealth(1 - scaled, 0.5)


def faster_wealth(differences: Float64) -> Float64:
    """e-process of faster for block differences `[..., n]` of the successes' steps over the horizon, live less
    candidate."""
    return wealth((1 + differences) / 2, 0.5)


def _successes(outcomes: list[CanaryOutcome]) -> Float64:
    return np.array([outcome.success for outcome in outcomes], np.float64)


def _steps(outcomes: list[CanaryOutcome]) -> Float64:
    return np.array([outcome.steps for outcome in outcomes if outcome.success], np.float64)


def _share(outcomes: list[CanaryOutcome]) -> float | None:
    return sum(outcome.success for outcome in outcomes) / len(outcomes) if outcomes else None
