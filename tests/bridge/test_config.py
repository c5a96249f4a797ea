"""Configuration: every mistake is named with its path, its value and what was expected."""

from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from bridge.config import BackendConfig, BridgeConfig, ConfigError, load_yaml, parse


class Inner(Struct, frozen=True, forbid_unknown_fields=True):
    lr: float = 1e-3
    steps: int = 10
    names: tuple[str, ...] = ()


class Outer(Struct, frozen=True, forbid_unknown_fields=True):
    backend: BackendConfig
    inner: Inner = Inner()
    maybe: Inner | None = None
    bridge: BridgeConfig = BridgeConfig()


def load(tmp_path: Path, text: str, *overrides: str) -> Outer:
    path = tmp_path / "deployment.yaml"
    path.write_text(text)
    return parse(load_yaml(path), Outer, str(path), overrides)


def error(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


BASE = "backend: {name: point}\n"


def test_a_good_file_is_read(tmp_path: Path) -> None:
    outer = load(tmp_path, BASE + "inner:\n  lr: 3e-4\n  names: [a, b]\n")
    assert outer.backend == BackendConfig("point")
    assert outer.inner.lr == 3e-4
    assert outer.inner.names == ("a", "b")
    assert outer.bridge.workers == 1


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", "1.0e-4", "0.0001", "100e-6", "1_0e-5"])
def test_numbers_in_any_notation_are_numbers(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, BASE + f"inner: {{lr: {text}}}").inner.lr == pytest.approx(1e-4)


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "inner: {names: ['1e-4', e4, 1e, v1e4]}").inner.names == ("1e-4", "e4", "1e", "v1e4")


def test_the_ordinary_loader_is_left_as_it_was() -> None:
    import yaml

    assert yaml.safe_load("1e-4") == "1e-4"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("inner: {lrr: 1}", ["$.inner.lrr", "unknown key", "did you mean `lr`?"]),
        ("inner: {qqqq: 1}", ["$.inner.qqqq", "unknown key", "known: lr, steps, names"]),
        ("maybe: {step: 1}", ["$.maybe.step", "did you mean `steps`?"]),
        ("bakend: {}", ["$.bakend", "did you mean `backend`?"]),
        ("inner: {lr: fast}", ["$.inner.lr", "'fast'", "Expected `float`"]),
        ("inner: {steps: 1.5}", ["$.inner.steps", "1.5", "Expected `int`"]),
        ("inner: {steps: '3'}", ["$.inner.steps", "'3'", "Expected `int`"]),
        ("inner: {names: [a, 3]}", ["$.inner.names[1]", "3", "Expected `str`"]),
        ("inner: 3", ["$.inner", "3", "Expected `object`"]),
        (
            "bridge: {safety: {low: {on: 1}}}",
            ["yaml: $.bridge.safety.low: Expected `str`", "as a key", "True"],
        ),
        ("bridge: {workers: -1}", ["$.bridge.workers", "-1", ">= 0"]),
        ("bridge: {horizon_steps: -5}", ["$.bridge.horizon_steps", "-5", ">= 1"]),
        ("bridge: {request_timeout_s: 0}", ["$.bridge.request_timeout_s", "0", "> 0"]),
        ("bridge: {give_up_after_s: -1.5}", ["$.bridge.give_up_after_s", "-1.5", "> 0"]),
    ],
)
def test_errors_name_path_value_and_expectation(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = error(tmp_path, BASE + text)
    for part in [str(tmp_path / "deployment.yaml"), *parts]:
        assert part in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "missing required field `backend`" in error(tmp_path, "inner: {}")
    assert "$.backend" in error(tmp_path, "backend: {}")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    assert "Expected `object`" in error(tmp_path, text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "a: *nobody", "a: 1\n b: 2", "a: 2024-13-45"])
def test_a_file_that_is_not_yaml(tmp_path: Path, text: str) -> None:
    assert "is not valid YAML" in error(tmp_path, text)


@pytest.mark.parametrize("text", ["bridge: {workers: 2}\nbridge: {niceness: 1}", "bridge: {workers: 2, workers: 3}"])
def test_a_key_that_is_given_twice_is_an_error(tmp_path: Path, text: str) -> None:
    key = "bridge" if "\n" in text else "workers"
    message = error(tmp_path, BASE + text)
    assert f"found the key `{key}` twice" in message and "line " in message


def test_a_merged_mapping_may_be_added_to(tmp_path: Path) -> None:
    text = "inner: &a {lr: 1, steps: 3}\nmaybe: {<<: *a, lr: 2}"
    assert load(tmp_path, BASE + text).maybe == Inner(2.0, 3)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {marker}']",
        "a: !!python/name:os.system",
        "a: !!python/tuple [1]",
        "a: !custom 1",
    ],
)
def test_tags_that_make_objects_are_refused(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "marker"
    assert "is not valid YAML" in error(tmp_path, text.replace("{marker}", str(marker)))
    assert not marker.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")


def test_overrides_replace_add_and_are_checked(tmp_path: Path) -> None:
    outer = load(
        tmp_path,
        BASE + "inner: {lr: 1, steps: 3}",
        "inner.lr=2e-5",
        "inner.names=[x, y]",
        "backend.options.size_px=32",
        "maybe.steps=7",
        "bridge.endpoint=tcp://127.0.0.1:5555",
        "maybe.lr=0.5",
    )
    assert outer.inner == Inner(2e-5, 3, ("x", "y"))
    assert outer.backend.options == {"size_px": 32}
    assert outer.maybe == Inner(0.5, 7)
    assert outer.bridge.endpoint == "tcp://127.0.0.1:5555"
    assert load(tmp_path, BASE + "maybe: {lr: 1}", "maybe=null").maybe is None


@pytest.mark.parametrize(
    "override", ["inner.lr", "=3", "inner..lr=3", ".lr=3", "inner.lr=[1", "inner.lr=2024-13-45", ""]
)
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in error(tmp_path, BASE, override)


def test_a_misspelt_override_is_an_error(tmp_path: Path) -> None:
    message = error(tmp_path, BASE, "iner.lr=3")
    assert "$.iner" in message and "did you mean `inner`?" in message


def test_overrides_leave_the_data_alone() -> None:
    data: dict[str, Any] = {"backend": {"name": "point"}, "inner": {"lr": 1.0}}
    parse(data, Outer, "here", ["inner.lr=2"])
    assert data == {"backend": {"name": "point"}, "inner": {"lr": 1.0}}
