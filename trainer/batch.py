"""The on-policy batch: the decisions of whole exploring episodes, one row each, with their rewards.

Rewards are computed here from how the episode ended and how many actions ran: every step costs `step_cost`, the step
that succeeds earns `success_reward`, and one that fails costs as much as if the robot went on for ever without success:
were it free, failing soon would be the cheapest thing to do. With `reward: backend`, an ablation, every step earns what
the backend said, scaled, in place of the success. Only what was executed counts: a chunk of which k actions ran has a
reward over k steps, a discount gamma^k, and the log-prob of these actions. A chunk that was asked for while another
played begins where that one ended; steps in which the robot held because none came in time (`starved`) are steps of the
chunk that ran out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.backend import Float32, Observation
from bridge.errors import FieldtuneError
from bridge.safety import STARVED
from runtime.bundle import PolicySpec
from runtime.episode import Decision, Episode
from trainer.config import PPOConfig
from trainer.vla import Inputs

Float64 = NDArray[np.float64]


class BatchError(FieldtuneError):
    """An episode that cannot be learned from; the message names it and says why."""


@dataclass(slots=True)
class Observations:
    """N observations as tensors: what the policy sees, and what only the critic sees.

    `images` uint8 `[N, H, W, 3]` by camera, `state` float32 `[N, n]`, `tokens` int64 `[N, L]`, `task` int64 `[N]` (its
    index), `privileged` float32 `[N, m]` or None where the backend has none; the committed actions `prefix` float32
    `[N, p, d]` and their `prefix_mask` float32 `[N, p]`, or None where the policy is told none.
    """

    images: dict[str, Tensor]
    state: Tensor
    tokens: Tensor
    task: Tensor
    privileged: Tensor | None
    prefix: Tensor | None = None
    prefix_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def inputs(self) -> Inputs:
        """What the policy sees."""
        return self.images, self.state, self.tokens, self.prefix, self.prefix_mask

    def rows(self, index: Tensor) -> Observations:
        """The rows `index` int64 `[M]`, copied."""
        return Observations(
            images={name: images.index_select(0, index) for name, images in self.images.items()},
            state=self.state.index_select(0, index),
            tokens=self.tokens.index_select(0, index),
            task=self.task.index_select(0, index),
            privileged=_rows(self.privileged, index),
            prefix=_rows(self.prefix, index),
            prefix_mask=_rows(self.prefix_mask, index),
        )


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.index_select(0, index)


@dataclass(slots=True)
class Batch:
    """N decisions of E episodes: episodes one after another, the decisions of each in order of time."""

    observations: Observations
    """What each decision saw, `[N]` rows."""
    finals: Observations
    """The last observation of each episode, `[E]` rows; a truncated return bootstraps from it."""
    actions: Tensor
    """float32 `[N, h, d]`: the chunk as sampled."""
    executed: Tensor
    """float32 `[N, h]`: 1 for the actions that were executed, one after another, 0 for the rest."""
    log_prob: Tensor
    """float32 `[N]`: log-prob of the executed actions under the behaviour policy, as the runtime logged it."""
    reward: Float64
    """`[N]`: R = sum_{i<k} gamma^i r_i over the k steps of the decision, the first of which is r_0."""
    discount: Float64
    """`[N]`: gamma^k."""
    terminated: NDArray[np.bool_]
    """`[N]`: the episode ended with this decision in success or failure, so nothing comes after it. One that was cut
    off and called a failure later did not."""
    last: NDArray[np.bool_]
    """`[N]`: last decision of its episode."""
    episode: NDArray[np.int64]
    """`[N]`: index of the episode, a row of `finals`."""
    version: NDArray[np.int64]
    """`[N]`: index of the behaviour policy in `versions`."""
    versions: tuple[str, ...]
    age: NDArray[np.int64]
    """`[N]`: how many versions older than the newest the behaviour policy is."""
    fresh: NDArray[np.bool_]
    """`[N]`: young enough to learn from. The others are here because the advantages of an episode need all of it."""

    def __len__(self) -> int:
        return len(self.reward)


def build_batch(
    episodes: Sequence[Episode],
    spec: PolicySpec,
    tasks: Sequence[str],
    config: PPOConfig,
    *,
    tokens: Callable[[str], NDArray[np.int64]],
    age: Callable[[str], int],
    max_age: int,
) -> Batch:
    """The batch of these episodes, which must have ended (not aborted) and have been sampled, not the mean.

    `tokens` encodes an instruction as `[L]`, `age` says how many versions a policy is behind the newest; decisions
    older than `max_age` are marked as not fresh. Raises `BatchError` for an episode that is not of that kind.
    """
    decisions: list[Decision] = []
    observations: list[tuple[Observation, Episode]] = []
    finals: list[tuple[Observation, Episode]] = []
    success: list[bool] = []
    failure: list[bool] = []
    last: list[bool] = []
    index: list[int] = []
    for episode in episodes:
        executed = executed_decisions(episode, spec)
        assert episode.final is not None
        for decision in executed:
            is_last = decision is executed[-1]
            decisions.append(decision)
            observations.append((decision.observation, episode))
            last.append(is_last)
            success.append(is_last and episode.status == "success")
            failure.append(is_last and episode.status == "failure" and not episode.truncated)
            index.append(len(finals))
        finals.append((episode.final, episode))
    if not decisions:
        raise BatchError("there are no decisions to learn from")
    k = np.array([len(decision.sent) for decision in decisions], np.int64)
    slices = np.array([(decision.executed.start, decision.executed.stop) for decision in decisions], np.int64)
    i = np.arange(spec.horizon)
    executed_mask = ((slices[:, :1] <= i) & (i < slices[:, 1:])).astype(np.float32)
    log_prob = np.array([decision.executed_log_prob for decision in decisions], np.float32)
    versions = tuple(dict.fromkeys(decision.version for decision in decisions))
    ages = {version: age(version) for version in versions}
    age_of = np.array([ages[decision.version] for decision in decisions], np.int64)
    return Batch(
        observations=_stack(observations, [decision.prefix for decision in decisions], spec, tasks, tokens),
        finals=_stack(finals, [None] * len(finals), spec, tasks, tokens),
        actions=torch.from_numpy(np.stack([decision.actions for decision in decisions]).astype(np.float32)),
        executed=torch.from_numpy(executed_mask),
        log_prob=torch.from_numpy(log_prob),
        reward=chunk_reward(k, np.array(success), np.array(failure), config)
        if config.reward == "sparse"
        else backend_reward([decision.reward for decision in decisions], config),
        discount=np.power(config.gamma, k.astype(np.float64)),
        terminated=np.array(success) | np.array(failure),
        last=np.array(last),
        episode=np.array(index, np.int64),
        version=np.array([versions.index(decision.version) for decision in decisions], np.int64),
        versions=versions,
        age=age_of,
        fresh=age_of <= max_age,
    )


def chunk_reward(
    k: NDArray[np.int64], success: NDArray[np.bool_], failure: NDArray[np.bool_], config: PPOConfig
) -> Float64:
    """R = sum_{i<k} gamma^i r_i of chunks with `k` `[N]` executed actions, which end in success, failure or neither.

    r_i is -step_cost, and success_reward - step_cost in the step that succeeds. A failure has the price of all steps
    that would follow, so that R = -step_cost / (1 - gamma).
    """
    powers = np.power(config.gamma, np.arange(int(k.max(initial=0)) + 1, dtype=np.float64))
    steps_discounted = np.concatenate([[0.0], np.cumsum(powers)])[k]
    steps_discounted = np.where(failure, 1.0 / (1.0 - config.gamma), steps_discounted)
    earned: Float64 = np.where(success, config.success_reward * powers[np.maximum(k - 1, 0)], 0.0)
    return earned - config.step_cost * steps_discounted


def backend_reward(rewards: Sequence[Float32], config: PPOConfig) -> Float64:
    """R = sum_{i<k} gamma^i (reward_scale r_i - step_cost) of chunks, from the backend's `rewards`, `[k]` of each."""
    steps = [config.reward_scale * own.astype(np.float64) - config.step_cost for own in rewards]
    return np.array([np.power(config.gamma, np.arange(len(own))) @ own for own in steps])


