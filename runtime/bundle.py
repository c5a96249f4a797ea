"""A policy on disk: an immutable directory that holds all a runtime needs, named by the hash of its content.

    policy.yaml           the spec below
    graph.onnx            the graph; large weights are outside it
    weights.safetensors   the weights, by the names of the graph's initializers
    tokenizer.json        Hugging Face `tokenizers`
    probe.safetensors     a fixed batch of inputs (`input.NAME`) and what the exporter computed for it (`output.NAME`)

Graph inputs (B is dynamic): `image/<camera>` uint8 `[B, H, W, 3]`, `state` float32 `[B, n]`, `tokens` int64 `[B, L]`.
Graph outputs: `action_mean` float32 `[B, h, d]`, `action_log_std` float32 `[B, h, d]`, both in the units of the action.
Resizing, normalisation and de-normalisation lie inside the graph, so training and serving cannot disagree.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from bridge.backend import ActionSpec, CameraSpec, VectorSpec

FORMAT = 1
PARTS = ("policy.yaml", "graph.onnx", "weights.safetensors", "tokenizer.json", "probe.safetensors")


class PolicySpec(Struct, frozen=True, forbid_unknown_fields=True):
    """policy.yaml: what the policy sees and gives, and where it comes from."""

    format: int
    name: str
    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    action: ActionSpec
    control_hz: float
    horizon: int
    tokens: int
    parent: str = ""
    """Version id of the policy that this one was trained from."""
    made: dict[str, Any] = {}
    """How it was made: command, iteration, library versions."""


class BundleError(Exception):
    """The bundle cannot be used; `part` names the file or tensor, the message what is wrong with it."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(f"{part}: {message}")
        self.part = part
        self.message = message
