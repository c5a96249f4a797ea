import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import WeightConfig
from trainer.weight import MIN_COMPETENCE, WINDOW_EPISODES, WeightSchedule

CONFIG = WeightConfig(ramp_iterations=4.0, w_max=0.9)


def schedule(
    results: dict[str, list[bool]], variance: float | None = 0.8, kl: float = 0.0, config: WeightConfig = CONFIG
) -> WeightSchedule:
    made = WeightSchedule(config, target_kl=0.3, tasks=tuple(results))
    for task, successes in results.items():
        made.add_results(task, successes)
    if variance is not None:
        made.add_explained_variance(variance)
    made.add_kl(kl)
    return made


def test_zero_during_the_warm_up_and_rising_after_it() -> None:
    made = schedule({"a": [True] * 50})
    assert made.weight(0).mean == 0.0
    w = [made.weight(i).mean for i in range(12)]
    assert all(later > earlier for earlier, later in itertools.pairwise(w))
    assert w[4] == pytest.approx(0.9 * math.tanh(1.0))


def test_a_critic_that_explains_nothing_halves_it() -> None:
    good, bad = schedule({"a": [True] * 50}, 0.9), schedule({"a": [True] * 50}, -0.5)
    assert bad.weight(8).mean == pytest.approx(good.weight(8).mean / 2)


def test_explained_variance_is_smoothed() -> None:
    made = schedule({"a": [True] * 50}, 0.5)
    made.add_explained_variance(0.0)
    assert made.weight(8).critic == pytest.approx(0.5 + 0.5 * 0.7)


def test_an_update_that_went_too_far_brakes() -> None:
    assert schedule({"a": [True] * 50}, kl=0.6).weight(8).brake == pytest.approx(0.5)
    assert schedule({"a": [True] * 50}, kl=0.1).weight(8).brake == 1.0


def test_a_task_whose_success_falls_goes_back_to_cloning_and_the_others_stay() -> None:
    made = schedule({"falls": [True] * 50, "stays": [True] * 50})
    before = made.weight(8)
    made.add_results("falls", [True, False] * 25)
    after = made.weight(8)
    assert after.by_task["stays"] == before.by_task["stays"]
    assert after.competence["falls"] == MIN_COMPETENCE
    assert after.success["falls"] == 0.5
    assert 0.95 < after.best["falls"] < 1.0
    made.add_results("falls", [True] * 50)
    assert made.weight(8).by_task == before.by_task


def test_chance_alone_does_not_take_a_task_away() -> None:
    rng = np.random.default_rng(0)
    made = schedule({"a": []})
    competence = []
    for _ in range(200):
        made.add_results("a", (rng.random(20) < 0.6).tolist())
        competence.append(made.competence("a"))
    assert np.mean(competence) > 0.75


def test_a_task_that_never_succeeds_is_cloned() -> None:
    assert schedule({"a": [False] * 30}).competence("a") == MIN_COMPETENCE
    assert schedule({"a": [False] * 45 + [True] * 5}).competence("a") == pytest.approx(0.5)


def test_known_answer_of_the_competence() -> None:
    made = schedule({"a": [True] * 50})
    made.add_results("a", [False] * 7)
    best = 1.0 - 2 * math.sqrt(51 / 52 * (1 / 52) / 52)
    error = math.sqrt(44 / 52 * (8 / 52) / 52)
    assert made.competence("a") == pytest.approx(1 - (best - 0.86 - error) / 0.2)


@given(
    results=st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=8),
    variances=st.lists(st.floats(-2, 1), max_size=5),
    kl=st.floats(0, 10),
    iterations=st.integers(0, 100),
)
def test_bounds_and_resume(results: list[list[bool]], variances: list[float], kl: float, iterations: int) -> None:
    made = WeightSchedule(CONFIG, target_kl=0.3, tasks=("a", "b"))
    for i, successes in enumerate(results):
        made.add_results("ab"[i % 2], successes)
    for variance in variances:
        made.add_explained_variance(variance)
    made.add_kl(kl)
    weight = made.weight(iterations)
    assert all(0.0 <= w <= CONFIG.w_max for w in weight.by_task.values())
    state = made.state()
    assert all(len(recent) <= WINDOW_EPISODES for recent in state["recent"].values())
    again = WeightSchedule(CONFIG, target_kl=0.3, tasks=("a", "b"))
    again.restore(state)
    assert again.weight(iterations) == weight


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (WeightConfig(fixed=0.4), 0.4),
        (WeightConfig(fixed=0.0), 0.0),
        (WeightConfig(w_max=0.0), 0.0),
        # Nothing is cloned, so there is nothing to hand a task back to.
        (WeightConfig(cloning_scale=0.0), 1.0),
        (WeightConfig(cloning_scale=0.0, fixed=0.4), 0.4),
    ],
)
def test_a_constant_weight_is_constant_after_the_warm_up(config: WeightConfig, expected: float) -> None:
    made = schedule({"falls": [True] * 50 + [False] * 50, "stays": [True] * 50}, variance=-1.0, kl=9.0, config=config)
    assert set(made.weight(0).by_task.values()) == {0.0}
    for iteration in (1, 2, 100):
        assert made.weight(iteration).by_task == {"falls": expected, "stays": expected}
