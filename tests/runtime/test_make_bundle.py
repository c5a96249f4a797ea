"""A policy made elsewhere becomes a bundle that computes the same, or nothing is written."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, save_model
from tokenizers import Tokenizer, models, pre_tokenizers

from bridge.config import ConfigError
from runtime.bundle import BundleError, read_bundle
from runtime.make_bundle import make_bundle
from runtime.policy import Policy

SPEC = """
format: 1
name: elsewhere
cameras: []
state: {names: [x, y, z], units: [m, m, m]}
action: {names: [a, b], units: ["1", "1"], low: [-1, -1], high: [1, 1], kind: delta}
control_hz: 1e1
horizon: 4
tokens: 0
"""
SEEING = SPEC.replace("cameras: []", "cameras: [{name: eye, height: 5, width: 6}]").replace("tokens: 0", "tokens: 7")
info = helper.make_tensor_value_info


def linear(batch: str | int = "B", out: str = "action_log_std", dtype: type = np.float32) -> ModelProto:
    """mean = reshape(state @ W) + bias, log_std = mean * 0 + spread."""
    rng = np.random.default_rng(0)
    constants = {
        "W": rng.normal(0, 0.1, (3, 8)).astype(dtype),
        "bias": rng.normal(0, 0.1, (4, 2)).astype(np.float32),
        "shape": np.array([-1, 4, 2], np.int64),
        "zero": np.float32(0) + np.zeros((), np.float32),
        "spread": np.full(2, -1.5, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["W"], ["W32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["state", "W32"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["rows"]),
        helper.make_node("Add", ["rows", "bias"], ["action_mean"], doc_string="/home/somebody/secret.py"),
        helper.make_node("Mul", ["rows", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "spread"], [out]),
    ]
    return model(nodes, [info("state", 1, [batch, 3])], out, constants, batch)


def seeing() -> ModelProto:
    """mean = (brightness of the image + mean token) / 1000 in every element."""
    constants = {
        "axes3": np.array([1, 2, 3], np.int64),
        "axes1": np.array([1], np.int64),
        "axes": np.array([1, 2], np.int64),
        "scale": np.full((4, 2), 1e-3, np.float32),
        "zero": np.zeros((), np.float32),
        "W": np.zeros((3, 1), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image/eye"], ["pixels"], to=1),
        helper.make_node("ReduceMean", ["pixels", "axes3"], ["light"], keepdims=0),
        helper.make_node("Cast", ["tokens"], ["words"], to=1),
        helper.make_node("ReduceMean", ["words", "axes1"], ["word"], keepdims=0),
        helper.make_node("Add", ["light", "word"], ["both"]),
        helper.make_node("Unsqueeze", ["both", "axes"], ["column"]),
        helper.make_node("MatMul", ["state", "W"], ["moved"]),
        helper.make_node("Unsqueeze", ["moved", "axes1"], ["state3"]),
        helper.make_node("Add", ["column", "state3"], ["all"]),
        helper.make_node("Mul", ["all", "scale"], ["action_mean"]),
        helper.make_node("Mul", ["action_mean", "zero"], ["action_log_std"]),
    ]
    inputs = [info("image/eye", 2, ["B", 5, 6, 3]), info("state", 1, ["B", 3]), info("tokens", 7, ["B", 7])]
    return model(nodes, inputs, "action_log_std", constants, "B")


def model(nodes: list[Any], inputs: list[Any], out: str, constants: dict[str, Any], batch: str | int) -> ModelProto:
    outputs = [info(name, 1, [batch, 4, 2]) for name in ("action_mean", out)]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "elsewhere", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    save_model(linear(), tmp_path / "policy.onnx")
    return tmp_path


def make(files: Path, tokenizer: Path | None = None) -> str:
    return make_bundle(files / "policy.onnx", files / "spec.yaml", tokenizer, files / "out")


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_the_bundle_computes_what_the_file_computes(files: Path, dtype: type, outside: bool) -> None:
    save_model(
        linear(dtype=dtype),
        files / "policy.onnx",
        save_as_external_data=outside,
        location="policy.data",
        size_threshold=70,  # onnxruntime itself wants shapes inside
    )
    version = make(files)
    policy = Policy.load(files / "out" / version)
    state = np.random.default_rng(3).normal(0, 1, (6, 3)).astype(np.float32)
    mean, log_std = policy.infer({"state": state})
    plain = ort.InferenceSession(files / "policy.onnx", providers=["CPUExecutionProvider"])
    expected = plain.run(None, {"state": state})
    assert np.allclose(mean, expected[0], atol=1e-6)
    assert np.allclose(log_std, -1.5)
    assert policy.spec.control_hz == 10.0


def test_weights_are_outside_the_graph_and_notes_are_gone(files: Path) -> None:
    bundle = read_bundle(files / "out" / make(files))
    assert sorted(bundle.weights) == ["W", "bias"]
    assert bundle.weights["W"].tobytes() not in bundle.graph
    assert b"somebody" not in bundle.graph
    assert len(bundle.probe_outputs["action_mean"]) > 1


def test_making_it_again_gives_the_same_version(files: Path) -> None:
    assert make(files) == make(files)
    assert len(list((files / "out").iterdir())) == 1


def test_images_and_instructions(files: Path) -> None:
    save_model(seeing(), files / "policy.onnx")
    (files / "spec.yaml").write_text(SEEING)
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefgh")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(files / "tokenizer.json"))
    policy = Policy.load(files / "out" / make(files, files / "tokenizer.json"))
    tokens = policy.tokens("bad")
    assert tokens.tolist() == [1, 0, 3, 0, 0, 0, 0]
    assert policy.tokens("bad") is tokens
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    image = np.full((1, 5, 6, 3), 100, np.uint8)
    mean, _ = policy.infer({"image/eye": image, "state": np.zeros((1, 3), np.float32), "tokens": tokens[None]})
    assert np.allclose(mean, (100 + 4 / 7) / 1000)
    with pytest.raises(BundleError, match="a tokenizer is needed"):
        make(files)


def test_what_does_not_fit_is_refused_and_nothing_is_written(files: Path) -> None:
    cases: list[tuple[ModelProto, str]] = [
        (linear(batch=1), "must be dynamic"),
        (linear(out="std"), "action_log_std is missing"),
        (seeing(), "has the inputs"),
    ]
    for made, message in cases:
        save_model(made, files / "policy.onnx")
        with pytest.raises(BundleError, match=message):
            make(files)
    nan = linear()
    nan.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((3, 8), np.nan, np.float32), "W"))
    save_model(nan, files / "policy.onnx")
    with pytest.raises(BundleError, match="not finite"):
        make(files)
    (files / "policy.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match="cannot be read as ONNX"):
        make(files)
    (files / "policy.onnx").unlink()
    with pytest.raises(BundleError, match="cannot be read as ONNX"):
        make(files)
    assert not (files / "out").exists()


def test_a_wrong_spec_is_named_with_its_file(files: Path) -> None:
    (files / "spec.yaml").write_text(SPEC.replace("horizon: 4", "horizon: 0"))
    with pytest.raises(ConfigError, match=r"spec.yaml: \$.horizon"):
        make(files)
    (files / "spec.yaml").write_text(SPEC.replace("horizon", "horizn"))
    with pytest.raises(ConfigError, match="did you mean `horizon`"):
        make(files)
    (files / "spec.yaml").write_text(SPEC.replace("horizon: 4", "horizon: 5"))
    with pytest.raises(BundleError, match="action_mean is"):
        make(files)


def test_without_onnx_it_says_what_to_install(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BundleError, match=r"fieldtune\[trainer\]"):
        make(files)