def executed_decisions(episode: Episode, spec: PolicySpec) -> list[Decision]:
    """The decisions that ran at least one action; raises `BatchError` unless they cover the episode without a gap."""
    name = f"episode {episode.start.episode}"
    if episode.status == "aborted" or episode.final is None:
        raise BatchError(f"{name} was aborted, so its return is not known")
    # A chunk that was overtaken before its first action ran decided nothing; the next one decided in its stead.
    decisions = [decision for decision in episode.decisions if len(decision.sent)]
    if not decisions:
        raise BatchError(f"{name} has no executed action")
    step = 0
    shape = (spec.horizon, len(spec.action.names))
    for decision in decisions:
        if decision.actions.shape != shape:
            raise BatchError(f"{name}: a chunk is {list(decision.actions.shape)}, the policy gives {list(shape)}")
        if decision.log_prob is None:
            raise BatchError(f"{name}: a decision has no log-prob; PPO learns from sampled chunks only")
        told = 0 if decision.prefix is None else len(decision.prefix)
        if told > min(spec.prefix_steps, decision.start):
            raise BatchError(
                f"{name}: a decision was told {told} actions and executed from {decision.start} on, the policy can be "
                f"told {spec.prefix_steps}; what it was told is not its own"
            )
        beyond = decision.start + len(decision.sent) - spec.horizon
        if decision.step + decision.start != step or (beyond > 0 and not _starved(decision, beyond)):
            raise BatchError(
                f"{name}: {len(decision.sent)} actions of a decision at step {decision.step} from {decision.start} on, "
                f"expected the action of step {step} and at most {spec.horizon - decision.start} from the chunk"
            )
        step += len(decision.sent)
    return decisions


