"""Action-chunked PPO with self behaviour cloning: advantages, losses and one update of the policy.

A decision at observation o samples a chunk of h actions. A slice a = (a_s, a_{s+1}, ...) of it is executed, in k steps;
where it came in time, s = 0. Then the slice of the next decision, at o', is executed. With gamma the discount of one
step and r_0 ... r_{k-1} the rewards of these steps,

    R     = sum_{i<k} gamma^i r_i                                       reward of the decision      (trainer/batch.py)
    delta = R + gamma^k V(o') (1 - terminated) - V(o)
    A     = delta + gamma^k lambda A'                                   GAE over decisions
    log pi(a | o) = log pi(a_s | o) + sum_{i>s} log pi(a_i | o, a_{i-1})        over the slice
    ratio = exp(log pi(a | o) - log pi_0(a | o))                        pi_0: pi before this update
    rho   = exp(log pi_0(a | o) - log mu(a | o))                        mu: the policy that acted
    L_ppo = -min(rho, rho_max) min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
    L_sbc = -log pi(a_i | o), mean over the executed actions a_i of the demonstration buffer
    total = w L_ppo + (1 - w) c L_sbc                                   w by task                   (trainer/weight.py)

The robot goes on while the trainer learns, so mu is often a version or two behind. Clipping against mu would then spend
the trust region on what earlier updates did; the decoupled objective clips against pi_0 and weighs by rho instead.
pi_0 is computed in the precision that pi is, so that rounding cancels in the ratio.

In an ablation L_sbc gives way to the KL to a frozen policy, mean over the executed actions of the minibatch,

    L_kl  = sum_d (m_i - m_i')^2 / (2 s_i^2)                            between Gaussians of one and the same s

Only executed actions enter the ratio, so the update stays exact where success, a time-out or a newer chunk cut a chunk
short and where a chunk came late: the noise is white or AR(1) along the chunk, so the log-prob of a slice does not
depend on what comes after it (runtime/policy.py), and its first action counts by its marginal, because what the chunk
had before it was never sent. Where the policy is told the actions that are committed while it thinks, they belong to o,
for pi and for V; they are executed by the decision before and are no part of the slice.

L_sbc takes each action by its marginal and is the same squared error whatever the exploration is: the residual of a
demonstration is the error of the mean and no draw of the policy's noise, so it is no AR(1) process. A policy that can
be told what is committed is told the first actions of a demonstration (trainer/samples.py) and clones the others.

A success terminates, and so does a failure, at the price of going on for ever (trainer/batch.py); a time-out is a
truncation and bootstraps from V of the last observation. Sources: PPO,
1707.06347; GAE, 1506.02438; the decoupled objective, 2110.00641; action chunks and the two losses together, 2509.25718;
what is committed as an input, 2512.05964.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batch import Batch, Float64
from trainer.buffer import DemoBuffer
from trainer.config import PPOConfig, SFTConfig
from trainer.finite import finite_norm
from trainer.samples import random_prefix, random_shift, random_wording
from trainer.shapes import filled_up, minibatches
from trainer.vla import VLA, Inputs, log_prob

CLONING_SHARE = 0.5  # samples of the buffer for each decision in a gradient step
PRIOR_EPISODES = 2.0  # of a task's scale; see normalise_by_task
MAX_IMPORTANCE = 2.0  # rho_max
LR_STEP, LR_RANGE = 1.2, 10.0  # see adapted_lr
KL_STOP = 2.0  # an update ends where its KL is above this many times the target
PRECISION_SAMPLE = 128
# bfloat16 halves the time of a gradient step, but rounds the log-prob: by 0.04 (standard deviation) for a chunk of
# 8 x 4 numbers at sigma 0.15, in proportion to 1 / sigma and more for correlated noise. Up to this share of the
# clipping range it only blurs where clipping begins.
PRECISION_SHARE = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did. Losses, KL and clip fraction are means over its last pass."""

    policy_loss: float
    cloning_loss: float
    """L_sbc, or L_kl in its place; without 1 - w, as `policy_loss` is without w."""
    kl: float
    """KL(pi_0 || pi), estimated as the mean of ratio - 1 - log ratio weighted by rho; never negative."""
    clip_fraction: float
    """Share of decisions whose ratio was outside the clipping range."""
    effective_share: float
    """(sum rho)^2 / (N sum rho^2): the share of the batch that it is worth; 1 if pi_0 is the policy that acted."""
    grad_norm: float
    """Mean length of the gradient before it was clipped."""
    gradient_steps: int
    kl_stop: bool
    """Whether the update ended early, at twice the target KL."""
    bfloat16: bool
    """Whether the forward passes were made in bfloat16."""


