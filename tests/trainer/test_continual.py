"""What iterations learn from, and what comes of them."""

import itertools
import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from continual_run import SPEC, WARMS_UP, changed, iterate, lines, make_trainer
from ppo_robot import CONFIG, Robot, announce

from bridge.config import ConfigError
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer import continual, intake
from trainer.checkpoint import load_checkpoint
from trainer.config import DemosConfig, StopConfig
from trainer.continual import ContinualTrainer, TrainingError, train
from trainer.demos import demo_rows
from trainer.ratio import RatioError

EPISODES = CONFIG.episodes_per_iteration


def mean(curve: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in curve]))


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
    config = msgspec.structs.replace(WARMS_UP, post_train=("reach",))

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
    config = msgspec.structs.replace(WARMS_UP, max_staleness_versions=0)
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
    config = msgspec.structs.replace(WARMS_UP, max_staleness_versions=0)
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
    assert line["buffer_episodes"] == WARMS_UP.demos.per_task + len(held)
    index = EpisodeIndex(run.episodes)
    assert {row.episode for row in index.retire(10**12)} == {row.episode for row in index.after(0)} - set(held)


def test_seed_demonstrations_only(run: RunDir, robot: Robot) -> None:
    line = iterate(make_trainer(run, changed(buffer={"admit": False})), robot, 8)
    assert line["success"] > 0
    assert line["buffer_episodes"] == WARMS_UP.demos.per_task


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

    version = train(run, SPEC, WARMS_UP, 0, announce=lambda path: None, stop=stop, report=lambda line: None, warn=warn)
    assert told.is_set()
    assert version == Registry(run.registry).live()
    assert (run.trainer / "checkpoint.pt").exists()


def test_training_goes_on_after_rows_that_were_passed_over(
    run: RunDir, robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, calls = ContinualTrainer.iterate, itertools.count()
    monkeypatch.setattr(ContinualTrainer, "iterate", lambda self, rows: iterate(self, rows) if next(calls) else None)
    robot.run(4)
    reports: list[dict[str, Any]] = []
    config = msgspec.structs.replace(WARMS_UP, stop=StopConfig(iterations=1))
    train(
        run, SPEC, config, 0, announce=partial(announce, run), stop=threading.Event(), report=reports.append, warn=print
    )
    assert [line["iteration"] for line in reports] == [1]
