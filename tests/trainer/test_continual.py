import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from ppo_robot import BACKEND, CONFIG, Robot, announce
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bridge.backend import BackendSpec
from bridge.backends import make_backend
from bridge.config import ConfigError
from runtime.bundle import read_bundle
from runtime.durable import ClaimedError, claim
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer import continual, intake, metrics
from trainer.checkpoint import load_checkpoint
from trainer.config import DemosConfig, StopConfig, TrainerConfig
from trainer.continual import ContinualTrainer, TrainingError, train
from trainer.demos import demo_rows
from trainer.experience import ExperienceError
from trainer.export import Exporter
from trainer.finite import NotFiniteError
from trainer.ratio import RatioError

torch.set_num_threads(1)
SPEC = make_backend(BACKEND).spec
EPISODES = CONFIG.episodes_per_iteration
# Tests of bookkeeping: the smallest iteration that goes through everything.
SMALL = msgspec.structs.replace(
    CONFIG,
    episodes_per_iteration=4,
    ppo=msgspec.structs.replace(CONFIG.ppo, epochs=1, critic_warmup_epochs=1, critic_epochs=1),
)


@pytest.fixture
def run(prepared: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(prepared.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def robot(run: RunDir) -> Iterator[Robot]:
    made = Robot(run)
    yield made
    made.close()


def make_trainer(
    run: RunDir,
    config: TrainerConfig = SMALL,
    announce: Callable[[Path], None] | None = None,
    warnings: list[str] | None = None,
    spec: BackendSpec = SPEC,
) -> ContinualTrainer:
    return ContinualTrainer(
        run,
        spec,
        config,
        0,
        announce=announce or (lambda path: make_live(run, path)),
        stop=threading.Event(),
        warn=(warnings if warnings is not None else []).append,
    )


def make_live(run: RunDir, path: Path) -> None:
    announce(run, path)


def iterate(trainer: ContinualTrainer, robot: Robot, episodes: int = 4) -> dict[str, Any]:
    robot.run(episodes)
    rows = trainer.collect()
    assert rows is not None
    line = trainer.iterate(rows)
    assert line is not None
    return line


def mean(curve: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in curve]))


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.slow
def test_ppo_makes_the_point_faster(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run, CONFIG)
    curve = [iterate(trainer, robot, EPISODES) for _ in range(11)]
    assert all(line["ratio_error"] < 1e-3 for line in curve)
    first, last = curve[:2], curve[-3:]  # the policy that explores in the first two is that of SFT
    assert mean(last, "steps_to_success") < 0.9 * mean(first, "steps_to_success")
    assert mean(last, "success") > mean(first, "success") - 0.1
    assert curve[-1]["weight"] > curve[1]["weight"] > curve[0]["weight"] == 0.0


def test_warm_up_publishes_nothing_and_then_every_iteration_a_child(run: RunDir, robot: Robot) -> None:
    sft = Registry(run.registry).live()
    trainer = make_trainer(run)
    assert iterate(trainer, robot)["warmup"]
    assert trainer.version == Registry(run.registry).live() == sft
    first, second = iterate(trainer, robot), iterate(trainer, robot)
    assert Registry(run.registry).live() == second["version"] == trainer.version
    assert [row.version for row in Registry(run.registry).lineage(second["version"])] == [
        second["version"],
        first["version"],
        sft,
    ]
    assert Registry(run.registry).get(second["version"]).made["episodes_seq"] == [9, 12]


