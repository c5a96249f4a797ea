"""A bundle is whole and what its name says, or it is refused by part."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import load, save

from bridge.backend import ActionSpec, CameraSpec, VectorSpec
from runtime import bundle as module
from runtime.bundle import (
    FORMAT,
    PARTS,
    BundleError,
    PolicySpec,
    graph_inputs,
    install_bundle,
    probe_part,
    read_bundle,
    tensor_part,
    version_id,
    write_bundle,
)

TinyBundle = Callable[..., str]
SPEC = PolicySpec(
    format=FORMAT,
    name="small",
    cameras=(),
    state=VectorSpec(("x",), ("m",)),
    action=ActionSpec(("a", "b"), ("1", "1"), (-1.0, 0.0), (1.0, 2.0), "delta"),
    control_hz=10.0,
    horizon=3,
    tokens=0,
)
finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=12)


def parts_of(spec: PolicySpec = SPEC) -> dict[str, bytes]:
    """Parts that fit the spec; the graph is not looked at here."""
    chunk = (2, spec.horizon, len(spec.action.names))
    inputs = {name: np.ones((2, *shape), dtype) for name, (dtype, shape) in graph_inputs(spec).items()}
    outputs = {"action_mean": np.zeros(chunk, np.float32), "action_log_std": np.full(chunk, -1, np.float32)}
    return {
        "graph.onnx": b"graph",
        "weights.safetensors": tensor_part({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        "tokenizer.json": b"{}" if spec.tokens else b"",
        "probe.safetensors": probe_part(inputs, outputs),
    }


def changed(path: Path, part: str, data: bytes, name: str = "copied") -> Path:
    """A copy of the bundle, under a name that is no id, with another content of one part."""
    copy = path.parent / name
    shutil.copytree(path, copy)
    (copy / part).write_bytes(data)
    return copy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / write_bundle(tmp_path, SPEC, parts_of())


def refusal(path: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        read_bundle(path)
    return caught.value


def test_what_was_written_is_read(path: Path) -> None:
    bundle = read_bundle(path)
    assert bundle.version == path.name
    assert bundle.spec == SPEC
    assert bundle.graph == b"graph"
    assert bundle.weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bundle.probe_inputs["state"].shape == (2, 1)
    assert bundle.probe_outputs["action_log_std"].shape == (2, 3, 2)
    assert sorted(file.name for file in path.iterdir()) == sorted(PARTS)


def test_the_version_is_the_hash_of_names_lengths_and_bytes() -> None:
    parts = {"b": b"22", "a": b"1"}
    assert version_id(parts) == hashlib.sha256(b"a\x001\x001" + b"b\x002\x0022").hexdigest()
    assert len({version_id(p) for p in ({"a": b"1", "b": b""}, {"a": b"", "b": b"1"}, {"a": b"1"}, {"a1": b""})}) == 4


def test_a_view_is_written_as_the_numbers_that_it_shows() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = load(tensor_part({"t": rows.T, "e": np.broadcast_to(rows[0], (2, 4)), "s": np.float32(7) + np.zeros(())}))
    assert np.array_equal(back["t"], rows.T)
    assert np.array_equal(back["e"], [rows[0], rows[0]])
    assert back["s"].shape == ()


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(path: Path, part: str) -> None:
    (path / part).unlink()
    assert refusal(path).part == part
    with pytest.raises(BundleError, match="has the parts"):
        write_bundle(path.parent, SPEC, {name: b"" for name in PARTS[1:] if name != part} if part in PARTS[1:] else {})


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_byte_is_another_version(path: Path, part: str) -> None:
    data = bytearray((path / part).read_bytes())
    data[len(data) // 2 :] = bytes([data[len(data) // 2] ^ 1, *data[len(data) // 2 + 1 :]]) if data else b"x"
    (path / part).write_bytes(data)
    error = refusal(path)
    assert error.part == "version"
    assert path.name[:12] in error.message


def test_the_name_of_the_directory_is_free_unless_it_is_an_id(path: Path) -> None:
    renamed = path.rename(path.parent / "my-best-policy")
    assert read_bundle(renamed).version == path.name
    assert refusal(renamed.rename(path.parent / ("0" * 64))).part == "version"


def test_only_regular_files_of_bounded_size_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / "notes.txt").write_text("")
    assert refusal(path).part == "notes.txt"
    (path / "notes.txt").unlink()
    monkeypatch.setitem(module.MAX_BYTES, "graph.onnx", 4)
    assert "at most 4" in refusal(path).message
    (path / "graph.onnx").unlink()
    os.mkfifo(path / "graph.onnx")
    assert "not a regular file" in refusal(path).message
    (path / "graph.onnx").unlink()
    (path / "graph.onnx").mkdir()
    assert refusal(path).part == "graph.onnx"
    assert refusal(path.parent / "nowhere").part == "bundle"


def test_writing_again_changes_nothing_and_damage_is_not_taken_for_it(path: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert write_bundle(path.parent, SPEC, parts_of()) == path.name
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    (path / "graph.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match="damaged"):
        write_bundle(path.parent, SPEC, parts_of())


def test_many_may_write_the_same_bundle_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = set(pool.map(lambda _: write_bundle(tmp_path, SPEC, parts_of()), range(24)))
    (version,) = versions
    assert [entry.name for entry in tmp_path.iterdir()] == [version]
    assert read_bundle(tmp_path / version).spec == SPEC


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "file", SPEC, parts_of())
    bad = parts_of() | {"weights.safetensors": tensor_part({"w": np.array([np.nan], np.float32)})}
    with pytest.raises(BundleError, match="w holds a value that is not finite") as caught:
        write_bundle(tmp_path / "policies", SPEC, bad)
    assert caught.value.part == "weights.safetensors"
    assert not (tmp_path / "policies").exists()


def test_install_copies_once(path: Path, tmp_path: Path) -> None:
    source = path.rename(path.parent / "from-a-stick")
    policies = tmp_path / "run" / "policies"
    target = install_bundle(source, policies)
    assert target == policies / path.name
    assert read_bundle(target).version == path.name
    assert install_bundle(source, policies) == install_bundle(target, policies) == target
    (source / "graph.onnx").write_bytes(b"other")
    assert install_bundle(source, policies) != target


ACTION = SPEC.action


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("format", replace(SPEC, format=2)),
        ("cameras", replace(SPEC, cameras=(CameraSpec("a", 2, 2), CameraSpec("a", 2, 2)))),
        ("cameras", replace(SPEC, cameras=(CameraSpec("a", 0, 2),))),
        ("cameras", replace(SPEC, state=VectorSpec((), ()))),
        ("state.units", replace(SPEC, state=VectorSpec(("x",), ()))),
        ("state.names", replace(SPEC, state=VectorSpec(("x", "x"), ("m", "m")))),
        ("action.names", replace(SPEC, action=ActionSpec((), (), (), (), "delta"))),
        ("action.units", replace(SPEC, action=replace(ACTION, units=("1",)))),
        ("action.low", replace(SPEC, action=replace(ACTION, low=(-1.0, 2.0)))),
        ("action.low", replace(SPEC, action=replace(ACTION, low=(-1.0,)))),
        ("action.low", replace(SPEC, action=replace(ACTION, high=(1.0, float("inf"))))),
        ("control_hz", replace(SPEC, control_hz=0.0)),
        ("horizon", replace(SPEC, horizon=0)),
        ("tokens", replace(SPEC, tokens=-1)),
        ("noise_correlation", replace(SPEC, noise_correlation=1.0)),
        ("noise_correlation", replace(SPEC, noise_correlation=-0.1)),
        ("noise_correlation", replace(SPEC, noise_correlation=float("nan"))),
        ("made", replace(SPEC, made={"day": b"bytes"})),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_by_field(tmp_path: Path, field: str, spec: PolicySpec) -> None:
    with pytest.raises(BundleError) as caught:
        write_bundle(tmp_path, spec, parts_of())
    assert caught.value.part == "policy.yaml"
    assert f"$.{field}" in caught.value.message or "made" in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: [", "not valid YAML"),
        ("format: 1", "missing required field"),
        ("horizon: eight", r"\$.horizon: Expected `int`"),
        ("horizn: 8", "did you mean"),
        ("made: {day: 2024-99-99}", "month"),
        ("made: {day: 2024-09-09}", r"\$.made"),
        ("made: " + "[" * 5000, "recursion"),
        ("made: {a: &a [1], b: [*a, *a]}", "anchor"),
        ("name: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_policy_yaml_that_cannot_be_read_is_refused(path: Path, text: str, message: str) -> None:
    lines = (path / "policy.yaml").read_text().splitlines()
    key = text.partition(":")[0]
    kept = [] if text in ("format: [", "format: 1") else [line for line in lines if not line.startswith(f"{key}:")]
    copy = changed(path, "policy.yaml", "\n".join([*kept, text]).encode())
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(copy)
    assert caught.value.part == "policy.yaml"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input.state": None}, "holds"),
        ({"extra": np.zeros(1, np.float32)}, "holds"),
        ({"input.state": np.zeros((2, 2), np.float32)}, r"input.state is float32\[2, 2\], expected float32\[2, 1\]"),
        ({"input.state": np.zeros((2, 1))}, "input.state is float64"),
        ({"input.state": np.zeros((3, 1), np.float32)}, r"expected float32\[2, 1\]"),
        ({"output.action_mean": np.zeros((0, 3, 2), np.float32)}, "no observation"),
        ({"output.action_mean": np.float32(1) + np.zeros(())}, "no observation|expected"),
        ({"output.action_log_std": np.full((2, 3, 2), np.inf, np.float32)}, "not finite"),
    ],
)
def test_a_probe_that_does_not_fit_the_spec_is_refused(path: Path, arrays: dict[str, Any], message: str) -> None:
    probe = load((path / "probe.safetensors").read_bytes()) | arrays
    data = save({name: np.asarray(array) for name, array in probe.items() if array is not None})
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(changed(path, "probe.safetensors", data))
    assert caught.value.part == "probe.safetensors"


def test_a_policy_that_reads_instructions_needs_a_tokenizer(path: Path) -> None:
    spec = replace(SPEC, tokens=4)
    with pytest.raises(BundleError, match="is empty"):
        write_bundle(path.parent, spec, parts_of(spec) | {"tokenizer.json": b""})
    assert refusal(changed(path, "tokenizer.json", b"\xff")).part == "tokenizer.json"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.binary(max_size=200), part=st.sampled_from(["policy.yaml", "weights.safetensors", "probe.safetensors"]))
@example(data=b"\xff" * 8 + b"{}", part="weights.safetensors")
@example(data=(2).to_bytes(8, "little") + b"{}", part="probe.safetensors")
@example(data=b"a: &a", part="policy.yaml")
def test_no_bytes_do_anything_but_raise_a_bundle_error(path: Path, data: bytes, part: str) -> None:
    copy = path.parent / "fuzzed"
    if not copy.exists():
        shutil.copytree(path, copy)
    for name in PARTS:
        shutil.copyfile(path / name, copy / name)
    (copy / part).write_bytes(data)
    try:
        read_bundle(copy)
    except BundleError as error:
        assert error.part == part
    else:
        assert part == "weights.safetensors"
        assert load(data) == {}


VALUES = st.recursive(words | finite | st.integers() | st.booleans() | st.none(), st.lists, max_leaves=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@example(
    name="1e5", unit="\x85", limits=(0.1, 1e300), rate=1e-6, made={"commit": "1234e56", "null": ["no", "1:30", ""]}
)
@given(
    name=words,
    unit=words,
    limits=st.tuples(finite, finite).filter(lambda pair: pair[0] < pair[1]),
    rate=st.floats(1e-6, 1e9),
    made=st.dictionaries(words, VALUES, max_size=4),
)
def test_every_spec_comes_back_as_it_was(
    tmp_path: Path, name: str, unit: str, limits: tuple[float, float], rate: float, made: dict[str, Any]
) -> None:
    action = ActionSpec(("a", name + "b"), (unit, "1"), (limits[0], -1.0), (limits[1], 1.0), "absolute")
    spec = replace(SPEC, name=name, action=action, control_hz=rate, made=made)
    version = write_bundle(tmp_path, spec, parts_of())
    read = read_bundle(tmp_path / version)
    assert read.spec == spec
