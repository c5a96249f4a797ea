"""Logged decisions are made again from the log and the bundle alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged_run import Brief, log_run
from msgspec.structs import replace

from bridge.messages import WireError
from runtime.decide_again import Difference, decide_again, difference
from runtime.episode import Episode
from runtime.policy import Policy

TinyBundle = Callable[..., str]
HALF_RANGE = np.ones(2, np.float32)


def compared(policy: Policy, episode: Episode) -> list[Difference]:
    again = decide_again(policy, episode.start, episode.decisions)
    return [difference(a, decision, HALF_RANGE) for a, decision in zip(again, episode.decisions, strict=True)]


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_the_version_that_acted_makes_them_to_the_bit(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: TinyBundle, explore: bool, rho: float
) -> None:
    policy = Policy.load(tmp_path / tiny_bundle(tmp_path, 0.25, noise_correlation=rho))
    for episode in log_run(serve, tmp_path / "log", policy, Brief(), seeds=2, explore=explore):
        found = compared(policy, episode)
        assert len(found) == 2
        zero = 0.0 if explore else None
        assert found == [Difference(actions=0.0, log_prob=zero, log_ratio=zero, identical=True)] * 2
        assert all(each.reproduced for each in found)


def test_another_version_differs_by_what_its_means_differ(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: TinyBundle
) -> None:
    acted, other = (Policy.load(tmp_path / tiny_bundle(tmp_path, value)) for value in (0.25, 0.27))
    (episode,) = log_run(serve, tmp_path / "log", acted, Brief(), seeds=1, explore=True)
    again = decide_again(other, episode.start, episode.decisions)
    for found, each, decision in zip(compared(other, episode), again, episode.decisions, strict=True):
        # mean = value * (1 + x + y), and log_std = -3 in both: with the same noise the chunks differ as the means do.
        gap = 0.02 * (1 + decision.observation.state.sum())
        np.testing.assert_allclose(each.actions - decision.actions, gap, atol=1e-6)
        assert found.actions == pytest.approx(abs(gap), abs=1e-6)
        assert not found.identical and found.reproduced == (abs(gap) <= 1e-3)
        # log N(a; m + gap, s) - log N(a; m, s) = ((a - m) gap - gap^2 / 2) / s^2, over what was executed.
        k, variance = len(decision.sent), np.exp(-6.0)
        residual = decision.actions[:k] - (each.mean[:k] - gap)
        expected = ((residual * gap - gap**2 / 2) / variance).sum()
        assert found.log_ratio == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert len(episode.decisions[-1].sent) < 4, "the last chunk was not played to its end"


def test_a_shorter_chunk_is_compared_over_its_own_length(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: TinyBundle
) -> None:
    acted = Policy.load(tmp_path / tiny_bundle(tmp_path, 0.25, noise_correlation=0.5))
    short = Policy.load(tmp_path / tiny_bundle(tmp_path, 0.25, noise_correlation=0.5, horizon=3))
    (episode,) = log_run(serve, tmp_path / "log", acted, Brief(), seeds=1, explore=True)
    for again, decision in zip(decide_again(short, episode.start, episode.decisions), episode.decisions, strict=True):
        np.testing.assert_array_equal(again.actions, decision.actions[:3])
        found = difference(again, decision, HALF_RANGE)
        assert (found.actions, found.log_prob, found.identical) == (0.0, 0.0, False)


def test_a_number_that_is_none_is_not_reproduced() -> None:
    assert not Difference(actions=float("nan"), log_prob=0.0, log_ratio=0.0, identical=False).reproduced
    assert not Difference(actions=0.0, log_prob=float("nan"), log_ratio=0.0, identical=False).reproduced


def test_a_policy_for_another_robot_is_refused(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: TinyBundle, point_policy_spec: Any
) -> None:
    acted = Policy.load(tmp_path / tiny_bundle(tmp_path, 0.25))
    wide = replace(point_policy_spec.action, high=(2.0, 1.0))
    other = Policy.load(tmp_path / tiny_bundle(tmp_path, 0.25, action=wide))
    (episode,) = log_run(serve, tmp_path / "log", acted, Brief(), seeds=1, explore=True)
    with pytest.raises(WireError, match=r"spec\.action\.high\[0\]"):
        decide_again(other, episode.start, episode.decisions)
