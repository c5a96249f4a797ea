"""Versions that are made on purpose from the one that ships: worse ones, and a broken one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from safetensors.numpy import load, save

from runtime.bundle import OUTPUTS, Arrays, PolicySpec, probe_part, read_bundle, tensor_part, write_bundle
from runtime.policy import build_session

Change = Callable[[Arrays, PolicySpec], Arrays]
"""The weights that are to be others, from all weights."""
HEAD = ("head.weight", "head.bias")
"""The last layer of the reference VLA, `[h d, width]` and `[h d]`: its outputs are the means, in half ranges."""


def changed_bundle(source: Path, directory: Path, change: Change, said: str) -> str:
    """Write `directory/<version>`, the bundle in `source` with other weights; returns the version.

    Its probe is what the graph computes with these weights, so it is as sound as any. Its parent is the source's
    version, and `said` is in `made` for whoever looks it up. Raises `BundleError`.
    """
    bundle = read_bundle(source)
    weights = bundle.weights | change(bundle.weights, bundle.spec)
    outputs = build_session(bundle.graph, weights).run(OUTPUTS, bundle.probe_inputs)
    parts = {
        "graph.onnx": bundle.graph,
        "weights.safetensors": tensor_part(weights),
        "tokenizer.json": bundle.tokenizer.encode(),
        "probe.safetensors": probe_part(bundle.probe_inputs, dict(zip(OUTPUTS, outputs, strict=True))),
    }
    made = {"command": "walk", "change": said}
    return write_bundle(directory, replace(bundle.spec, parent=bundle.version, made=made), parts)


def shifted(element: str, by: float) -> Change:
    """The mean of one element of every action is larger by `by` half ranges."""

    def change(weights: Arrays, spec: PolicySpec) -> Arrays:
        bias = weights["head.bias"].reshape(spec.horizon, len(spec.action.names)).copy()
        bias[:, spec.action.names.index(element)] += np.float32(by)
        return {"head.bias": bias.reshape(-1)}

    return change


def flipped(weights: Arrays, _spec: PolicySpec) -> Arrays:
    """The mean of every action has the other sign, about the middle of its range."""
    return {name: -weights[name] for name in HEAD}


def broken_copy(source: Path, target: Path) -> Path:
    """Copy the bundle in `source` to `target` with NaN for weights of the last layer; returns `target`.

    No writer of bundles makes one like this; a trainer that has diverged, or a disk, might.
    """
    parts: dict[str, bytes] = {part.name: part.read_bytes() for part in source.iterdir()}
    weights = load(parts["weights.safetensors"])
    parts["weights.safetensors"] = save(weights | {name: np.full_like(weights[name], np.nan) for name in HEAD})
    target.mkdir(parents=True)
    for name, data in parts.items():
        (target / name).write_bytes(data)
    return target
