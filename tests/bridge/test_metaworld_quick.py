"""The quick MetaWorld against the stock one: every number equal to the last bit."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.backends.metaworld_quick import _quick_tolerance, _Rotation, quick_class
from bridge.backends.metaworld_tasks import MT50

# Tasks that grasp, that turn an object, that carry two objects, and one with a reward of its own.
SPREAD = ("push-v3", "pick-place-v3", "door-open-v3", "window-close-v3", "peg-insert-side-v3", "hammer-v3", "reach-v3")


def as_played(cls, seed: int):
    """An environment with a visible goal, reset as MetaWorld does it."""
    env = cls()
    env._partially_observable = False
    del env.sawyer_observation_space
    env._set_task_called = env.seeded_rand_vec = True
    env._freeze_rand_vec = False
    env.seed(seed)
    env.reset_model()
    env._freeze_rand_vec = True
    env.reset()
    return env


def simulator_state(env) -> np.ndarray:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.zeros(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return state


def compare(task: str, seed: int, steps: int) -> bool:
    """Drive both by the scripted expert, with noise in the second half; returns whether it succeeded."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    stock, quick = (as_played(cls, seed) for cls in (ALL_V3_ENVIRONMENTS[task], quick_class(ALL_V3_ENVIRONMENTS[task])))
    expert, rng, succeeded = ENV_POLICY_MAP[task](), np.random.default_rng(seed), False
    observation = stock._get_obs()
    np.testing.assert_array_equal(quick._get_obs(), observation)
    for step in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action = np.asarray(expert.get_action(observation), np.float32)
        if step > steps // 2:
            action = (action + rng.normal(0.0, 0.4, 4)).astype(np.float32)
        observation, reward, _, _, info = stock.step(np.clip(action, -1, 1))
        theirs, their_reward, _, _, their_info = quick.step(np.clip(action, -1, 1))
        np.testing.assert_array_equal(theirs, observation, err_msg=task)
        np.testing.assert_array_equal(simulator_state(quick), simulator_state(stock), err_msg=task)
        assert their_reward == reward, task
        assert their_info == info, task
        succeeded = succeeded or info["success"] > 0
    stock.close()
    quick.close()
    return succeeded


@pytest.mark.parametrize("task", SPREAD)
def test_an_expert_episode_is_the_same_to_the_last_bit(task):
    assert compare(task, 21, 160)


@pytest.mark.slow
def test_all_fifty_tasks_are_the_same_to_the_last_bit():
    for task in MT50:
        compare(task, 22, 30)


def test_only_the_subclass_is_changed():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.utils import reward_utils

    tolerance = reward_utils.tolerance
    stock = ALL_V3_ENVIRONMENTS["push-v3"]
    quick = quick_class(stock)
    assert issubclass(quick, stock)
    assert quick.evaluate_state is stock.evaluate_state
    assert stock.compute_reward.__globals__["reward_utils"].tolerance is tolerance
    assert quick.compute_reward.__globals__["reward_utils"].tolerance is not tolerance
    assert quick.compute_reward.__code__ is stock.compute_reward.__code__


numbers = st.floats(-2, 2) | st.sampled_from([0.0, 0.05, 0.1, float("nan")])


@given(x=numbers, kind=st.sampled_from([float, np.float64, np.array]), ends=st.tuples(numbers, numbers).map(sorted),
       margin=st.floats(0, 2), sigmoid=st.sampled_from(["long_tail", "gaussian"]))  # fmt: skip
def test_tolerance_is_that_of_metaworld(x, kind, ends, margin, sigmoid):
    from metaworld.utils import reward_utils

    with np.errstate(over="ignore"):  # the stock one evaluates both branches, so it divides by tiny margins for nothing
        expected = reward_utils.tolerance(kind(x), tuple(ends), margin, sigmoid)
        got = _quick_tolerance(reward_utils)(kind(x), tuple(ends), margin, sigmoid)
    np.testing.assert_array_equal(got, expected)


def test_tolerance_refuses_what_metaworld_refuses():
    from metaworld.utils import reward_utils

    tolerance = _quick_tolerance(reward_utils)
    with pytest.raises(ValueError, match="non-negative"):
        tolerance(0.5, (0.0, 0.1), -1.0)
    with pytest.raises(ValueError, match="Lower bound"):
        tolerance(0.5, (0.2, 0.1), 1.0)


@given(
    st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda quat: np.linalg.norm(quat) > 1e-2),
    st.sampled_from([0, 1e-9, 1e-3]),
)
def test_rotation_is_that_of_scipy(quat, skew):
    """Also for a matrix that is not orthogonal, which scipy replaces by the nearest that is."""
    import mujoco
    from scipy.spatial.transform import Rotation

    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, np.array(quat) / np.linalg.norm(quat))
    matrix = matrix.reshape(3, 3)
    matrix[0, 1] += skew
    np.testing.assert_array_equal(_Rotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat())
