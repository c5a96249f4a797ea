"""Policies that ship: each is sound and small, and a fresh clone evaluates and trains them by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldtune import deployment
from fieldtune.cli import run
from fieldtune.deployment import shipped_bundles
from runtime.policy import Policy
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.evaluate import load_evaluation

ROOT = Path(__file__).resolve().parents[2]
LARGEST_BYTES = 10_000_000
QUICK = ("--set", "trainer.demos.per_task=2", "--set", "trainer.sft.steps=3")
TinyBundle = Callable[..., str]


def check_shipped(path: Path) -> None:
    assert Policy.load(path).version
    assert sum(part.stat().st_size for part in path.iterdir()) < LARGEST_BYTES


@pytest.mark.parametrize("name", shipped_bundles())
def test_every_shipped_policy_is_sound_and_small(name: str) -> None:
    check_shipped(shipped_bundles()[name])


@pytest.fixture
def clone(tmp_path: Path, tiny_bundle: TinyBundle) -> Path:
    """A checkout that ships one policy, `made`, and has no run."""
    checkout = tmp_path / "checkout"
    for part in ("bridge", "runtime", "trainer", "fieldtune", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__", "policies"))
    version = tiny_bundle(tmp_path, 0.5)
    shutil.copytree(tmp_path / version, checkout / "configs" / "policies" / "made")
    return checkout


def fieldtune(*arguments: str, checkout: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of this checkout, in the directory above it."""
    done = subprocess.run(
        [sys.executable, "-m", "fieldtune", *arguments],
        cwd=checkout.parent,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=150,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def ask(*arguments: str, checkout: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(fieldtune(*arguments, "--json", checkout=checkout).stdout)
    return answer


def test_a_policy_that_does_not_compute_what_its_probe_says_is_found(tmp_path: Path, tiny_bundle: TinyBundle) -> None:
    check_shipped(tmp_path / tiny_bundle(tmp_path, 1.0))
    with pytest.raises(Exception, match="probe"):
        check_shipped(tmp_path / tiny_bundle(tmp_path, 1.0, claimed=2.0))


@pytest.mark.slow
def test_a_fresh_clone_evaluates_a_shipped_policy_by_name(clone: Path) -> None:
    (row,) = ask("bundle", "list", checkout=clone)["bundles"]
    version = row["version"]
    assert (row["name"], row["spec"]["horizon"]) == ("made", 4) and 0 < row["size_mb"] < 1
    assert "made" in fieldtune("bundle", "list", checkout=clone).stdout
    assert ask("bundle", "verify", "made", checkout=clone)["version"] == version

    evaluation = ("eval", "point", "--episodes", "3")
    first = ask(*evaluation, "--policy", "made", checkout=clone)
    assert (first["version"], first["overall"]["n"]) == (version, 3)
    run = RunDir(clone.parent / "runs" / "point")
    # Three goals are not those that the configuration compares versions on: nothing takes this for the result.
    assert json.loads((run.evaluation(version) / "result-2000000-3.json").read_text()) == first
    assert load_evaluation(run, version) is None
    (listed,) = Registry(run.registry).list()
    assert (listed.version, listed.live) == (version, False)
    assert listed.made == {"command": "import", "from": "made"}
    # By its directory and in another run: the same figures. By its version: what is there already.
    path = str(clone / "configs" / "policies" / "made")
    again = ask(*evaluation, "--policy", path, "--set", "runs=elsewhere", checkout=clone)
    assert again["trials"] == first["trials"]
    assert ask(*evaluation, "--policy", version[:8], checkout=clone) == first
    # The run has not begun: there is still nothing to serve.
    assert "no version yet" in fieldtune("eval", "point", checkout=clone, code=1).stderr


def test_what_is_neither_a_version_nor_a_bundle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "point", "--policy", "nosuch"]) == 1
    message = capsys.readouterr().err
    assert "no version begins with 'nosuch'" in message and "no shipped policy of that name" in message
    assert not (tmp_path / "runs" / "point" / "eval").exists()


