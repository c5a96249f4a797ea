"""The trainer where versions are staged: it waits while its version is on trial, and goes on from what is live then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from ppo_robot import SMALL, TrainingScene, nothing

from runtime.bundle import read_bundle
from runtime.rundir import RunDir
from trainer.config import TrainerConfig

torch.set_num_threads(1)


class Scene(TrainingScene):
    """Versions are staged, and the runtime does what the test says."""

    def __init__(self, run: RunDir, config: TrainerConfig = SMALL) -> None:
        self.announced: list[str] = []
        super().__init__(run, config)
        self.live = str(self.registry.live())
        self.registry.enter(self.live, "live", why="test")

    def announce(self, path: Path) -> None:
        """Through the gate, and into a canary."""
        self.announced.append(path.name)
        self.registry.enter(path.name, "candidate", why="announced")
        self.registry.enter(path.name, "canary", why="passed the gate")

    def reject(self) -> None:
        self.registry.enter(self.announced[-1], "rejected", why="worse")

    def promote(self) -> None:
        self.registry.set_live(self.announced[-1], why="promoted")
        self.registry.enter(self.live, "retired", why="replaced")
        self.registry.enter(self.announced[-1], "live", why="promoted")
        self.live = self.announced[-1]

    def on_trial(self) -> str:
        """Learn a first version, which then is on trial."""
        self.robot.run(4, version=self.live)
        self.iterate()
        assert self.announced[-1] == self.trainer.version != self.live
        return self.trainer.version


@pytest.fixture
def scene(run: RunDir) -> Iterator[Scene]:
    made = Scene(run)
    yield made
    made.robot.close()


def test_after_a_rejection_it_goes_on_from_the_live_version(scene: Scene) -> None:
    rejected = scene.on_trial()
    scene.robot.run(4, version=rejected)
    scene.robot.run(4, version=scene.live)
    weights: list[dict[str, Any]] = []

    def look(_rows: Any, take: Any = scene.trainer._take) -> Any:
        weights.append({name: tensor.numpy().copy() for name, tensor in scene.trainer._vla.state_dict().items()})
        return take(_rows)

    scene.trainer._take = look  # type: ignore[method-assign]
    # There are more than enough episodes; it waits for the decision, which comes without any new ones.
    line = scene.iterate(nothing, nothing, scene.reject)
    live = read_bundle(scene.run.policies / scene.live).weights
    assert all(np.array_equal(weights[0][name], array) for name, array in live.items())
    assert scene.registry.get(line["version"]).parent == scene.live
    assert any(f"{scene.live[:12]} is live, not {rejected[:12]}" in said for said in scene.said)
    # What the rejected one did is a version old, what the live one did is not.
    assert (line["episodes"], line["staleness_versions_max"], line["dropped_stale"]) == (8, 1, 0)
    assert 0 < line["staleness_versions"] < 1 and line["ratio_error"] < 0.02


def test_after_a_promotion_it_goes_on_from_its_own(scene: Scene) -> None:
    candidate = scene.on_trial()
    scene.robot.run(4, version=candidate)
    line = scene.iterate(nothing, scene.promote)
    assert scene.registry.get(line["version"]).parent == candidate
    assert line["staleness_versions_max"] == 0 and scene.said == []
    assert scene.announced == [candidate, line["version"]]


def test_the_live_versions_episodes_stay_fresh_however_many_candidates_are_rejected(run: RunDir) -> None:
    scene = Scene(run, replace(SMALL, max_staleness_versions=1))
    rejected = scene.on_trial()
    for _ in range(4):
        scene.robot.run(3, version=scene.live)
        scene.robot.run(1, version=rejected)
        line = scene.iterate(scene.reject)
        assert (line["episodes"], line["dropped_stale"]) == (4, 0)
        assert scene.registry.get(line["version"]).parent == scene.live
        rejected = line["version"]
    assert len(set(scene.announced)) == 5
    scene.robot.close()


def test_a_rejection_at_the_gate_costs_no_waiting(scene: Scene) -> None:
    def refuse(path: Path) -> None:
        scene.announced.append(path.name)
        scene.registry.enter(path.name, "candidate", why="announced")
        scene.registry.enter(path.name, "rejected", why="gate: kl")

    scene.trainer._versions._announce = refuse
    scene.robot.run(4, version=scene.live)
    line = scene.iterate()
    assert scene.announced == [line["version"]] and scene.trainer.version == scene.live
    scene.robot.run(4, version=scene.live)
    assert scene.iterate()["staleness_versions_max"] == 0


def test_a_trainer_that_comes_up_again_waits_for_the_trial_that_runs(scene: Scene) -> None:
    candidate = scene.on_trial()
    scene.robot.run(4, version=scene.live)
    scene.start()
    assert scene.announced == [candidate], "it was announced"
    line = scene.iterate(nothing, scene.promote)
    assert scene.registry.get(line["version"]).parent == candidate


def test_a_trainer_that_comes_up_after_a_rejection_goes_on_from_the_live_version(scene: Scene) -> None:
    candidate = scene.on_trial()
    scene.reject()
    scene.start()
    assert scene.trainer.version == scene.live and scene.announced == [candidate]


def test_a_stop_ends_the_waiting(scene: Scene) -> None:
    scene.on_trial()
    scene.robot.run(8, version=scene.live)
    scene.turns.left = [nothing, scene.turns.set]
    assert scene.trainer.collect() is None
