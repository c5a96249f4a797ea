"""What the gate finds, on policies whose answers are known."""

import math
from typing import Any

import numpy as np
import pytest

from bridge.backend import Backend, Observation
from runtime.config import GateRule
from runtime.episode import FORMAT, Decision, Episode, EpisodeStart
from runtime.gate import judge


def episode(point: Backend, sent: float = 0.5, status: Any = "success", decisions: int = 3, **changes: Any) -> Episode:
    """At every decision the state is 0, and what was sent is `sent` in every element."""
    start = EpisodeStart(
        format=FORMAT,
        episode="0" * 24,
        task="reach",
        instruction="go",
        seed=0,
        source="policy",
        explore=True,
        client="c",
        spec=point.spec,
        started_unix_s=0.0,
    )
    made = [
        Decision(
            number=i + 1,
            step=4 * i,
            version="v",
            observation=Observation({"top": np.zeros((8, 8, 3), np.uint8)}, np.zeros(2, np.float32)),
            actions=np.full((4, 2), sent, np.float32),
            log_prob=None,
            sent=np.full((4, 2), sent, np.float32),
            reward=np.zeros(4, np.float32),
            **changes,
        )
        for i in range(decisions)
    ]
    return Episode(start, made, status, 4 * decisions)


def test_the_figures_are_those_of_their_formulas(point: Backend, fake_policy: Any) -> None:
    half = (point.spec.action.high[0] - point.spec.action.low[0]) / 2
    live = fake_policy(value=0.5 * half, log_std=math.log(0.2 * half))
    candidate = fake_policy(value=0.6 * half, log_std=math.log(0.1 * half))
    report = judge(candidate, live, [episode(point, 0.55 * half), episode(point, 9.0, "timeout")], GateRule(max_kl=9))
    assert report.refused == () and report.decisions == 6
    assert report.divergence == pytest.approx(0.1, rel=1e-5)
    # Two elements: log(s / s') + (s'^2 + (m - m')^2) / (2 s^2) - 1/2 with s = 0.1, s' = 0.2.
    assert report.kl == pytest.approx(2 * (math.log(0.5) + (0.04 + 0.01) / 0.02 - 0.5), rel=1e-5)
    # Only the success is imitated.
    assert report.cloning_error == pytest.approx(0.05**2, rel=1e-4) == report.live_cloning_error
    assert report.outside == report.live_outside == 0.0


@pytest.mark.parametrize(
    ("value", "log_std", "broken"),
    [
        (-0.5, -2.0, ("divergence", "kl", "cloning_error")),  # the sign flipped
        (0.9, -2.0, ("divergence", "kl", "cloning_error")),
        (0.5, -4.0, ("kl",)),
        (math.nan, -2.0, ("an action is not finite",)),
        (0.5, math.inf, ("an action is not finite",)),
        (0.52, -2.0, ()),
    ],
)
def test_what_is_far_from_the_live_version_is_refused_by_name(
    point: Backend, fake_policy: Any, value: float, log_std: float, broken: tuple[str, ...]
) -> None:
    half = (point.spec.action.high[0] - point.spec.action.low[0]) / 2
    live = fake_policy(value=0.5 * half, log_std=-2.0 + math.log(half))
    candidate = fake_policy(value=value * half, log_std=log_std + math.log(half))
    report = judge(candidate, live, [episode(point, 0.5 * half)], GateRule())
    assert tuple(why.split(" is ")[0] if " at most " in why else why for why in report.refused) == broken


def test_means_beyond_the_limits_are_counted_against_those_of_the_live_version(
    point: Backend, fake_policy: Any
) -> None:
    high = point.spec.action.high[0]
    inside, outside = fake_policy(value=1.05 * high), fake_policy(value=1.2 * high)
    report = judge(outside, inside, [episode(point, high)], GateRule(max_divergence=9, max_kl=99, max_cloning=99))
    assert (report.outside, report.live_outside) == (1.0, 0.0)
    assert [why.split(" is ")[0] for why in report.refused][:1] == ["outside"]
    assert judge(outside, outside, [episode(point, high)], GateRule()).refused == ()


def test_a_hold_is_not_what_a_policy_should_repeat(point: Backend, fake_policy: Any) -> None:
    held = episode(point, 0.0, rules=np.full(4, 64, np.uint8))
    report = judge(fake_policy(value=0.5), fake_policy(value=0.5), [held], GateRule())
    assert report.cloning_error == 0.0 and report.refused == ()


def test_without_episodes_there_is_nothing_to_compare(fake_policy: Any) -> None:
    report = judge(fake_policy(value=9.0), fake_policy(), [], GateRule())
    assert report.refused == () and report.decisions == 0