WIDE = """
from bridge.backends.point import Point, PointOptions
from msgspec.structs import replace


class Wide(Point):
    def __init__(self):
        super().__init__(PointOptions(size_px=32))
        self._spec = replace(self._spec, action=replace(self._spec.action, high=(2.0, 1.0)))
"""


@pytest.fixture
def shipped(tmp_path: Path, tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    """Ship the configuration `point` and one policy, `made`, and run in an empty directory."""
    monkeypatch.setattr(deployment, "shipped_configs", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs" / "point.yaml", tmp_path)

    def ship(**changes: Any) -> str:
        version = tiny_bundle(tmp_path / "policies", 0.5, **changes)
        (tmp_path / "policies" / version).rename(tmp_path / "policies" / "made")
        return version

    return ship


@pytest.mark.parametrize("line", ["eval point --policy made", "policies add point made"])
@pytest.mark.parametrize(
    ("changes", "settings", "field"),
    [
        ({"control_hz": 20.0}, (), "spec.control_hz"),
        ({}, ("--set", "backend={name: 'robots:Wide'}"), "spec.action.high[0]"),
    ],
)
def test_a_policy_for_another_robot_is_refused_by_field(
    line: str,
    changes: dict[str, Any],
    settings: tuple[str, ...],
    field: str,
    tmp_path: Path,
    shipped: TinyBundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "robots.py").write_text(WIDE)
    monkeypatch.syspath_prepend(tmp_path)
    shipped(**changes)
    assert run([*line.split(), *settings]) == 1
    assert field in capsys.readouterr().err
    assert Registry(RunDir(tmp_path / "runs" / "point").registry).list() == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("up point", "$.trainer.vla.max_tokens: is 16, the policy made has 0"),
        ("up point --set trainer.vla.horizon_steps=8", "$.trainer.vla.horizon_steps: is 8, the policy made has 4"),
        ("up point --set trainer.policy=mede", "mede: no such directory, and no shipped policy of that name (made)"),
        ("sft point", "$.trainer.policy: the run starts from made as it is"),
        ("pretrain point", "$.trainer.policy: the run starts from made as it is"),
    ],
)
def test_a_start_that_cannot_go_well_is_refused_before_demonstrations_are_collected(
    line: str,
    message: str,
    tmp_path: Path,
    shipped: TinyBundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped()
    command, config, *settings = line.split()
    assert run([command, config, "--set", "trainer.policy=made", *settings]) == 2
    assert message in capsys.readouterr().err
    assert not RunDir(tmp_path / "runs" / "point").demos.exists()
    assert Registry(RunDir(tmp_path / "runs" / "point").registry).list() == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_deployment_goes_on_from_a_shipped_policy_as_it_is(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone.parent)
    source = (*QUICK, "--set", "name=source")
    ask("demos", "point", *source, checkout=clone)
    version = ask("sft", "point", *source, checkout=clone)["version"]
    shutil.copytree(
        RunDir(clone.parent / "runs" / "source").policies / version, clone / "configs" / "policies" / "mt10"
    )
    small = (*QUICK, "--set", "trainer.stop.iterations=1", "--set", "trainer.evaluate.episodes_per_task=3")
    # One that is only evaluated is not what the run started from.
    ask("eval", "point", *small, "--policy", "made", checkout=clone)

    report = ask(
        "up", "point", *small, "--set", "trainer.policy=mt10", "--set", "trainer.ppo.sigma=0.3", checkout=clone
    )
    assert report["before"]["version"] == version
    directory = RunDir(clone.parent / "runs" / "point")
    assert directory.demos.exists() and not directory.sft.exists()
    first, explores = Registry(directory.registry).served()
    assert first.version == version and first.made == {"command": "import", "from": "mt10"}
    assert explores.made["command"] == "explore" and explores.parent == version
    (line,) = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert line["buffer_steps_by_task"]["reach"] > 0, "the demonstrations are in the buffer"

    assert run(["up", "point", *small, "--set", "trainer.policy=made"]) == 2
    assert "$.trainer.policy: is made, but the run has started from another version" in capsys.readouterr().err
