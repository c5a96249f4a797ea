"""Versions that come in between: an operator goes back, or the run begins with other noise than its policy."""

from typing import Any

import numpy as np
import pytest
from continual_run import changed, iterate, make_trainer
from ppo_robot import Robot

from runtime.bundle import read_bundle
from runtime.registry import Registry
from runtime.rundir import RunDir


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