def test_a_task_that_is_not_post_trained_is_rehearsed_and_nothing_else(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = msgspec.structs.replace(SPEC, instructions={"rest": "stay where you are", **SPEC.instructions})
    config = msgspec.structs.replace(SMALL, post_train=("reach",))

    def rows(index: EpisodeIndex, task: str, demos: DemosConfig) -> list[EpisodeRow]:
        found = demo_rows(index, "reach", demos)
        return found[:3] if task == "rest" else found[3:]

    monkeypatch.setattr("trainer.experience.demo_rows", rows)
    seen: list[Any] = []
    update = continual.update
    monkeypatch.setattr(continual, "update", lambda *args, **named: seen.append(args[5]) or update(*args, **named))
    trainer = make_trainer(run, config, spec=two)
    iterate(trainer, robot)
    line = iterate(trainer, robot)
    assert trainer.buffer.tasks == ("reach", "rest") and len(trainer.buffer.entries("rest")) == 3
    assert line["weight_by_task"].keys() == line["success_by_task"].keys() == {"reach"}
    (weight,) = seen
    assert weight[0] > 0.0 and weight[1] == 0.0


def test_an_episode_that_nobody_has_judged_waits_for_its_label(run: RunDir, robot: Robot) -> None:
    trainer, index = make_trainer(run), EpisodeIndex(run.episodes)
    waiting = robot.run(4, judged=False)
    steps = robot.run(4)
    line = iterate(trainer, robot, 0)
    assert line["env_steps"] == sum(steps)
    for row in index.after(0)[:4]:
        index.label(row.episode, "success", "ada")
    line = iterate(trainer, robot, 0)  # without a new episode
    assert line["env_steps"] == sum(steps) + sum(waiting) and line["success"] == 1.0
    assert {row.episode for row in index.after(0)[:4]} & set(trainer.buffer.own_episodes())
    # What was taken is not taken again, also after a restart.
    again = make_trainer(run)
    more = robot.run(4)
    line = iterate(again, robot, 0)
    assert line["env_steps"] == sum(steps) + sum(waiting) + sum(more)


def test_another_label_changes_the_buffer_and_is_not_learned_from_again(run: RunDir, robot: Robot) -> None:
    trainer, index = make_trainer(run), EpisodeIndex(run.episodes)
    steps = robot.run(8, judged=False)
    for row in index.after(0)[:4]:
        index.label(row.episode, "success", "ada")
    for row in index.after(0)[4:]:
        index.label(row.episode, "failure", "ada")
    line = iterate(trainer, robot, 0)
    assert line["env_steps"] == sum(steps)
    (held, *_) = trainer.buffer.own_episodes()
    index.label(held, "failure", "bob")
    failed = index.after(0)[4].episode
    index.label(failed, "discard", "bob")
    more = robot.run(4)
    line = iterate(trainer, robot, 0)
    assert line["env_steps"] == sum(steps) + sum(more)
    assert held not in trainer.buffer.own_episodes()


def test_only_a_task_of_the_policy_can_be_post_trained() -> None:
    assert CONFIG.post_trained(SPEC) == ("reach",)
    with pytest.raises(ConfigError, match=r"trainer.post_train: 'push' is not among the tasks \(reach\)"):
        msgspec.structs.replace(CONFIG, post_train=("push",)).post_trained(SPEC)


def test_the_metrics_line_holds_what_was_promised(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run)
    iterate(trainer, robot)
    line = iterate(trainer, robot)
    assert lines(run)[-1] == json.loads(json.dumps(line))
    wanted = (
        "iteration unix_s minutes env_steps episodes version success steps_to_success success_by_task steps_by_task "
        "buffer_episodes buffer_steps buffer_steps_by_task weight weight_by_task weight_inputs kl clip_fraction "
        "policy_loss cloning_loss value_loss "
        "explained_variance grad_norm sigma ratio_error staleness_versions staleness_versions_max "
        "dropped_stale aborted collect_wait_s learn_s cpu_idle_share"
    )
    assert set(wanted.split()) <= line.keys()
    assert line["iteration"] == 2
    assert line["episodes"] == 4
    rows = EpisodeIndex(run.episodes).after(0)
    assert line["env_steps"] == sum(row.steps for row in rows)
    assert 0 < line["weight"] < 1
    assert np.mean([*line["buffer_steps_by_task"].values()]) == pytest.approx(line["buffer_steps"])
    assert line["sigma"] == pytest.approx(CONFIG.vla.sigma)


def test_aborted_evaluated_and_stale_episodes_are_not_learned_from(run: RunDir, robot: Robot) -> None:
    config = msgspec.structs.replace(SMALL, max_staleness_versions=0)
    trainer = make_trainer(run, config)
    sft = trainer.version
    iterate(trainer, robot)
    iterate(trainer, robot)
    robot.run(3, version=sft)
    robot.run(2, explore=False)
    robot.abort()
    line = iterate(trainer, robot)
    assert line["episodes"] == 4
    assert line["aborted"] == 1
    stale = EpisodeIndex(run.episodes).after(8, 3)
    assert line["dropped_stale"] == sum(row.decisions for row in stale) > 0
    assert line["staleness_versions"] == 0.0


def test_episodes_that_came_late_are_learned_from_a_version_old(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run)
    iterate(trainer, robot)
    before = trainer.version
    iterate(trainer, robot)
    robot.run(2, version=before)
    line = iterate(trainer, robot, 2)
    assert 0 < line["staleness_versions"] < 1
    assert line["staleness_versions_max"] == 1
    assert line["dropped_stale"] == 0


def test_episodes_in_which_a_young_version_decided_but_was_not_played_are_passed_over(
    run: RunDir, robot: Robot
) -> None:
    config = msgspec.structs.replace(SMALL, max_staleness_versions=0)
    warnings: list[str] = []
    trainer, registry = make_trainer(run, config, warnings=warnings), Registry(run.registry)
    iterate(trainer, robot)
    before = trainer.version
    iterate(trainer, robot)
    assert trainer.version != before and len(registry.list()) == 2
    robot.run(4, version=before, unplayed=trainer.version)
    rows = trainer.collect()
    assert rows is not None and trainer.iterate(rows) is None
    decisions = sum(row.decisions - 1 for row in rows)
    assert warnings == [f"none of {decisions} decisions is young enough to learn from; they are passed over"]
    assert len(registry.list()) == 2 and len(lines(run)) == 2
    checkpoint = load_checkpoint(run.trainer / "checkpoint.pt")
    assert checkpoint is not None and checkpoint.state.cursor == rows[-1].seq
    line = iterate(trainer, robot)
    assert (line["iteration"], line["episodes"], line["dropped_stale"]) == (3, 4, decisions)
    line = iterate(make_trainer(run, config), robot)
    assert (line["iteration"], line["episodes"], line["dropped_stale"]) == (4, 4, 0)


def test_a_backlog_is_cut_to_its_newest_episodes(run: RunDir, robot: Robot) -> None:
    line = iterate(make_trainer(run), robot, 11)
    assert line["episodes"] == 8
    oldest = EpisodeIndex(run.episodes).after(0, 3)
    assert line["dropped_stale"] == sum(row.decisions for row in oldest)


def test_a_damaged_episode_is_left_out_and_told_of(run: RunDir, robot: Robot) -> None:
    robot.run(1)
    index = EpisodeIndex(run.episodes)
    path = index.path(index.after(0)[0])
    path.write_bytes(path.read_bytes()[:-40])
    warnings: list[str] = []
    line = iterate(make_trainer(run, warnings=warnings), robot)
    assert line["unreadable"] == 1
    assert line["episodes"] == 4
    assert any(path.name in warning for warning in warnings)


def test_an_episode_that_broke_off_is_not_learned_from_whatever_its_label(run: RunDir, robot: Robot) -> None:
    robot.abort()
    index = EpisodeIndex(run.episodes)
    index.label(index.after(0)[0].episode, "success", "ada")
    warnings: list[str] = []
    trainer = make_trainer(run, warnings=warnings)
    line = iterate(trainer, robot)
    assert (line["unreadable"], line["episodes"]) == (1, 4)
    assert index.after(0)[0].episode not in trainer.buffer.own_episodes()
    assert any("was aborted" in warning and "left out" in warning for warning in warnings)


def test_own_successes_enter_the_buffer_and_are_held(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run)
    line = iterate(trainer, robot, 8)
    assert line["success"] > 0
    held = trainer.buffer.own_episodes()
    assert held
    assert line["buffer_episodes"] == SMALL.demos.per_task + len(held)
    index = EpisodeIndex(run.episodes)
    assert {row.episode for row in index.retire(10**12)} == {row.episode for row in index.after(0)} - set(held)


class CrashError(Exception):
    pass


def crash(*_: Any, **__: Any) -> None:
    raise CrashError


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
    config = msgspec.structs.replace(SMALL, tensorboard=True)
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
    config = msgspec.structs.replace(SMALL, tensorboard=True)
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


def test_an_operator_who_goes_back_is_followed(run: RunDir, robot: Robot) -> None:
    warnings: list[str] = []
    trainer = make_trainer(run, warnings=warnings)
    for _ in range(3):
        iterate(trainer, robot)
    registry = Registry(run.registry)
    left, wanted = trainer.version, registry.previous()
    assert wanted is not None
    robot.run(2)  # in flight when the operator goes back
    registry.set_live(wanted, why="rollback")
    line = iterate(trainer, robot, 2)
    assert line["ratio_error"] < 0.02
    assert line["staleness_versions_max"] == 1
    assert registry.get(line["version"]).parent == wanted
    assert registry.live() == line["version"] != left
    assert any(f"{wanted[:12]} is live, not {left[:12]}" in warning for warning in warnings)


def test_what_was_made_of_a_version_that_was_left_meanwhile_is_not_announced(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(run)
    for _ in range(3):
        iterate(trainer, robot)
    registry = Registry(run.registry)
    left, wanted = trainer.version, registry.previous()
    assert wanted is not None
    learn = trainer._learn_policy

    def go_back_meanwhile(*arguments: Any) -> Any:
        registry.set_live(wanted, why="rollback")
        return learn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_learn_policy", go_back_meanwhile)
        made = iterate(trainer, robot)["version"]
    assert registry.get(made).parent == left
    assert registry.live() == trainer.version == wanted
    line = iterate(trainer, robot)
    assert registry.get(line["version"]).parent == wanted and registry.live() == line["version"]


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


def changed(**sections: dict[str, Any]) -> TrainerConfig:
    """`SMALL` with other values in some of its sections."""
    replace = msgspec.structs.replace
    return replace(SMALL, **{name: replace(getattr(SMALL, name), **values) for name, values in sections.items()})


def test_a_run_can_start_with_other_noise_than_its_bundle(run: RunDir, robot: Robot) -> None:
    sft = str(Registry(run.registry).live())
    robot.run(4)  # with the old noise
    config = changed(ppo={"sigma": 0.1, "noise_correlation": 0.7, "critic_warmup_iterations": 0})
    trainer = make_trainer(run, config)
    registry = Registry(run.registry)
    live = registry.live()
    assert live == trainer.version != sft
    assert registry.get(live).parent == sft
    first = read_bundle(run.policies / live)
    assert first.spec.noise_correlation == 0.7
    old = read_bundle(run.policies / sft)
    changes = [name for name, weight in first.weights.items() if not np.array_equal(weight, old.weights[name])]
    assert changes == ["log_sigma"]
    assert np.exp(first.weights["log_sigma"]) == pytest.approx([0.1, 0.1])
    line = iterate(trainer, robot)
    assert line["episodes"] == 4 and line["dropped_stale"] > 0, "what was explored otherwise is not learned from"
    assert line["sigma"] == pytest.approx(0.1)
    assert line["ratio_error"] < 1e-3
    assert line["gradient_steps"] > 0
    assert read_bundle(run.policies / line["version"]).spec.noise_correlation == 0.7
    count = len(registry.list())
    again = make_trainer(run, config)
    assert again.version == line["version"] and len(registry.list()) == count
    assert iterate(again, robot)["ratio_error"] < 1e-3


def test_an_operator_may_go_back_to_before_the_noise_was_changed(run: RunDir, robot: Robot) -> None:
    registry = Registry(run.registry)
    sft = str(registry.live())
    trainer = make_trainer(run, changed(ppo={"noise_correlation": 0.7, "critic_warmup_iterations": 0}))
    robot.run(2)
    registry.set_live(sft, why="rollback")
    line = iterate(trainer, robot)
    assert line["ratio_error"] < 1e-3 and line["dropped_stale"] > 0
    assert read_bundle(run.policies / line["version"]).spec.noise_correlation == 0.0


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


def test_seed_demonstrations_only(run: RunDir, robot: Robot) -> None:
    line = iterate(make_trainer(run, changed(buffer={"admit": False})), robot, 8)
    assert line["success"] > 0
    assert line["buffer_episodes"] == SMALL.demos.per_task


@pytest.mark.parametrize(
    ("weight", "expected"), [({"fixed": 0.5}, 0.5), ({"w_max": 0.0}, 0.0), ({"cloning_scale": 0.0}, 1.0)]
)
def test_a_constant_weight(run: RunDir, robot: Robot, weight: dict[str, float], expected: float) -> None:
    trainer = make_trainer(run, changed(weight=weight))
    assert [iterate(trainer, robot)["weight"] for _ in range(3)] == [0.0, expected, expected]


def test_self_cloning_alone_does_not_see_the_rewards(run: RunDir, robot: Robot, tmp_path: Path) -> None:
    robot.run(8)
    shutil.copytree(run.path, tmp_path / "other")
    versions = []
    for one, cost in ((run, 0.0), (RunDir(tmp_path / "other"), 1.0)):
        ppo = {"step_cost": cost, "critic_warmup_iterations": 0}
        trainer = make_trainer(one, changed(weight={"w_max": 0.0}, ppo=ppo))
        rows = trainer.collect()
        assert rows is not None
        line = trainer.iterate(rows)
        assert line is not None and line["gradient_steps"] > 0
        versions.append(line["version"])
    assert versions[0] == versions[1]


def test_a_wrong_stamp_stops_training(run: RunDir, robot: Robot) -> None:
    trainer = make_trainer(run)
    robot.run(4, stamp="0" * 64)
    with pytest.raises(RatioError, match="lineage"):
        trainer.collect()


def test_without_a_policy_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="fieldtune sft"):
        make_trainer(RunDir(tmp_path))


def test_waiting_is_told_of(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "STILL_WAITING_S", 0.05)
    told = threading.Event()
    stop = threading.Event()

    def warn(message: str) -> None:
        assert "0 of 4" in message
        told.set()
        stop.set()

    version = train(run, SPEC, SMALL, 0, announce=lambda path: None, stop=stop, report=lambda line: None, warn=warn)
    assert told.is_set()
    assert version == Registry(run.registry).live()
    assert (run.trainer / "checkpoint.pt").exists()


def test_train_stops_at_its_limit_and_does_not_start_again(run: RunDir, robot: Robot) -> None:
    config = msgspec.structs.replace(SMALL, stop=StopConfig(iterations=2))
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


def test_training_goes_on_after_rows_that_were_passed_over(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, calls = ContinualTrainer.iterate, itertools.count()
    monkeypatch.setattr(ContinualTrainer, "iterate", lambda self, rows: iterate(self, rows) if next(calls) else None)
    robot.run(4)
    reports: list[dict[str, Any]] = []
    config = msgspec.structs.replace(SMALL, stop=StopConfig(iterations=1))
    train(
        run, SPEC, config, 0, announce=partial(announce, run), stop=threading.Event(), report=reports.append, warn=print
    )
    assert [line["iteration"] for line in reports] == [1]


def test_a_run_has_one_trainer(run: RunDir) -> None:
    run.trainer.mkdir(exist_ok=True)
    with claim(run.trainer), pytest.raises(ClaimedError, match="is at work here already"):
        train(run, SPEC, SMALL, 0, announce=print, stop=threading.Event(), report=print, warn=print)


WORK = """
import sys
import threading
from pathlib import Path
sys.path.insert(0, {here!r})
import test_continual as t
run = t.RunDir(Path(sys.argv[1]))
robot = t.Robot(run)
trainer = t.make_trainer(run)
print("ready", flush=True)
while True:
    line = t.iterate(trainer, robot)
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
