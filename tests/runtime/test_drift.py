"""The drift alarm: seldom false, quick for what matters, and the statistics it watches."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_samples import SPEC, make_start

from bridge.backend import Observation
from runtime.drift import (
    POWERS,
    Direction,
    DriftError,
    DriftMonitor,
    DriftRule,
    episode_statistics,
    rank_bet,
    statistic_names,
)
from runtime.episode import Decision, Episode

directions: st.SearchStrategy[Direction] = st.sampled_from(["fell", "rose"])


def bet(values: np.ndarray[Any, Any], direction: Direction, worst: float | None = None) -> np.ndarray[Any, Any]:
    """That of the last of the values."""
    return rank_bet(sorted(values.tolist()), float(values[-1]), direction, worst)


def test_known_bets() -> None:
    lowest_of_four = bet(np.array([3.0, 2.0, 4.0, 1.0]), "fell")
    assert lowest_of_four == pytest.approx(4 * 0.25**POWERS)
    assert bet(np.array([3.0, 2.0, 4.0, 1.0]), "rose") == pytest.approx(4 * (1 - 0.75**POWERS))
    assert bet(np.full(7, 2.5), "rose") == pytest.approx(np.ones(5))  # all tie: it says nothing
    # A failure after nine successes is among one failure: rank 0 to 0.1.
    assert bet(np.append(np.ones(9), 0.0), "fell") == pytest.approx(10 * 0.1**POWERS)
    assert bet(np.append(np.zeros(1), np.ones(9)), "fell") == pytest.approx((1 - 0.1**POWERS) / 0.9)
    # As if a failure had been seen once more: rank 0 to 2/11, and 1/11 to 1 where there was none else.
    assert bet(np.append(np.ones(9), 0.0), "fell", 0.0) == pytest.approx((2 / 11) ** (POWERS - 1))
    assert bet(np.ones(10), "fell", 0.0) == pytest.approx((1 - (1 / 11) ** POWERS) * 11 / 10)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), directions)
def test_a_bet_is_fair_whichever_of_the_values_comes_last(numbers: list[int], direction: Direction) -> None:
    """Given which values there are, each is equally likely to be the last."""
    values = np.array(numbers, float)
    bets = [bet(np.roll(values, i), direction) for i in range(len(values))]
    assert np.mean(bets, axis=0) == pytest.approx(np.ones(len(POWERS)))
    worst = min(numbers) if direction == "fell" else max(numbers)
    for seen in (worst, -4 if direction == "fell" else 4):
        bets = [bet(np.roll(values, i), direction, seen) for i in range(len(values))]
        assert (np.mean(bets, axis=0) <= 1 + 1e-9).all()


def bet_by_counting(values: np.ndarray[Any, Any], direction: Direction, worst: float | None) -> np.ndarray[Any, Any]:
    seen = values if worst is None else np.append(worst, values)
    signed = seen if direction == "fell" else -seen
    low = np.count_nonzero(signed < signed[-1]) / len(seen)
    high = np.count_nonzero(signed <= signed[-1]) / len(seen)
    return np.asarray((high**POWERS - low**POWERS) / (high - low))


@given(
    st.lists(st.integers(-3, 3).map(float) | st.floats(allow_nan=False, allow_infinity=False), min_size=1),
    directions,
    st.sampled_from([None, 0.0, 1.0]),
)
def test_a_bet_is_what_counting_gives_to_the_last_bit(
    numbers: list[float], direction: Direction, worst: float | None
) -> None:
    values = np.array(numbers)
    assert bet(values, direction, worst).tolist() == bet_by_counting(values, direction, worst).tolist()


def test_an_episode_is_not_compared_with_all_that_were_before() -> None:
    monitor, looked = DriftMonitor(NAMES), 0
    rng = np.random.default_rng(0)

    class Value(float):
        def __lt__(self, other: float) -> bool:
            nonlocal looked
            looked += 1
            return float(self) < float(other)

    for _ in range(1000):
        monitor.add({"x mean": Value(rng.normal())})
    looked = 0
    monitor.add({"x mean": Value(0.0)})
    assert 0 < looked < 100


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0.0, 0.0, 1.0, 1.0, 1.0, 0.0)])
def test_over_all_orders_the_sum_is_on_average_the_number_of_episodes(values: tuple[float, ...]) -> None:
    """From this and Doob's inequality follows what is promised without ties: two are the record, four are watched."""
    rule = DriftRule(record_episodes=2, false_alarm=0.5, window_episodes=1000)
    sums = []
    for order in permutations(values):
        monitor = DriftMonitor(["steps"], rule)
        for value in order:
            monitor.add({"steps": value})
        sums.append(monitor.evidence()["steps"] * 1000 / 0.25)
    assert np.mean(sums) == pytest.approx(4)


