"""The curves for TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fieldtune.cli import run as fieldtune
from runtime.rundir import RunDir
from trainer.tensorboard import Curves, scalars


def line(iteration: int, value: float = 0.5, **changes: Any) -> dict[str, Any]:
    """As trainer/continual.py writes it, the part that matters here."""
    found = {
        "iteration": iteration,
        "unix_s": 1000.0 + iteration,
        "env_steps": 100 * iteration,
        "version": "a" * 64,
        "warmup": False,
        "success": value,
        "steps_to_success": None,
        "success_by_task": {"reach": value, "push": None},
        "weight": 0.3,
        "weight_inputs": {"ramp": 0.4, "competence": {"reach": 1.0}},
        "kl": 0.01,
    }
    return {**found, **changes}


def append(run: RunDir, *made: dict[str, Any]) -> None:
    run.trainer.mkdir(parents=True, exist_ok=True)
    with run.metrics.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in made)


def read(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of its points."""
    reader = EventAccumulator(str(run.curves), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_the_tags_of_a_line() -> None:
    assert dict(scalars(line(3))) == {
        "policy/success": 0.5,
        "policy/kl": 0.01,
        "weight/mean": 0.3,
        "weight/ramp": 0.4,
        "data/env_steps": 300,
        "success/reach": 0.5,
    }


def test_a_crash_doubles_nothing_and_what_is_done_again_takes_its_place(run: RunDir) -> None:
    curves = Curves(run, 0)
    for iteration in range(1, 5):
        curves.add(line(iteration, 0.25))
    # The trainer died without closing, with a checkpoint of iteration 2, and a record torn at the end of the file.
    (events,) = run.curves.iterdir()
    with events.open("ab") as file:
        file.write(b"\x10\x00\x00\x00torn")
    again = Curves(run, 2)
    assert [step for step, _ in read(run)["policy/success"]] == [1, 2]
    again.add(line(3, 0.75, steps_to_success=40.0))
    found = read(run)
    assert found["policy/success"] == found["success/reach"] == [(1, 0.25), (2, 0.25), (3, 0.75)]
    assert found["policy/steps_to_success"] == [(3, 40.0)]


def test_a_run_that_had_no_curves_gets_them_from_its_metrics(run: RunDir) -> None:
    append(run, line(1, 0.25), line(2, 0.5))
    Curves(run, 2).add(line(3, 0.75))
    assert read(run)["policy/success"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    append(run, line(3, 0.75))
    Curves(run, 3)
    assert read(run)["policy/success"] == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("command", ["up", "train"])
def test_a_missing_package_is_named_before_anything_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it was not installed
    assert fieldtune([command, "point", "--set", "trainer.tensorboard=true"]) == 1
    assert "pip install 'fieldtune[metrics]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
