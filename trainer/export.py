"""From torch to a bundle and back: the graph once, the weights as often as the trainer publishes."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from bridge.backend import Float32
from bridge.errors import FieldtuneError
from runtime.bundle import (
    OUTPUTS,
    Arrays,
    Bundle,
    BundleError,
    PolicySpec,
    graph_inputs,
    probe_part,
    tensor_part,
    write_bundle,
)
from runtime.graph import split
from runtime.policy import build_session, check_graph
from trainer.vla import VLA

PARITY_TOLERANCE = 1e-4
"""Largest difference between onnxruntime and torch, in half ranges of the action; measured: about 1e-6."""
ARGUMENTS = ("state", "tokens", "prefix", "prefix_mask")
"""Of `VLA.forward`, after the images, by the names of the graph's inputs."""
PREFIX_WEIGHT = "prefix.weight"
_INTERFACE = ("cameras", "state", "action", "control_hz", "horizon", "tokens", "noise_correlation")


class ExportError(FieldtuneError):
    """The policy cannot be exported; the message says why."""


class Exporter:
    """Publishes the versions of one VLA. Its graph is exported once, each version has its own weights and probe."""

    def __init__(
        self, vla: VLA, tokenizer: Tokenizer, probe: Mapping[str, NDArray[Any]], *, graph: bytes | None = None
    ) -> None:
        """Export the graph (seconds) unless `graph` is given, and compare it with torch on the probe.

        `probe` holds 2 or more observations under the names of the graph's inputs, `[B, ...]` each. Later versions are
        published from what `vla` is then. Raises `ExportError`.
        """
        if not bool(torch.isfinite(vla.state_mean).all()):
            raise ExportError(
                "the statistics of the state were never set; call set_state_statistics with those of the demonstrations"
            )
        if tokenizer.get_vocab_size() > vla.config.vocabulary:
            raise ExportError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the VLA knows {vla.config.vocabulary}"
            )
        self._vla = vla
        self._tokenizer = tokenizer.to_str().encode()
        self._inputs = _probe_inputs(vla.spec, probe)
        frozen = _frozen(vla)
        self._graph = export_graph(frozen, self._inputs) if graph is None else graph
        check_parity(frozen, self._graph, self._inputs)

    @classmethod
    def of_bundle(cls, vla: VLA, bundle: Bundle) -> Exporter:
        """An exporter with graph, tokenizer and probe of the bundle that this VLA was loaded from."""
        return cls(vla, Tokenizer.from_str(bundle.tokenizer), bundle.probe_inputs, graph=bundle.graph)

    def publish(self, directory: Path, *, parent: str, made: dict[str, Any]) -> str:
        """Write the VLA as it is now to `directory/<version>`, durable on return; returns the version.

        Raises `BundleError` for weights that are not finite or a `made` that is not plain values.
        """
        frozen = _frozen(self._vla)
        outputs = torch_outputs(frozen, self._inputs)
        parts = {
            "graph.onnx": self._graph,
            "weights.safetensors": tensor_part(
                {name: tensor.numpy() for name, tensor in weight_tensors(frozen).items()}
            ),
            "tokenizer.json": self._tokenizer,
            "probe.safetensors": probe_part(self._inputs, outputs),
        }
        return write_bundle(directory, msgspec.structs.replace(self._vla.spec, parent=parent, made=made), parts)


def export(
    vla: VLA,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    parent: str,
    made: dict[str, Any],
    probe: Mapping[str, NDArray[Any]],
) -> str:
    """One version of a VLA that will have no others: see `Exporter`."""
    return Exporter(vla, tokenizer, probe).publish(directory, parent=parent, made=made)


