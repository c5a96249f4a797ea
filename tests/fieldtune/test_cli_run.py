"""The command line on a run: demonstrations, versions, a running deployment, evaluations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import fieldtune, one_object

from bridge.client import PolicyClient
from bridge.messages import GetStatus, StatusReply
from fieldtune.cli import run
from fieldtune.commands.common import connect
from fieldtune.commands.evaluate import told_in
from fieldtune.deployment import Deployment
from runtime.durable import claim
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir

if TYPE_CHECKING:
    pass


QUICK = ("--set", "trainer.demos.per_task=2", "--set", "trainer.sft.steps=3")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run of `point`: two demonstrations and one hardly trained version."""
    directory = tmp_path_factory.mktemp("cli")
    collected = one_object(fieldtune("demos", "point", "--json", *QUICK, cwd=directory).stdout)
    assert collected["kept"] == 2
    assert one_object(fieldtune("sft", "point", "--json", *QUICK, cwd=directory).stdout)["version"]
    return directory


@pytest.fixture(scope="module")
def served(prepared: Path) -> Iterator[Path]:
    """The same with a runtime that serves it, and two episodes driven."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((prepared / "serve.log").open("wb"))
        runtime = subprocess.Popen(
            [sys.executable, "-m", "fieldtune", "serve", "point"], cwd=prepared, stdout=log, stderr=log
        )
        try:
            driven = fieldtune("drive", "point", "--episodes", "2", "--name", "arm", "--json", cwd=prepared)
            assert one_object(driven.stdout)["episodes"] == 2
            yield prepared
        finally:
            runtime.terminate()
            assert runtime.wait(30) == 0, (prepared / "serve.log").read_text()


def in_process(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Stdout of a command that ended well."""
    monkeypatch.chdir(directory)
    code = run(line.split())
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_a_runtime_removes_bundles_that_were_never_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policies = tmp_path / "runs" / "point" / "policies"
    old, now = (policies / f".{'a' * 64}.{number * 12}.tmp" for number in "12")
    for path in (old, now):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert run(["serve", "point"]) == 1, "there is no version to serve"
    assert list(policies.iterdir()) == [now], "the trainer may be writing it"


