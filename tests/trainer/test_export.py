"""What torch computes is what the runtime serves, and a version gives its exact weights back."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from vla_samples import (
    CONFIG,
    SPEC,
    TOLD_CONFIG,
    TOLD_SPEC,
    arguments,
    observations,
    small_vla,
    tokenizer,
    told_vla,
)

import trainer
from bridge.backend import VectorSpec
from runtime.bundle import BundleError, read_bundle
from runtime.policy import Policy
from trainer.export import Exporter, ExportError, export, load_weights, weight_tensors
from trainer.vla import VLA

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported() -> Exporter:
    """The graph, exported once for all tests."""
    return Exporter(small_vla(), tokenizer(), observations(4))


@pytest.fixture
def vla() -> VLA:
    return small_vla(seed=1)


@pytest.fixture
def exporter(exported: Exporter, vla: VLA, tmp_path: Path) -> Iterator[Exporter]:
    """An exporter of `vla`, by the road that a resumed trainer takes."""
    first = read_bundle(tmp_path / exported.publish(tmp_path, parent="", made={}))
    load_weights(vla, first)
    return Exporter.of_bundle(vla, first)


def learn(vla: VLA) -> None:
    """One gradient step that moves every weight."""
    optimiser = torch.optim.Adam(vla.parameters(), lr=1e-3)
    mean, log_std = vla(*arguments(observations(4)))
    (mean.square().sum() + log_std.sum()).backward()
    optimiser.step()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_runtime_computes_what_torch_computes(exporter: Exporter, vla: VLA, tmp_path: Path, batch: int) -> None:
    learn(vla)
    policy = Policy.load(tmp_path / exporter.publish(tmp_path, parent="", made={}))
    arrays = observations(batch, seed=7)
    got = policy.infer(arrays)
    with torch.no_grad():
        wanted = vla(*arguments(arrays))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == (batch, 3, 2)
        assert np.abs(mine - theirs.numpy()).max() < 1e-5


def test_each_version_has_the_weights_of_its_moment(exporter: Exporter, vla: VLA, tmp_path: Path) -> None:
    first = exporter.publish(tmp_path, parent="", made={"step": 0})
    before = {name: tensor.clone() for name, tensor in vla.state_dict().items()}
    learn(vla)
    second = exporter.publish(tmp_path, parent=first, made={"step": 1})
    assert first != second
    bundles = read_bundle(tmp_path / first), read_bundle(tmp_path / second)
    assert bundles[0].graph == bundles[1].graph
    assert bundles[1].spec == replace(SPEC, parent=first, made={"step": 1})
    for bundle, weights in zip(bundles, (before, vla.state_dict()), strict=True):
        other = small_vla(seed=2)
        load_weights(other, bundle)
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    assert all(not torch.equal(before[name], parameter) for name, parameter in vla.named_parameters())
    # A resumed trainer that changed nothing makes the very same version.
    again = Exporter.of_bundle(other, bundles[1]).publish(tmp_path, parent=first, made={"step": 1})
    assert again == second


def test_weights_are_outside_the_graph_and_no_path_of_this_machine_is_inside(
    exporter: Exporter, vla: VLA, tmp_path: Path
) -> None:
    bundle = read_bundle(tmp_path / exporter.publish(tmp_path, parent="", made={}))
    assert set(bundle.weights) == set(vla.state_dict())
    assert {"state_mean", "state_std", "log_sigma"} < set(bundle.weights)
    for name, array in bundle.weights.items():
        assert array.nbytes < 64 or array.tobytes() not in bundle.graph, name
    assert str(Path(trainer.__file__).parent).encode() not in bundle.graph
    assert b".py" not in bundle.graph


def test_weights_of_another_version_do_not_replay(exporter: Exporter, vla: VLA, tmp_path: Path) -> None:
    first = tmp_path / exporter.publish(tmp_path, parent="", made={})
    learn(vla)
    second = tmp_path / exporter.publish(tmp_path, parent="", made={})
    mixed = first.rename(tmp_path / "mixed")
    (mixed / "weights.safetensors").write_bytes((second / "weights.safetensors").read_bytes())
    with pytest.raises(BundleError, match="not those that the probe was made with"):
        Policy.load(mixed)


def test_the_export_is_the_same_every_time(exported: Exporter, tmp_path: Path) -> None:
    version = export(small_vla(), tokenizer(), tmp_path, parent="", made={"by": "me"}, probe=observations(4))
    assert exported.publish(tmp_path, parent="", made={"by": "me"}) == version


def test_a_policy_without_cameras_and_state(tmp_path: Path) -> None:
    spec = replace(SPEC, cameras=(), state=VectorSpec((), ()))
    vla, arrays = small_vla(spec), observations(2, spec)
    version = Exporter(vla, tokenizer(), arrays).publish(tmp_path, parent="", made={})
    bundle = read_bundle(tmp_path / version)
    assert list(bundle.probe_inputs) == ["tokens"]
    mean, _ = Policy.load(tmp_path / version).infer({"tokens": arrays["tokens"][:1]})
    assert np.allclose(mean, vla(*arguments(arrays))[0][:1].detach(), atol=1e-5)
    load_weights(small_vla(spec, seed=3), bundle)


def test_a_policy_that_is_told_what_is_committed(tmp_path: Path) -> None:
    vla, probe = told_vla(), observations(4, TOLD_SPEC)
    assert {int(row.sum()) for row in probe["prefix_mask"]} == {0, 1, 2}
    version = Exporter(vla, tokenizer(), probe).publish(tmp_path, parent="", made={})
    bundle, policy = read_bundle(tmp_path / version), Policy.load(tmp_path / version)
    assert bundle.spec.prefix_steps == 2 and set(bundle.probe_inputs) > {"prefix", "prefix_mask"}
    for batch in (1, 5):
        arrays = observations(batch, TOLD_SPEC, seed=7)
        mean, _ = policy.infer(arrays)
        assert np.abs(mean - vla(*arguments(arrays))[0].detach().numpy()).max() < 1e-5
    other = small_vla(TOLD_SPEC, TOLD_CONFIG, seed=3)
    load_weights(other, bundle)
    assert torch.equal(other.prefix.weight, vla.prefix.weight)
    # One that cannot be told so much, or nothing, is another network.
    one = replace(TOLD_CONFIG, prefix_steps=1)
    for less in (small_vla(), small_vla(replace(TOLD_SPEC, prefix_steps=1), one)):
        with pytest.raises(BundleError, match=r"\$\.prefix_steps is 2"):
            load_weights(less, bundle)


def test_a_version_that_is_told_nothing_can_be_gone_on_from_by_one_that_is(
    exporter: Exporter, vla: VLA, tmp_path: Path
) -> None:
    bundle = read_bundle(tmp_path / exporter.publish(tmp_path, parent="", made={}))
    told, arrays = told_vla(seed=5), observations(4, TOLD_SPEC)
    load_weights(told, bundle)
    assert told.spec.prefix_steps == 2 and not told.prefix.weight.any()
    with torch.no_grad():
        assert torch.equal(told(*arguments(arrays))[0], vla(*arguments(arrays)[:3])[0])
    # Nothing else may be missing.
    del bundle.weights["head.bias"]
    with pytest.raises(BundleError, match=r"differ in head\.bias"):
        load_weights(told_vla(), bundle)


def test_what_must_not_be_exported_is_refused(exported: Exporter) -> None:
    graph = exported._graph
    unset = VLA(CONFIG, SPEC)
    with pytest.raises(ExportError, match="set_state_statistics"):
        Exporter(unset, tokenizer(), observations(2), graph=graph)
    small = small_vla(config=replace(CONFIG, vocabulary=200))
    with pytest.raises(ExportError, match="the VLA knows 200"):
        Exporter(small, tokenizer(), observations(2), graph=graph)
    for changes, message in (
        ({"state": None}, "has no state"),
        ({"state": np.zeros((2, 3))}, "is float64"),
        ({"image/wrist": np.zeros((2, 20, 12, 3), np.uint8)}, r"expected uint8\['B', 12, 20, 3\]"),
        ({"state": np.zeros((3, 3), np.float32)}, "different numbers"),
    ):
        arrays = {name: array for name, array in {**observations(2), **changes}.items() if array is not None}
        with pytest.raises(ExportError, match=message):
            Exporter(small_vla(), tokenizer(), arrays, graph=graph)
    with pytest.raises(ExportError, match="fewer than 2"):
        Exporter(small_vla(), tokenizer(), observations(1))


def test_a_graph_that_computes_something_else_is_refused(exported: Exporter) -> None:
    moved = replace(SPEC, action=replace(SPEC.action, low=(-1.0, -0.01)))
    with pytest.raises(ExportError, match=r"differ by 0\.00"):
        Exporter(small_vla(moved), tokenizer(), observations(2), graph=exported._graph)
    wide = small_vla(config=replace(CONFIG, width=24))
    with pytest.raises(ExportError, match="does not fit the VLA"):
        Exporter(wide, tokenizer(), observations(2), graph=exported._graph)


def test_broken_weights_are_not_published(exporter: Exporter, vla: VLA, tmp_path: Path) -> None:
    with torch.no_grad():
        vla.fusion[0].bias[3] = torch.inf  # type: ignore[index]
    count = len(list(tmp_path.iterdir()))
    with pytest.raises(BundleError, match=r"fusion\.0\.bias holds a value that is not finite"):
        exporter.publish(tmp_path, parent="", made={})
    assert len(list(tmp_path.iterdir())) == count


def test_a_bundle_of_another_network_is_not_loaded(exporter: Exporter, vla: VLA, tmp_path: Path) -> None:
    bundle = read_bundle(tmp_path / exporter.publish(tmp_path, parent="", made={}))
    for other, message in (
        (small_vla(config=replace(CONFIG, width=24)), r"this VLA has float32\[(\d+, )?24"),
        (small_vla(config=replace(CONFIG, channels=(6, 8, 6))), "differ in"),
        (small_vla(replace(SPEC, control_hz=20.0)), r"\$.control_hz is not that of this VLA"),
        (small_vla(replace(SPEC, cameras=SPEC.cameras[::-1])), r"\$.cameras"),
        (small_vla(replace(SPEC, noise_correlation=0.5)), r"\$.noise_correlation"),
    ):
        before = {name: tensor.clone() for name, tensor in weight_tensors(other).items()}
        with pytest.raises(BundleError, match=message):
            load_weights(other, bundle)
        assert all(torch.equal(tensor, before[name]) for name, tensor in weight_tensors(other).items())
