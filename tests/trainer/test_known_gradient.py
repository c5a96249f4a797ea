"""The policy gradient is the right one however chunks are cut, late or conditioned: a problem with a known answer.

A point on a line, x_{t+1} = x_t + a_t from x_0 = 0, earns (x_t - g)^2 - (x_{t+1} - g)^2 at each of T steps. Action i of
a chunk has the mean theta_i plus phi times the sum of what the policy was told, and AR(1) noise. So x_T is Gaussian,
its mean and variance follow from which indices are executed when, and J = g^2 - E (x_T - g)^2 has an exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from ppo_episodes import SPEC, TASKS, policy_spec, tokens
from torch import Tensor

from bridge.backend import ActionSpec, Observation, VectorSpec
from bridge.messages import RULES
from runtime.episode import Decision, Episode, EpisodeStart
from runtime.inference import log_probs_after, sample_after
from trainer.batch import Batch, build_batch
from trainer.chunked_ppo import advantages, executed_log_prob
from trainer.config import PPOConfig
from trainer.vla import log_prob

H, P, STEPS, GOAL, SIGMA = 5, 2, 12, 6.0, 0.3
THETA, PHI = (0.1, -0.1, 0.4, 0.2, 0.3), 0.3
EPISODES = 1500
HELD = np.uint8(1 << RULES.index("starved"))
POLICY = replace(
    policy_spec(H),
    cameras=(),
    state=VectorSpec(("x",), ("1",)),
    action=ActionSpec(("v",), ("1",), (-1.0,), (1.0,), "delta"),
    prefix_steps=P,
)


@dataclass(frozen=True)
class Plan:
    """A decision: asked for at `step`, told `told` committed actions, executed from index `start` on for `k` steps."""

    step: int
    start: int
    k: int
    told: int = 0


WHOLE = (Plan(0, 0, 5), Plan(5, 0, 5), Plan(10, 0, 2))
LATE = (Plan(0, 0, 4), Plan(2, 2, 3), Plan(5, 2, 3), Plan(8, 2, 2))
# The second chunk runs out, and the robot holds for a step.
STARVED = (Plan(0, 0, 4), Plan(2, 2, 4), Plan(5, 3, 2), Plan(8, 2, 2))
TOLD = (Plan(0, 0, 4), Plan(2, 2, 4, told=2), Plan(5, 3, 2, told=2), Plan(8, 2, 2, told=1))


def exact(plans: Sequence[Plan], rho: float, theta: Sequence[float]) -> np.ndarray:
    """dJ / d(theta, phi) `[h + 1]`: every executed action is mean + coefficients . white noise."""
    parameters = torch.tensor([*theta, PHI], dtype=torch.float64, requires_grad=True)
    means, noises = [], []
    for n, plan in enumerate(plans):
        committed = slice(plan.step, plan.step + plan.told)
        zero = torch.zeros(len(plans), H, dtype=torch.float64)
        push = parameters[H] * sum(means[committed], torch.zeros((), dtype=torch.float64))
        push_noise = parameters[H] * sum(noises[committed], zero)
        eps = zero
        for i in range(plan.told, plan.start + plan.k):
            white = zero.clone()
            if i < H:
                white[n, i] = 1.0
                eps = white if i == plan.told else rho * eps + math.sqrt(1 - rho**2) * white
            if i >= plan.start:
                means.append(parameters[i] + push if i < H else torch.zeros((), dtype=torch.float64))
                noises.append(SIGMA * eps + push_noise if i < H else zero)
    assert len(means) == STEPS
    j = GOAL**2 - (torch.stack(means).sum() - GOAL) ** 2 - torch.stack(noises).sum(0).square().sum()
    return torch.autograd.grad(j, parameters)[0].numpy()


def played(plans: Sequence[Plan], rho: float, theta: Sequence[float], rng: np.random.Generator, name: str) -> Episode:
    """One episode, its chunks drawn and logged as the runtime does."""
    log_std = np.full((H, 1), math.log(SIGMA), np.float32)
    sent: list[float] = []
    decisions = []
    x = 0.0
    for n, plan in enumerate(plans):
        prefix = np.array(sent[plan.step : plan.step + plan.told], np.float32).reshape(-1, 1)
        mean = np.array(theta, np.float32)[:, None] + np.float32(PHI) * prefix.sum()
        actions = sample_after(prefix, mean, log_std, rho, rng)
        chosen = actions[plan.start : plan.start + plan.k, 0].tolist()
        acted = np.array(chosen + [0.0] * (plan.k - len(chosen)))
        at = x + np.concatenate([[0.0], np.cumsum(acted)])
        decision = Decision(
            number=n + 1,
            step=plan.step,
            version="v0",
            observation=Observation({}, np.zeros(1, np.float32)),
            actions=actions,
            log_prob=None,
            sent=acted.astype(np.float32)[:, None],
            reward=((at[:-1] - GOAL) ** 2 - (at[1:] - GOAL) ** 2).astype(np.float32),
            rules=np.array([0] * len(chosen) + [HELD] * (plan.k - len(chosen)), np.uint8),
            start=plan.start,
            prefix=prefix if plan.told else None,
        )
        for field, array in log_probs_after(plan.told, actions, mean, log_std, rho).items():
            setattr(decision, field, array)
        decisions.append(decision)
        sent += acted.tolist()
        x = at[-1]
    start = EpisodeStart(
        format=1,
        episode=name,
        task=TASKS[0],
        instruction="",
        seed=0,
        source="policy",
        explore=True,
        client="test",
        spec=SPEC,
        started_unix_s=0.0,
    )
    return Episode(start, decisions, "failure", STEPS, final=Observation({}, np.zeros(1, np.float32)))


@lru_cache
def drawn(plans: Sequence[Plan], rho: float, theta: Sequence[float]) -> Batch:
    """The batch of `EPISODES` episodes."""
    rng = np.random.default_rng(0)
    config = PPOConfig(gamma=1.0, reward="backend", step_cost=0.0)
    spec = replace(POLICY, noise_correlation=rho)
    episodes = [played(plans, rho, theta, rng, f"e{i}") for i in range(EPISODES)]
    return build_batch(episodes, spec, TASKS, config, tokens=tokens, age=lambda _: 0, max_age=0)


def estimate(
    plans: Sequence[Plan], rho: float, theta: Sequence[float] = THETA, *, conditional: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient `[h + 1]` that PPO's first step follows, by episode `[E, h + 1]` and its exact value `[h + 1]`.

    With `conditional` the first action of a slice counts given the one before it, which was never sent.
    """
    batch = drawn(plans, rho, theta)
    told = batch.observations.prefix
    assert told is not None
    told_sum = told.sum(dim=(1, 2))
    mean = torch.tensor(theta)[None, :, None] + PHI * told_sum[:, None, None]
    mean.requires_grad_()
    log_std = torch.full_like(mean, math.log(SIGMA), requires_grad=False)
    if conditional:
        by_action: Tensor = log_prob(batch.actions, mean, log_std, rho)
        logged = (by_action * batch.executed).sum(dim=1)
    else:
        logged = executed_log_prob(batch.actions, mean, log_std, batch.executed, rho)
        assert torch.allclose(logged, batch.log_prob, atol=1e-4)
    (score,) = torch.autograd.grad(logged.sum(), mean)
    nothing = np.zeros(len(batch))
    advantage = advantages(batch.reward, batch.discount, batch.terminated, batch.last, nothing, nothing, 1.0)
    centred = advantage.reshape(EPISODES, -1) - advantage.reshape(EPISODES, -1).mean(axis=0)
    by_theta = score[:, :, 0].double().numpy()
    by_parameter = np.column_stack([by_theta, by_theta.sum(axis=1) * told_sum.double().numpy()])
    by_episode = (by_parameter.reshape(EPISODES, len(plans), H + 1) * centred[:, :, None]).sum(axis=1)
    return by_episode, exact(plans, rho, theta)


