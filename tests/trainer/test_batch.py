import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppo_episodes import TASKS, episode, policy_spec, tokens

from runtime.episode import Episode
from trainer.batch import Batch, BatchError, build_batch, chunk_reward
from trainer.config import PPOConfig

CONFIG = PPOConfig(gamma=0.5, success_reward=10.0, step_cost=1.0)
AGES = {"v0": 0, "v1": 1, "v2": 2, "v3": 3}


def batch_of(*episodes: Episode, max_age: int = 2, horizon: int = 4) -> Batch:
    return build_batch(
        episodes, policy_spec(horizon), TASKS, CONFIG, tokens=tokens, age=AGES.__getitem__, max_age=max_age
    )


def test_rewards_discounts_and_flags_by_hand() -> None:
    made = batch_of(episode([4, 2], "success"), episode([3, 4], "timeout", task="right"), episode([1], "failure"))
    # Four steps cost 1 + .5 + .25 + .125; two steps cost 1.5, and the second of them earns .5 * 10; and so on.
    assert made.reward.tolist() == [-1.875, 3.5, -1.75, -1.875, -1.0]
    assert made.discount.tolist() == [0.0625, 0.25, 0.125, 0.0625, 0.5]
    assert made.terminated.tolist() == [False, True, False, False, True]
    assert made.last.tolist() == [False, True, False, True, True]
    assert made.episode.tolist() == [0, 0, 1, 1, 2]
    assert made.executed.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert made.observations.task.tolist() == [0, 0, 1, 1, 0]


def test_the_backends_own_reward_is_not_used() -> None:
    assert (batch_of(episode([4, 4])).reward < 100).all()


def test_the_backends_own_reward_takes_the_place_of_the_success() -> None:
    config = PPOConfig(gamma=0.5, step_cost=1.0, success_reward=1e6, reward="backend", reward_scale=0.1)
    one = episode([4, 2], "success")
    one.decisions[0].reward = np.array([10, 20, 30, 40], np.float32)
    one.decisions[1].reward = np.array([50, 60], np.float32)
    made = build_batch([one], policy_spec(4), TASKS, config, tokens=tokens, age=AGES.__getitem__, max_age=2)
    # (1 - 1) + (2 - 1) / 2 + (3 - 1) / 4 + (4 - 1) / 8, and (5 - 1) + (6 - 1) / 2.
    assert made.reward.tolist() == pytest.approx([1.375, 6.5])


def test_log_prob_is_of_the_executed_actions_only() -> None:
    one = episode([4, 2])
    logged = one.decisions[1].log_prob
    assert logged is not None
    made = batch_of(one)
    assert made.log_prob[1].item() == pytest.approx(float(logged[:2].sum()))
    logged[2:] = np.nan  # must not reach the batch even as a product with 0
    assert torch.isfinite(batch_of(one).log_prob).all()


def test_rows_keep_their_observations() -> None:
    one, two = episode([4, 2], seed=1), episode([4], task="right", seed=2)
    made = batch_of(one, two)
    third = made.observations.rows(torch.tensor([2]))
    assert (third.images["top"][0].numpy() == two.decisions[0].observation.images["top"]).all()
    assert (third.state[0].numpy() == two.decisions[0].observation.state).all()
    assert third.privileged is not None
    assert (third.privileged[0].numpy() == two.decisions[0].observation.privileged).all()
    assert two.final is not None
    assert (made.finals.state[1].numpy() == two.final.state).all()


def test_staleness_masks_decisions_but_keeps_the_episode_whole() -> None:
    made = batch_of(episode([4, 4, 2], versions=("v3", "v1", "v0")), max_age=2)
    assert made.age.tolist() == [3, 1, 0]
    assert made.fresh.tolist() == [False, True, True]
    assert made.versions == ("v3", "v1", "v0")
    assert made.version.tolist() == [0, 1, 2]


def test_a_chunk_that_never_ran_is_no_decision() -> None:
    made = batch_of(episode([4, 0, 2, 0], "success"))
    assert made.executed.sum(dim=1).tolist() == [4, 2]
    assert made.terminated.tolist() == [False, True]
    assert made.reward[1] == 3.5


def test_what_cannot_be_learned_from_is_refused_by_name() -> None:
    with pytest.raises(BatchError, match="e0 was aborted"):
        batch_of(episode([4], "aborted"))
    with pytest.raises(BatchError, match="no executed action"):
        batch_of(episode([0]))
    mean = episode([4])
    mean.decisions[0].log_prob = None
    with pytest.raises(BatchError, match="no log-prob"):
        batch_of(mean)
    gap = episode([4, 4])
    gap.decisions[1].step = 5
    with pytest.raises(BatchError, match="expected a decision at step 4"):
        batch_of(gap)
    with pytest.raises(BatchError, match=r"\[4, 2\], the policy gives \[3, 2\]"):
        batch_of(episode([3]), horizon=3)
    with pytest.raises(BatchError, match="no decisions"):
        batch_of()


@given(
    k=st.integers(1, 12),
    success=st.booleans(),
    gamma=st.floats(0, 1),
    reward=st.floats(-5, 5),
    cost=st.floats(0, 1),
)
def test_chunk_reward_is_the_plain_sum(k: int, success: bool, gamma: float, reward: float, cost: float) -> None:
    config = PPOConfig(gamma=gamma, success_reward=reward, step_cost=cost)
    steps = [-cost] * k
    if success:
        steps[-1] += reward
    expected = sum(gamma**i * r for i, r in enumerate(steps))
    assert chunk_reward(np.array([k]), np.array([success]), config)[0] == pytest.approx(expected, abs=1e-9)
