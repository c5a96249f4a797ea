"""The simulated canaries: they decide as the real one does, and as seldom wrongly as promised."""

from __future__ import annotations

import json
from collections import Counter
from math import comb

import numpy as np
import pytest
from msgspec.structs import replace

from fieldtune.bench.canary import METHODS, Decided, Scenario, draw, join, scenarios, sequential, simulate
from fieldtune.bench.canary_fixed import FIRST_LOOK, fixed_sample_tests
from fieldtune.cli import run
from runtime.canary import Canary, CanaryRule, Decision

RULE = CanaryRule(max_episodes=200)


def test_it_runs_and_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "canary", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    errors, decisions = report["results"]
    assert [row["test"] for row in errors["rows"]] == [*METHODS, *METHODS]
    assert [goal["limit"] for goal in errors["goals"]] == [0.05, 0.05]
    assert len(decisions["rows"]) == len(scenarios())
    assert {row["diff"] for row in decisions["rows"]} >= {"-0.30", "+0.00", "+0.30"}


@pytest.mark.parametrize(
    ("scenario", "promote"),
    [
        (Scenario(0.5, 0.3), "better"),
        (Scenario(0.8, -0.2, share=0.2), "better"),
        (Scenario(0.95, 0.0, steps=0.6, share=0.3), "better"),
        (Scenario(0.9, 0.0), "not_worse"),
    ],
)
def test_the_simulation_decides_as_the_canary_does(scenario: Scenario, promote: str) -> None:
    rule = replace(RULE, promote=promote, share=scenario.share)
    episodes = draw(scenario, rule.max_episodes, 40, np.random.default_rng(3))
    found = sequential(episodes, rule)
    seen: Counter[Decision] = Counter()
    for i in range(40):
        canary = Canary("c", "l", 200, rule)
        decision: Decision = "go on"
        for t in range(rule.max_episodes):
            version = "c" if episodes.candidate[i, t] else "l"
            decision = canary.add(version, bool(episodes.success[i, t]), int(episodes.steps[i, t]))
            if decision != "go on":
                break
        assert (decision == "promote", decision == "rollback") == (found.promoted[i], found.rolled_back[i])
        assert len(canary.outcomes) == found.episodes[i]
        seen[decision] += 1
    assert seen["promote"] + seen["rollback"] > 10, "nothing was compared"


def rates(scenario: Scenario, rule: CanaryRule = RULE, n: int = 4000) -> dict[str, tuple[float, float]]:
    found = simulate(scenario, rule, n, seed=11)
    return {method: (float(by.promoted.mean()), float(by.rolled_back.mean())) for method, by in found.items()}


def test_wrong_decisions_are_rare_though_one_looks_after_every_episode() -> None:
    """With 4,000 deployments a true rate of 0.1 would give less than 0.08 once in ten thousand runs."""
    for scenario in (Scenario(0.5, 0.0), Scenario(0.9, 0.0, share=0.2)):
        by_method = rates(scenario)
        assert max(by_method["sequential"]) <= 0.055, scenario
        # What the sequential test is for: the fixed-sample one keeps its level once, and breaks it when looked at.
        promoted, rolled_back = by_method["fixed sample"]
        assert promoted <= 0.06 and rolled_back <= 0.07
        promoted, rolled_back = by_method["peeking"]
        assert promoted > 0.06 and rolled_back > 0.15
    assert rates(Scenario(0.5, -0.1, steps=0.5))["sequential"][0] <= 0.04  # faster, and worse by the margin
    assert rates(Scenario(0.5, -0.1), replace(RULE, promote="not_worse"))["sequential"][0] <= 0.055
    # At the edge of each null a test that never rejects would be as good; this one uses what it is allowed.
    assert rates(Scenario(0.5, 0.0))["sequential"][1] > 0.005


def test_right_decisions_are_frequent() -> None:
    assert rates(Scenario(0.5, 0.3), n=500)["sequential"][0] > 0.8
    assert rates(Scenario(0.95, -0.3), n=500)["sequential"][1] > 0.95
    assert rates(Scenario(0.95, 0.0, steps=0.6), n=500)["sequential"][0] > 0.4
    assert rates(Scenario(0.95, 0.0), replace(RULE, promote="not_worse"), n=500)["sequential"][0] > 0.5


def test_known_fixed_sample_tests() -> None:
    """Twenty of each by turns, 18 successes against 8: pooled z = 0.5 / sqrt(0.65 * 0.35 * 0.1) = 3.31."""
    candidate = np.tile([True, False], 20)[None]
    success = np.where(candidate, np.arange(40) >= 4, np.arange(40) >= 24)
    promote, roll_back = fixed_sample_tests(candidate, success, np.full((1, 40), 50.0), CanaryRule())
    assert promote[0, -1] and not roll_back.any()
    assert not promote[:, : 2 * FIRST_LOOK - 1].any()
    swapped_promote, swapped_back = fixed_sample_tests(~candidate, success, np.full((1, 40), 50.0), CanaryRule())
    assert swapped_back[0, -1] and not swapped_promote.any()


def test_the_pooled_test_keeps_its_level_where_it_can_be_counted() -> None:
    """All tables of 20 against 20 at a rate of 0.5: the chance of a rollback is what adding up binomials gives."""
    weights = np.array([comb(20, k) for k in range(21)]) / 2**20
    level = 0.0
    for own in range(21):
        for live in range(21):
            candidate = (np.arange(40) < 20)[None]
            success = np.concatenate([np.arange(20) < own, np.arange(20) < live])[None]
            _, roll_back = fixed_sample_tests(candidate, success, np.full((1, 40), 50.0), CanaryRule())
            level += weights[own] * weights[live] * roll_back[0, -1]
    assert 0.03 < level < 0.065


def test_lots_are_joined_in_order() -> None:
    lots = [Decided(np.array([i == 0]), np.array([i == 1]), np.array([i])) for i in range(3)]
    joined = join(lots)
    assert joined.promoted.tolist() == [True, False, False]
    assert joined.rolled_back.tolist() == [False, True, False]
    assert joined.episodes.tolist() == [0, 1, 2]