def deviations(by_episode: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many standard errors the mean over episodes is away from what is expected; 0 where both are exactly 0."""
    error = by_episode.std(axis=0, ddof=1) / math.sqrt(EPISODES)
    gap = by_episode.mean(axis=0) - expected
    return np.divide(gap, error, out=np.zeros_like(gap), where=(error > 0) | (np.abs(gap) > 1e-9))


@pytest.mark.parametrize(("plans", "rho"), [(WHOLE, 0.5), (LATE, 0.5), (LATE, 0.0), (STARVED, 0.5), (TOLD, 0.5)])
def test_the_estimate_is_the_exact_gradient(plans: Sequence[Plan], rho: float) -> None:
    by_episode, expected = estimate(plans, rho)
    assert np.abs(deviations(by_episode, expected)).max() < 4
    # That says something: it can be told from no gradient, and that of phi too where the policy is told something.
    from_zero = np.abs(deviations(by_episode, np.zeros(H + 1)))
    assert from_zero[:H].max() > 12 and (from_zero[H] > 8) == (plans is TOLD)


@pytest.mark.parametrize("plans", [LATE, STARVED, TOLD])
def test_a_first_action_given_one_that_was_never_sent_would_bias_it(plans: Sequence[Plan]) -> None:
    by_episode, expected = estimate(plans, 0.5, conditional=True)
    assert np.abs(deviations(by_episode, expected)).max() > 7


def test_late_chunks_and_whole_ones_agree_where_all_actions_have_one_mean() -> None:
    constant = (0.1,) * H
    found = [estimate(plans, 0.5, constant) for plans in (WHOLE, LATE)]
    # dJ / dtheta = -2 T (T theta - g), whatever is executed when.
    expected = np.array([-2 * STEPS * (STEPS * 0.1 - GOAL)])
    for by_episode, by_index in found:
        assert by_index[:H].sum() == pytest.approx(expected[0], rel=1e-6)
        assert np.abs(deviations(by_episode[:, :H].sum(axis=1, keepdims=True), expected)).max() < 4
