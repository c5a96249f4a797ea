"""Decisions of a logged episode made again: by the version that made them, to see whether the log can be reproduced,
or by another, to see what it would have done on the same observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bridge.backend import Float32
from bridge.messages import observation_tensors
from runtime.episode import Decision, EpisodeStart
from runtime.inference import Infers, Pending, batch_inputs, decision_rng, log_probs_after, sample_after
from runtime.policy import PROBE_TOLERANCE, compare_specs

LOG_PROB_TOLERANCE = 0.02
"""Of an action's log-prob, in nats: what the trainer's check of the ratio lets pass for a whole decision."""


@dataclass(slots=True)
class Again:
    """What one policy makes of one logged decision.

    `mean` float32 `[h, d]`; `actions` float32 `[h, d]`, the chunk that it would have sent: the mean, or, where the log
    has a log-prob, a sample with the decision's own noise; `log_prob` float32 `[h]`, that of the **logged** actions
    under this policy (None where the log has none). Where the policy's chunk is longer or shorter than the logged one,
    all of them have the shorter length.
    """

    mean: Float32
    actions: Float32
    log_prob: Float32 | None


def decide_again(policy: Infers, start: EpisodeStart, decisions: Sequence[Decision]) -> list[Again]:
    """These decisions of the episode that began with `start`, made by `policy`, each in an inference of its own.

    On the same processor and libraries, and with the policy that acted, the result is that of the log to the bit, where
    the runtime had one robot at a time to answer: joined into one batch with others' requests the last digit may be
    another. Raises `WireError` naming the first field in which the logged backend is another than the policy was made
    for, and `InstructionError`.
    """
    compare_specs(policy.spec, start.spec)
    return [_again(policy, start, decision) for decision in decisions]


def asked_again(start: EpisodeStart, decision: Decision) -> Pending:
    """The request that led to a logged decision, sampled where that was."""
    told = {} if decision.prefix is None else {"prefix": decision.prefix}
    return Pending(
        identity=b"",
        session="",
        request=0,
        episode=start.episode,
        decision=decision.number,
        step=decision.step,
        instruction=start.instruction,
        tensors={**observation_tensors(decision.observation), **told},
        explore=decision.log_prob is not None,
        arrived_s=0.0,
    )


def _again(policy: Infers, start: EpisodeStart, decision: Decision) -> Again:
    request = asked_again(start, decision)
    means, log_stds = policy.infer(batch_inputs(policy, [request]))
    mean, log_std, rho = means[0], log_stds[0], policy.spec.noise_correlation
    h = min(len(mean), len(decision.actions))
    prefix = mean[:0] if decision.prefix is None else decision.prefix
    c = len(prefix)
    if decision.log_prob is None:
        return Again(mean[:h], np.concatenate([prefix, mean[c:]])[:h], None)
    actions = sample_after(prefix, mean, log_std, rho, decision_rng(start.episode, decision.number))
    logged = log_probs_after(c, decision.actions[:h], mean[:h], log_std[:h], rho)["log_prob"]
    return Again(mean[:h], actions[:h], logged)


@dataclass(slots=True)
class Difference:
    """How far a policy is from one logged decision; see `difference`."""

    actions: float
    """Largest difference between its chunk and the logged one, in half ranges of the action."""
    log_prob: float | None
    """Largest difference of an action's log-prob, in nats; None where the log has none."""
    log_ratio: float | None
    """Log-prob of the executed actions under this policy minus that of the log; None where the log has none."""
    identical: bool
    """Chunk and log-probs are those of the log to the bit."""

    @property
    def reproduced(self) -> bool:
        """Whether rounding on another computer explains the difference; NaN is none."""
        return self.actions <= PROBE_TOLERANCE and (self.log_prob is None or self.log_prob <= LOG_PROB_TOLERANCE)


def difference(again: Again, decision: Decision, half_range: Float32) -> Difference:
    """Compare with the log; `half_range` float32 `[d]` is half of what each element of the action can be."""
    h = len(again.actions)
    same = h == len(decision.actions) and np.array_equal(again.actions, decision.actions)
    actions = largest(again.actions, decision.actions[:h], half_range)
    if again.log_prob is None or decision.log_prob is None:
        return Difference(actions, None, None, same)
    gap = again.log_prob.astype(np.float64) - decision.log_prob[:h]
    ratio = float(gap[decision.executed].sum())
    return Difference(actions, float(np.abs(gap).max()), ratio, same and not gap.any())


def largest(a: Float32, b: Float32, half_range: Float32) -> float:
    """Largest difference between two chunks `[h, d]`, in half ranges."""
    return float(np.max(np.abs(a.astype(np.float64) - b) / half_range))