def outcome(rng: np.random.Generator, success: float, steps: float = 80.0, shift: float = 0.0) -> dict[str, float]:
    found = {"success": float(rng.random() < success), "x mean": rng.normal() + shift, "y mean": rng.normal()}
    if found["success"]:
        found["steps"] = np.round(rng.gamma(16) / 16 * steps)
    return found


NAMES = ("success", "steps", "x mean", "y mean")


def test_false_alarms_are_as_seldom_as_the_rule_says() -> None:
    """Of 150 monitors at most a fifth may alarm within 50 episodes; were it two fifths, 60 would, give or take 12."""
    rule, alarmed = DriftRule(record_episodes=10, false_alarm=0.2, window_episodes=50), 0
    for seed in range(150):
        rng, monitor = np.random.default_rng(seed), DriftMonitor(NAMES, rule)
        for _ in range(60):
            monitor.add(outcome(rng, 0.8))
            if monitor.drifts:
                alarmed += 1
                break
    assert 0 < alarmed <= 42


@pytest.mark.parametrize(
    ("changed", "statistic", "direction"),
    [
        ({"success": 0.4}, "success", "fell"),
        ({"success": 0.9, "steps": 120.0}, "steps", "rose"),
        ({"success": 0.9, "shift": 2.5}, "x mean", "rose"),
        ({"success": 0.9, "shift": -2.5}, "x mean", "fell"),
    ],
)
def test_a_change_is_found_soon_and_named(changed: dict[str, float], statistic: str, direction: Direction) -> None:
    found_after = []
    for seed in range(9):
        rng, monitor = np.random.default_rng(seed), DriftMonitor(NAMES)
        for _ in range(200):
            assert monitor.add(outcome(rng, 0.9)) == []
        while monitor.episodes < 350 and not monitor.drifts:
            monitor.add(outcome(rng, **changed))
        if monitor.drifts:
            (drift,) = monitor.drifts
            assert (drift.statistic, drift.direction, drift.episode) == (statistic, direction, monitor.episodes)
            assert (drift.recent < drift.record) == (direction == "fell")
            found_after.append(monitor.episodes - 200)
    assert len(found_after) == 9 and np.median(found_after) <= 40


def test_a_rare_failure_is_no_drift() -> None:
    """Of 60 monitors that see a failure in 500 episodes at most 3 may alarm; what they see alike must not add up."""
    alarmed = 0
    for seed in range(60):
        rng, monitor = np.random.default_rng(seed), DriftMonitor(("success", "steps"))
        for failed in rng.random(1100) < 0.002:
            monitor.add({"success": float(not failed)})
        alarmed += bool(monitor.drifts)
    assert alarmed <= 1
    monitor = DriftMonitor(("success", "steps"))
    for success in [1.0] * 2000 + [0.0]:
        assert monitor.add({"success": success}) == []


def test_getting_better_is_no_drift_of_the_outcomes() -> None:
    rng, monitor = np.random.default_rng(0), DriftMonitor(("success", "steps"))
    for i in range(300):
        found = outcome(rng, 0.5 if i < 150 else 1.0, 80.0 if i < 150 else 40.0)
        monitor.add({name: value for name, value in found.items() if name in ("success", "steps")})
    assert monitor.drifts == []


