"""An episode as it is logged: the records of the file, and the same as arrays for whoever learns from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from bridge.backend import BackendSpec, Float32, Observation, UInt8

End = Literal["success", "failure", "timeout", "aborted"]
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
    """One inference. Tensors: those of the observation, `actions` `[h, d]` and, if sampled, `log_prob` `[h]`."""

    decision: int
    step: int
    version: str
    tensors: dict[str, TensorRecord]


class ExecutedRecord(Struct, frozen=True, kw_only=True, tag_field="record", tag="executed"):
    """What became of a decision. Tensors: `sent` `[k, d]`, `reward` `[k]`, and `rules` `[k]` where any is not 0."""

    decision: int
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
    behaviour policy (None where the mean was taken or an expert acted). The first `len(sent)` = k actions were
    executed: `sent` float32 `[k, d]` is what the backend really sent, `reward` float32 `[k]` the backend's own reward.
    `rules` uint8 `[k]` has the bits of the rules (`bridge.messages.RULES`) by which the safety stage changed an action;
    None where it changed none.
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


@dataclass(slots=True)
class Episode:
    """A whole episode. `final` is the observation after the last step (None if aborted)."""

    start: EpisodeStart
    decisions: list[Decision]
    status: End
    steps: int
    reason: str = ""
    final: Observation | None = None

    @property
    def success(self) -> bool:
        """Whether the backend reported success."""
        return self.status == "success"

    @property
    def versions(self) -> list[str]:
        """The policy versions that acted, in order of first use."""
        return list(dict.fromkeys(decision.version for decision in self.decisions))
