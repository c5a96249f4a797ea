"""A policy on disk: an immutable directory that holds all a runtime needs, named by the hash of its content.

    policy.yaml           the spec below
    graph.onnx            the graph; large weights are outside it
    weights.safetensors   the weights, by the names of the graph's initializers
    tokenizer.json        Hugging Face `tokenizers`; empty for a policy that reads no instruction
    probe.safetensors     a fixed batch of inputs (`input.NAME`) and what the exporter computed for it (`output.NAME`)

Graph inputs (B is dynamic): `image/<camera>` uint8 `[B, H, W, 3]`, `state` float32 `[B, n]`, `tokens` int64 `[B, L]`.
`prefix` float32 `[B, p, d]` and `prefix_mask` float32 `[B, p]` are the actions at the head of the chunk that are
committed already (mask 1; the rest is 0 in both), for a policy that plans on from them.
What the spec leaves empty (no camera, no state, `tokens: 0`, `prefix_steps: 0`) is no input of the graph.
Graph outputs: `action_mean` float32 `[B, h, d]`, `action_log_std` float32 `[B, h, d]`, both in the units of the action.
Resizing, normalisation and de-normalisation lie inside the graph, so training and serving cannot disagree.

The content is the identity: a directory may have any name, but one that looks like a version id must be the right one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import ActionSpec, CameraSpec, VectorSpec
from bridge.config import ConfigError, dump_yaml, load_yaml, parse
from bridge.errors import FieldtuneError
from runtime.durable import atomic_directory

FORMAT = 1
PARTS = ("policy.yaml", "graph.onnx", "weights.safetensors", "tokenizer.json", "probe.safetensors")
OUTPUTS = ("action_mean", "action_log_std")

_MIB = 1024 * 1024
MAX_BYTES = {
    "policy.yaml": _MIB,
    "graph.onnx": 256 * _MIB,
    "weights.safetensors": 32 * 1024 * _MIB,
    "tokenizer.json": 64 * _MIB,
    "probe.safetensors": 256 * _MIB,
}
"""Largest size of each part."""

Arrays = dict[str, NDArray[Any]]


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
    prefix_steps: int = 0
    """p: committed actions that the policy can be told, from the first of the chunk on."""
    noise_correlation: float = 0.0
    """rho, 0 <= rho < 1: correlation of the exploration noise of neighbouring actions; see `runtime.policy`."""
    parent: str = ""
    """Version id of the policy that this one was trained from."""
    made: dict[str, Any] = {}
    """How it was made: command, iteration, library versions."""


class BundleError(FieldtuneError):
    """The bundle cannot be used; `part` names the file or tensor, the message what is wrong with it."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(f"{part}: {message}")
        self.part = part
        self.message = message


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle as read: every part is there, its content is what `version` says, names, shapes and numbers are sound.

    Whether graph and weights compute what the probe says is for `runtime.policy.Policy` to find out.
    """

    version: str
    spec: PolicySpec
    path: Path
    graph: bytes
    weights: Arrays
    tokenizer: str
    probe_inputs: Arrays
    """The graph's inputs, `[B, ...]`."""
    probe_outputs: Arrays
    """`action_mean` and `action_log_std`, float32 `[B, h, d]`."""


def graph_inputs(spec: PolicySpec) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name -> (dtype, shape without the batch dimension) of every input of the graph."""
    inputs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        f"image/{camera.name}": (np.dtype(np.uint8), (camera.height, camera.width, 3)) for camera in spec.cameras
    }
    if spec.state.names:
        inputs["state"] = (np.dtype(np.float32), (len(spec.state.names),))
    if spec.tokens:
        inputs["tokens"] = (np.dtype(np.int64), (spec.tokens,))
    if spec.prefix_steps:
        inputs["prefix"] = (np.dtype(np.float32), (spec.prefix_steps, len(spec.action.names)))
        inputs["prefix_mask"] = (np.dtype(np.float32), (spec.prefix_steps,))
    return inputs


def version_id(parts: Mapping[str, bytes]) -> str:
    """sha256 over names, lengths and bytes of the parts, in order of their names: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name}\0{len(parts[name])}\0".encode())
        digest.update(parts[name])
    return digest.hexdigest()


def read_bundle(path: Path) -> Bundle:
    """Read a bundle and check all that can be checked without running it; raises `BundleError` naming the part."""
    parts = _read_parts(path)
    version = version_id(parts)
    if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.name != version:
        raise BundleError(
            "version",
            f"{path} has the content of {version[:12]}, its name says {path.name[:12]}: a part was changed or damaged; "
            "copy the bundle again",
        )
    return _bundle(version, _read_spec(path / "policy.yaml", parts["policy.yaml"]), path, parts)


