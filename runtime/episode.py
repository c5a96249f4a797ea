"""An episode as it is logged: the records of the file, and the same as arrays for whoever learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec import Struct

from bridge.backend import BackendSpec, Float32, Observation, UInt8

End = Literal["success", "failure", "timeout", "unjudged", "aborted"]
"""unjudged: the robot cannot tell how it went; somebody has to say."""
Source = Literal["policy", "expert"]

FORMAT = 1


class EpisodeStart(Struct, frozen=True, kw_only=True, tag_field="record", tag="start"):
    """First record of every file."""

    format: int
    episode: str
    task: str
    instruction: str
    seed: int
    source: Source
    explore: bool
    """Whether chunks were sampled (training) or the mean was taken (evaluation)."""
    client: str
    spec: BackendSpec
    started_unix_s: float


class TensorRecord(Struct, frozen=True, array_like=True):
    """One array in a record."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class DecisionRecord(Struct, frozen=True, kw_only=True, tag_field="record", tag="decision"):
    """One inference. Tensors: those of the observation, `actions` `[h, d]`; if sampled, `log_prob` `[h]` and, where the
    noise is correlated, `first_log_prob` `[h]`; `prefix` `[c, d]` where the policy was told what was committed."""

    decision: int
    step: int
    version: str
    tensors: dict[str, TensorRecord]


class ExecutedRecord(Struct, frozen=True, kw_only=True, tag_field="record", tag="executed"):
    """What became of a decision. Tensors: `sent` `[k, d]`, `reward` `[k]`, and `rules` `[k]` where any is not 0.

    A decision that went on playing while the next one was asked for has several of these, each from where the one
    before it ended.
    """

    decision: int
    start: int = 0
    """Index in the chunk of the first action that was played."""
    tensors: dict[str, TensorRecord]


class EndRecord(Struct, frozen=True, kw_only=True, tag_field="record", tag="end"):
    """Last record. Tensors: those of the last observation (none in an aborted episode)."""

    status: End
    steps: int
    reason: str
    """Why an episode was aborted, or that the operator ended it; empty otherwise."""
    tensors: dict[str, TensorRecord]
    interventions: dict[str, int] = {}
    """Steps that each rule of the safety stage changed; rules that changed none are left out."""


Record = EpisodeStart | DecisionRecord | ExecutedRecord | EndRecord


@dataclass(slots=True)
class Decision:
    """One decision of an episode. Its `number` (1, 2, 3, ...) says which noise it was drawn with.

    `actions` float32 `[h, d]` is the chunk as sampled, `log_prob` float32 `[h]` its log-prob by action under the
    behaviour policy (None where the mean was taken or an expert acted).

    Action i of the chunk is for environment step `step` + i. Those from `start` on were executed, k = `len(sent)` of
    them: `sent` float32 `[k, d]` is what the backend really sent, `reward` float32 `[k]` the backend's own reward. A
    chunk that came late begins with `start` > 0; where none came in time `sent` goes on beyond the chunk with hold
    actions. `rules` uint8 `[k]` has the bits of the rules (`bridge.messages.RULES`) by which the safety stage changed
    an action; None where it changed none.

    `first_log_prob` float32 `[h]` is the log-prob of each action by itself, which is what counts for the first one
    executed: those before it in the chunk were never sent. None where the noise is white, when both are the same.
    `prefix` float32 `[c, d]` are the actions that the policy was told to be committed; None where it was told none.
    """

    number: int
    step: int
    version: str
    observation: Observation
    actions: Float32
    log_prob: Float32 | None
    sent: Float32
    reward: Float32
    rules: UInt8 | None = None
    start: int = 0
    first_log_prob: Float32 | None = None
    prefix: Float32 | None = None

    @property
    def executed(self) -> slice:
        """The actions of the chunk that were executed."""
        return slice(self.start, min(self.start + len(self.sent), len(self.actions)))

    @property
    def executed_log_prob(self) -> float | None:
        """Log-prob of these actions under the behaviour policy; None where the log has none."""
        if self.log_prob is None:
            return None
        by_action = self.log_prob[self.executed].astype(np.float64)
        if self.first_log_prob is not None and len(by_action):
            by_action[0] = self.first_log_prob[self.start]
        return float(by_action.sum())


@dataclass(slots=True)
class Episode:
    """A whole episode. `final` is the observation after the last step (None if aborted)."""

    start: EpisodeStart
    decisions: list[Decision]
    status: End
    steps: int
    reason: str = ""
    final: Observation | None = None
    truncated: bool = False
    """Time or the operator cut it off, whatever somebody said of it later."""

    @property
    def success(self) -> bool:
        """Whether the backend reported success."""
        return self.status == "success"

    @property
    def versions(self) -> list[str]:
        """The policy versions that acted, in order of first use."""
        return list(dict.fromkeys(decision.version for decision in self.decisions))
