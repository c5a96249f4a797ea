"""Crashes, kills, and files that are gone: nothing is lost, nothing counts twice, one curve."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from continual_run import SPEC, WARMS_UP, CrashError, changed, crash, iterate, lines, make_trainer
from ppo_robot import Robot, announce
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.bundle import read_bundle
from runtime.durable import ClaimedError, claim
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer import continual, metrics
from trainer.config import StopConfig
from trainer.continual import ContinualTrainer, train
from trainer.experience import ExperienceError
from trainer.export import Exporter
from trainer.finite import NotFiniteError


@pytest.mark.parametrize("where", ["publish", "add", "append_line", "save", "hold", "announce"])
def test_a_crash_anywhere_loses_nothing_and_counts_nothing_twice(
    run: RunDir, robot: Robot, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run)
    for _ in range(2):
        iterate(trainer, robot)
    owners: dict[str, Any] = {
        "publish": Exporter,
        "add": Registry,
        "append_line": metrics,
        "save": ContinualTrainer,
        "hold": EpisodeIndex,
        "announce": None,
    }
    robot.run(4)
    rows = trainer.collect()
    assert rows is not None
    with monkeypatch.context() as patch:
        if owners[where] is None:
            patch.setattr(trainer._versions, "_announce", crash)
        else:
            patch.setattr(owners[where], where, crash)
        with pytest.raises(CrashError):
            trainer.iterate(rows)
    again = make_trainer(run)
    assert Registry(run.registry).live() == again.version
    done = where in ("hold", "announce")
    assert len(lines(run)) == (3 if done else 2)
    if done:
        robot.run(4)
    later = again.collect()
    assert later is not None
    line = again.iterate(later)
    assert line is not None
    assert [entry["iteration"] for entry in lines(run)] == list(range(1, 5 if done else 4))
    assert line["env_steps"] == sum(row.steps for row in EpisodeIndex(run.episodes).after(0))


def test_an_iteration_whose_figures_are_not_finite_leaves_no_version(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run, changed(ppo={"critic_warmup_iterations": 0}))
    update = continual.update

    def overflows(*arguments: Any, **named: Any) -> Any:
        return dataclasses.replace(update(*arguments, **named), kl=float("inf"))

    with (
        monkeypatch.context() as patch,
        pytest.raises(NotFiniteError, match="iteration 1 is not kept; these are not finite: kl"),
    ):
        patch.setattr(continual, "update", overflows)
        iterate(trainer, robot)
    assert len(Registry(run.registry).list()) == 1 and not run.metrics.exists()
    assert iterate(make_trainer(run), robot)["iteration"] == 1


def test_curves_are_those_of_the_metrics_through_a_crash(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(WARMS_UP, tensorboard=True)
    trainer = make_trainer(run, config)
    iterate(trainer, robot)
    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "save", crash)
        with pytest.raises(CrashError):
            iterate(trainer, robot)
    again = make_trainer(run, config)
    for _ in range(2):
        iterate(again, robot)
    reader = EventAccumulator(str(run.curves))
    reader.Reload()
    found = [(point.step, point.value) for point in reader.Scalars("data/env_steps")]
    assert found == [(line["iteration"], line["env_steps"]) for line in lines(run)]
    assert [step for step, _ in found] == [1, 2, 3]


def test_resuming_restores_everything(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run)
    for _ in range(3):
        iterate(trainer, robot)
    again = make_trainer(run)
    assert again.version == trainer.version
    assert again.buffer.state() == trainer.buffer.state()
    # From the same state and the same episodes both learn the same.
    robot.run(4)
    results = []
    for one in (trainer, again):
        rows = one.collect()
        assert rows is not None
        line = one.iterate(rows)
        assert line is not None
        results.append(
            {key: line[key] for key in ("iteration", "env_steps", "kl", "policy_loss", "value_loss", "weight")}
        )
        break_point = Registry(run.registry).live()
        assert break_point is not None
        if one is trainer:
            # Put the run back to where it was, as if this iteration had not been.
            Registry(run.registry).set_live(again.version, why="test")
    assert results[0] == results[1]


def test_episodes_of_the_buffer_that_are_gone_are_told_and_left_out(run: RunDir, robot: Robot) -> None:
    trainer, index, demos = make_trainer(run), EpisodeIndex(run.episodes), EpisodeIndex(run.demos)
    iterate(trainer, robot, 8)
    held, had = trainer.buffer.own_episodes(), trainer.buffer.episodes
    index.mark_deleted(held[:1])
    row = index.get(held[1])
    assert row is not None
    by_hand = index.path(row)
    by_hand.unlink()
    warnings: list[str] = []
    again = make_trainer(run, warnings=warnings)
    (said,) = warnings
    assert f"2 episodes of the demonstration buffer are left out, {had - 2} remain: " in said
    assert held[0] in said or str(by_hand) in said
    assert again.buffer.own_episodes() == held[2:]
    assert iterate(again, robot)["iteration"] == 2

    had = again.buffer.episodes
    index.mark_deleted(again.buffer.own_episodes())
    for row in demos.after(0):
        demos.path(row).unlink()
    with pytest.raises(ExperienceError, match=f"none of the {had} episodes.*put their files back"):
        make_trainer(run)


def test_without_its_checkpoint_it_starts_again_and_learns_from_nothing_twice(run: RunDir, robot: Robot) -> None:
    config = msgspec.structs.replace(WARMS_UP, tensorboard=True)
    trainer, index = make_trainer(run, config), EpisodeIndex(run.episodes)
    robot.run(4, judged=False)
    robot.run(4)
    iterate(trainer, robot, 0)
    for row in index.after(0)[:4]:
        index.label(row.episode, "success", "ada")
    live = iterate(trainer, robot, 0)["version"]
    assert Registry(run.registry).live() == live
    before = run.metrics.read_text()
    (run.trainer / "checkpoint.pt").rename(run.trainer / "checkpoint.away")
    warnings: list[str] = []
    again = make_trainer(run, config, warnings=warnings)
    (said,) = warnings
    assert f"starts again from version {live[:12]}; the 8 episodes so far count as learned from" in said
    (kept,) = run.trainer.glob("metrics.jsonl.old-*")
    (curves,) = run.trainer.glob("tensorboard.old-*")
    assert kept.read_text() == before and str(kept) in said and str(curves) in said
    steps = robot.run(4)
    line = iterate(again, robot, 0)
    assert (line["iteration"], line["env_steps"], line["episodes"]) == (1, sum(steps), 4)
    assert lines(run) == [json.loads(json.dumps(line))]
    warnings.clear()
    make_trainer(run, config, warnings=warnings)
    assert warnings == [] and lines(run) == [json.loads(json.dumps(line))]


def test_without_its_checkpoint_a_version_that_learned_nothing_takes_all_episodes(run: RunDir, robot: Robot) -> None:
    iterate(make_trainer(run), robot)
    (run.trainer / "checkpoint.pt").unlink()
    warnings: list[str] = []
    again = make_trainer(run, warnings=warnings)
    assert iterate(again, robot)["episodes"] == 8
    assert len(warnings) == 1 and "count as learned from" not in warnings[0]


def test_a_run_without_demonstrations_starts_with_an_empty_buffer(run: RunDir, robot: Robot) -> None:
    shutil.rmtree(run.demos)
    warnings: list[str] = []
    trainer = make_trainer(run, warnings=warnings)
    assert trainer.buffer.episodes == 0
    assert any("starts empty" in warning for warning in warnings)
    for _ in range(2):
        iterate(trainer, robot, 8)
    assert trainer.buffer.episodes > 0


def test_after_its_index_was_made_anew_a_log_is_gone_on_with(run: RunDir, robot: Robot) -> None:
    warnings: list[str] = []
    trainer = make_trainer(run)
    for _ in range(3):
        iterate(trainer, robot)
    robot.close()
    index, held = EpisodeIndex(run.episodes), set(trainer._buffer.own_episodes())
    rows = index.after(0)
    gone = [row for row in rows if row.episode not in held]
    assert gone, "retention may delete some of them"
    for path in [*map(index.path, gone), *run.episodes.glob("index.sqlite*")]:
        path.unlink()
    again = Robot(run)
    try:
        trainer = make_trainer(run, warnings=warnings)
        assert any(f"the {len(rows) - len(gone)} that it has count as learned from" in said for said in warnings)
        warnings.clear()
        trainer.save()
        trainer = make_trainer(run, warnings=warnings)
        assert warnings == [], "the checkpoint has the new place"
        assert iterate(trainer, again)["episodes"] == 4
    finally:
        again.close()


def test_a_crash_before_the_first_version_with_other_noise_is_live_changes_nothing(run: RunDir) -> None:
    config = changed(ppo={"sigma": 0.1})
    with pytest.raises(CrashError):
        make_trainer(run, config, announce=crash)
    count = len(Registry(run.registry).list())
    assert make_trainer(run, config).version == Registry(run.registry).live()
    assert len(Registry(run.registry).list()) == count == 2
    assert make_trainer(run, config).version == Registry(run.registry).live()  # and without a checkpoint once more
    assert len(Registry(run.registry).list()) == count


def test_the_anchor_is_the_policy_that_the_run_started_from_also_after_a_restart(run: RunDir, robot: Robot) -> None:
    sft = read_bundle(run.policies / str(Registry(run.registry).live()))
    config = changed(weight={"anchor": "sft", "w_max": 0.0, "cloning_scale": 1.0}, ppo={"sigma": 0.25})
    trainer = make_trainer(run, config)
    lines = [iterate(trainer, robot) for _ in range(2)]
    assert lines[1]["cloning_loss"] == pytest.approx(0.0, abs=1e-6), "it is where the anchor is"
    with torch.no_grad():
        trainer._vla.head.bias += 0.1
    trainer._versions.add({"command": "train"})
    trainer.save()
    again = make_trainer(run, config)
    assert again._frozen is not None
    assert np.array_equal(again._frozen.head.bias.detach(), sft.weights["head.bias"])
    assert iterate(again, robot)["cloning_loss"] > 0.01


def test_train_stops_at_its_limit_and_does_not_start_again(run: RunDir, robot: Robot) -> None:
    config = msgspec.structs.replace(WARMS_UP, stop=StopConfig(iterations=2))
    reports: list[dict[str, Any]] = []
    arguments: dict[str, Any] = {
        "announce": lambda path: announce(run, path),
        "stop": threading.Event(),
        "report": lambda line: (reports.append(line), robot.run(4)),
        "warn": lambda message: None,
    }
    robot.run(4)
    version = train(run, SPEC, config, 0, **arguments)
    assert [line["iteration"] for line in reports] == [1, 2]
    assert version == reports[-1]["version"] == Registry(run.registry).live()
    assert train(run, SPEC, config, 0, **arguments) == version
    assert len(lines(run)) == 2


def test_a_run_has_one_trainer(run: RunDir) -> None:
    run.trainer.mkdir(exist_ok=True)
    with claim(run.trainer), pytest.raises(ClaimedError, match="is at work here already"):
        train(run, SPEC, WARMS_UP, 0, announce=print, stop=threading.Event(), report=print, warn=print)


WORK = """
import sys
import threading
from pathlib import Path
sys.path.insert(0, {here!r})
from continual_run import Robot, RunDir, iterate, make_trainer
run = RunDir(Path(sys.argv[1]))
robot = Robot(run)
trainer = make_trainer(run)
print("ready", flush=True)
while True:
    line = iterate(trainer, robot)
    print(line["iteration"], flush=True)
    if line["iteration"] >= 7:
        break
