"""A bundle in onnxruntime: the policy that serves. Also the Gaussian that chunks are drawn from, and the comparison of
what a policy needs with what a backend has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bridge.backend import BackendSpec, Float32
from bridge.errors import FieldtuneError
from bridge.messages import WireError
from runtime.bundle import OUTPUTS, Arrays, Bundle, BundleError, PolicySpec, graph_inputs, read_bundle

PROBE_TOLERANCE = 1e-3
"""Largest difference of a replayed probe, in half ranges of the action (mean) and in nats (log_std).

float32 on another processor or library differs by about 1e-5; 1e-3 is far above that and moves no robot. Weights of
another version differ by 1e-2 and more: one gradient step of Adam at a learning rate of 1e-4 is enough for that.
"""
CACHED_INSTRUCTIONS = 1024
_TYPES = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
}
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class InstructionError(FieldtuneError):
    """The instruction does not fit into the policy's tokens; the message gives both lengths."""


class Policy:
    """One version, loaded and proven. Immutable and safe to call from several threads.

    It is a `runtime.inference.Infers`: the server uses `spec`, `version`, `tokens` and `infer`, and serves whatever has
    these four.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        """Build the session, check the graph against the spec, replay the probe, warm up. Raises `BundleError`."""
        self._spec, self._version = bundle.spec, bundle.version
        self._session = build_session(bundle.graph, bundle.weights, threads=threads)
        check_graph(self._session, bundle.spec)
        self._names = tuple(graph_inputs(bundle.spec))
        tokenizer = _tokenizer(bundle) if bundle.spec.tokens else None
        # Of no method: a cache that holds its policy would keep the session in memory until a full garbage collection.
        self._encode = lru_cache(CACHED_INSTRUCTIONS)(partial(_read_only_tokens, tokenizer, bundle.spec.tokens))
        self._replay(bundle)

    @classmethod
    def load(cls, path: Path, *, threads: int = 1) -> Policy:
        """Read, check and load the bundle in `path`; raises `BundleError` naming the part that is wrong."""
        return cls(read_bundle(path), threads=threads)

    @property
    def spec(self) -> PolicySpec:
        """What it sees and gives."""
        return self._spec

    @property
    def version(self) -> str:
        """Its content hash."""
        return self._version

    def tokens(self, instruction: str) -> NDArray[np.int64]:
        """The instruction as int64 `[L]`, read-only; `[0]` if the policy reads none. Raises `InstructionError`."""
        return self._encode(instruction)

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Float32, Float32]:
        """(mean, log_std), float32 `[B, h, d]` each, in units of the action; `inputs` are named as in the bundle."""
        mean, log_std = self._session.run(OUTPUTS, {name: inputs[name] for name in self._names})
        return mean, log_std

    def _replay(self, bundle: Bundle) -> None:
        """The outputs must be those of the exporter, for the batch and for its first row alone.

        Nothing else finds weights of another version: onnxruntime takes any that have the right shapes.
        """
        for rows in dict.fromkeys((len(bundle.probe_outputs["action_mean"]), 1)):
            try:
                mean, log_std = self.infer({name: array[:rows] for name, array in bundle.probe_inputs.items()})
            except Exception as error:  # onnxruntime's errors have no class in common
                raise BundleError(
                    "graph.onnx", f"cannot be run on the probe with a batch of {rows}: {error}"
                ) from error
            check_replay(bundle.spec, bundle.probe_outputs, mean, log_std)


def build_session(graph: bytes, weights: Arrays, *, threads: int = 1) -> ort.InferenceSession:
    """The session of a graph whose external initializers are `weights`; raises `BundleError`.

    A weight that the graph does not know, or one of another shape or dtype, is refused; so is one that is missing.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Trainer and simulator share the cores: a thread that spins while it waits takes one from them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Weights come from the bundle only: what is not given below must not be looked for in some directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    try:
        if weights:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        # onnxruntime names the tensor only in the text.
        part = "weights.safetensors" if "nitializ" in str(error) or "eplacement" in str(error) else "graph.onnx"
        raise BundleError(part, f"does not fit: {error}") from error