def write_bundle(directory: Path, spec: PolicySpec, parts: Mapping[str, bytes]) -> str:
    """Write `directory/<version>`, whole or not at all and durable on return; returns the version.

    `parts` are all of `PARTS` but policy.yaml, checked as in `read_bundle`. A bundle of the same content that is there
    already is left as it is.
    """
    try:
        complete = {"policy.yaml": dump_yaml(msgspec.to_builtins(spec)).encode(), **parts}
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise BundleError("policy.yaml", f"cannot be written: {error}; `made` may hold plain values only") from error
    if sorted(complete) != sorted(PARTS):
        raise BundleError("bundle", f"has the parts {', '.join(sorted(complete))}, expected {', '.join(PARTS)}")
    version = version_id(complete)
    _bundle(version, spec, directory / version, complete)
    _write(directory / version, complete)
    return version


def install_bundle(path: Path, policies: Path) -> Path:
    """Copy the bundle in `path` to `policies/<version>`, whole or not at all; returns that directory. Idempotent."""
    bundle = read_bundle(path)
    target = policies / bundle.version
    if path.resolve() == target.resolve():
        return target
    parts = _read_parts(path)
    if version_id(parts) != bundle.version:
        raise BundleError("version", f"{path} changed while it was copied; write it elsewhere and announce it whole")
    _write(target, parts)
    return target