def _starved(decision: Decision, steps: int) -> bool:
    """Whether the robot held for want of a chunk in the last `steps` of the decision."""
    return decision.rules is not None and bool((decision.rules[-steps:] & STARVED).all())


def _stack(
    pairs: Sequence[tuple[Observation, Episode]],
    prefixes: Sequence[Float32 | None],
    spec: PolicySpec,
    tasks: Sequence[str],
    tokens: Callable[[str], NDArray[np.int64]],
) -> Observations:
    """Observations of episodes and what was committed at each as tensors, each image copied once."""
    n = len(pairs)
    images = {}
    for camera in spec.cameras:
        stacked = np.empty((n, camera.height, camera.width, 3), np.uint8)
        for i, (observation, _) in enumerate(pairs):
            stacked[i] = observation.images[camera.name]
        images[camera.name] = torch.from_numpy(stacked)
    privileged = [observation.privileged for observation, _ in pairs if observation.privileged is not None]
    rows = {instruction: tokens(instruction) for instruction in {episode.start.instruction for _, episode in pairs}}
    number = {task: i for i, task in enumerate(tasks)}
    prefix, prefix_mask = _prefixes(prefixes, spec)
    return Observations(
        images=images,
        state=torch.from_numpy(np.stack([observation.state for observation, _ in pairs]).astype(np.float32)),
        tokens=torch.from_numpy(np.stack([rows[episode.start.instruction] for _, episode in pairs])),
        task=torch.tensor([number[episode.start.task] for _, episode in pairs], dtype=torch.int64),
        privileged=torch.from_numpy(np.stack(privileged).astype(np.float32)) if len(privileged) == n else None,
        prefix=prefix,
        prefix_mask=prefix_mask,
    )


def _prefixes(prefixes: Sequence[Float32 | None], spec: PolicySpec) -> tuple[Tensor | None, Tensor | None]:
    """The committed actions `[N, p, d]` and their mask `[N, p]`, as the runtime gives them to the policy."""
    if not spec.prefix_steps:
        return None, None
    prefix = torch.zeros(len(prefixes), spec.prefix_steps, len(spec.action.names))
    mask = torch.zeros(len(prefixes), spec.prefix_steps)
    for i, committed in enumerate(prefixes):
        if committed is not None:
            prefix[i, : len(committed)] = torch.from_numpy(committed)
            mask[i, : len(committed)] = 1.0
    return prefix, mask