robot.close()
"""


@pytest.mark.slow
def test_a_trainer_that_is_killed_goes_on_with_the_same_curve(run: RunDir) -> None:
    script = WORK.format(here=str(Path(__file__).parent))
    rng = np.random.default_rng(int.from_bytes(run.path.name.encode()))
    for kills_left in range(2, -1, -1):
        process = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if kills_left:
            process.stdout.readline()
            time.sleep(float(rng.uniform(0, 0.5)))
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert process.wait(timeout=120) == 0
        process.stdout.close()
    curve = lines(run)
    assert [line["iteration"] for line in curve] == list(range(1, 8))
    registry = Registry(run.registry)
    assert registry.live() == curve[-1]["version"]
    log = EpisodeLog(run.episodes)  # recovers what the last kill tore
    rows = log.index.after(0, 10**6)
    log.close()
    assert curve[-1]["env_steps"] == sum(row.steps for row in rows if row.status != "aborted")
    # The ranges of episodes that made the versions join without overlap.
    lineage = registry.lineage(curve[-1]["version"])[::-1]
    ranges = [row.made["episodes_seq"] for row in lineage if row.made["command"] == "train"]
    assert len(ranges) == 6
    assert all(earlier[1] + 1 == later[0] for earlier, later in itertools.pairwise(ranges))