@pytest.mark.slow
def test_versions_and_bundles(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(line: str) -> dict[str, Any]:
        return one_object(in_process(prepared, monkeypatch, capsys, line + " --json"))

    (row,) = ask("policies list point")["policies"]
    version = row["version"]
    assert row["live"] and row["on_disk"] and row["made"]["command"] == "sft"
    assert ask(f"policies show point {version[:6]}")["lineage"] == [version]
    bundle = f"runs/point/policies/{version}"
    assert ask(f"bundle inspect {bundle}")["spec"]["horizon"] == 4
    assert ask(f"bundle verify {bundle}") == {"version": version, "good": True}
    # A run of its own starts from a bundle that was made elsewhere.
    assert ask(f"policies add point {bundle} --set runs=elsewhere") == {"version": version}
    (added,) = ask("policies list point --set runs=elsewhere")["policies"]
    assert added["version"] == version and added["live"] and added["on_disk"]
    for line in ("policies list point", f"policies show point {version}", f"bundle inspect {bundle}"):
        assert version[:8] in in_process(prepared, monkeypatch, capsys, line)


@pytest.mark.slow
def test_demonstrations(prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "episodes list point --log demos --json"
    rows = one_object(in_process(prepared, monkeypatch, capsys, line))["episodes"]
    assert len(rows) == 2 and {row["status"] for row in rows} == {"success"}
    line = f"episodes show point {rows[0]['episode']} --log demos --json"
    shown = one_object(in_process(prepared, monkeypatch, capsys, line))
    assert sum(decision["executed"] for decision in shown["decisions"]) == rows[0]["steps"]


@pytest.mark.slow
def test_failures_of_a_run_say_why_and_end_with_1(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared)
    for line, word in {
        "episodes show point nosuch": "no episode nosuch",
        "policies show point ffffffff": "ffffffff",
        "report point": "was not evaluated",
        "stop point": "NOTHING WAS STOPPED",
    }.items():
        assert run(line.split()) == 1, line
        captured = capsys.readouterr()
        assert captured.err.startswith("fieldtune: ") and word in captured.err, line
        assert captured.out == ""


@pytest.mark.slow
def test_nobody_goes_back_beside_a_runtime_that_is_coming_up(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have read what is live, and would go on with that, whatever the registry says by then."""
    monkeypatch.chdir(prepared)
    registry = Registry(RunDir(prepared / "runs/point").registry)
    before = registry.history()
    RunDir(prepared / "runs/point").episodes.mkdir(exist_ok=True)
    with claim(RunDir(prepared / "runs/point").episodes):
        for line in (
            f"policies rollback point {registry.live()}",
            f"policies add point runs/point/policies/{registry.live()}",
        ):
            assert run(line.split()) == 1
            assert "is at work here already" in capsys.readouterr().err
    assert registry.history() == before


@pytest.mark.slow
def test_a_running_deployment(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(line: str) -> dict[str, Any]:
        return one_object(in_process(served, monkeypatch, capsys, line + " --json"))

    now = ask("status point")
    assert sum(now["runtime"]["episodes"].values()) == 2 and now["trainer"] == {}
    assert now["runtime"]["shares"] == {"reach": 1.0}
    rows = ask("episodes list point")["episodes"]
    assert [row["client"] for row in rows] == ["arm", "arm"]
    shown = ask(f"episodes show point {rows[0]['episode']}")
    assert {decision["version"] for decision in shown["decisions"]} == {now["runtime"]["version"]}
    doctor = {row["name"]: row for row in ask("doctor point")["checks"]}
    assert "a runtime answers" in doctor["endpoint"]["found"]
    assert "version" in in_process(served, monkeypatch, capsys, "status point")


def connected(deployment: Deployment, client: str, timeout_s: float) -> PolicyClient:
    """A client that has its connection already, and next to no time for what comes."""
    made = connect(deployment, client, timeout_s)
    made.request(GetStatus(), StatusReply)
    made.timeout_s = 1e-4
    return made


@pytest.mark.slow
def test_what_a_runtime_has_not_judged_yet_is_not_made_live_beside_it(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(served)
    monkeypatch.setattr("fieldtune.commands.policies.connect", connected)
    registry = Registry(RunDir(served / "runs/point").registry)
    assert run(["policies", "add", "point", f"runs/point/policies/{registry.live()}"]) == 1
    assert "no answer to Announce" in " ".join(capsys.readouterr().err.split())
    assert all(change.why != "added by hand" for change in registry.history())


@pytest.mark.slow
def test_an_evaluation_beside_a_running_deployment(served: Path) -> None:
    done = fieldtune("eval", "point", "--episodes", "2", "--json", cwd=served)
    assert one_object(done.stdout)["overall"]["n"] == 2
    other = ("--set", "bridge.play_steps=1")
    refused = fieldtune("eval", "point", "--episodes", "2", "--json", *other, cwd=served, code=1)
    assert "has episodes with bridge.play_steps = None, not 1" in " ".join(refused.stderr.split())


ROBOT = """
from bridge.backend import Outcome
from bridge.backends.point import Point, PointOptions
from msgspec.structs import replace


class Robot(Point):
    def __init__(self):
        super().__init__(PointOptions(size_px=32))
        self._spec = replace(self._spec, paced=True, judges=False)

    def outcome(self):
        return Outcome(status="running", reward=0.0)
"""


@pytest.mark.slow
def test_the_operator_has_the_last_word_in_the_evaluation_of_a_robot(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (prepared / "robot.py").write_text(ROBOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(prepared), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(prepared)
    version = Registry(RunDir(prepared / "runs/point").registry).live()
    settings = ("name=robot", "backend={name: 'robot:Robot'}", "bridge.workers=1", "bridge.horizon_steps=60")
    ask = ["eval", "point", "--policy", f"runs/point/policies/{version}", "--episodes", "2", "--json"]
    ask += [argument for setting in settings for argument in ("--set", setting)]

    def until_told(*line: str) -> str:
        deadline_s = time.monotonic() + 60
        while True:
            code, said = run([*line, "--set", "name=robot", "--json"]), capsys.readouterr().out
            if code == 0 and "eval-0" in said:
                return said
            assert time.monotonic() < deadline_s, f"{line}: {said}"
            time.sleep(0.1)

    with subprocess.Popen([sys.executable, "-m", "fieldtune", *ask], stdout=-1, stderr=-1, text=True) as process:
        try:
            assert "stopped" in until_told("stop", "point")
            until_told("operator", "point", "reset")
            until_told("operator", "point", "success")
            printed, said = process.communicate(timeout=60)
        finally:
            process.kill()
    first = one_object(printed)
    assert (first["overall"]["n"], first["overall"]["successes"], first["unjudged"]) == (1, 1, 1)
    assert "1 of 2 episodes wait for somebody to say how they went" in " ".join(said.split())

    log = ("--set", "name=robot", "--json", "--log", f"eval/{version[:8]}")
    assert run(["episodes", "list", "point", "--status", "unjudged", *log]) == 0
    (waiting,) = one_object(capsys.readouterr().out)["episodes"]
    assert run(["episodes", "label", "point", waiting["episode"], "failure", *log]) == 0
    capsys.readouterr()
    again = one_object(fieldtune(*ask, cwd=prepared).stdout)
    assert (again["overall"]["n"], again["overall"]["successes"], again["unjudged"]) == (2, 1, 0)
    for wrong in ("eval/ffff", "eval/", "demonstrations"):
        assert run(["episodes", "list", "point", "--set", "name=robot", "--log", wrong]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"--log {wrong}: there is no such log" in said and f"eval/{version}" in said.replace(" ", "")


WORDED = """
from bridge.backends.point import Point, PointOptions
from msgspec.structs import replace


class Worded(Point):
    def __init__(self, instructions="training"):
        super().__init__(PointOptions(size_px=32))
        texts = ("move the dot to the square", "go") if instructions == "training" else ("reach", "get to it")
        self._spec = replace(self._spec, instructions={"reach": texts})
"""


@pytest.mark.slow
def test_an_evaluation_with_held_out_wordings_has_a_log_of_its_own(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Registry(RunDir(prepared / "runs/point").registry).live()
    ask = ["eval", "point", "--policy", f"runs/point/policies/{version}", "--json", "--set", "name=worded"]
    ask += ["--set", "trainer.evaluate={first_seed: 3000000, episodes_per_task: 2}"]
    held_out = ("--instructions", "held_out")
    refused = fieldtune(*ask, *held_out, cwd=prepared, code=2)
    assert "$.backend.options.instructions: unknown key" in refused.stderr
    (prepared / "worded.py").write_text(WORDED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(prepared), os.environ.get("PYTHONPATH", "")]))
    told = []
    for extra in ((), ("--instructions", "training"), held_out):
        done = fieldtune(*ask, *extra, "--set", "backend={name: 'worded:Worded'}", cwd=prepared)
        assert one_object(done.stdout)["version"] == version
        directory = RunDir(prepared / "runs/worded").evaluation(version, "held_out" if extra == held_out else "")
        assert (directory / "result.json").exists()
        index = EpisodeIndex(directory)
        rows = [row for row in index.after(0) if row.seed >= 3_000_000]
        told.append(sorted(read_episode(index.path(row)).start.instruction for row in rows))
    training = ["go", "move the dot to the square"]
    assert told == [training, training, ["get to it", "reach"]]
    # Where the configuration tells other wordings, those of training have to be asked for.
    monkeypatch.syspath_prepend(str(prepared))
    options = ("backend={name: 'worded:Worded', options: {instructions: held_out}}",)
    asked = "backend.options.instructions=training"
    assert told_in("point", options, "training") == (*options, asked)
    assert told_in("point", ("backend={name: 'worded:Worded'}",), "training") == ("backend={name: 'worded:Worded'}",)