def check_graph(session: ort.InferenceSession, spec: PolicySpec) -> None:
    """Raise `BundleError` unless inputs and outputs are those of the spec, with a dynamic batch dimension."""
    expected = graph_inputs(spec)
    found = {node.name: node for node in session.get_inputs()}
    if set(found) != set(expected):
        raise BundleError("graph.onnx", f"has the inputs {_list(found)}, the spec asks for {_list(expected)}")
    chunk = (np.dtype(np.float32), (spec.horizon, len(spec.action.names)))
    outputs = {node.name: node for node in session.get_outputs()}
    for name in OUTPUTS:
        if name not in outputs:
            raise BundleError("graph.onnx", f"has the outputs {_list(outputs)}, {name} is missing")
    nodes = [(found[name], kind) for name, kind in expected.items()] + [(outputs[name], chunk) for name in OUTPUTS]
    for node, (dtype, shape) in nodes:
        batch, *rest = node.shape or [0]
        if isinstance(batch, int):
            raise BundleError("graph.onnx", f"{node.name} is {node.type}{node.shape}: the batch must be dynamic")
        # A graph made elsewhere may leave other dimensions open; the replay of the probe decides then.
        fits = len(rest) == len(shape) and all(
            not isinstance(a, int) or a == b for a, b in zip(rest, shape, strict=True)
        )
        if _TYPES.get(node.type) != dtype or not fits:
            raise BundleError(
                "graph.onnx", f"{node.name} is {node.type}{node.shape}, expected {dtype}{['B', *shape]} from the spec"
            )


def check_replay(spec: PolicySpec, wanted: Arrays, mean: Float32, log_std: Float32) -> None:
    """Raise `BundleError` unless `mean` and `log_std` `[B, h, d]` are the first B rows of the probe's outputs."""
    half_range = (np.array(spec.action.high) - np.array(spec.action.low)) / 2
    for name, got, unit in (("action_mean", mean, half_range), ("action_log_std", log_std, np.ones_like(half_range))):
        want = wanted[name][: len(got)]
        if got.shape != want.shape:
            raise BundleError("graph.onnx", f"{name} is {list(got.shape)} on the probe, expected {list(want.shape)}")
        if not np.isfinite(got).all():
            raise BundleError("probe.safetensors", f"{name} is not finite when the probe is replayed")
        difference = float(np.max(np.abs(got - want) / unit))
        if difference > PROBE_TOLERANCE:
            raise BundleError(
                "probe.safetensors",
                f"{name} differs by {difference:.3g} (at most {PROBE_TOLERANCE:g} allowed) from what the exporter "
                "computed: the weights are not those that the probe was made with",
            )


def encode(tokenizer: Tokenizer, text: str, max_tokens: int) -> NDArray[np.int64]:
    """The text as int64 `[max_tokens]`, padded as the tokenizer says (on the right with 0 if it says nothing).

    Raises `InstructionError` if it has more tokens: a shortened instruction is another instruction.
    """
    encoding = tokenizer.encode(text)
    count = sum(encoding.attention_mask) + sum(sum(rest.attention_mask) for rest in encoding.overflowing)
    if count > max_tokens or encoding.overflowing:
        raise InstructionError(
            f"the instruction {text[:80]!r} has {count} tokens, the policy takes {max_tokens}; shorten it, or train a "
            "policy with a larger trainer.vla.max_tokens"
        )
    if len(encoding.ids) == max_tokens:
        return np.array(encoding.ids, np.int64)
    ids = np.full(max_tokens, (tokenizer.padding or {}).get("pad_id", 0), np.int64)
    ids[:count] = [i for i, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real]
    return ids


def sample_chunk(mean: Float32, log_std: Float32, noise_correlation: float, rng: np.random.Generator) -> Float32:
    """Draw a chunk, float32 `[h, d]`, around `mean` with `log_std` `[h, d]`: a_i = m_i + s_i eps_i.

    With rho = `noise_correlation` and xi white noise, eps_0 = xi_0 and eps_i = rho eps_{i-1} + sqrt(1 - rho^2) xi_i, an
    AR(1) process along the chunk. So every action has the standard deviation s_i whatever rho is, and rho = 0 is white
    noise. Chunks are independent of each other.
    """
    noise = rng.standard_normal(mean.shape)
    if noise_correlation:
        noise = _correlate(len(noise), noise_correlation) @ noise
    return (mean.astype(np.float64) + np.exp(log_std.astype(np.float64)) * noise).astype(np.float32)


@lru_cache(maxsize=16)
def _correlate(h: int, rho: float) -> NDArray[np.float64]:
    """The matrix `[h, h]` that makes eps of xi: rho^(i - j) for j <= i, times sqrt(1 - rho^2) but for j = 0."""
    i, j = np.indices((h, h))
    return np.where(j <= i, rho ** np.maximum(i - j, 0) * np.where(j, math.sqrt(1 - rho**2), 1.0), 0.0)


