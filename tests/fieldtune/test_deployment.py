"""One file is one deployment: every shipped one loads, and what is wrong in one is named."""

from pathlib import Path

import pytest

from bridge.config import ConfigError
from fieldtune import deployment as deployments
from fieldtune.deployment import Deployment, config_names, find_bundle, find_config, load_deployment, shipped_bundles

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_by_path_and_by_name(path: Path) -> None:
    deployment = load_deployment(str(path))
    assert deployment == load_deployment(path.stem)
    assert path.stem in config_names()


def test_there_are_shipped_configurations() -> None:
    assert "quickstart" in config_names()


def test_a_minimal_deployment_has_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: {name: point}\n")
    deployment = load_deployment(str(path))
    assert deployment == Deployment(name="mine", backend=deployment.backend)
    assert deployment.run_dir == Path("runs/mine")
    assert load_deployment(str(path), ["runs=/data"]).run_dir == Path("/data/mine")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.ppo.lrr=1", ["$.trainer.ppo.lrr", "did you mean `lr`?"]),
        ("trainer.ppo.lr=0", ["$.trainer.ppo.lr", "> 0"]),
        ("trainer.ppo.gamma=1.5", ["$.trainer.ppo.gamma", "1.5", "<= 1"]),
        ("runtime.serve.max_batch=0", ["$.runtime.serve.max_batch", ">= 1"]),
        ("runtime.serve.endpoint=5", ["$.runtime.serve.endpoint", "Expected `str`"]),
        ("trainer.stop.minutes=soon", ["$.trainer.stop.minutes", "'soon'"]),
        ("trainer.vla.channels=[8, 0]", ["$.trainer.vla.channels[1]", ">= 1"]),
        ("trainer.vla.prefix_steps=8", ["$.trainer.vla", "prefix_steps 8 must be below horizon_steps 8"]),
        ("trainer.ppo.gamma=1", ["$.trainer.ppo", "gamma must be below 1"]),
        ("trainer.evaluate.first_seed=9960", ["$.trainer", "seeds 9960 to 10009 are trained on (train_first_seed"]),
        ("trainer.evaluate.first_seed=9", ["$.trainer", "seeds 9 to 58 are trained on (demos: seeds 0 to 49)"]),
        ("trainer.evaluate.first_seed=49", ["seeds 49 to 98 are trained on (demos: seeds 0 to 49)"]),
        ("bridge.give_up_after_s=.inf", ["$.bridge.give_up_after_s", "expected a finite number (found inf)"]),
        ("bridge.safety.low={vx: .nan}", ["$.bridge.safety.low.vx", "expected a finite number (found nan)"]),
        ("backend.options={a: [1, -.inf]}", ["$.backend.options.a[1]", "(found -inf)"]),
        ("runtme.serve.max_batch=1", ["$.runtme", "did you mean `runtime`?"]),
        ("seed=-1", ["$.seed", "-1", ">= 0"]),
        ("name=../elsewhere", ["$.name", "'../elsewhere'"]),
        ("name=a/b", ["$.name", "'a/b'"]),
        ("name=", ["$.name", "Expected `str`"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: {name: point}\n")
    with pytest.raises(ConfigError) as caught:
        load_deployment(str(path), [override])
    for part in parts:
        assert part in str(caught.value)


def test_what_may_be_learned_from_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: {name: point}\nruntime: {keep_versions: 3}\n")
    assert load_deployment(str(path), ["trainer.max_staleness_versions=4"]).runtime.keep_versions == 3
    with pytest.raises(ConfigError) as caught:
        load_deployment(str(path), ["trainer.max_staleness_versions=5"])
    assert "$.trainer.max_staleness_versions: is 5" in str(caught.value)
    assert "$.runtime.keep_versions 3" in str(caught.value)


def test_learning_rates_may_be_written_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbackend: {name: point}\ntrainer: {ppo: {lr: 1e-4}}\n")
    assert load_deployment(str(path)).trainer.ppo.lr == 1e-4
    assert load_deployment(str(path), ["trainer.ppo.lr=3e-5"]).trainer.ppo.lr == 3e-5


def test_an_unknown_configuration_lists_those_that_ship(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        find_config("quickstat")
    with pytest.raises(ConfigError, match="no such file"):
        find_config(str(tmp_path))


def test_a_bundle_is_found_by_directory_or_by_the_name_that_it_ships_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deployments, "shipped_configs", lambda: tmp_path / "configs")
    assert shipped_bundles() == {}
    with pytest.raises(ConfigError, match=r"^base: no such directory, and no shipped policy of that name \(none\)$"):
        find_bundle("base")
    for name in ("mt10", "base"):
        (tmp_path / "configs" / "policies" / name).mkdir(parents=True)
    (tmp_path / "configs" / "policies" / "base.md").write_text("what it is")
    assert list(shipped_bundles()) == ["base", "mt10"]
    assert find_bundle("base") == tmp_path / "configs" / "policies" / "base"
    assert find_bundle("configs/policies/mt10") == Path("configs/policies/mt10")
    for wrong in ("bas", "base.md", "../policies/base"):
        with pytest.raises(ConfigError, match=r"\(base, mt10\)"):
            find_bundle(wrong)
    (tmp_path / "base").mkdir()
    assert find_bundle("base") == Path("base"), "a directory of the user goes before what ships, as with configurations"
