"""The check that is always on: before learning, the trainer's log-probs must be those that the runtime logged.

PPO rests on the ratio pi / mu, with mu as the runtime computed it through the exported graph. If, under the very
weights that acted, the trainer computes anything else, then every gradient is wrong and nothing else would show it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bridge.errors import FieldtuneError
from runtime.bundle import Bundle, PolicySpec, read_bundle
from trainer.batch import Batch
from trainer.chunked_ppo import executed_log_prob
from trainer.export import become, torch_outputs
from trainer.shapes import filled_up
from trainer.vla import VLA

SAMPLE = 256
# Torch and onnxruntime differ by about 1e-6 of an action, which makes 1e-4 of a summed log-prob of 32 numbers at the
# sigmas in use. 0.02 is far above that and a tenth of the clipping range, so what passes cannot matter to PPO.
TOLERANCE = 0.02
PROBE_TOLERANCE = 1e-3  # of an action's half range
# Of log sigma between two versions that can be compared: a learned sigma moves by about a hundredth in an update.
SIGMA_CHANGE = 0.1

Weights = Mapping[str, Tensor]


class RatioError(FieldtuneError):
    """The log-probs of runtime and trainer disagree; `broken` says what is at fault."""

    def __init__(self, broken: Literal["lineage", "export", "preprocessing"], message: str) -> None:
        super().__init__(f"{broken}: {message}; training has stopped so that nothing is learned from it")
        self.broken = broken


class Behaviours:
    """The policies that may have acted: the order in which they went live, and the weights of the recent ones.

    Weights that the trainer made are kept in memory, those of others are read from their bundles.
    """

    def __init__(self, policies: Path, vla: VLA, keep: int) -> None:
        """`policies` holds the bundles; `keep` sets of weights stay in memory."""
        self._policies, self._keep = policies, keep
        self._scratch = copy.deepcopy(vla)
        self._kept: dict[str, tuple[PolicySpec, Weights]] = {}
        self._history: list[str] = []

    def set_history(self, history: Sequence[str]) -> None:
        """The versions that went live so far, oldest first, each as often as it did."""
        self._history = list(history)

    def remember(self, version: str, vla: VLA) -> None:
        """Keep a copy of the weights of a version that has just been made or loaded."""
        self._kept.pop(version, None)
        self._kept[version] = vla.spec, {name: tensor.detach().clone() for name, tensor in vla.state_dict().items()}
        while len(self._kept) > self._keep:
            del self._kept[next(iter(self._kept))]

    def age(self, version: str) -> int:
        """How many versions went live after this one last did. Raises `RatioError` if it never did."""
        for age, live in enumerate(reversed(self._history)):
            if live == version:
                return age
        raise RatioError(
            "lineage",
            f"episodes hold decisions of version {version[:12]}, which the registry never had live; was the registry "
            "or the episode log replaced, or does another runtime write into this run?",
        )

    def policy(self, version: str) -> VLA:
        """The policy with the weights of `version`; the same object each time, so use it before asking again."""
        self._scratch.spec, weights = self._of(version)
        self._scratch.load_state_dict(weights)
        return self._scratch

    def explored_like(self, version: str, vla: VLA) -> bool:
        """Whether the noise of `version` was that of `vla`, or near it.

        Where it was another (`ppo.sigma` and `ppo.noise_correlation` change it at the start), the ratio of every one of
        its decisions is far from 1 whatever the means are, and there is nothing to learn from them.
        """
        spec, weights = self._of(version)
        change = (weights["log_sigma"] - vla.log_sigma.detach()).abs().max()
        return spec.noise_correlation == vla.spec.noise_correlation and float(change) <= SIGMA_CHANGE

    def _of(self, version: str) -> tuple[PolicySpec, Weights]:
        if version not in self._kept:
            become(self._scratch, self.bundle(version))
            self.remember(version, self._scratch)
        return self._kept[version]

    def bundle(self, version: str) -> Bundle:
        """Its bundle on disk; raises `BundleError` if that is damaged or gone."""
        return read_bundle(self._policies / version)

    def recent(self) -> list[str]:
        """The versions whose weights are in memory."""
        return list(self._kept)


def check_ratio(batch: Batch, behaviours: Behaviours, rng: np.random.Generator) -> float:
    """The largest |log ratio| over up to 256 fresh decisions, each under the weights of its own behaviour policy.

    Raises `RatioError` where it is above 0.02, after finding out what is broken:
    lineage: the log-probs are those of another version than the one that the decisions are stamped with, or unknown;
    export: the trainer does not even reproduce the probe that lies in the bundle;
    preprocessing: it does, so the observations or instructions reach the two differently.
    """
    fresh = np.flatnonzero(batch.fresh)
    sample = np.sort(rng.choice(fresh, size=min(SAMPLE, len(fresh)), replace=False))
    worst = 0.0
    for number in np.unique(batch.version[sample]):
        version = batch.versions[number]
        rows = torch.from_numpy(sample[batch.version[sample] == number])
        error = _error(batch, rows, behaviours.policy(version))
        if not error <= TOLERANCE:  # so that NaN is an error too
            raise _diagnosis(batch, rows, version, error, behaviours)
        worst = max(worst, error)
    return worst


def _error(batch: Batch, rows: Tensor, policy: VLA) -> float:
    rows = filled_up(rows)
    seen = batch.observations.rows(rows)
    with torch.no_grad():
        mean, log_std = policy(*seen.inputs)
        again = executed_log_prob(
            batch.actions.index_select(0, rows),
            mean,
            log_std,
            batch.executed.index_select(0, rows),
            policy.spec.noise_correlation,
        )
    return float((again - batch.log_prob.index_select(0, rows)).abs().max())


def _diagnosis(batch: Batch, rows: Tensor, version: str, error: float, behaviours: Behaviours) -> RatioError:
    found = f"the log-probs of {len(rows)} decisions of version {version[:12]} differ by up to {error:.3g}"
    for other in behaviours.recent():
        if other != version and _error(batch, rows, behaviours.policy(other)) <= TOLERANCE:
            return RatioError("lineage", f"{found}, and are those of version {other[:12]}: the stamp is wrong")
    difference = probe_difference(behaviours.policy(version), behaviours.bundle(version))
    if not difference <= PROBE_TOLERANCE:
        return RatioError(
            "export",
            f"{found}, and its weights give actions on the bundle's probe that differ by {difference:.3g} of half the "
            "range: the exported graph or weights are not those of the trainer",
        )
    return RatioError(
        "preprocessing",
        f"{found}, yet the bundle's probe comes out right: images, state, instruction or sampled actions in the "
        "episode log are not those that the runtime used",
    )


def probe_difference(policy: VLA, bundle: Bundle) -> float:
    """Largest difference between the mean actions of `policy` and the bundle's probe, in half ranges of the action."""
    mean = torch_outputs(policy, bundle.probe_inputs)["action_mean"]
    action = bundle.spec.action
    half_range = (np.array(action.high) - np.array(action.low)) / 2
    return float(np.max(np.abs(mean - bundle.probe_outputs["action_mean"]) / half_range))
