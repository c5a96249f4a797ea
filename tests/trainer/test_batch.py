from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from ppo_episodes import TASKS, episode, policy_spec, tokens

from bridge.messages import RULES
from runtime.episode import Decision, Episode
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
    # A failure costs 1 + .5 + .25 + ... = 2.
    assert made.reward.tolist() == [-1.875, 3.5, -1.75, -1.875, -2.0]
    assert made.discount.tolist() == [0.0625, 0.25, 0.125, 0.0625, 0.5]
    assert made.terminated.tolist() == [False, True, False, False, True]
    assert made.last.tolist() == [False, True, False, True, True]
    assert made.episode.tolist() == [0, 0, 1, 1, 2]
    assert made.executed.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert made.observations.task.tolist() == [0, 0, 1, 1, 0]


def test_what_was_cut_off_is_no_end_though_somebody_calls_it_a_failure() -> None:
    cut, reached = episode([4, 2], "failure"), episode([4, 2], "success")
    cut.truncated = reached.truncated = True
    made = batch_of(cut, reached)
    assert made.terminated.tolist() == [False, False, False, True]
    assert made.reward.tolist() == [-1.875, -1.5, -1.875, 3.5]


def test_failing_soon_pays_no_better_than_failing_late() -> None:
    config = PPOConfig()
    failed = [chunk_reward(np.array([k]), np.array([False]), np.array([True]), config)[0] for k in (1, 8)]
    stayed = chunk_reward(np.array([10_000]), np.array([False]), np.array([False]), config)[0]
    assert failed == pytest.approx([stayed, stayed])


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


STARVED = np.uint8(1 << RULES.index("starved"))


def overlapping() -> Episode:
    """h = 4, p = 2: the second chunk was asked for at step 2 while the first played, told nothing, and began 2 late;
    after it the robot held for a step. The third was asked for at step 5, told two actions, and began 2 late."""
    one = episode([4, 3, 1], "success")
    first, second, third = one.decisions
    second.step, second.start, second.rules = 2, 2, np.array([0, 0, STARVED], np.uint8)
    third.step, third.start, third.prefix = 5, 2, second.sent[1:]
    for decision in one.decisions:
        decision.first_log_prob = np.array([10, 20, 30, 40], np.float32)
    assert first.log_prob is not None and third.log_prob is not None
    third.log_prob[:2] = 0.0
    return one


def test_chunks_that_were_asked_for_while_others_played_count_by_their_slices() -> None:
    one = overlapping()
    spec = replace(policy_spec(), prefix_steps=2)
    made = build_batch([one], spec, TASKS, CONFIG, tokens=tokens, age=AGES.__getitem__, max_age=2)
    assert made.executed.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]
    # Four steps, three of which one was held, and the one that succeeded.
    assert made.reward.tolist() == [-1.875, -1.75, 9.0]
    assert made.discount.tolist() == [0.0625, 0.125, 0.5]
    logged = [decision.log_prob for decision in one.decisions]
    assert logged[0] is not None and logged[1] is not None
    expected = [10 + logged[0][1:].sum(), 30 + logged[1][3], 30]
    assert made.log_prob.tolist() == pytest.approx(expected)
    seen, finals = made.observations, made.finals
    assert seen.prefix is not None and seen.prefix_mask is not None
    assert seen.prefix_mask.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert (seen.prefix[:2] == 0).all() and (seen.prefix[2].numpy() == one.decisions[2].prefix).all()
    assert finals.prefix is not None and finals.prefix.tolist() == [[[0, 0], [0, 0]]]
    row = seen.rows(torch.tensor([2]))
    assert row.prefix is not None and torch.equal(row.prefix[0], seen.prefix[2])
    assert row.inputs[3:] == (row.prefix, row.prefix_mask)


def test_a_chunk_that_came_when_it_was_over_has_its_steps_and_no_action() -> None:
    one = episode([4, 2, 2])
    second = one.decisions[1]
    second.step, second.start, second.rules = 0, 4, np.full(2, STARVED)
    made = batch_of(one)
    assert made.executed.sum(dim=1).tolist() == [4, 0, 2]
    assert made.log_prob[1] == 0 and made.discount[1] == 0.25


def _starts(decision: Decision) -> None:
    decision.start = 1


def _not_held(decision: Decision) -> None:
    decision.rules = np.array([0, STARVED, 0], np.uint8)


def _no_rules(decision: Decision) -> None:
    decision.rules = None


def _told_more_than_it_waited(decision: Decision) -> None:
    decision.prefix = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("damage", "prefix_steps", "message"),
    [
        (_starts, 2, "from 1 on, expected the action of step 4"),
        (_not_held, 2, "at most 2 from the chunk"),
        (_no_rules, 2, "at most 2 from the chunk"),
        (_told_more_than_it_waited, 3, "told 3 actions and executed from 2 on"),
        (lambda _: None, 1, "told 2 actions .* can be told 1"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(
    damage: Callable[[Decision], None], prefix_steps: int, message: str
) -> None:
    one = overlapping()
    damage(one.decisions[1])
    with pytest.raises(BatchError, match=message):
        spec = replace(policy_spec(), prefix_steps=prefix_steps)
        build_batch([one], spec, TASKS, CONFIG, tokens=tokens, age=AGES.__getitem__, max_age=2)


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
    with pytest.raises(BatchError, match="expected the action of step 4"):
        batch_of(gap)
    with pytest.raises(BatchError, match=r"\[4, 2\], the policy gives \[3, 2\]"):
        batch_of(episode([3]), horizon=3)
    with pytest.raises(BatchError, match="no decisions"):
        batch_of()


@given(
    k=st.integers(1, 12),
    success=st.booleans(),
    gamma=st.floats(0, 0.999),
    reward=st.floats(-5, 5),
    cost=st.floats(0, 1),
)
def test_chunk_reward_is_the_plain_sum(k: int, success: bool, gamma: float, reward: float, cost: float) -> None:
    config = PPOConfig(gamma=gamma, success_reward=reward, step_cost=cost)
    steps = [-cost] * k
    if success:
        steps[-1] += reward
    expected = sum(gamma**i * r for i, r in enumerate(steps))
    found = chunk_reward(np.array([k]), np.array([success]), np.array([False]), config)
    assert found[0] == pytest.approx(expected, abs=1e-9)