def advantages(
    reward: Float64,
    discount: Float64,
    terminated: NDArray[np.bool_],
    last: NDArray[np.bool_],
    value: Float64,
    next_value: Float64,
    lam: float,
) -> Float64:
    """GAE over decisions, all arguments and the result `[N]`; `last` marks where an episode ends.

    With k = h = 1 this is the ordinary estimator over steps; with lam = 1 it is the discounted return minus V(o).
    """
    delta = reward + discount * next_value * ~terminated - value
    advantage = np.zeros_like(delta)
    following = 0.0
    for i in range(len(delta) - 1, -1, -1):
        if last[i]:
            following = 0.0
        following = delta[i] + discount[i] * lam * following
        advantage[i] = following
    return advantage


def next_values(value: Float64, final_value: Float64, last: NDArray[np.bool_], episode: NDArray[np.int64]) -> Float64:
    """V(o') `[N]`: V of the next decision, or of the last observation of the episode (`final_value` `[E]`)."""
    following: Float64 = np.append(value[1:], 0.0)
    return np.where(last, final_value[episode], following)


def normalise_by_task(
    advantage: Float64, task: NDArray[np.int64], episode: NDArray[np.int64], used: NDArray[np.bool_]
) -> Float64:
    """Advantages `[N]` with mean 0 over the `used` decisions of each task, in units of its scale; 0 elsewhere.

        scale_i = max(s_i, s_i^(e_i / (e_i + e_0)) s^(e_0 / (e_i + e_0)))

    s_i is the standard deviation within task i, e_i its number of episodes, s the geometric mean of the s_i by
    episodes, e_0 = `PRIOR_EPISODES`. By task, so that a task with large returns does not drown the others. With many
    episodes the scale is s_i. The decisions of a few episodes are much alike and may hardly differ by chance; taken as
    they are, their noise would be scaled up to the size of everybody else's signal (own rule).
    """
    normalised = np.zeros_like(advantage)
    # A task whose decisions are all equally good has nothing to say; scaling its rounding errors up would.
    spread = {
        int(number): std
        for number in np.unique(task[used])
        if (std := float(advantage[used & (task == number)].std())) > 1e-6
    }
    episodes = {number: len(np.unique(episode[used & (task == number)])) for number in spread}
    pooled = sum(episodes[number] * math.log(std) for number, std in spread.items()) / max(1, sum(episodes.values()))
    for number, std in spread.items():
        rows = used & (task == number)
        own = episodes[number] / (episodes[number] + PRIOR_EPISODES)
        scale = max(std, math.exp(own * math.log(std) + (1.0 - own) * pooled))
        normalised[rows] = (advantage[rows] - advantage[rows].mean()) / scale
    return normalised


def executed_log_prob(
    actions: Tensor, mean: Tensor, log_std: Tensor, executed: Tensor, noise_correlation: float
) -> Tensor:
    """log pi(a | o) `[B]` of the executed slice; actions, mean, log_std `[B, h, d]`, `executed` `[B, h]` is 1 in it.

    What was never executed is cut out before the sum, so it gets no gradient.
    """
    before = nn.functional.pad(executed[:, :-1], (1, 0))
    by_action = log_prob(actions, mean, log_std, noise_correlation, first=(executed > 0) & (before == 0))
    return torch.where(executed > 0, by_action, torch.zeros_like(by_action)).sum(dim=1)


def ppo_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """L_ppo of each decision `[B]`, from its log-ratio `[B]` and A `[B]`."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def cloning_loss(target: Tensor, mean: Tensor, log_std: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Mean over the actions with mask 1 of `scale` x L_sbc, a scalar; target, mean, log_std `[B, h, d]`, mask `[B, h]`,
    `scale` `[B]`.

    It moves the mean only: cloning would otherwise shrink sigma, and with it what PPO can explore. Every action counts
    by its marginal, whatever the correlation of the policy's noise: see the head of this file.
    """
    by_action = -log_prob(target, mean, log_std.detach(), 0.0)
    wanted = torch.where(mask > 0, by_action * scale[:, None], torch.zeros_like(by_action))
    return wanted.sum() / mask.sum().clamp(min=1.0)