def load_weights(vla: VLA, bundle: Bundle) -> None:
    """Give `vla` exactly the weights of a version; raises `BundleError` if the bundle is of another network.

    A version that is told nothing of what is committed becomes one that can be told and does the same whatever it is
    told: the weights of the prefix, which it does not have, are 0.
    """
    for field in _INTERFACE:
        if getattr(bundle.spec, field) != getattr(vla.spec, field):
            raise BundleError("policy.yaml", f"$.{field} is not that of this VLA; it was made for another deployment")
    if bundle.spec.prefix_steps not in (0, vla.spec.prefix_steps):
        raise BundleError("policy.yaml", f"$.prefix_steps is {bundle.spec.prefix_steps}, {vla.spec.prefix_steps} here")
    tensors = weight_tensors(vla)
    untold = {PREFIX_WEIGHT} & set(tensors) if bundle.spec.prefix_steps == 0 else set()
    if set(tensors) - untold != set(bundle.weights):
        names = ", ".join(sorted((set(tensors) - untold) ^ set(bundle.weights))[:5])
        raise BundleError(
            "weights.safetensors",
            f"the bundle and this VLA differ in {names}; only bundles of the reference VLA with equal trainer.vla "
            "settings can be trained further",
        )
    for name in bundle.weights:
        tensor = tensors[name]
        if bundle.weights[name].shape != tuple(tensor.shape) or bundle.weights[name].dtype != np.float32:
            raise BundleError(
                "weights.safetensors",
                f"{name} is {bundle.weights[name].dtype}{list(bundle.weights[name].shape)}, this VLA has "
                f"float32{list(tensor.shape)}; trainer.vla has changed",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in untold:
                tensor.zero_()
            else:
                tensor.copy_(torch.from_numpy(np.array(bundle.weights[name])))


def become(vla: VLA, bundle: Bundle) -> None:
    """Give `vla` weights and exploration noise of a version of the same network; raises `BundleError`."""
    before = vla.spec
    vla.spec = msgspec.structs.replace(before, noise_correlation=bundle.spec.noise_correlation)
    try:
        load_weights(vla, bundle)
    except BundleError:
        vla.spec = before
        raise


def weight_tensors(vla: VLA) -> dict[str, Tensor]:
    """What a version's weights are, by the names of the graph's initializers: parameters and state statistics."""
    # Without state there are statistics of nothing, which are in no graph.
    return {name: tensor for name, tensor in vla.state_dict().items() if tensor.numel()}


def torch_outputs(vla: VLA, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """`action_mean` and `action_log_std` float32 `[B, h, d]` as torch computes them for the graph's inputs."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        images, others = _arguments(vla.spec, inputs)
        outputs = vla(images, *others)
    return {name: tensor.numpy() for name, tensor in zip(OUTPUTS, outputs, strict=True)}


def export_graph(vla: VLA, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """The graph without weights, from an example batch of 2 or more."""
    images, others = _arguments(vla.spec, inputs)
    rows = len(others[0])
    if rows < 2:
        raise ExportError(
            f"the probe holds {rows} observation; with fewer than 2, torch takes the batch size for a constant"
        )
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of packages that nothing here uses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            # With optimize=True names get lost and equal weights are merged.
            program = torch.onnx.export(
                vla,
                (images, *others),
                dynamo=True,
                optimize=False,
                verbose=False,
                dynamic_shapes=({name: {0: "batch"} for name in images}, *({0: "batch"} for _ in others)),
                input_names=[*(f"image/{name}" for name in images), *ARGUMENTS[: len(others)]],
                output_names=list(OUTPUTS),
            )
    finally:
        registration.setLevel(level)
    assert program is not None
    model = program.model_proto
    wanted = graph_inputs(vla.spec)
    for node in [node for node in model.graph.input if node.name not in wanted]:
        model.graph.input.remove(node)
    try:
        graph, _ = split(model, list(weight_tensors(vla)))
    except ValueError as error:
        raise ExportError(f"the exported graph lost a weight of the VLA: {error}") from error
    return graph


def check_parity(vla: VLA, graph: bytes, inputs: Arrays) -> None:
    """Raise `ExportError` unless onnxruntime computes from `graph` and the VLA's weights what torch computes."""
    try:
        session = build_session(graph, {name: tensor.numpy() for name, tensor in weight_tensors(vla).items()})
        check_graph(session, vla.spec)
    except BundleError as error:
        raise ExportError(f"the graph does not fit the VLA: {error}") from error
    wanted = torch_outputs(vla, inputs)
    got = dict(zip(OUTPUTS, session.run(OUTPUTS, inputs), strict=True))
    half_range = vla.half_range.numpy()
    for name, unit in (("action_mean", half_range), ("action_log_std", np.ones_like(half_range))):
        difference = float(np.max(np.abs(got[name] - wanted[name]) / unit))
        if not difference <= PARITY_TOLERANCE:  # so that NaN is an error too
            raise ExportError(
                f"onnxruntime and torch differ by {difference:.3g} in {name}, at most {PARITY_TOLERANCE:g} is allowed"
            )


def probe_prefixes(actions: Float32, prefix_steps: int) -> Arrays:
    """What a probe's observations are told is committed, from all `prefix_steps` of their `actions` `[B, h, d]` in the
    first down to none in the last; nothing where the policy is told none.
    """
    if not prefix_steps:
        return {}
    told = np.linspace(prefix_steps, 0, len(actions)).round()
    mask = (np.arange(prefix_steps) < told[:, None]).astype(np.float32)
    return {"prefix": actions[:, :prefix_steps] * mask[..., None], "prefix_mask": mask}


def _frozen(vla: VLA) -> VLA:
    """A copy on the CPU that later gradient steps do not reach."""
    return copy.deepcopy(vla).cpu().eval().requires_grad_(False)


def _probe_inputs(spec: PolicySpec, probe: Mapping[str, NDArray[Any]]) -> Arrays:
    """The graph's inputs among the arrays of the probe, checked."""
    inputs: Arrays = {}
    for name, (dtype, shape) in graph_inputs(spec).items():
        if name not in probe:
            raise ExportError(f"the probe has no {name}; it holds {', '.join(probe)}")
        array = probe[name]
        if array.dtype != dtype or array.shape[1:] != shape:
            raise ExportError(
                f"{name} of the probe is {array.dtype}{list(array.shape)}, expected {dtype}{['B', *shape]}"
            )
        inputs[name] = np.array(array, order="C")
    if len({len(array) for array in inputs.values()}) != 1:
        raise ExportError("the arrays of the probe hold different numbers of observations")
    return inputs


def _arguments(spec: PolicySpec, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The arguments of `VLA.forward`, images and others; where there is no state, `[B, 0]`, and without a prefix none
    of it."""
    images = {camera.name: torch.from_numpy(inputs[f"image/{camera.name}"]) for camera in spec.cameras}
    state = np.zeros((len(inputs["tokens"]), 0), np.float32)
    others = {"state": state, **inputs}
    return images, [torch.from_numpy(others[name]) for name in ARGUMENTS if name in others]
