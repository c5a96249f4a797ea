"""The e-process, its confidence sequence and the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.betting import SHARES, block_differences, block_ends, difference_interval, largest, lower_bound, wealth

shares = st.floats(0.05, 0.5)


def test_wealth_is_what_the_bets_pay() -> None:
    found = wealth(np.array([1.0, 0.0]), 0.5)
    assert found[0] == pytest.approx(np.mean(1 + SHARES))  # the asset doubles
    assert found[1] == pytest.approx(np.mean((1 + SHARES) * (1 - SHARES)))  # and is lost
    assert wealth(np.full(9, 0.3), 0.3) == pytest.approx(np.ones(9))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([0.25, 0.5, 0.75]))
def test_no_next_value_of_that_mean_gains_on_average(before: list[int], mean: float) -> None:
    past = np.array(before) / 4
    now = wealth(past, mean)[-1]
    after = mean * wealth(np.append(past, 1.0), mean)[-1] + (1 - mean) * wealth(np.append(past, 0.0), mean)[-1]
    assert after == pytest.approx(now)


def test_much_evidence_is_a_number_and_ruin_is_not_undone() -> None:
    assert np.isfinite(wealth(np.ones(5000), 0.1)).all()
    there_and_back = wealth(np.concatenate([np.zeros(20_000), np.ones(20)]), 0.5)
    assert np.isfinite(there_and_back).all() and there_and_back[-1] < 1e-6
    assert largest(there_and_back) == 1 and largest(np.zeros(0)) == 1


def test_the_wealth_of_a_fair_game_rarely_becomes_large_however_long_one_looks() -> None:
    rng = np.random.default_rng(0)
    for mean in (0.1, 0.5, 0.9):
        values = (rng.random((4000, 400)) < mean).astype(np.float64)
        broken = float(np.mean((wealth(values, mean) >= 20).any(axis=1)))
        assert 0.002 < broken < 0.05, mean


def test_the_lower_bound_of_ones_is_where_the_bets_first_reject() -> None:
    for n in (1, 5, 50):
        bound = lower_bound(np.ones(n), 0.05)
        rejected, kept = (largest(wealth(np.ones(n), mean)) >= 20 for mean in (bound - 1e-6, bound + 1e-6))
        assert rejected and not kept
    assert lower_bound(np.zeros(50), 0.05) == 0
    assert lower_bound(np.zeros(0), 0.05) == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_the_interval_narrows_holds_the_sign_and_turns_with_the_values(numbers: list[int]) -> None:
    values = np.array(numbers) / 4
    low, high = difference_interval(values, 0.05)
    before_low, before_high = difference_interval(values[:-1], 0.05)
    assert before_low <= low and high <= before_high
    assert difference_interval(-values, 0.05) == pytest.approx((-high, -low))
    assert (low > 1e-9) == (largest(wealth((1 + values) / 2, 0.5)) > 40.0001)


def test_the_confidence_sequence_holds_the_difference_at_every_look() -> None:
    rng = np.random.default_rng(1)
    n, missed = 200, 0
    for _ in range(n):
        values = (rng.random(150) < 0.7).astype(np.float64) - (rng.random(150) < 0.5)
        low, high = difference_interval(values, 0.05)  # it only narrows, so the last look is all looks
        missed += not low <= 0.2 <= high
        assert high - low < 0.5
    assert missed <= 0.1 * n


@given(shares, st.integers(1, 60))
def test_blocks_take_the_live_versions_part_as_evenly_as_they_can(share: float, blocks: int) -> None:
    ends = block_ends(blocks, share)
    sizes = np.diff(ends, prepend=0)
    ratio = (1 - share) / share
    assert np.isin(sizes, [np.floor(ratio + 1e-6), np.ceil(ratio - 1e-6)]).all()
    assert abs(ends[-1] - blocks * ratio) < 1 + 1e-6


@given(shares, st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 9), max_size=60))
def test_block_differences_are_those_of_the_blocks(share: float, candidate: list[int], live: list[int]) -> None:
    found = block_differences(np.array(candidate, float), np.array(live, float), share)
    expected, start = [], 0
    for value, end in zip(candidate, block_ends(len(candidate), share), strict=True):
        if end > len(live):
            break
        expected.append(value - sum(live[start:end]) / (end - start))
        start = int(end)
    assert found == pytest.approx(np.array(expected))


def test_known_blocks() -> None:
    live = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    assert block_ends(4, 0.5).tolist() == [1, 2, 3, 4]
    assert block_ends(3, 0.2).tolist() == [4, 8, 12]
    assert block_ends(3, 0.3).tolist() == [2, 4, 7]
    assert block_differences(np.array([1.0, 1.0, 0.0, 1.0]), live, 0.3) == pytest.approx([0.5, 0.0, -1 / 3])
    assert block_differences(np.array([1.0]), np.zeros(0), 0.5).shape == (0,)
