"""Taking the weights out of an ONNX model. Needs `onnx`, which a runtime that only serves does not have."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from runtime.bundle import Arrays

if TYPE_CHECKING:
    from onnx import ModelProto

WEIGHTS = "weights.safetensors"


def split(model: ModelProto, names: Collection[str]) -> tuple[bytes, Arrays]:
    """(graph without these initializers' numbers, the numbers by name); `model` is changed.

    The graph refers to them as external data, which onnxruntime lets `add_external_initializers` replace. Notes of the
    exporter go: they hold file paths and stack traces, and would make equal graphs differ. Raises `ValueError` if an
    initializer is not there.
    """
    from onnx import TensorProto, numpy_helper

    found = {tensor.name: tensor for tensor in model.graph.initializer}
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(f"the graph has no initializer named {', '.join(missing)}")
    weights: Arrays = {}
    for name in names:
        tensor = found[name]
        weights[name] = numpy_helper.to_array(tensor).copy()
        kept = TensorProto(name=name, dims=tensor.dims, data_type=tensor.data_type, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS), ("offset", "0"), ("length", str(weights[name].nbytes))):
            kept.external_data.add(key=key, value=value)
        tensor.CopyFrom(kept)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    return model.SerializeToString(deterministic=True), weights
