"""`fieldtune ablate` on the toy backend: one start, one budget, one table; resumable, and no failure takes the rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fine_tuning import FINE_TUNING
from msgspec.structs import replace

from fieldtune.ablation import ablated_overrides, ablation_names, load_ablated, load_ablation
from fieldtune.cli import run
from fieldtune.commands import ablate as ablate_command
from fieldtune.commands.ablate import Row, finished_before
from fieldtune.commands.up import Up
from fieldtune.deployment import load_deployment
from runtime.durable import write_json
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.supervisor import ChildFailedError
from trainer.evaluate import EvaluationError
from trainer.statistics import Trial, result_of

TINY = (
    *FINE_TUNING,
    "trainer.episodes_per_iteration=8",
    "trainer.ppo.critic_warmup_iterations=1",
    "trainer.stop.iterations=2",
    "trainer.evaluate.episodes_per_task=6",
)


def test_every_shipped_ablation_differs_from_its_base_in_what_it_says_and_shares_the_rest() -> None:
    names = ablation_names()
    assert names[0] == "full"
    promised = {"chunk_1", "chunk_4", "no_cloning", "no_ppo", "fixed_weight", "no_buffer_update", "kl_to_sft"}
    assert promised | {"white_noise", "shaped_reward", "learned_sigma"} <= set(names)
    for name in names:
        found, ablation = load_ablation(name)
        base = load_deployment(ablation.base)
        changed = load_ablated(ablation.base, base, ablated_overrides(base, (), name, ablation), name)
        assert found == name and ablation.why.endswith(".")
        assert changed.name == f"{base.name}-ablation-{name}"
        assert bool(ablation.overrides) == (name != "full")
        unnamed = load_deployment(ablation.base, ablation.overrides)
        assert (unnamed != base) == (name != "full"), f"{name} changes nothing"


def test_bad_ablations_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert run(["ablate", *words, "--set", f"runs={tmp_path / 'runs'}"]) == 2
        assert not (tmp_path / "runs").exists()
        return " ".join(capsys.readouterr().err.split())

    budget = tmp_path / "budget.yaml"
    budget.write_text("base: point\nwhy: unfair\noverrides: [trainer.stop.iterations=9]\n", encoding="utf-8")
    assert "changes $.trainer.stop, which all runs of a comparison must share" in refused(str(budget))
    assert "no shipped ablation of that name (full, chunk_1" in refused("no_such")
    assert "sets no limit, so no ablation would end" in refused(
        "full", "--base", "point", "--set", "trainer.stop.iterations=null"
    )
    assert "have different bases (metaworld_mt10, point)" in refused("full", str(budget))


def test_what_earlier_calls_finished_is_in_the_table_if_its_settings_are_the_same(tmp_path: Path) -> None:
    def start_of(*settings: str) -> Up:
        overrides = (f"runs={tmp_path}", *settings)
        return Up(load_deployment("point", overrides), "point", overrides, threading.Event(), quiet=True)

    def finish(start: Up, name: str, version: str) -> None:
        _, ablation = load_ablation(name)
        overrides = ablated_overrides(start.deployment, start.overrides, name, ablation)
        deployment = load_ablated("point", start.deployment, overrides, name)
        run_dir = RunDir(deployment.run_dir)
        Registry(run_dir.registry).add(version, parent="", made={})
        Registry(run_dir.registry).set_live(version, why="start")
        row = Row(
            name=name,
            why=ablation.why,
            overrides=ablation.overrides,
            version=version,
            env_steps=1,
            minutes=1.0,
            result=result_of([[Trial("reach", 1, True, 5)]], 0, 40),
            deployment=deployment,
        )
        write_json(run_dir.path / "ablation.json", row)

    start = start_of()
    Registry(start.run.registry).add("a" * 64, parent="", made={})
    Registry(start.run.registry).set_live("a" * 64, why="start")
    finish(start, "full", "a" * 64)
    finish(start, "no_ppo", "a" * 64)
    finish(start, "learned_sigma", "b" * 64)  # from another start
    finish(start_of("trainer.stop.iterations=99"), "chunk_1", "a" * 64)  # with another budget
    broken = tmp_path / "point-ablation-chunk_4" / "ablation.json"
    broken.parent.mkdir()
    broken.write_bytes(msgspec.json.encode({"name": "chunk_4"}))  # of another version of fieldtune
    assert [row.name for row in finished_before(start, ())] == ["full", "no_ppo"]
    assert [row.name for row in finished_before(start, {"no_ppo"})] == ["full"]
    assert finished_before(start_of("trainer.ppo.epochs=9"), ()) == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_has_begun_elsewhere_is_not_taken_for_an_ablation_of_this_start(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, version in (("point", "a" * 64), ("point-ablation-full", "a" * 64), ("point-ablation-no_ppo", "b" * 64)):
        registry = Registry(RunDir(tmp_path / name).registry)
        registry.add(version, parent="", made={})
        registry.set_live(version, why="start")
    row = Row(
        name="sft",
        why="",
        overrides=(),
        version="a" * 64,
        env_steps=0,
        minutes=0.0,
        result=result_of([[Trial("reach", 1, True, 5)]], 0, 40),
        deployment=load_deployment("point", (f"runs={tmp_path}",)),
    )
    child = tmp_path / "point-ablation-no_ppo"
    if finished:
        write_json(child / "ablation.json", replace(row, name="no_ppo"))
    ran = []
    monkeypatch.setattr(ablate_command, "_row_of_start", lambda start: row)
    monkeypatch.setattr(ablate_command, "_row_of", lambda start, child, name, ablation: ran.append(name))
    ask = ["ablate", "full", "no_ppo", "--base", "point", "--json", "--set", f"runs={tmp_path}"]
    assert run(ask) == 2 and not ran, "refused before hours of work"
    said = " ".join(capsys.readouterr().err.split())
    assert f"no_ppo: {child} has begun with version {'b' * 12}, {tmp_path / 'point'} with {'a' * 12}" in said
    assert f"move {child} away or remove it" in said
    shutil.rmtree(child)
    assert run(ask) == 0 and ran == ["full", "no_ppo"]


@pytest.mark.parametrize("error", [EvaluationError("no server"), ChildFailedError("no runtime")])
def test_neither_an_evaluation_nor_a_process_that_fails_stops_the_others(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def row_of(_start: Up, _child: Up, name: str, _ablation: object) -> None:
        ran.append(name)
        if name == "full":
            raise error

    monkeypatch.setattr(ablate_command, "_row_of_start", lambda start: None)
    monkeypatch.setattr(ablate_command, "_row_of", row_of)
    assert run(["ablate", "full", "no_ppo", "--base", "point", "--json", "--set", f"runs={tmp_path}"]) == 1
    assert ran == ["full", "no_ppo"]
    printed = capsys.readouterr()
    assert json.loads(printed.out)["failed"] == ["full"] and f"ablation full failed: {error}" in printed.err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_start_one_budget_one_table_and_nothing_runs_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its server refuses to start; the next ablation must run all the same.
    broken = tmp_path / "broken.yaml"
    broken.write_text("base: point\nwhy: It cannot work.\noverrides: ['trainer.post_train=[swim]']\n", encoding="utf-8")
    runs = tmp_path / "runs"
    settings = [word for setting in (*TINY, f"runs={runs}") for word in ("--set", setting)]

    def ablate(*names: str, code: int) -> dict[str, Any]:
        assert run(["ablate", *names, "--base", "point", "--json", *settings]) == code
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    answer = ablate("full", str(broken), "no_ppo", code=1)
    assert answer["failed"] == ["broken"]
    assert [row["name"] for row in answer["rows"]] == ["sft", "full", "no_ppo"]
    start = Registry(RunDir(runs / "point").registry).served()
    assert len(start) == 1, "nothing is learned in the base run"
    for name in ("full", "no_ppo"):
        child = RunDir(runs / f"point-ablation-{name}")
        versions = Registry(child.registry).served()
        assert versions[0].version == start[0].version and len(versions) == 2
        assert (child.path / "trainer" / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2
    rows = {row["name"]: row for row in answer["rows"]}
    assert all(row["result"]["n"] == 6 for row in rows.values())
    assert rows["sft"]["env_steps"] == 0 < rows["full"]["env_steps"]

    table = json.loads((runs / "point" / "ablations.json").read_text(encoding="utf-8"))
    assert table["rows"] == answer["rows"]
    assert table["against_full"].keys() == {"sft", "no_ppo"} and table["against_full"]["sft"]["goals"] == 6
    text = (runs / "point" / "ablations.md").read_text(encoding="utf-8")
    assert "`trainer.weight.w_max=0`" in text and "iterations 2" in text

    before = {path: path.stat().st_mtime_ns for path in runs.glob("point-ablation-*/trainer/*")}
    assert ablate("full", "no_ppo", code=0)["rows"] == answer["rows"]
    assert {path: path.stat().st_mtime_ns for path in runs.glob("point-ablation-*/trainer/*")} == before
    assert ablate("no_ppo", code=0)["rows"] == answer["rows"], "full was finished before, so it stays and is compared"
    assert json.loads((runs / "point" / "ablations.json").read_text(encoding="utf-8")) == table
    assert run(["ablate", "full", "--base", "point", *settings, "--set", "trainer.ppo.epochs=9"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()  # its children see that their parent is gone
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_control_c_stops_an_ablation_and_the_same_command_goes_on_with_it(
    tmp_path: Path, fine_tuned: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    iterations = 8
    shutil.copytree(fine_tuned, tmp_path / "point")
    child = RunDir(tmp_path / "point-ablation-full")
    settings = (*TINY, f"trainer.stop.iterations={iterations}", f"runs={tmp_path}")
    line = [sys.executable, "-m", "fieldtune", "ablate", "full", "--base", "point"]
    line += [word for setting in settings for word in ("--set", setting)]
    output = tmp_path / "ablate.log"

    def start() -> subprocess.Popen[bytes]:
        with output.open("ab") as log:
            started.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    def metrics() -> list[str]:
        return child.metrics.read_text(encoding="utf-8").splitlines() if child.metrics.exists() else []

    process = start()
    deadline_s = time.monotonic() + 90
    while not metrics():
        assert process.poll() is None and time.monotonic() < deadline_s, output.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1, output.read_text()
    before = metrics()
    assert 0 < len(before) < iterations, "stopped in the middle"
    assert "the same command goes on from here" in output.read_text()
    assert not (child.path / "ablation.json").exists()

    assert start().wait(200) == 0, output.read_text()
    assert metrics()[: len(before)] == before and len(metrics()) == iterations
    rows = json.loads((tmp_path / "point" / "ablations.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["sft", "full"]
