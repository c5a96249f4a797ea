"""The canary's decisions: right as often as promised, known for small cases, restored from their outcomes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.canary import Canary, CanaryError, CanaryOutcome, CanaryRule, Decision

CANDIDATE, LIVE = "c" * 64, "a" * 64
HORIZON = 100


def canary(rule: CanaryRule | None = None) -> Canary:
    return Canary(CANDIDATE, LIVE, HORIZON, rule)


def run(test: Canary, candidate: tuple[bool, int], live: tuple[bool, int], most: int = 500) -> Decision:
    """The same outcome of each version again and again, by turns."""
    for i in range(most):
        decision = test.add(*((CANDIDATE, *candidate) if i % 2 else (LIVE, *live)))
        if decision != "go on":
            return decision
    return "go on"


def test_a_candidate_that_always_fails_goes_after_few_episodes() -> None:
    test = canary()
    assert run(test, (False, 100), (True, 50)) == "rollback"
    # The stakes are at most 0.95, so a block at most multiplies by 1.95: 20 needs five blocks at least.
    assert 10 <= len(test.outcomes) <= 16
    evidence = test.evidence()
    assert evidence.worse >= evidence.needed_to_roll_back == 20
    assert evidence.better == evidence.not_worse == evidence.faster == 1
    assert (evidence.candidate_success, evidence.live_success) == (0, 1)
    assert evidence.success_difference[0] == -1 and evidence.success_difference[1] < 0.1


def test_a_candidate_that_alone_succeeds_is_promoted_after_few_episodes() -> None:
    test = canary()
    assert run(test, (True, 99), (False, 100)) == "promote"
    assert 12 <= len(test.outcomes) <= 20
    assert test.evidence().better >= test.evidence().needed_to_promote == 40


def test_where_both_always_succeed_faster_steps_decide() -> None:
    test = canary()
    assert run(test, (True, 40), (True, 60)) == "promote"
    evidence = test.evidence()
    assert evidence.better == 1 and evidence.not_worse >= 40 and evidence.faster >= 40
    low, high = evidence.steps_difference
    assert low < -20 < high < 0
    assert run(canary(), (True, 60), (True, 40)) == "undecided"
    assert run(canary(CanaryRule(max_episodes=60)), (True, 40), (True, 60)) == "undecided"


def test_not_worse_promotes_without_faster_steps() -> None:
    test = canary(CanaryRule(promote="not_worse"))
    assert run(test, (True, 60), (True, 40)) == "promote"
    # With fewer of the candidate's, one that fails by a tenth could have succeeded as often with probability 0.05.
    assert test.evidence().candidate_episodes >= np.log(20) / -np.log(0.9)
    assert test.evidence().needed_to_promote == 20


def test_steps_of_failures_count_for_nothing() -> None:
    test = canary()
    for _ in range(40):
        test.add(CANDIDATE, False, 1)
        test.add(LIVE, False, 100)
    assert test.decision == "go on"
    assert test.evidence().faster == 1 and test.evidence().steps_difference == (-100, 100)


def test_nothing_changes_after_the_decision() -> None:
    test = canary()
    run(test, (False, 100), (True, 50))
    before = test.evidence()
    assert run(test, (True, 1), (False, 100), 100) == "rollback"
    assert test.evidence() == before


def test_what_does_not_belong_is_refused() -> None:
    test = canary()
    for version, steps in (("b" * 64, 3), (LIVE, HORIZON + 1), (LIVE, -1)):
        with pytest.raises(CanaryError):
            test.add(version, True, steps)
    with pytest.raises(CanaryError):
        Canary(LIVE, LIVE, HORIZON)
    assert test.outcomes == [] and test.evidence().live_success is None
    with pytest.raises(msgspec.ValidationError, match="max_episode"):
        msgspec.convert({"max_episode": 3}, CanaryRule)


episodes = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, HORIZON)), max_size=60)


@settings(max_examples=30, deadline=None)
@given(episodes, st.sampled_from([0.2, 0.3, 0.5]), st.sampled_from(["better", "not_worse"]))
def test_a_canary_made_from_its_outcomes_stands_where_it_stood(
    given_episodes: list[tuple[bool, bool, int]], share: float, promote: str
) -> None:
    rule = msgspec.convert({"share": share, "promote": promote, "max_episodes": 40}, CanaryRule)
    test = canary(rule)
    for candidate, success, steps in given_episodes:
        test.add(CANDIDATE if candidate else LIVE, success, steps)
    stored = msgspec.json.encode(test.outcomes)
    again = Canary(CANDIDATE, LIVE, HORIZON, rule, msgspec.json.decode(stored, type=list[CanaryOutcome]))
    assert again.decision == test.decision and again.evidence() == test.evidence()
    evidence = test.evidence()
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=type(evidence)) == evidence
    assert evidence.candidate_episodes + evidence.live_episodes == len(test.outcomes) <= 40
    assert evidence.success_difference[0] <= evidence.success_difference[1]


@settings(max_examples=30, deadline=None)
@given(episodes)
def test_how_the_versions_take_turns_does_not_matter(given_episodes: list[tuple[bool, bool, int]]) -> None:
    """Only the order within each version counts, so whoever allocates cannot change the evidence by it."""
    rule = CanaryRule(max_episodes=1000, false_promotion=1e-9, false_rollback=1e-9)
    mixed, sorted_ = canary(rule), canary(rule)
    for candidate, success, steps in given_episodes:
        mixed.add(CANDIDATE if candidate else LIVE, success, steps)
    for candidate, success, steps in sorted(given_episodes, key=lambda episode: episode[0]):
        sorted_.add(CANDIDATE if candidate else LIVE, success, steps)
    assert mixed.evidence() == sorted_.evidence()
