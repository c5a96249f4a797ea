"""A policy is loaded and proven, or refused by part; its Gaussian is the one that the trainer computes with."""

import gc
import math
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import load, save
from scipy.stats import multivariate_normal
from tokenizers import Tokenizer, models, pre_tokenizers

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, VectorSpec
from bridge.messages import WireError
from runtime.bundle import FORMAT, BundleError, PolicySpec
from runtime.policy import InstructionError, Policy, compare_specs, encode, log_prob, sample_chunk

TinyBundle = Callable[..., str]


@pytest.fixture
def path(tmp_path: Path, tiny_bundle: TinyBundle) -> Path:
    """mean = 0.25 * (1 + sum of the state), log_std = -3."""
    return tmp_path / tiny_bundle(tmp_path, 0.25)


def states(policy: Policy, batch: int) -> np.ndarray[Any, Any]:
    n = len(policy.spec.state.names)
    return np.random.default_rng(batch).uniform(-1, 1, (batch, n)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_computes_what_the_bundle_says(path: Path, batch: int) -> None:
    policy = Policy.load(path)
    state = states(policy, batch)
    mean, log_std = policy.infer({"state": state, "image/not-asked-for": np.zeros(1, np.uint8)})
    assert mean.shape == log_std.shape == (batch, policy.spec.horizon, len(policy.spec.action.names))
    assert mean.dtype == log_std.dtype == np.float32
    assert np.allclose(mean, 0.25 * (1 + state.sum(1))[:, None, None], atol=1e-6)
    assert (log_std == -3).all()
    assert policy.version == path.name
    assert policy.tokens("anything").shape == (0,)


def test_one_that_nobody_holds_is_freed_at_once(path: Path) -> None:
    gc.disable()
    try:
        policy = Policy.load(path)
        policy.tokens("anything")
        gone = weakref.ref(policy)
        del policy
        assert gone() is None
    finally:
        gc.enable()


def test_threads_do_not_mix_their_requests(path: Path) -> None:
    policy = Policy.load(path)

    def one(i: int) -> bool:
        state = np.full((1 + i % 3, len(policy.spec.state.names)), i / 100, np.float32)
        mean, _ = policy.infer({"state": state})
        return np.allclose(mean, 0.25 * (1 + state.sum(1))[:, None, None], atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(200)))


def changed(path: Path, part: str, data: bytes) -> Path:
    copy = path.parent / "copy"
    shutil.copytree(path, copy)
    (copy / part).write_bytes(data)
    return copy


@pytest.mark.parametrize(
    ("weights", "part", "message"),
    [
        ({"bias": None}, "weights.safetensors", "does not fit"),
        ({"unknown": np.zeros(3, np.float32)}, "weights.safetensors", "unknown"),
        ({"bias": np.zeros((1, 1), np.float32)}, "weights.safetensors", "dimensions"),
        ({"bias": np.zeros((4, 2))}, "weights.safetensors", "does not fit"),
        ({"slope": np.full((2, 8), 0.2501, np.float32)}, "", ""),
        ({"slope": np.full((2, 8), 0.26, np.float32)}, "probe.safetensors", "differs by"),
        ({"spread": np.full((4, 2), -2.9, np.float32)}, "probe.safetensors", "action_log_std differs"),
        ({"slope": np.full((2, 8), 3e38, np.float32)}, "probe.safetensors", "not finite"),
        ({"slope": np.full((2, 8), np.nan, np.float32)}, "weights.safetensors", "slope holds a value"),
    ],
)
def test_weights_that_are_not_those_of_the_probe_are_refused(
    path: Path, weights: dict[str, Any], part: str, message: str
) -> None:
    arrays = load((path / "weights.safetensors").read_bytes()) | weights
    copy = changed(path, "weights.safetensors", save({k: v for k, v in arrays.items() if v is not None}))
    if not part:
        Policy.load(copy)  # the tolerance is for other processors
        return
    with pytest.raises(BundleError, match=message) as caught:
        Policy.load(copy)
    assert caught.value.part == part


