"""Figures of an evaluation: known answers, and what must hold for any episodes."""

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from runtime.episode import End
from trainer.statistics import (
    Evaluation,
    StatisticsError,
    compare,
    mcnemar,
    mean_interval,
    result_on,
    summarise,
    wilson,
)


@dataclass
class FakeRow:
    task: str
    seed: int
    status: End
    steps: int


def test_wilson_known_answers() -> None:
    # 15 of 20: the worked value that R's prop.test(15, 20, correct = FALSE) gives.
    assert wilson(15, 20) == pytest.approx((0.5312998, 0.8881384), abs=1e-6)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775328, abs=1e-6))
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_agrees_with_scipy(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("k, n, confidence", [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_nonsense(k: int, n: int, confidence: float) -> None:
    with pytest.raises(StatisticsError):
        wilson(k, n, confidence)


def test_bootstrap_agrees_with_the_normal_interval_and_keeps_tasks_apart() -> None:
    values = np.random.default_rng(1).normal(60, 10, 200).tolist()
    mean, interval = mean_interval([values])
    assert mean == pytest.approx(np.mean(values)) and interval is not None
    half = 1.96 * np.std(values) / np.sqrt(200)
    assert interval == pytest.approx((mean - half, mean + half), abs=0.2)
    # Two tasks of very different length, each without spread: nothing is uncertain.
    assert mean_interval([[20.0] * 5, [100.0] * 5]) == (60.0, (60.0, 60.0))
    assert mean_interval([[], [7.0]]) == (7.0, None)
    # With goals that have no value, the weights of the tasks are uncertain too: 2 of 4 against 4 of 4 weigh
    # 100 with 1/3 on average, and anything from 0 to 1/2 is drawn.
    mean, interval = mean_interval([[20.0] * 4, [100.0, 100.0, None, None]])
    assert mean == pytest.approx(140 / 3)
    assert interval == pytest.approx((20.0, 60.0))
    assert mean_interval([[None, None]]) == (None, None) and mean_interval([[None, 5.0]]) == (5.0, None)
    assert mean_interval([]) == (None, None)


def test_the_interval_of_steps_covers_what_it_says_where_tasks_succeed_differently() -> None:
    rng = np.random.default_rng(7)
    rates, lengths = np.linspace(0.4, 1.0, 10), np.linspace(30, 110, 10)
    truth = float((rates * lengths).sum() / rates.sum())
    covered = 0
    for _ in range(150):
        won = rng.random((10, 50)) < rates[:, None]
        steps = rng.normal(lengths[:, None], 5.0, (10, 50))
        _, interval = mean_interval(
            [[s if w else None for s, w in zip(*task, strict=True)] for task in zip(steps, won, strict=True)]
        )
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 135 <= covered <= 150, "95 % of 150, within what chance allows"


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_agrees_with_scipy(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-6)


def test_summary_counts_every_goal_once() -> None:
    rows = [
        FakeRow("push", 1, "success", 50),
        FakeRow("push", 2, "aborted", 3),
        FakeRow("push", 2, "timeout", 200),
        FakeRow("push", 1, "timeout", 200),
        FakeRow("reach", 1, "success", 30),
        FakeRow("reach", 2, "failure", 12),
        FakeRow("peg", 1, "aborted", 1),
    ]
    result = summarise(rows, version="v", horizon_steps=200)
    push, reach, peg = result.tasks["push"], result.tasks["reach"], result.tasks["peg"]
    assert (push.n, push.successes, push.aborted, result.repeated) == (2, 1, 1, 1)
    assert (push.steps, push.steps_interval, push.steps_all) == (50, None, 125)
    assert reach.steps_all == 115  # a failure after 12 steps counts as 200
    assert (peg.n, peg.success, peg.success_interval, peg.steps, peg.steps_all) == (0, 0.0, (0.0, 1.0), None, None)
    assert (result.overall.n, result.overall.success, result.overall.steps) == (4, 0.5, 40)
    assert result.overall.aborted == 2 and result.seeds == (1, 2) and result.action == "mean"
    assert msgspec.json.decode(msgspec.json.encode(result), type=Evaluation) == result
    assert result_on(result, result.tasks) == result.overall and result_on(result, ["reach"]) == reach
    two = result_on(result, ["push", "peg"])
    assert (two.n, two.successes, two.aborted, two.steps_all) == (2, 1, 2, 125)


statuses = st.sampled_from(["success", "failure", "timeout", "aborted"])
rows_of_an_evaluation = st.lists(
    st.builds(FakeRow, st.sampled_from(["a", "b"]), st.integers(0, 9), statuses, st.integers(1, 200))
)


@given(rows_of_an_evaluation)
def test_summary_is_consistent(rows: list[FakeRow]) -> None:
    result = summarise(rows, version="v", horizon_steps=200)
    assert result.overall.n + result.overall.aborted + result.repeated == len(rows)
    assert sum(task.successes for task in result.tasks.values()) == result.overall.successes
    for part in (*result.tasks.values(), result.overall):
        assert part.success_interval[0] <= part.success <= part.success_interval[1]
        if part.steps_interval and part.steps_all_interval:
            assert part.steps_interval[0] <= part.steps_interval[1] <= 200
            assert part.steps_all is not None and part.steps is not None and part.steps <= part.steps_all
    assert summarise(rows, version="v", horizon_steps=200) == result


def test_comparison_pairs_goals() -> None:
    before = [FakeRow("a", s, "success", 60 + s) for s in range(10)] + [FakeRow("a", 10, "timeout", 200)]
    after = [FakeRow("a", s, "success", 40 + s) for s in range(9)] + [
        FakeRow("a", 9, "timeout", 200),
        FakeRow("a", 10, "success", 90),
        FakeRow("a", 77, "success", 1),
    ]
    result = compare(
        summarise(before, version="b", horizon_steps=200), summarise(after, version="c", horizon_steps=200)
    )
    assert (result.goals, result.both_succeed, result.gained, result.lost, result.mcnemar_p) == (11, 9, 1, 1, 1.0)
    assert result.steps_difference == -20 and result.steps_difference_interval == (-20, -20)
    assert result.steps_ratio == pytest.approx(44 / 64)


def test_comparison_refuses_what_cannot_be_compared() -> None:
    one = summarise([FakeRow("a", 1, "success", 5)], version="b", horizon_steps=200)
    with pytest.raises(StatisticsError, match="no goal in common"):
        compare(one, summarise([FakeRow("a", 2, "success", 5)], version="c", horizon_steps=200))
    with pytest.raises(StatisticsError, match="horizon_steps"):
        compare(one, summarise([FakeRow("a", 1, "success", 5)], version="c", horizon_steps=100))