def log_prob(actions: Float32, mean: Float32, log_std: Float32, noise_correlation: float) -> Float32:
    """Log-density of each action given those before it in the chunk, summed over its elements: float32 `[..., h]`;
    the arrays are `[..., h, d]`, rho = `noise_correlation` as in `sample_chunk`.

    With z_i = (a_i - m_i) / s_i the noise is xi_0 = z_0, xi_i = (z_i - rho z_{i-1}) / sqrt(1 - rho^2), and

        log p_i = -xi_i^2 / 2 - log s_i - log(2 pi) / 2 - log sqrt(1 - rho^2)       without the last term for i = 0.

    An action depends on those before it only, so the sum over the first k is the exact log-prob of an executed prefix
    of k actions. That is why the noise is AR(1): a general covariance would have to be factorised for each k. A slice
    that begins later than the chunk counts its first action by `first_log_prob`.
    Computed in float64, on the actions as they are logged.
    """
    m, s = mean.astype(np.float64), log_std.astype(np.float64)
    xi = (actions.astype(np.float64) - m) * np.exp(-s)
    innovation = math.sqrt(1 - noise_correlation**2)
    xi[..., 1:, :] = (xi[..., 1:, :] - noise_correlation * xi[..., :-1, :]) / innovation
    s[..., 1:, :] += math.log(innovation)
    result: Float32 = (-0.5 * xi**2 - s - _LOG_SQRT_2PI).sum(-1).astype(np.float32)
    return result


def first_log_prob(actions: Float32, mean: Float32, log_std: Float32) -> Float32:
    """Log-density of each action by itself, summed over its elements: float32 `[..., h]`; the arrays are `[..., h, d]`.

    The marginal of an AR(1) process is that of white noise with the same standard deviation.
    """
    return log_prob(actions, mean, log_std, 0.0)


def compare_specs(policy: PolicySpec, backend: BackendSpec) -> None:
    """Raise `WireError` naming the first field in which the backend is not what the policy was made for.

    The backend may have more cameras than the policy needs, and any state if the policy reads none.
    """
    cameras = {camera.name: camera for camera in backend.cameras}
    for camera in policy.cameras:
        field = f"spec.cameras.{camera.name}"
        if camera.name not in cameras:
            raise WireError(field, f"the policy needs this camera, the backend has {_list(cameras)}")
        _equal(f"{field}.height", cameras[camera.name].height, camera.height)
        _equal(f"{field}.width", cameras[camera.name].width, camera.width)
    if policy.state.names:
        _equal_items("spec.state.names", backend.state.names, policy.state.names)
        _equal_items("spec.state.units", backend.state.units, policy.state.units)
    _equal_items("spec.action.names", backend.action.names, policy.action.names)
    _equal_items("spec.action.units", backend.action.units, policy.action.units)
    _equal("spec.action.kind", backend.action.kind, policy.action.kind)
    _equal_items("spec.action.low", backend.action.low, policy.action.low)
    _equal_items("spec.action.high", backend.action.high, policy.action.high)
    _equal("spec.control_hz", backend.control_hz, policy.control_hz)


def _equal_items(field: str, has: tuple[Any, ...], needs: tuple[Any, ...]) -> None:
    for i, (a, b) in enumerate(zip(has, needs, strict=False)):
        _equal(f"{field}[{i}]", a, b)
    if len(has) != len(needs):
        raise WireError(field, f"the backend has {len(has)}, the policy was made for {len(needs)}: {_list(needs)}")


def _equal(field: str, has: Any, needs: Any) -> None:
    # Limits and rates may have been float32 or text once; the last digit tells no two robots apart.
    numbers = isinstance(has, float) and isinstance(needs, float)
    if not (math.isclose(has, needs, rel_tol=1e-6, abs_tol=1e-9) if numbers else has == needs):
        raise WireError(field, f"the backend has {has!r}, the policy was made for {needs!r}")


def _tokenizer(bundle: Bundle) -> Tokenizer:
    try:
        return Tokenizer.from_str(bundle.tokenizer)
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError("tokenizer.json", f"cannot be read: {error}") from error


def _read_only_tokens(tokenizer: Tokenizer | None, max_tokens: int, instruction: str) -> NDArray[np.int64]:
    if tokenizer is None:
        return np.zeros(0, np.int64)
    ids = encode(tokenizer, instruction, max_tokens)
    ids.flags.writeable = False
    return ids


def _list(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"