def tensor_part(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as a safetensors part."""
    from safetensors.numpy import save

    # safetensors writes the memory as it lies, whatever the strides: a view would come back as other numbers.
    data: bytes = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return data


def probe_part(inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> bytes:
    """probe.safetensors, from the graph's inputs and outputs by name."""
    return tensor_part(
        {f"input.{name}": array for name, array in inputs.items()}
        | {f"output.{name}": array for name, array in outputs.items()}
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _read_parts(path: Path) -> dict[str, bytes]:
    """The bytes of every part; nothing else may lie in the directory."""
    try:
        found = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise BundleError("bundle", f"{path} cannot be read: {error.strerror}; expected a directory") from error
    for name in sorted(found - set(PARTS)):
        raise BundleError(name, f"is no part of a bundle; {path} may hold only {', '.join(PARTS)}")
    for name in PARTS:
        if name not in found:
            raise BundleError(name, f"is missing from {path}")
    return {name: _read_file(path / name, MAX_BYTES[name]) for name in PARTS}


def _read_file(path: Path, limit: int) -> bytes:
    try:
        # Without NONBLOCK, opening a named pipe would wait for ever; what is not a regular file is refused below.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(path.name, f"{path} is not a regular file")
            if status.st_size > limit:
                raise BundleError(path.name, f"is {status.st_size} bytes long, at most {limit} are allowed")
            return file.read(status.st_size)
    except OSError as error:
        raise BundleError(path.name, f"{path} cannot be read: {error.strerror}") from error


def _write(target: Path, parts: Mapping[str, bytes]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as temporary:
            for name, data in parts.items():
                (temporary / name).write_bytes(data)
    except OSError as error:
        if not target.exists():
            raise BundleError("bundle", f"{target} cannot be written: {error.strerror or error}") from error
        # It was there already, or another process has just written it.
        if version_id(_read_parts(target)) != target.name:
            raise BundleError(
                "version", f"{target} exists and is damaged; move it away, then write the bundle again"
            ) from error


# --- content ----------------------------------------------------------------------------------------------------------


def _read_spec(path: Path, data: bytes) -> PolicySpec:
    try:
        # A few aliases to aliases would grow without bound when read; nothing that writes specs needs them.
        if b"&" in data and any(isinstance(token, yaml.AnchorToken) for token in yaml.scan(data)):
            raise BundleError("policy.yaml", "holds a YAML anchor; write the values out")
        return parse(load_yaml(path), PolicySpec, str(path))
    except (ConfigError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise BundleError("policy.yaml", str(error)) from error


def _bundle(version: str, spec: PolicySpec, path: Path, parts: Mapping[str, bytes]) -> Bundle:
    """Decode and check the parts."""
    check_spec(spec)
    weights = _tensors("weights.safetensors", parts["weights.safetensors"])
    try:
        tokenizer = parts["tokenizer.json"].decode()
    except UnicodeDecodeError as error:
        raise BundleError("tokenizer.json", "is not UTF-8 text") from error
    if spec.tokens and not tokenizer:
        raise BundleError("tokenizer.json", f"is empty, but the policy reads instructions of {spec.tokens} tokens")
    inputs, outputs = _probe(spec, _tensors("probe.safetensors", parts["probe.safetensors"]))
    return Bundle(version, spec, path, parts["graph.onnx"], weights, tokenizer, inputs, outputs)


def check_spec(spec: PolicySpec) -> None:
    """Raise `BundleError` with the path of the first field that makes no sense."""
    action = spec.action
    d = len(action.names)
    bounded = d == len(action.low) == len(action.high) and all(
        math.isfinite(low) and math.isfinite(high) and low < high
        for low, high in zip(action.low, action.high, strict=True)
    )
    cameras = [camera.name for camera in spec.cameras]
    rules = (
        (spec.format == FORMAT, "format", f"is {spec.format}, this version of fieldtune reads {FORMAT}"),
        (len(set(cameras)) == len(cameras), "cameras", "two cameras have the same name"),
        (all(cameras), "cameras", "a camera has no name"),
        (all(0 < s <= 4096 for c in spec.cameras for s in (c.height, c.width)), "cameras", "sizes are 1 to 4096 px"),
        (len(spec.state.names) == len(spec.state.units), "state.units", "expected one unit for each name"),
        (len(set(spec.state.names)) == len(spec.state.names), "state.names", "a name is there twice"),
        (0 < d <= 1024 and len(set(action.names)) == d, "action.names", "expected 1 to 1024 different names"),
        (d == len(action.units), "action.units", "expected one unit for each name"),
        (bounded, "action.low", "expected finite limits with low < high for each name"),
        (math.isfinite(spec.control_hz) and spec.control_hz > 0, "control_hz", "must be above 0"),
        (0 < spec.horizon <= 1024, "horizon", "must be 1 to 1024 actions"),
        (0 <= spec.tokens <= 8192, "tokens", "must be 0 to 8192"),
        (0 <= spec.prefix_steps < spec.horizon, "prefix_steps", "must be at least 0 and below the horizon"),
        (0 <= spec.noise_correlation < 1, "noise_correlation", "must be at least 0 and below 1"),
        (
            bool(spec.cameras or spec.state.names or spec.tokens),
            "cameras",
            "the policy sees nothing: no camera, no state and no instruction",
        ),
    )
    for good, field, message in rules:
        if not good:
            raise BundleError("policy.yaml", f"$.{field}: {message}")
    try:
        json.dumps(spec.made)
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError("policy.yaml", f"$.made: {error}; only text, numbers, lists and mappings") from error


def _tensors(part: str, data: bytes) -> Arrays:
    """The arrays of a safetensors part; all of them finite."""
    # Here, so that whoever needs the specs alone needs no safetensors.
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Arrays = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BundleError(part, f"is not a safetensors file that numpy can read: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise BundleError(part, f"{name} has dtype {array.dtype}, expected numbers")
        if not np.isfinite(array).all():
            raise BundleError(part, f"{name} holds a value that is not finite")
    return arrays


def _probe(spec: PolicySpec, tensors: Arrays) -> tuple[Arrays, Arrays]:
    """Inputs and outputs of the probe; names, dtypes and shapes are those of the spec, with one batch size for all."""
    part = "probe.safetensors"
    expected = {f"input.{name}": kind for name, kind in graph_inputs(spec).items()}
    chunk = (spec.horizon, len(spec.action.names))
    expected |= {f"output.{name}": (np.dtype(np.float32), chunk) for name in OUTPUTS}
    if sorted(tensors) != sorted(expected):
        raise BundleError(part, f"holds {', '.join(sorted(tensors))}, expected {', '.join(sorted(expected))}")
    batch = len(tensors["output.action_mean"]) if tensors["output.action_mean"].ndim else 0
    if batch == 0:
        raise BundleError(part, "holds no observation")
    for name, (dtype, shape) in expected.items():
        array = tensors[name]
        if array.dtype != dtype or array.shape != (batch, *shape):
            raise BundleError(
                part, f"{name} is {array.dtype}{list(array.shape)}, expected {dtype}{[batch, *shape]} from the spec"
            )
    inputs = {name.removeprefix("input."): a for name, a in tensors.items() if name.startswith("input.")}
    return inputs, {name: tensors[f"output.{name}"] for name in OUTPUTS}
