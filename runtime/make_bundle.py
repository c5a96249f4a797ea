"""A bundle from an ONNX policy made elsewhere: weights taken out, a probe made, all checked before it lands."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from bridge.config import ConfigError, load_yaml, parse
from runtime.bundle import (
    OUTPUTS,
    Arrays,
    BundleError,
    PolicySpec,
    check_spec,
    graph_inputs,
    install_bundle,
    probe_part,
    tensor_part,
    write_bundle,
)
from runtime.graph import split
from runtime.policy import InstructionError, Policy, check_graph, encode

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

PROBE_TEXTS = ("stop", "go", "open the drawer", "pick up the red cube and put it into the box")
# Smaller ones are shapes, scales and limits, which onnxruntime wants to know while it optimises the graph.
SMALLEST_WEIGHT_BYTES = 1024


def make_bundle(onnx_path: Path, spec_path: Path, tokenizer_path: Path | None, out_dir: Path) -> str:
    """Make `out_dir/<version>` from an ONNX file, its spec in YAML and its tokenizer; returns the version.

    The probe holds random observations and what onnxruntime computes for them from the file as it is, so the bundle is
    the file's equal. Initializers with at least two dimensions or 1 KiB become weights. Raises `ConfigError` for the
    spec, `BundleError` for everything else that does not fit; then nothing is written.
    """
    spec = parse(load_yaml(spec_path), PolicySpec, str(spec_path))
    try:
        check_spec(spec)
    except BundleError as error:
        raise ConfigError(f"{spec_path}: {error.message}") from error
    tokenizer = _tokenizer(spec, tokenizer_path)
    model = _load(onnx_path)
    inputs = _probe_inputs(spec, tokenizer)
    outputs = _run(onnx_path, spec, inputs)
    graph, weights = split(model, [tensor.name for tensor in model.graph.initializer if _is_weight(tensor)])
    parts = {
        "graph.onnx": graph,
        "weights.safetensors": tensor_part(weights),
        "tokenizer.json": b"" if tokenizer_path is None else tokenizer_path.read_bytes(),
        "probe.safetensors": probe_part(inputs, outputs),
    }
    with tempfile.TemporaryDirectory() as temporary:
        version = write_bundle(Path(temporary), spec, parts)
        Policy.load(Path(temporary) / version)
        install_bundle(Path(temporary) / version, out_dir)
    return version


def _load(path: Path) -> ModelProto:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise BundleError("graph.onnx", "making a bundle needs onnx: pip install 'fieldtune[trainer]'") from error
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's and onnx's errors have no class in common
        raise BundleError("graph.onnx", f"{path} cannot be read as ONNX: {error}") from error


def _is_weight(tensor: TensorProto) -> bool:
    from onnx import TensorProto

    known: dict[int, int] = {
        TensorProto.FLOAT: 4,
        TensorProto.FLOAT16: 2,
        TensorProto.DOUBLE: 8,
        TensorProto.INT8: 1,
        TensorProto.UINT8: 1,
        TensorProto.INT32: 4,
        TensorProto.INT64: 8,
    }
    size = known.get(tensor.data_type, 0) * int(np.prod(tensor.dims, dtype=np.int64))
    return size > 0 and (len(tensor.dims) >= 2 or size >= SMALLEST_WEIGHT_BYTES)


def _tokenizer(spec: PolicySpec, path: Path | None) -> Tokenizer | None:
    if (path is not None) != bool(spec.tokens):
        raise BundleError(
            "tokenizer.json",
            f"the spec has tokens: {spec.tokens}; a tokenizer is needed if and only if that is above 0",
        )
    if path is None:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError("tokenizer.json", f"{path} cannot be read: {error}") from error


def _probe_inputs(spec: PolicySpec, tokenizer: Tokenizer | None) -> Arrays:
    """Random observations `[4, ...]`, the same ones at every call."""
    rng = np.random.default_rng(0)
    inputs: Arrays = {}
    for name, (dtype, shape) in graph_inputs(spec).items():
        if name == "state":
            inputs[name] = rng.standard_normal((len(PROBE_TEXTS), *shape)).astype(dtype)
        elif name == "prefix":
            inputs[name] = rng.uniform(spec.action.low, spec.action.high, (len(PROBE_TEXTS), *shape)).astype(dtype)
        elif name == "prefix_mask":
            inputs[name] = np.tri(len(PROBE_TEXTS), *shape, dtype=dtype)
        elif tokenizer is not None and name == "tokens":
            inputs[name] = np.stack([_encode_if_short(tokenizer, text, spec.tokens) for text in PROBE_TEXTS])
        else:
            inputs[name] = rng.integers(0, 256, (len(PROBE_TEXTS), *shape)).astype(dtype)
    if "prefix" in inputs:
        inputs["prefix"] *= inputs["prefix_mask"][..., None]
    return inputs


def _encode_if_short(
    tokenizer: Tokenizer, text: str, max_tokens: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    try:
        return encode(tokenizer, text, max_tokens)
    except InstructionError:
        return encode(tokenizer, "", max_tokens)


def _run(path: Path, spec: PolicySpec, inputs: Arrays) -> Arrays:
    """What the file computes for `inputs`, before anything is done to it."""
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        raise BundleError("graph.onnx", f"{path}: onnxruntime cannot load it: {error}") from error
    check_graph(session, spec)
    try:
        return dict(zip(OUTPUTS, session.run(OUTPUTS, inputs), strict=True))
    except Exception as error:  # onnxruntime's errors have no class in common
        raise BundleError("graph.onnx", f"{path} fails on random observations: {error}") from error
