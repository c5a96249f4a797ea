"""The gate: what a candidate does on observations that robots have seen, before any robot moves by it.

Both policies are asked for their chunks on the same logged observations. With m, s the mean and standard deviation of
an action element in half ranges, of the candidate and (with a dash) of the live version:

    divergence     sqrt(mean (m - m')^2)
    kl             mean over actions of sum_d log(s / s') + (s'^2 + (m - m')^2) / (2 s^2) - 1/2, KL(live || candidate)
    outside        share of the elements whose mean is beyond the limits by more than a tenth of the half range
    cloning_error  mean (m - a)^2 over the actions a that were sent in successful episodes

That weights are finite, and graph and probe sound, is found when the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.safety import HELD
from runtime.config import GateRule
from runtime.decide_again import asked_again
from runtime.episode import Decision, Episode
from runtime.index import EpisodeIndex
from runtime.inference import Infers, batch_inputs
from runtime.reading import EpisodeError, read_row
from runtime.rundir import RunDir

Float64 = NDArray[np.float64]

BEYOND = 0.1
EPISODES = 64  # of the log, that decisions are taken from
AT_ONCE = 32  # observations in an inference


class GateReport(Struct, frozen=True, kw_only=True):
    """What was found. `refused` names each rule that was broken with both figures; empty for one that may pass."""

    refused: tuple[str, ...]
    decisions: int
    divergence: float = 0.0
    kl: float = 0.0
    outside: float = 0.0
    live_outside: float = 0.0
    cloning_error: float = 0.0
    live_cloning_error: float = 0.0


def judge(candidate: Infers, live: Infers, episodes: Sequence[Episode], rule: GateRule) -> GateReport:
    """Compare the two on the decisions of these episodes, newest last, spread evenly over them.

    Without any there is nothing to compare, and only the bundle's own checks have been made.
    """
    pairs = [(episode, decision) for episode in episodes for decision in episode.decisions]
    if not pairs:
        return GateReport(refused=(), decisions=0)
    pairs = [pairs[i] for i in _evenly(len(pairs), rule.decisions)]
    action = live.spec.action
    half_range = (np.array(action.high) - np.array(action.low)) / 2
    center = (np.array(action.high) + np.array(action.low)) / 2
    (m, s), (m_live, s_live) = (_outputs(policy, pairs, center, half_range) for policy in (candidate, live))
    if not (np.isfinite(m).all() and np.isfinite(s).all()):
        return GateReport(refused=("an action is not finite",), decisions=len(pairs))
    error, live_error = (_cloning_error(mean, pairs, center, half_range) for mean in (m, m_live))
    report = GateReport(
        refused=(),
        decisions=len(pairs),
        divergence=float(np.sqrt(np.mean((m - m_live) ** 2))),
        kl=float(np.mean(np.sum(np.log(s / s_live) + (s_live**2 + (m - m_live) ** 2) / (2 * s**2) - 0.5, axis=-1))),
        outside=float(np.mean(np.abs(m) > 1 + BEYOND)),
        live_outside=float(np.mean(np.abs(m_live) > 1 + BEYOND)),
        cloning_error=error,
        live_cloning_error=live_error,
    )
    limits = (
        ("divergence", report.divergence, rule.max_divergence),
        ("kl", report.kl, rule.max_kl),
        ("outside", report.outside, report.live_outside + rule.max_outside),
        # Where the live version hardly errs, twice nothing is nothing.
        ("cloning_error", report.cloning_error, max(rule.max_cloning * live_error, live_error + 0.01)),
    )
    broken = tuple(f"{name} is {found:.3g}, at most {most:.3g}" for name, found, most in limits if not found <= most)
    return msgspec.structs.replace(report, refused=broken)


def gate_episodes(run: RunDir, decisions: int) -> list[Episode]:
    """The newest episodes of a run's robots that came to their end, oldest first; else demonstrations.

    Of each only as many decisions are kept as are needed to have `decisions` in all: the images of long episodes would
    fill the memory.
    """
    for directory in (run.episodes, run.demos):
        index = EpisodeIndex(directory)
        rows = [row for row in index.list(limit=EPISODES) if row.status != "aborted" and not row.deleted]
        episodes = []
        for row in reversed(rows):
            try:
                episode = read_row(index, row)
            except EpisodeError:
                continue  # retention has just deleted it, or it is damaged
            chosen = _evenly(len(episode.decisions), -(-decisions // len(rows)))
            episodes.append(replace(episode, decisions=[episode.decisions[i] for i in chosen]))
        index.close()
        if episodes:
            return episodes
    return []


def _evenly(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over 0 ... length - 1."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist() if length else []


def _outputs(
    policy: Infers, pairs: Sequence[tuple[Episode, Decision]], center: Float64, half_range: Float64
) -> tuple[Float64, Float64]:
    """Means and standard deviations `[N, h, d]` in half ranges from the middle."""
    parts = []
    for start in range(0, len(pairs), AT_ONCE):
        batch = [asked_again(episode.start, decision) for episode, decision in pairs[start : start + AT_ONCE]]
        parts.append(policy.infer(batch_inputs(policy, batch)))
    mean, log_std = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*parts, strict=True))
    return (mean - center) / half_range, np.exp(log_std) / half_range


def _cloning_error(
    mean: Float64, pairs: Sequence[tuple[Episode, Decision]], center: Float64, half_range: Float64
) -> float:
    errors = []
    for own, (episode, decision) in zip(mean, pairs, strict=True):
        executed = decision.executed
        if not episode.success or executed.stop <= executed.start:
            continue
        sent = (decision.sent[: executed.stop - executed.start].astype(np.float64) - center) / half_range
        done = np.ones(len(sent), bool) if decision.rules is None else decision.rules[: len(sent)] & HELD == 0
        errors.append(((own[executed] - sent) ** 2)[done].ravel())
    joined = np.concatenate(errors) if errors else np.zeros(0)
    return float(joined.mean()) if len(joined) else 0.0