def test_a_known_alarm() -> None:
    """Ten equal values, then 1: rank 0 to 1/11 and R = 11 (1/11)^k; then 2, the highest again of twelve."""
    rule = DriftRule(record_episodes=10, false_alarm=0.9, window_episodes=2)
    monitor = DriftMonitor(["z mean"], rule)
    for _ in range(10):
        monitor.add({"z mean": 0.0})
    assert monitor.evidence() == {"z mean": 0.0}
    first = 11 * (1 / 11) ** POWERS
    needed = 2 * 2 / 0.45  # two directions, two episodes, half of the rule's probability
    assert monitor.add({"z mean": 1.0}) == []
    assert monitor.evidence()["z mean"] == pytest.approx(first.mean() / needed)
    second = (1 + first) * 12 * (1 / 12) ** POWERS
    assert second.mean() >= needed
    (drift,) = monitor.add({"z mean": 2.0})
    assert (drift.episode, drift.direction, drift.record, drift.recent) == (12, "rose", 0.0, pytest.approx(3 / 12))
    assert monitor.add({"z mean": 3.0}) == [], "one alarm for one change"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5).map(float)), max_size=40))
def test_adding_the_same_again_gives_the_same_alarms(episodes: list[dict[str, float]]) -> None:
    rule = DriftRule(record_episodes=10, false_alarm=0.9, window_episodes=1)
    monitors = [DriftMonitor(NAMES, rule) for _ in range(2)]
    raised = [[drift for episode in episodes for drift in monitor.add(episode)] for monitor in monitors]
    assert raised[0] == raised[1] == monitors[0].drifts
    assert monitors[0].evidence() == monitors[1].evidence()
    assert monitors[0].episodes == len(episodes)
    keys = [(drift.statistic, drift.direction) for drift in raised[0]]
    assert len(keys) == len(set(keys))
    assert {name for name, _ in keys} == {name for name, value in monitors[0].evidence().items() if value >= 1}


def test_unknown_and_infinite_statistics_are_refused_and_change_nothing() -> None:
    monitor = DriftMonitor(NAMES)
    for wrong in ({"success": 1.0, "z": 1.0}, {"x mean": float("nan")}):
        with pytest.raises(DriftError):
            monitor.add(wrong)
    assert monitor.episodes == 0


def decision(state: list[float], sent: Any, brightness: int) -> Decision:
    rows = np.array(sent, np.float32).reshape(-1, 2)
    images = {"eye": np.full((8, 8, 3), brightness, np.uint8), "wrist": np.zeros((8, 8, 3), np.uint8)}
    return Decision(
        number=1,
        step=0,
        version="v",
        observation=Observation(images, np.array(state, np.float32)),
        actions=np.zeros((4, 2), np.float32),
        log_prob=None,
        sent=rows,
        reward=np.zeros(len(rows), np.float32),
    )


def test_known_statistics_of_an_episode() -> None:
    first, second = decision([1, 0, 2], [[0, 1], [2, 1]], 10), decision([3, 0, 2], [[4, 1]], 30)
    episode = Episode(make_start("e"), [first, second, decision([5, 0, 2], [], 50)], "success", 3)
    found = episode_statistics(episode)
    assert set(found) == set(statistic_names(SPEC)) and len(statistic_names(SPEC)) == 2 + 2 * 2 + 2 * 3 + 2
    assert (found["success"], found["steps"]) == (1, 3)
    assert (found["action a mean"], found["action b mean"], found["action b std"]) == (2, 1, 0)
    assert found["action a std"] == pytest.approx(np.sqrt(8 / 3))
    assert (found["state x mean"], found["state y std"], found["state z mean"]) == (3, 0, 2)
    assert (found["image eye brightness"], found["image wrist brightness"]) == (30, 0)
    assert DriftMonitor(statistic_names(SPEC)).add(found) == []


def test_a_failure_has_no_steps_an_aborted_episode_nothing() -> None:
    failed = episode_statistics(Episode(make_start("e"), [decision([0, 0, 0], [], 0)], "timeout", 40))
    assert failed["success"] == 0 and "steps" not in failed and "action a mean" not in failed
    assert episode_statistics(Episode(make_start("e"), [], "failure", 0)) == {"success": 0.0}
    assert episode_statistics(Episode(make_start("e"), [decision([0, 0, 0], [], 0)], "aborted", 40)) == {}
