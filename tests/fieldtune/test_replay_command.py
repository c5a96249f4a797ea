"""`fieldtune episodes replay` on a run whose episodes a real server logged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logged_run import Brief, log_run

from fieldtune.cli import run
from runtime.episode import Episode
from runtime.policy import Policy
from runtime.registry import Registry
from runtime.rundir import RunDir

CONFIG = "name: made\nbackend: {name: point, options: {size_px: 8}}\n"


@pytest.fixture
def made(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Episode], list[str]]:
    """A run `made` with two versions: its episodes, which the first one drove, and the ids of both."""
    files = RunDir(tmp_path / "runs" / "made")
    files.path.mkdir(parents=True)
    versions = [tiny_bundle(files.policies, value) for value in (0.25, 0.27)]
    for version in versions:
        Registry(files.registry).add(version, parent="", made={})
    episodes = log_run(serve, files.episodes, Policy.load(files.policies / versions[0]), Brief(), seeds=2, explore=True)
    (tmp_path / "made.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return episodes, versions


def ask(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert run(["episodes", "replay", "made.yaml", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_version_that_acted_and_another(
    made: tuple[list[Episode], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (episode, _), (acted, other) = made
    name = episode.start.episode
    found = ask(capsys, name)
    assert (found["episode"], found["policy"], len(found["decisions"])) == (name, None, 2)
    for row, decision in zip(found["decisions"], episode.decisions, strict=True):
        assert (row["version"], row["step"], row["executed"]) == (acted, decision.step, len(decision.sent))
        exact = {"actions": 0, "log_prob": 0, "log_ratio": 0, "identical": True, "reproduced": True}
        assert row["acted"] == exact and row["instead"] is None and row["mean"] is None
    # The same from the file alone, and beside another version.
    found = ask(capsys, f"runs/made/episodes/done/{name}.ep", "--policy", other[:8])
    assert found["policy"] == other
    for row, decision in zip(found["decisions"], episode.decisions, strict=True):
        gap = abs(0.02 * (1 + decision.observation.state.sum()))
        assert row["acted"]["identical"] and row["mean"] == pytest.approx(gap, abs=1e-6)
        assert row["instead"]["actions"] == pytest.approx(gap, abs=1e-6) and row["instead"]["log_ratio"] != 0

    assert run(["episodes", "replay", "made.yaml", name, "--policy", other]) == 0
    printed = capsys.readouterr().out
    assert "by the version that acted: 2 of 2 decisions to the bit" in printed
    assert f"by {other[:8]} instead" in printed and printed.count(f" {acted[:8]} ") == 2
    # As it counts, by its id; as it was written, by its file.
    said = "failure" if episode.success else "success"
    assert run(["episodes", "label", "made.yaml", name, said]) == 0
    for which, status in ((name, said), (f"runs/made/episodes/done/{name}.ep", episode.status)):
        assert run(["episodes", "replay", "made.yaml", which]) == 0
        assert f": {status} after {episode.steps} steps" in capsys.readouterr().out


def test_a_bundle_that_is_not_the_one_that_acted_is_found(
    made: tuple[list[Episode], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (episode, _), (acted, other) = made
    name = episode.start.episode
    policies = Path("runs/made/policies")
    shutil.rmtree(policies / acted)
    assert run(["episodes", "replay", "made.yaml", name]) == 1
    assert f"no bundle of {acted[:12]}, which acted; give another with --policy" in capsys.readouterr().err
    found = ask(capsys, name, "--policy", other)
    assert all(row["acted"] is None and row["instead"] for row in found["decisions"])
    # The weights of one version under the name of another are refused by the bundle's own hash.
    shutil.copytree(policies / other, policies / acted)
    assert run(["episodes", "replay", "made.yaml", name]) == 1
    assert "fieldtune: " in capsys.readouterr().err
    assert run(["episodes", "replay", "made.yaml", "nosuch"]) == 1
    assert "no episode nosuch" in capsys.readouterr().err


def test_a_log_that_the_version_did_not_make_ends_with_1(
    serve: Callable[..., Any],
    made: tuple[list[Episode], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, (acted, other) = made
    policy = Policy.load(tmp_path / "runs/made/policies" / other)
    monkeypatch.setattr(Policy, "version", property(lambda self: acted))
    (episode,) = log_run(serve, tmp_path / "false", policy, Brief(), seeds=1, explore=True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "false" / "done" / f"{episode.start.episode}.ep")
    assert run(["episodes", "replay", "made.yaml", file]) == 1
    assert "2 of 2 decisions are not those of the version that they are stamped" in " ".join(
        capsys.readouterr().err.split()
    )