def test_a_weight_that_is_missing_is_not_looked_for_on_the_disk(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = load((path / "weights.safetensors").read_bytes())
    del arrays["bias"]
    copy = changed(path, "weights.safetensors", save(arrays))
    (tmp_path / "weights.bin").write_bytes(b"\0" * 1024)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError):
        Policy.load(copy)


def graph(batch: str | int = "B", out: str = "action_mean", kind: int = 1, inputs: int = 2, d: int = 2) -> bytes:
    """A graph without weights: both outputs are zeros in the shape of a chunk."""
    from onnx import helper

    info = helper.make_tensor_value_info
    outputs = [info(name, 1, [batch, 4, d]) for name in (out, "action_log_std")]
    nodes = [
        helper.make_node("Cast", ["state"], ["float"], to=1),
        helper.make_node("ReduceSum", ["float", "axes"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zeros"], [out]),
        helper.make_node("Mul", ["sum", "zeros"], ["action_log_std"]),
    ]
    constants = [
        helper.make_tensor("axes", 7, [1], [1]),
        helper.make_tensor("zeros", 1, [1, 4, d], [0.0] * 4 * d),
    ]
    nodes.insert(2, helper.make_node("Unsqueeze", ["sum", "axes"], ["sums"]))
    nodes[3].input[0] = nodes[4].input[0] = "sums"
    made = helper.make_graph(nodes, "g", [info("state", kind, [batch, inputs])], outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a graph", "does not fit"),
        (graph(batch=3), "must be dynamic"),
        (graph(out="mean"), "action_mean is missing"),
        (graph(inputs=3), r"state is tensor\(float\)\['B', 3\], expected float32\['B', 2\]"),
        (graph(kind=11), "expected float32"),
        (graph(d=3), "action_mean is"),
    ],
)
def test_a_graph_that_is_not_that_of_the_spec_is_refused(path: Path, data: bytes, message: str) -> None:
    copy = changed(path, "graph.onnx", data)
    (copy / "weights.safetensors").write_bytes(save({}))
    with pytest.raises(BundleError, match=message) as caught:
        Policy.load(copy)
    assert caught.value.part == "graph.onnx"


def test_the_graph_needs_exactly_the_inputs_of_the_spec(tmp_path: Path, tiny_bundle: TinyBundle) -> None:
    camera = (CameraSpec("eye", 4, 4),)
    with pytest.raises(BundleError, match=r"input\.image/eye"):
        tiny_bundle(tmp_path, 0.5, cameras=camera)
    path = tmp_path / tiny_bundle(tmp_path, 0.5)
    copy = changed(path, "policy.yaml", (path / "policy.yaml").read_bytes().replace(b"cameras: []", CAMERA))
    probe = load((path / "probe.safetensors").read_bytes())
    probe["input.image/eye"] = np.zeros((len(probe["input.state"]), 4, 4, 3), np.uint8)
    (copy / "probe.safetensors").write_bytes(save(probe))
    with pytest.raises(BundleError, match="has the inputs state, the spec asks for image/eye, state"):
        Policy.load(copy)


CAMERA = b"cameras: [{name: eye, height: 4, width: 4}]"


# --- tokens -----------------------------------------------------------------------------------------------------------


def letters() -> Tokenizer:
    """A token for each letter; 0 is a."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefgh")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_tokens_are_padded_as_the_tokenizer_says() -> None:
    tokenizer = letters()
    assert encode(tokenizer, "bad", 5).tolist() == [1, 0, 3, 0, 0]
    tokenizer.enable_padding(pad_id=7, direction="right")
    assert encode(tokenizer, "bad", 5).tolist() == [1, 0, 3, 7, 7]
    tokenizer.enable_padding(pad_id=7, direction="left", length=5)
    assert encode(tokenizer, "bad", 5).tolist() == [7, 7, 1, 0, 3]
    assert encode(tokenizer, "bad", 5).dtype == np.int64


def test_a_long_instruction_is_refused_not_cut() -> None:
    tokenizer = letters()
    assert encode(tokenizer, "abcde", 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InstructionError, match="has 6 tokens, the policy takes 5"):
        encode(tokenizer, "abcdef", 5)
    tokenizer.enable_truncation(5)
    with pytest.raises(InstructionError, match="has 6 tokens"):
        encode(tokenizer, "abcdef", 5)


# --- the Gaussian -----------------------------------------------------------------------------------------------------


def test_log_prob_known_answers() -> None:
    one = np.zeros((1, 1), np.float32)
    assert log_prob(one, one, one, 0.0)[0] == pytest.approx(-0.5 * math.log(2 * math.pi))
    # N(1.5; 1, 0.5) has z = 1, so log p = -1/2 - log 0.5 - log sqrt(2 pi); two equal elements double it.
    actions, mean = np.full((3, 2), 1.5, np.float32), np.ones((3, 2), np.float32)
    expected = 2 * (-0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi))
    result = log_prob(actions, mean, np.full((3, 2), math.log(0.5), np.float32), 0.0)
    assert result.dtype == np.float32
    assert result.tolist() == pytest.approx([expected] * 3, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1), h=st.integers(1, 4), d=st.integers(1, 4))
def test_a_chunk_is_mean_plus_sigma_times_noise(seed: int, h: int, d: int) -> None:
    mean = np.random.default_rng(1).uniform(-2, 2, (h, d)).astype(np.float32)
    log_std = np.random.default_rng(2).uniform(-3, 1, (h, d)).astype(np.float32)
    actions = sample_chunk(mean, log_std, 0.0, np.random.default_rng(seed))
    noise = np.random.default_rng(seed).standard_normal((h, d))
    assert actions.dtype == np.float32
    assert np.allclose(actions, mean + np.exp(log_std) * noise, atol=1e-5)
    # In terms of the noise, log p = -noise^2 / 2 - log_std - log sqrt(2 pi).
    expected = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    assert np.allclose(log_prob(actions, mean, log_std, 0.0), expected, atol=1e-3)


def chunk_of(h: int, d: int, rho: float, seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Actions, mean and log_std `[h, d]`, with another standard deviation for each action."""
    rng = np.random.default_rng(seed)
    mean, log_std = (rng.uniform(-2, 1, (h, d)).astype(np.float32) for _ in range(2))
    return sample_chunk(mean, log_std, rho, rng), mean, log_std


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_log_prob_of_a_prefix_is_that_of_the_explicit_covariance(rho: float, k: int) -> None:
    actions, mean, log_std = chunk_of(8, 3, rho, seed=k)
    std = np.exp(log_std[:k].astype(np.float64))
    correlation = rho ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
    expected = sum(
        multivariate_normal(mean[:k, j], correlation * np.outer(std[:, j], std[:, j])).logpdf(actions[:k, j])
        for j in range(3)
    )
    assert log_prob(actions, mean, log_std, rho)[:k].sum() == pytest.approx(expected, abs=1e-3)


@given(seed=st.integers(0, 1000), h=st.integers(1, 6), rho=st.floats(0, 0.95), data=st.data())
def test_what_comes_after_a_prefix_does_not_change_its_log_prob(
    seed: int, h: int, rho: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, h))
    actions, mean, log_std = chunk_of(h, 2, rho, seed)
    prefix = log_prob(actions[:k], mean[:k], log_std[:k], rho)
    actions[k:], mean[k:] = 9.0, -9.0
    assert np.array_equal(log_prob(actions, mean, log_std, rho)[:k], prefix)
    together = np.stack([actions, mean])
    batched = log_prob(together, np.stack([mean, mean]), np.stack([log_std, log_std]), rho)
    assert np.array_equal(batched[0, :k], prefix)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_noise_is_the_recursion_of_its_definition(rho: float) -> None:
    zeros = np.zeros((6, 3), np.float32)
    noise = np.random.default_rng(0).standard_normal((6, 3))
    for i in range(1, 6):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    assert sample_chunk(zeros, zeros, rho, np.random.default_rng(0)) == pytest.approx(noise, abs=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_noise_has_the_asked_correlation_and_its_standard_deviation(rho: float) -> None:
    mean = np.full((6, 4000), 0.5, np.float32)
    log_std = np.full_like(mean, math.log(0.2))
    z = (sample_chunk(mean, log_std, rho, np.random.default_rng(0)) - mean) / 0.2
    assert z.std(axis=1) == pytest.approx([1.0] * 6, abs=0.05)
    for lag in range(1, 4):
        measured = np.mean(z[lag:] * z[:-lag])
        assert measured == pytest.approx(rho**lag, abs=0.03)


# --- does the policy fit the robot? -----------------------------------------------------------------------------------

BACKEND = BackendSpec(
    name="arm",
    cameras=(CameraSpec("corner", 64, 48), CameraSpec("wrist", 32, 32)),
    state=VectorSpec(("x", "y"), ("m", "rad")),
    action=ActionSpec(("a", "b", "c"), ("m", "m", "1"), (-1.0, -1.0, 0.0), (1.0, 1.0, 0.1), "delta"),
    control_hz=20.0,
    instructions={},
)
POLICY = PolicySpec(
    format=FORMAT,
    name="policy",
    cameras=BACKEND.cameras[:1],
    state=BACKEND.state,
    action=BACKEND.action,
    control_hz=20.0,
    horizon=8,
    tokens=0,
)


def test_what_fits_is_accepted() -> None:
    compare_specs(POLICY, BACKEND)
    compare_specs(replace(POLICY, state=VectorSpec((), ())), BACKEND)
    single = float(np.float32(0.1))
    compare_specs(POLICY, replace(BACKEND, action=replace(BACKEND.action, high=(1.0, 1.0, single))))


def action(**changes: Any) -> BackendSpec:
    return replace(BACKEND, action=replace(BACKEND.action, **changes))


@pytest.mark.parametrize(
    ("field", "backend"),
    [
        ("spec.cameras.corner", replace(BACKEND, cameras=BACKEND.cameras[1:])),
        ("spec.cameras.corner.height", replace(BACKEND, cameras=(CameraSpec("corner", 65, 48),))),
        ("spec.cameras.corner.width", replace(BACKEND, cameras=(CameraSpec("corner", 64, 64),))),
        ("spec.state.names[0]", replace(BACKEND, state=VectorSpec(("y", "x"), ("m", "rad")))),
        ("spec.state.names", replace(BACKEND, state=VectorSpec(("x", "y", "z"), ("m", "rad", "m")))),
        ("spec.state.names", replace(BACKEND, state=VectorSpec(("x",), ("m",)))),
        ("spec.state.units[1]", replace(BACKEND, state=VectorSpec(("x", "y"), ("m", "deg")))),
        ("spec.action.names[2]", action(names=("a", "b", "d"))),
        ("spec.action.names", action(names=("a", "b"), units=("m", "m"), low=(-1.0, -1.0), high=(1.0, 1.0))),
        ("spec.action.units[0]", action(units=("cm", "m", "1"))),
        ("spec.action.kind", action(kind="absolute")),
        ("spec.action.low[1]", action(low=(-1.0, -2.0, 0.0))),
        ("spec.action.high[2]", action(high=(1.0, 1.0, 0.11))),
        ("spec.control_hz", replace(BACKEND, control_hz=50.0)),
    ],
)
def test_what_does_not_fit_is_refused_by_field(field: str, backend: BackendSpec) -> None:
    with pytest.raises(WireError) as caught:
        compare_specs(POLICY, backend)
    assert caught.value.field == field