def anchor_loss(mean: Tensor, frozen_mean: Tensor, log_std: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """Mean over the actions with mask 1 of `scale` x L_kl, a scalar; arguments as in `cloning_loss`.

    `frozen_mean` is that of the frozen policy, taken with the standard deviation of this one; like cloning it moves the
    mean only and takes each action by its marginal.
    """
    by_action = 0.5 * ((mean - frozen_mean) * torch.exp(-log_std.detach())).square().sum(dim=-1)
    return torch.where(mask > 0, by_action * scale[:, None], 0.0).sum() / mask.sum().clamp(min=1.0)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(pi_0 || pi) `[B]` from actions of pi_0: ratio - 1 - log ratio."""
    return log_ratio.exp() - 1 - log_ratio


def adapted_lr(lr: float, kl: float, config: PPOConfig) -> float:
    """Learning rate of the next update after one with this KL, so that KL follows `config.target_kl` (own rule):

        lr <- clip(lr clip(sqrt(target / KL), 1 / LR_STEP, LR_STEP), lr_0 / LR_RANGE, lr_0 LR_RANGE)

    The square root because KL goes with the square of the step. How far a learning rate moves a policy depends on
    sigma, on the noise's correlation, on network and batch; the KL that a policy survives does not.
    """
    factor = math.sqrt(config.target_kl / max(kl, 1e-9))
    adapted = lr * min(max(factor, 1 / LR_STEP), LR_STEP)
    return min(max(adapted, config.lr / LR_RANGE), config.lr * LR_RANGE)


@dataclass(slots=True)
class _Pass:
    """Sums over the gradient steps of one pass."""

    policy_loss: float = 0.0
    cloning_loss: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    count: int = 0

    def add(self, policy_loss: Tensor, cloning: Tensor, kl: float, clip_fraction: Tensor) -> None:
        self.policy_loss += float(policy_loss.detach())
        self.cloning_loss += float(cloning.detach())
        self.kl += kl
        self.clip_fraction += float(clip_fraction.detach())
        self.count += 1


def update(
    vla: VLA,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    advantage: Float64,
    buffer: DemoBuffer,
    weight: NDArray[np.float32],
    config: PPOConfig,
    *,
    cloning_scale: float,
    frozen: VLA | None = None,
    sft: SFTConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
    stopped: Callable[[], bool],
) -> Update | None:
    """One update of the policy on the fresh decisions of a batch: `config.epochs` passes, or fewer if its KL passes
    `KL_STOP` x `config.target_kl`. None, with the policy half changed, if `stopped` came first.

    `advantage` `[N]` is as `advantages` gave it, `weight` `[tasks]` is w by task, `cloning_scale` is c. Images of the
    buffer are shifted and words left out as in supervised fine-tuning, `sft`. With `frozen`, L_kl to it takes the place
    of L_sbc, and the buffer is not used. Raises `NotFiniteError`, with the policy half changed.
    """
    task = batch.observations.task
    normal = torch.from_numpy(normalise_by_task(advantage, task.numpy(), batch.episode, batch.fresh).astype(np.float32))
    w = torch.from_numpy(weight)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    reduced = reduced_precision(vla, batch, config.clip)
    held = cloning_scale > 0
    frozen_mean = _means(frozen, batch, config.minibatch, reduced) if held and frozen is not None else None
    clone = held and frozen is None and buffer.episodes > 0
    correlation = vla.spec.noise_correlation
    before = _log_probs(vla, batch, config.minibatch, reduced)
    importance = (before - batch.log_prob).exp().clamp(max=MAX_IMPORTANCE)
    fresh, zero = np.flatnonzero(batch.fresh), torch.zeros(())
    grad_norm, gradient_steps, kl_stop = 0.0, 0, False
    sums = _Pass()
    for _ in range(config.epochs):
        sums = _Pass()
        for rows in minibatches(torch.from_numpy(rng.permutation(fresh)), config.minibatch):
            if stopped():
                return None
            seen = batch.observations.rows(rows)
            mean, log_std = _forward(vla, seen.inputs, reduced)
            executed = batch.executed.index_select(0, rows)
            new = executed_log_prob(batch.actions.index_select(0, rows), mean, log_std, executed, correlation)
            log_ratio, rho = new - before.index_select(0, rows), importance.index_select(0, rows)
            by_decision = rho * ppo_loss(log_ratio, normal.index_select(0, rows), config.clip)
            kl = float((rho * approximate_kl(log_ratio.detach())).sum() / rho.sum())
            cloned = unscaled = zero
            if frozen_mean is not None:
                there = frozen_mean.index_select(0, rows)
                cloned = anchor_loss(mean, there, log_std, executed, (1 - w)[seen.task])
                unscaled = anchor_loss(mean.detach(), there, log_std, executed, torch.ones(len(rows)))
            elif clone:
                count = max(1, round(len(rows) * CLONING_SHARE))
                cloned, unscaled = _buffer_loss(vla, buffer, 1 - w, count, sft, rng, generator, reduced)
            outside = (log_ratio.detach().exp() - 1).abs() > config.clip
            policy_loss = by_decision.mean()
            sums.add(policy_loss, unscaled, kl, outside.float().mean())
            kl_stop = kl > KL_STOP * config.target_kl
            if kl_stop:
                break
            total = (w[seen.task] * by_decision).mean() + cloning_scale * cloned
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            grad_norm += finite_norm(norm, {"policy loss": policy_loss, "cloning loss": unscaled})
            optimiser.step()
            gradient_steps += 1
        if kl_stop:
            break
    return Update(
        policy_loss=sums.policy_loss / max(1, sums.count),
        cloning_loss=sums.cloning_loss / max(1, sums.count),
        kl=sums.kl / max(1, sums.count),
        clip_fraction=sums.clip_fraction / max(1, sums.count),
        effective_share=_effective_share(importance[torch.from_numpy(batch.fresh)]),
        grad_norm=grad_norm / max(1, gradient_steps),
        gradient_steps=gradient_steps,
        kl_stop=kl_stop,
        bfloat16=reduced,
    )


def reduced_precision(vla: VLA, batch: Batch, clip: float) -> bool:
    """Whether the forward passes may be made in bfloat16: the processor has it, and it hardly moves the ratios."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    rows = torch.from_numpy(np.flatnonzero(batch.fresh)[:PRECISION_SAMPLE])
    seen = batch.observations.rows(rows)
    actions, executed = batch.actions.index_select(0, rows), batch.executed.index_select(0, rows)
    correlation = vla.spec.noise_correlation
    with torch.no_grad():
        exact, rounded = (
            executed_log_prob(actions, *_forward(vla, seen.inputs, low), executed, correlation) for low in (False, True)
        )
    return float((rounded - exact).square().mean().sqrt()) <= PRECISION_SHARE * clip


def _buffer_loss(
    vla: VLA,
    buffer: DemoBuffer,
    scale_by_task: Tensor,
    count: int,
    sft: SFTConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    """(1 - w) L_sbc over `count` samples of the buffer, and L_sbc itself, without gradients."""
    samples, task = buffer.sample(count, rng)
    images = {
        name: random_shift(torch.from_numpy(pixels), sft.shift_px, generator) for name, pixels in samples.images.items()
    }
    target, executed = torch.from_numpy(samples.target), torch.from_numpy(samples.mask)
    prefix, prefix_mask, mask = random_prefix(target, executed, vla.spec.prefix_steps, generator)
    tokens = random_wording(torch.from_numpy(samples.tokens), sft.word_dropout, generator)
    seen = images, torch.from_numpy(samples.state), tokens, prefix, prefix_mask
    mean, log_std = _forward(vla, seen, reduced)
    scaled = cloning_loss(target, mean, log_std, mask, scale_by_task[torch.from_numpy(task)])
    return scaled, cloning_loss(target, mean.detach(), log_std, mask, torch.ones(count))


def _log_probs(vla: VLA, batch: Batch, rows_at_once: int, reduced: bool) -> Tensor:
    """log pi_0(a | o) `[N]` of the fresh decisions; of the others what was logged."""
    known, parts = batch.log_prob.clone(), []
    fresh = torch.from_numpy(np.flatnonzero(batch.fresh))
    with torch.no_grad():
        for rows in torch.split(filled_up(fresh), rows_at_once):
            seen = batch.observations.rows(rows)
            mean, log_std = _forward(vla, seen.inputs, reduced)
            actions, executed = batch.actions.index_select(0, rows), batch.executed.index_select(0, rows)
            parts.append(executed_log_prob(actions, mean, log_std, executed, vla.spec.noise_correlation))
    known[fresh] = torch.cat(parts)[: len(fresh)]
    return known


def _effective_share(importance: Tensor) -> float:
    return float(importance.sum().square() / (len(importance) * importance.square().sum()))


def _means(policy: VLA, batch: Batch, rows_at_once: int, reduced: bool) -> Tensor:
    """Means of a policy that does not learn, float32 `[N, h, d]`, in the precision of the policy that does."""
    parts = []
    with torch.no_grad():
        for rows in torch.split(filled_up(torch.arange(len(batch))), rows_at_once):
            seen = batch.observations.rows(rows)
            parts.append(_forward(policy, seen.inputs, reduced)[0])
    return torch.cat(parts)[: len(batch)]


def _forward(vla: VLA, inputs: Inputs, reduced: bool) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation in float32; the layers run in bfloat16 if `reduced`, the densities never do."""
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        mean, log_std = vla(*inputs)
    return mean.float(), log_std.float()
