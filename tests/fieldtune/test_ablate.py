"""`fieldtune ablate` on the toy backend: one start, one budget, one table; resumable, and no failure takes the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fieldtune.ablation import ablated_overrides, ablation_names, load_ablated, load_ablation
from fieldtune.cli import run
from fieldtune.deployment import load_deployment
from runtime.registry import Registry
from runtime.rundir import RunDir

TINY = (
    "trainer.demos.per_task=20",
    "trainer.sft.steps=60",
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
    assert run(["ablate", "full", "--base", "point", *settings, "--set", "trainer.ppo.epochs=9"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
