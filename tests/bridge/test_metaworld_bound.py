"""The kinematic bound: its geometry by hand, and its rules against the simulator itself."""

import numpy as np
import pytest

pytest.importorskip("metaworld")

from bridge.backends.metaworld import MetaWorld, MetaWorldOptions
from bridge.backends.metaworld_bound import (
    SUCCESS,
    HandMotion,
    kinematic_bound,
    measure_hand,
    privileged,
    shortest_way_m,
    way_into_ball_m,
)
from bridge.backends.metaworld_tasks import MT10


@pytest.fixture(scope="module")
def backend() -> MetaWorld:
    backend = MetaWorld(MetaWorldOptions(cameras=()))
    backend.connect()
    return backend


def test_way_into_a_ball() -> None:
    assert way_into_ball_m(np.array([0.3, 0.0, 0.0]), 0.1) == pytest.approx(0.2)
    assert way_into_ball_m(np.array([0.3, -0.3, 0.0]), np.sqrt(2) * 0.1) == pytest.approx(0.2)
    assert way_into_ball_m(np.array([0.3, 0.1, 0.0]), 0.1) == pytest.approx(0.2)  # the short axis is done on the way
    assert way_into_ball_m(np.array([0.03, 0.04, 0.0]), 0.05) == 0.0
    assert way_into_ball_m(np.array([0.5, 0.2, 0.0]), 0.1, (0, 1, 0)) == pytest.approx(0.1)  # x does not count
    assert way_into_ball_m(np.array([0.0, 0.2, 0.0]), 0.1, (1, 2, 2)) == pytest.approx(0.15)


def test_steps_of_a_hand() -> None:
    hand = HandMotion(travelled_m=(0.0, 0.005, 0.015), speed_m=0.01, lag_steps=1.5)
    assert [hand.steps(d) for d in (0.0, 0.001, 0.005, 0.006, 0.015, 0.016, 0.025, 0.026)] == [0, 2, 2, 3, 3, 4, 4, 5]


def test_the_hand_goes_about_a_centimetre_a_step(backend: MetaWorld) -> None:
    hand = measure_hand(backend)
    assert 0.0095 < hand.speed_m < 0.0115 and 1.0 < hand.lag_steps < 8.0
    assert np.all(np.diff(hand.travelled_m) > 0)


@pytest.mark.parametrize("task", MT10)
def test_the_rule_of_success_is_the_simulators(backend: MetaWorld, task: str) -> None:
    """At every step of the expert the rule says what MetaWorld says, and nobody is faster than the bound."""
    rule = SUCCESS[task]
    hand = measure_hand(backend)
    for seed in (2_000_001, 2_000_002):
        backend.reset(task, seed)
        start = privileged(backend)
        bound = hand.steps(shortest_way_m(task, start))
        touched = False
        for step in range(1, 201):
            backend.apply(backend.expert_action())
            state = privileged(backend)
            point = (state[:3] if rule.contact_m is None else state[4:7]) + rule.offset_m
            # The peg turns a little in the hand and the tool swings: hence the margins.
            gap = np.linalg.norm(np.array(rule.scale) * (point - state[36:39])) - rule.radius_m
            success = backend.outcome().status == "success"
            assert gap < 0.02 if success else gap > -0.002, (seed, step, gap)
            away = np.linalg.norm(state[4:7] - state[:3])
            touched = touched or (rule.contact_m is not None and bool(away <= rule.contact_m))
            if success:
                break
        assert success and step >= bound > 5
        assert touched or rule.contact_m is None


def test_bounds_of_goals() -> None:
    goals = [("reach-v3", 5), ("door-open-v3", 5), ("hammer-v3", 5), ("reach-v3", 5)]
    found = kinematic_bound(goals)
    assert [(goal.task, goal.seed) for goal in found.goals] == [("door-open-v3", 5), ("reach-v3", 5)]
    door, reach = (goal.steps for goal in found.goals)
    assert 15 < reach < 40 < door < 100
