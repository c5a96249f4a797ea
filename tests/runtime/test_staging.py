"""Staged versions, with real bundles and a real episode log; time is the log's."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.backend import Backend
from runtime.bundle import BundleError
from runtime.canary_test import CanaryRule
from runtime.config import DeployConfig, GateRule
from runtime.drift import DriftRule
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.records import tensor_records
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.staging import Staging
from runtime.swap import Live

ENOUGH_S = 60.0
TinyBundle = Callable[..., str]
RULE = CanaryRule(max_episodes=200)


@dataclass
class Scene:
    """A run whose first version is live, and staged versions around it."""

    run: RunDir
    point: Backend
    bundle: TinyBundle
    first: str
    log: EpisodeLog
    warnings: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def staging(self, **config: Any) -> Staging:
        rules: dict[str, Any] = {"mode": "staged", "canary": RULE, **config}
        live = Live(self.run, threads=1, keep_versions=20)
        return Staging(self.run, live, DeployConfig(**rules), horizon_steps=40, warn=self.warnings.append)

    def candidate(self, staging: Staging, value: float) -> str:
        version = self.bundle(self.run.path / "made", value, parent=staging().version)
        assert staging.announce(self.run.path / "made" / version) == staging().version
        return version

    def ended(
        self,
        versions: str | tuple[str, ...],
        status: Any = "success",
        steps: int = 8,
        reason: str = "",
        at: float = 0.0,
    ) -> None:
        """Log an episode; it began at `at`, or after all before."""
        number = next(self.numbers)
        episode = f"{number:024x}"
        versions = (versions,) if isinstance(versions, str) else versions
        seen = {"image/top": np.zeros((8, 8, 3), np.uint8), "state": np.zeros(2, np.float32)}
        seen["privileged"] = np.zeros(4, np.float32)
        start = EpisodeStart(
            format=FORMAT,
            episode=episode,
            task="reach",
            instruction="go",
            seed=0,
            source="policy",
            explore=True,
            client="c",
            spec=self.point.spec,
            started_unix_s=at or float(number),
        )
        self.log.start(start)
        for i, version in enumerate(versions):
            tensors = tensor_records({**seen, "actions": np.full((4, 2), 0.5, np.float32)})
            self.log.append(episode, DecisionRecord(decision=i + 1, step=4 * i, version=version, tensors=tensors))
            sent = tensor_records({"sent": np.full((4, 2), 0.5, np.float32), "reward": np.zeros(4, np.float32)})
            self.log.append(episode, ExecutedRecord(decision=i + 1, tensors=sent))
        done = threading.Event()
        final = {} if status == "aborted" else tensor_records(seen)
        end = EndRecord(status=status, steps=steps, reason=reason, tensors=final)
        self.log.end(episode, end, lambda _error: done.set())
        assert done.wait(ENOUGH_S)

    def canary(self, staging: Staging, candidate: str, good: float, live_good: float, most: int = 200) -> int:
        """Episodes of both in turn, with these success rates, until the canary is over; how many."""
        rng = np.random.default_rng(0)
        live = staging().version
        for number in range(1, most + 1):
            version, rate = ((candidate, good), (live, live_good))[number % 2]
            success = bool(rng.random() < rate)
            self.ended(version, "success" if success else "timeout", 8 if success else 40)
            staging.look()
            if staging.policy_of(candidate).version != candidate or staging().version == candidate:
                return number
        return most

    def stage(self, version: str) -> tuple[str | None, str, str]:
        change = Registry(self.run.registry).stages(version)[-1]
        return change.stage, change.why, change.who


@pytest.fixture
def scene(tmp_path: Path, point: Backend, tiny_bundle: TinyBundle) -> Iterator[Scene]:
    run = RunDir(tmp_path / "run")
    first = tiny_bundle(run.policies, 0.5)
    registry = Registry(run.registry)
    registry.add(first, parent="", made={})
    registry.set_live(first, why="sft")
    log = EpisodeLog(run.episodes)
    yield Scene(run, point, tiny_bundle, first, log)
    log.close()


def test_the_first_version_is_live_and_drives_everything(scene: Scene) -> None:
    staging = scene.staging()
    assert staging().version == scene.first and scene.stage(scene.first)[0] == "live"
    assert {staging.arm_for("a") for _ in range(20)} == {""}
    assert staging.policy_of("").version == staging.policy_of("f" * 64).version == scene.first
    assert staging.standing()["candidate"] == ""


def test_a_candidate_drives_its_share_and_an_episode_keeps_its_version(scene: Scene) -> None:
    staging = scene.staging(canary=CanaryRule(share=0.25))
    version = scene.candidate(staging, 0.51)
    assert staging().version == scene.first and scene.stage(version)[0] == "canary"
    arms = [staging.arm_for(f"robot-{i % 3}") for i in range(2000)]
    assert 0.2 < arms.count(version) / 2000 < 0.3 and set(arms) == {"", version}
    assert staging.policy_of(version).version == version and staging.policy_of("").version == scene.first


def test_one_that_is_better_goes_live_and_the_one_before_retires(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    episodes = scene.canary(staging, version, 0.95, 0.3)
    assert staging().version == version and episodes < 200
    stage, why, who = scene.stage(version)
    assert (stage, who) == ("live", "rule") and "canary of" in why
    assert Registry(scene.run.registry).stages(version)[-1].evidence["decision"] == "promote"
    assert scene.stage(scene.first)[0] == "retired"
    assert Registry(scene.run.registry).acted() == [scene.first, version]
    assert {staging.arm_for("a") for _ in range(20)} == {""}


def test_one_that_is_worse_is_taken_back_also_in_the_middle_of_its_episodes(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    scene.canary(staging, version, 0.2, 0.9)
    assert staging().version == staging.policy_of(version).version == scene.first
    assert scene.stage(version)[0] == "rejected" and "worse" in scene.stage(version)[1]
    assert Registry(scene.run.registry).acted() == [scene.first, version, scene.first]


def test_one_that_is_no_better_is_not_promoted(scene: Scene) -> None:
    staging = scene.staging(canary=CanaryRule(max_episodes=30))
    version = scene.candidate(staging, 0.51)
    assert scene.canary(staging, version, 1.0, 1.0) == 30
    assert staging().version == scene.first and "no better after 30" in scene.stage(version)[1]


@pytest.mark.parametrize("value", [-0.5, 5.0])
def test_one_that_is_far_off_does_not_pass_the_gate(scene: Scene, value: float) -> None:
    scene.ended(scene.first)
    staging = scene.staging()
    version = scene.candidate(staging, value)
    assert scene.stage(version)[0] == "rejected" and scene.stage(version)[1].startswith("gate: ")
    assert Registry(scene.run.registry).stages(version)[-1].evidence["divergence"] > 0.25
    assert {staging.arm_for("a") for _ in range(20)} == {""}


def test_weights_that_are_not_those_of_the_probe_never_become_a_candidate(scene: Scene) -> None:
    staging = scene.staging()
    wrong = scene.bundle(scene.run.path / "made", 0.6, claimed=0.5)
    with pytest.raises(BundleError, match="probe"):
        staging.announce(scene.run.path / "made" / wrong)
    assert Registry(scene.run.registry).stage(wrong) is None


def test_a_newer_candidate_takes_the_place_of_the_one_that_runs(scene: Scene) -> None:
    staging = scene.staging()
    older, newer = scene.candidate(staging, 0.51), scene.candidate(staging, 0.52)
    assert scene.stage(older)[:2] == ("rejected", f"superseded by {newer[:12]}")
    assert scene.stage(newer)[0] == "canary" and staging.standing()["candidate"] == newer


def test_people_decide_by_name(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    assert staging.govern("promote", "", "ada") == version == staging().version
    assert scene.stage(version) == ("live", "by ada", "ada") and scene.stage(scene.first)[0] == "retired"
    other = scene.candidate(staging, 0.52)
    assert staging.govern("reject", "", "bob") == version
    assert scene.stage(other) == ("rejected", "by bob", "bob")
    with pytest.raises(BundleError, match="no canary runs"):
        staging.govern("reject", "", "bob")
    assert staging.govern("promote", other[:8], "ada") == other  # rejected or not: a person may


def test_a_pinned_version_stays(scene: Scene) -> None:
    staging = scene.staging()
    running = scene.candidate(staging, 0.51)
    staging.govern("pin", "", "ada")
    assert scene.stage(running)[0] == "rejected" and staging.standing()["pinned"] == "ada"
    later = scene.candidate(staging, 0.52)
    assert scene.stage(later)[1] == "the live version is pinned by ada"
    staging.govern("unpin", "", "ada")
    assert scene.stage(scene.candidate(staging, 0.53))[0] == "canary"


def test_after_a_restart_a_canary_stands_where_it_stood(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    for i in range(10):
        scene.ended((scene.first, version)[i % 2], "success" if i % 3 else "timeout")
    staging.look()
    before = staging.standing()["evidence"]
    again = scene.staging()
    again.look()
    assert again.standing()["evidence"] == before and before["candidate_episodes"] == 5
    assert again.policy_of(version).version == version


def test_episodes_are_taken_in_the_order_in_which_they_began(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    began = [0.5]
    staging._open_since = lambda: began[0]
    scene.ended(version, at=5.0)
    scene.ended(scene.first, "timeout", 40, at=2.0)
    staging.look()
    assert staging.standing()["evidence"]["candidate_episodes"] == 0  # one that began before both is in progress
    scene.ended(version, "timeout", 40, at=0.5)
    began[0] = 4.0
    staging.look()
    assert [outcome.success for outcome in staging._trial.test.outcomes] == [False, False]  # type: ignore[union-attr]
    began[0] = np.inf
    staging.look()
    assert [outcome.success for outcome in staging._trial.test.outcomes] == [False, False, True]  # type: ignore[union-attr]


def test_what_says_nothing_of_one_version_is_left_out_and_a_stop_is_a_failure(scene: Scene) -> None:
    staging = scene.staging()
    version = scene.candidate(staging, 0.51)
    scene.ended((scene.first, version))
    scene.ended(version, "aborted", 4, "silent for 30 s")
    scene.ended(version, "unjudged", 40)
    scene.ended("f" * 64)
    scene.ended(version, "aborted", 4, "stopped: by a key at arm-1")
    staging.look()
    evidence = staging.standing()["evidence"]
    assert (evidence["candidate_episodes"], evidence["candidate_success"], evidence["live_episodes"]) == (1, 0.0, 0)


DRIFT = DriftRule(record_episodes=20, false_alarm=0.2, window_episodes=200)


def drifted(scene: Scene, staging: Staging) -> None:
    """The live version succeeds, then never again."""
    live = staging().version
    for i in range(80):
        good = i < 25
        scene.ended(live, "success" if good else "timeout", 8 if good else 40)
        staging.look()
        if staging().version != live:
            return


def test_a_live_version_that_gets_worse_is_rolled_back(scene: Scene) -> None:
    staging = scene.staging(drift=DRIFT)
    version = scene.candidate(staging, 0.51)
    staging.govern("promote", "", "ada")
    drifted(scene, staging)
    assert staging().version == scene.first
    assert scene.stage(version) == ("rejected", "success fell", "rule")
    assert scene.stage(scene.first) == ("live", "success fell", "rule")
    assert any("drift: success fell" in warning for warning in scene.warnings)


@pytest.mark.parametrize("pinned", [False, True])
def test_without_a_version_before_it_or_pinned_it_stays_with_an_alarm(scene: Scene, pinned: bool) -> None:
    staging = scene.staging(drift=DRIFT)
    if pinned:
        scene.candidate(staging, 0.51)
        staging.govern("promote", "", "ada")
        staging.govern("pin", "", "ada")
    live = staging().version
    drifted(scene, staging)
    assert staging().version == live
    assert [drift["statistic"] for drift in staging.standing()["drifts"]][:1] == ["success"]


def test_a_rollback_by_hand_ends_the_canary(scene: Scene) -> None:
    staging = scene.staging()
    second = scene.candidate(staging, 0.51)
    staging.govern("promote", "", "ada")
    third = scene.candidate(staging, 0.52)
    assert staging.rollback() == scene.first
    assert scene.stage(third)[0] == scene.stage(second)[0] == "rejected"
    assert staging.standing()["candidate"] == ""


def test_the_gate_has_thresholds_in_the_configuration(scene: Scene) -> None:
    scene.ended(scene.first)
    staging = scene.staging(gate=GateRule(max_divergence=1e-6))
    assert "divergence" in scene.stage(scene.candidate(staging, 0.51))[1]
