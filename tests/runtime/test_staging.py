"""Staged versions: which version drives an episode, and what its end leads to. Episodes are written into the log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from server_samples import refused, until

from bridge.backend import Backend
from bridge.client import RefusedError
from bridge.messages import RULES, Announce, Assignment, Govern, Orders, Serving, Watch
from runtime.bundle import BundleError
from runtime.canary import CanaryRule
from runtime.config import DeployConfig, GateRule
from runtime.drift import DriftRule
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.policy import Policy
from runtime.records import tensor_records
from runtime.registry import Registry, RegistryError
from runtime.rundir import RunDir
from runtime.staging import Staging, end_all_trials
from runtime.swap import Live

HORIZON_STEPS = 20
CONFIG = DeployConfig(
    mode="staged",
    canary=CanaryRule(max_episodes=200),
    # A false alarm within 20 episodes at every second run: quick, and certain where all of a sudden all is different.
    drift=DriftRule(record_episodes=20, false_alarm=0.5, window_episodes=20),
)


class Scene:
    """A run, what is staged in it, and a log that the test writes."""

    def __init__(self, run: RunDir, point: Backend, tiny_bundle: Callable[..., str]) -> None:
        self.run, self._spec, self._bundle = run, point.spec, tiny_bundle
        self.registry, self.log = Registry(run.registry), EpisodeLog(run.episodes)
        self.said: list[str] = []
        self.count = 0
        self.first = tiny_bundle(run.policies, 0.1)
        self.registry.add(self.first, parent="", made={})
        self.registry.set_live(self.first, why="sft")
        self.staging = self.start()

    def bundle(self, value: float) -> str:
        return self._bundle(self.run.path / "new", value, parent=self.first)

    def start(self, config: DeployConfig = CONFIG) -> Staging:
        """The runtime as it comes up, without its thread."""
        live = Live(self.run, threads=1, keep_versions=20)
        self.staging = Staging(self.run, live, config, horizon_steps=HORIZON_STEPS, warn=self.said.append)
        return self.staging

    def announce(self, value: float) -> str:
        version = self.bundle(value)
        self.staging.announce(self.run.path / "new" / version)
        return version

    def write(
        self,
        *versions: str,
        status: Any = "success",
        steps: int = 2,
        reason: str = "",
        started_unix_s: float | None = None,
        rules: str = "",
        source: Any = "policy",
    ) -> str:
        """One episode that has ended, with a decision of each version."""
        self.count += 1
        episode = f"{self.count:032x}"
        start = EpisodeStart(
            format=FORMAT, episode=episode, task="reach", instruction="go", seed=self.count, source=source,
            explore=True, client="robot", spec=self._spec, started_unix_s=started_unix_s or time.time(),
        )  # fmt: skip
        seen = {
            "image/top": np.zeros((8, 8, 3), np.uint8),
            "state": np.full(2, 0.5, np.float32),
            "privileged": np.zeros(4, np.float32),
        }
        self.log.start(start)
        for i, version in enumerate(versions):
            chunk = {"actions": np.full((4, 2), 0.2, np.float32), "log_prob": np.zeros(4, np.float32)}
            decision = DecisionRecord(
                decision=i + 1, step=i * steps, version=version, tensors=tensor_records({**seen, **chunk})
            )
            sent = {"sent": np.full((steps, 2), 0.2, np.float32), "reward": np.zeros(steps, np.float32)}
            if rules:
                sent["rules"] = np.full(steps, 1 << RULES.index(rules), np.uint8)
            self.log.append(episode, decision)
            self.log.append(episode, ExecutedRecord(decision=i + 1, tensors=tensor_records(sent)))
        last = {} if status == "aborted" else tensor_records(seen)
        record = EndRecord(status=status, steps=steps * len(versions), reason=reason, tensors=last)
        self.log.end(episode, record, lambda _error: None)
        return episode

    def look(self) -> dict[str, Any]:
        """Have the staging see all that was written."""
        until(lambda: self.log.index.count() == self.count, "the episodes to be stored")
        self.staging.look()
        return self.staging.standing()

    def run_canary(self, candidate: str, candidate_succeeds: Any, live_succeeds: Any, pairs: int = 100) -> None:
        """Both by turns until a decision; the two say whether episode i succeeds."""
        live = self.staging().version
        for i in range(pairs):
            for version, succeeds in ((candidate, candidate_succeeds), (live, live_succeeds)):
                self.write(version, status="success" if succeeds(i) else "timeout")
            if i % 10 == 9 and not self.look()["candidate"]:
                return
        self.look()

    def seen(self) -> tuple[int, int]:
        """How many episodes of the candidate and of the live version the canary has."""
        evidence = self.look()["evidence"]
        return evidence["candidate_episodes"], evidence["live_episodes"]

    def stages(self, version: str) -> list[str]:
        return [change.stage for change in self.registry.stages(version)]

    def why(self, version: str) -> tuple[str, str]:
        change = self.registry.stages(version)[-1]
        return change.why, change.who


@pytest.fixture
def scene(tmp_path: Path, point: Backend, tiny_bundle: Callable[..., str]) -> Iterator[Scene]:
    run = RunDir(tmp_path / "run")
    made = Scene(run, point, tiny_bundle)
    yield made
    made.log.close()


def always(_i: int) -> bool:
    return True


def never(_i: int) -> bool:
    return False


# --- which version drives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_candidate_has_its_share_of_the_episodes(scene: Scene, share: float) -> None:
    assert {scene.staging.arm_for("robot") for _ in range(50)} == {""}
    scene.start(replace(CONFIG, canary=CanaryRule(share=share)))
    candidate = scene.announce(0.11)
    assert scene.stages(candidate) == ["candidate", "canary"]
    assert scene.staging().version == scene.registry.live() == scene.first
    arms = [scene.staging.arm_for("robot") for _ in range(2000)]
    assert set(arms) == {"", candidate}
    assert abs(arms.count(candidate) / 2000 - share) < 0.06  # five standard deviations


def test_the_policy_of_an_arm(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    assert scene.staging.policy_of("").version == scene.first
    assert scene.staging.policy_of(candidate).version == candidate
    scene.staging.govern("reject", "", "Ada")
    assert scene.staging.policy_of(candidate).version == scene.first
    later = scene.announce(0.12)
    assert scene.staging.policy_of(candidate).version == scene.first
    scene.staging.govern("promote", "", "Ada")
    assert {scene.staging.policy_of(arm).version for arm in ("", candidate, later)} == {later}


def test_over_the_wire_an_episode_keeps_its_arm_and_a_rejection_counts_from_its_next_decision(
    serve: Any, point: Backend, scene: Scene
) -> None:
    serving = serve(live=scene.staging, log=scene.log, horizon_steps=HORIZON_STEPS)
    scene.staging.start(serving.server.oldest_open_unix_s)
    tool = serving.client("tool")
    answer = refused(lambda: tool.request(Govern(command="reject", who="Ada"), Serving))
    assert (answer.code, answer.field) == ("bundle", "version")
    candidate = scene.bundle(0.11)
    reply, _ = tool.request(Announce(path=str(scene.run.path / "new" / candidate)), Serving)
    assert reply.version == scene.first, "it is not live"
    assert serving.status()["staging"]["candidate"] == candidate
    robot = serving.robot(point.spec)
    version = ""
    while version != candidate:
        assert isinstance(robot.next(), Assignment)
        version = robot.infer(robot.observation(point.spec))[0].version
        robot.executed()
    for _ in range(5):
        assert robot.infer(robot.observation(point.spec))[0].version == candidate
        robot.executed()
    reply, _ = tool.request(Govern(command="reject", who="Ada"), Serving)
    assert reply.version == scene.first
    assert robot.infer(robot.observation(point.spec))[0].version == scene.first
    robot.executed()
    robot.end(robot.observation(point.spec))
    assert serving.log.index.list(limit=1)[0].versions == (candidate, scene.first)
    assert serving.status()["staging"]["candidate"] == ""
    assert scene.why(candidate) == ("by Ada", "Ada")
    scene.staging.close()


def test_a_candidate_that_gives_no_action_is_rejected_at_once(
    serve: Any, point: Backend, scene: Scene, fake_policy: Any
) -> None:
    """Its episodes end before their first decision, so that no log would ever tell of them."""
    serving = serve(live=scene.staging, log=scene.log, horizon_steps=HORIZON_STEPS)
    scene.staging.start(serving.server.oldest_open_unix_s)
    candidate = scene.announce(0.11)
    trial = scene.staging._trial
    assert trial is not None
    trial.policy = fake_policy(version=candidate, value=float("nan"))
    robot = serving.robot(point.spec)
    while scene.stages(candidate)[-1] == "canary":
        assert isinstance(robot.next(), Assignment)
        with suppress(RefusedError):
            robot.infer(robot.observation(point.spec))
    assert scene.why(candidate) == ("it could not decide: the policy gave an action that is not finite", "rule")
    scene.staging.close()


def test_a_paused_robot_does_not_hold_up_what_is_known_of_the_others(serve: Any, point: Backend, scene: Scene) -> None:
    serving = serve(live=scene.staging, log=scene.log, horizon_steps=HORIZON_STEPS)
    began = time.time()
    robot = serving.robot(point.spec, "arm")
    robot.next()
    robot.infer(robot.observation(point.spec))
    assert began < serving.server.oldest_open_unix_s() < time.time()
    watch = serving.client("watch")
    for state, held in (("paused", False), ("driving", True)):
        beat = Watch(bridge="b", client="arm", session=robot.welcome.session, state=state)
        watch.request(beat, Orders)
        assert (serving.server.oldest_open_unix_s() < np.inf) is held


# --- how a canary ends ------------------------------------------------------------------------------------------------


def test_a_better_one_is_promoted_with_its_evidence(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    scene.run_canary(candidate, always, never)
    assert scene.staging().version == scene.registry.live() == candidate
    assert scene.staging.previous == scene.first
    assert scene.stages(candidate) == ["candidate", "canary", "live"]
    assert scene.stages(scene.first) == ["live", "retired"]
    evidence = scene.registry.stages(candidate)[-1].evidence
    assert evidence["better"] >= evidence["needed_to_promote"] == 40.0
    assert evidence["candidate_success"] == 1.0 and evidence["live_success"] == 0.0
    assert scene.registry.stages(candidate)[1].evidence["gate"]["refused"] == []


def test_the_status_counts_what_the_rules_and_the_operator_make_live(serve: Any, scene: Scene) -> None:
    serving = serve(live=scene.staging, log=scene.log, horizon_steps=HORIZON_STEPS)
    tool = serving.client("tool")
    candidate = scene.announce(0.11)
    assert serving.status()["swaps"] == 0, "a candidate is not live"
    scene.run_canary(candidate, always, never)
    assert (serving.status()["version"], serving.status()["swaps"]) == (candidate, 1)
    for status in ["success"] * 25 + ["timeout"] * 10:
        scene.write(candidate, status=status)
    scene.look()
    assert (serving.status()["version"], serving.status()["swaps"]) == (scene.first, 2)
    tool.request(Govern(command="promote", version=candidate, who="Ada"), Serving)
    tool.request(Govern(command="promote", version=candidate, who="Ada"), Serving)  # it is live already
    assert (serving.status()["version"], serving.status()["swaps"]) == (candidate, 3)


def test_a_worse_one_is_rolled_back(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    scene.run_canary(candidate, never, always)
    assert scene.staging().version == scene.registry.live() == scene.first
    assert scene.stages(candidate) == ["candidate", "canary", "rejected"]
    assert scene.why(candidate)[0].startswith("canary: worse after")
    assert scene.registry.stages(candidate)[-1].evidence["decision"] == "rollback"


def test_one_that_is_as_good_ends_undecided(scene: Scene) -> None:
    scene.start(replace(CONFIG, canary=CanaryRule(max_episodes=20)))
    candidate = scene.announce(0.11)
    scene.run_canary(candidate, always, always)
    assert scene.staging().version == scene.first
    assert scene.why(candidate) == ("canary: no better after 20 episodes", "rule")
    assert scene.staging.arm_for("robot") == ""


def test_a_newer_candidate_takes_the_place_of_the_one_on_trial(scene: Scene) -> None:
    first, second = scene.announce(0.11), scene.announce(0.12)
    assert scene.why(first) == (f"superseded by {second[:12]}", "rule")
    assert scene.look()["candidate"] == second
    scene.write(first)
    scene.write(second)
    assert scene.seen() == (1, 0)


def test_announcing_again_changes_nothing(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    scene.write(candidate)
    assert scene.seen() == (1, 0)
    scene.announce(0.11)
    assert scene.seen() == (1, 0)
    assert scene.stages(candidate) == ["candidate", "canary"]
    scene.staging.announce(scene.run.policies / scene.first)
    assert scene.stages(scene.first) == ["live"]


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_what_the_gate_refuses_never_drives(scene: Scene) -> None:
    scene.write(scene.first)
    scene.look()
    poisoned = scene.announce(-0.4)
    assert scene.stages(poisoned) == ["candidate", "rejected"]
    assert scene.why(poisoned)[0].startswith("gate: divergence is 1, at most 0.25")
    assert scene.registry.stages(poisoned)[-1].evidence["divergence"] == pytest.approx(1.0)
    assert scene.staging.arm_for("robot") == ""
    assert scene.staging.policy_of(poisoned).version == scene.first


def test_a_canary_goes_on_while_the_gate_refuses_another(scene: Scene) -> None:
    scene.write(scene.first)
    candidate = scene.announce(0.11)
    scene.write(candidate)
    scene.look()
    scene.announce(-0.4)
    assert scene.look()["candidate"] == candidate and scene.seen() == (1, 0)


def test_one_that_cannot_be_judged_does_not_stay_a_candidate(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("an episode of another robot")

    monkeypatch.setattr("runtime.staging.gate_episodes", broken)
    candidate = scene.announce(0.11)
    assert scene.stages(candidate) == ["candidate", "rejected"]
    assert "an episode of another robot" in scene.why(candidate)[0]


def test_what_is_no_policy_of_this_run_is_not_even_a_candidate(scene: Scene, tiny_bundle: Any) -> None:
    version = tiny_bundle(scene.run.path / "new", 0.1, horizon=5)
    with pytest.raises(BundleError, match="horizon"):
        scene.staging.announce(scene.run.path / "new" / version)
    assert scene.stages(version) == []


def test_a_live_version_that_changes_while_a_candidate_is_judged_is_not_its_measure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = scene.announce(0.11)
    scene.staging.govern("promote", "", "Ada")

    def rolled_back(*_: Any) -> Any:
        scene.staging.govern("rollback", "", "Ada")
        return []

    monkeypatch.setattr("runtime.staging.gate_episodes", rolled_back)
    candidate = scene.announce(0.12)
    assert scene.staging().version == scene.first
    assert scene.stages(candidate) == ["candidate", "rejected"]
    assert scene.stages(better)[-1] == "rejected"


def test_a_candidate_that_somebody_promotes_while_it_is_judged_stays_live(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promoted(*_: Any) -> Any:
        newest = scene.registry.list()[-1].version
        scene.staging.govern("promote", newest, "Ada")
        return []

    monkeypatch.setattr("runtime.staging.gate_episodes", promoted)
    candidate = scene.announce(0.12)
    assert scene.staging().version == candidate
    assert scene.stages(candidate) == ["candidate", "live"]


def test_an_old_version_that_is_announced_again_keeps_its_bundle(scene: Scene) -> None:
    old, *others = [scene.announce(0.11 + 0.01 * i) for i in range(4)]
    scene.staging._live._keep = 1
    scene.staging.announce(scene.run.path / "new" / old)
    assert scene.staging.standing()["candidate"] == old and (scene.run.policies / old).is_dir()
    assert not (scene.run.policies / others[0]).exists(), "the others may go"


def test_a_canary_that_goes_on_decides_with_the_threads_of_the_live_version(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = scene.announce(0.11)
    threads: dict[str, int] = {}
    load = Policy.load

    def noted(path: Path, *, threads_of: dict[str, int] = threads, **options: Any) -> Policy:
        threads_of[path.name] = options.get("threads", 1)
        return load(path, **options)

    monkeypatch.setattr(Policy, "load", noted)
    live = Live(scene.run, threads=2, keep_versions=20)
    Staging(scene.run, live, CONFIG, horizon_steps=HORIZON_STEPS, warn=scene.said.append)
    assert threads == {scene.first: 2, candidate: 2}


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_pinned_means_that_no_rule_replaces_it(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    scene.staging.govern("pin", "", "Ada")
    assert scene.why(candidate) == ("the live version was pinned by Ada", "Ada")
    assert scene.look()["pinned"] == "Ada"
    later = scene.announce(0.12)
    assert scene.stages(later) == ["candidate", "rejected"]
    assert scene.why(later)[0] == "the live version is pinned by Ada"
    assert scene.start().standing()["pinned"] == "Ada", "after a restart too"
    scene.staging.govern("unpin", "", "Grace")
    assert scene.look()["pinned"] == ""
    scene.announce(0.13)
    assert scene.staging.standing()["candidate"]


def test_promoted_by_hand(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    assert scene.staging.govern("promote", "", "Ada") == candidate
    assert scene.why(candidate) == ("by Ada", "Ada")
    assert scene.staging.standing()["candidate"] == ""
    # Any version of the run, by a prefix; the canary that ran ends.
    other = scene.announce(0.12)
    assert scene.staging.govern("promote", scene.first[:8], "Grace") == scene.first
    assert scene.stages(other)[-1] == "rejected"
    assert scene.stages(candidate) == ["candidate", "canary", "live", "retired"]
    # What is live already stays so.
    stages = scene.registry.stages()
    assert scene.staging.govern("promote", scene.first, "Grace") == scene.first
    assert scene.registry.stages() == stages


def test_a_canary_is_rejected_by_name_and_no_other_in_its_place(scene: Scene) -> None:
    first, second = scene.announce(0.11), scene.announce(0.12)
    with pytest.raises(BundleError, match=f"the canary is {second[:12]} now"):
        scene.staging.govern("reject", first, "Ada")
    assert scene.stages(second)[-1] == "canary"
    scene.staging.govern("reject", second, "Ada")
    assert scene.stages(second)[-1] == "rejected"


def test_there_must_be_something_to_be_decided(scene: Scene) -> None:
    for command in ("promote", "reject"):
        with pytest.raises(BundleError, match="no canary runs"):
            scene.staging.govern(command, "", "Ada")
    with pytest.raises(RegistryError, match="no version begins"):
        scene.staging.govern("promote", "ffffffff", "Ada")


def test_a_rollback_by_hand_ends_the_canary(scene: Scene) -> None:
    with pytest.raises(BundleError, match="no version before"):
        scene.staging.govern("rollback", "", "Ada")
    live = scene.announce(0.11)
    scene.staging.govern("promote", "", "Ada")
    candidate = scene.announce(0.12)
    assert scene.staging.govern("rollback", "", "Ada") == scene.first
    assert scene.why(candidate) == ("the live version was rolled back", "Ada")
    assert scene.stages(live)[-1] == "rejected" and scene.stages(scene.first) == ["live", "retired", "live"]


# --- which episodes count ---------------------------------------------------------------------------------------------


def test_which_episodes_count(scene: Scene) -> None:
    before = time.time()
    candidate = scene.announce(0.11)
    scene.write(candidate, scene.first)  # both
    scene.write(candidate, status="aborted", reason="silent for 30 s")
    scene.write(candidate, status="aborted", reason="the client said hello again")
    scene.write(candidate, source="expert")
    scene.write(scene.first, started_unix_s=before)  # in progress when the canary began
    scene.write("f" * 64)
    assert scene.seen() == (0, 0)
    scene.write(candidate, status="aborted", reason="stopped: by the operator", steps=1)
    scene.write(candidate, status="aborted", reason="stopped by its own fault: overload", steps=1)
    scene.write(scene.first, status="failure")
    scene.write(scene.first, steps=3)
    assert scene.seen() == (2, 2)
    evidence = scene.staging.standing()["evidence"]
    assert evidence["candidate_success"] == 0.0 and evidence["live_success"] == 0.5


def test_episodes_are_taken_in_the_order_in_which_they_began(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    began = time.time()
    long, short = began + 0.001, began + 0.002
    scene.write(candidate, started_unix_s=short)
    scene.staging._open_since = lambda: long
    assert scene.seen() == (0, 0), "one that began earlier is still in progress"
    scene.write(candidate, status="timeout", started_unix_s=long)
    scene.staging._open_since = lambda: np.inf
    assert scene.seen() == (2, 0)
    trial = scene.staging._trial
    assert trial is not None and [outcome.success for outcome in trial.test.outcomes] == [False, True]


def test_an_episode_that_waits_for_its_label_holds_up_those_behind_it(scene: Scene) -> None:
    scene.write(scene.first, status="unjudged")  # before there is a canary: nobody waits for that
    candidate = scene.announce(0.11)
    waits = scene.write(candidate, status="unjudged")
    discarded = scene.write(scene.first, status="unjudged")
    scene.write(scene.first)
    assert scene.seen() == (0, 0)
    scene.log.index.label(discarded, "discard", "Ada")
    assert scene.seen() == (0, 0)
    scene.log.index.label(waits, "success", "Ada")
    assert scene.seen() == (1, 1)
    assert scene.staging.standing()["evidence"]["candidate_success"] == 1.0


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_after_a_restart_the_canary_stands_where_it_stood(scene: Scene) -> None:
    scene.write(scene.first)
    candidate = scene.announce(0.11)
    for i in range(7):
        scene.write(candidate, status="success" if i % 3 else "timeout")
        scene.write(scene.first, status="failure" if i % 2 else "success")
    before = scene.look()
    assert before["evidence"]["candidate_episodes"] == 7
    scene.start()
    assert scene.staging.arm_for("robot") in ("", candidate)
    assert scene.look() == before
    scene.run_canary(candidate, always, never)
    assert scene.staging().version == candidate


def test_a_candidate_whose_judging_was_broken_off_is_rejected(scene: Scene) -> None:
    version = scene.bundle(0.11)
    scene.registry.add(version, parent="", made={})
    scene.registry.enter(version, "candidate", why="announced")
    scene.start()
    assert scene.why(version) == ("the runtime was stopped while it was judged", "rule")
    scene.announce(0.11)
    assert scene.look()["candidate"] == version, "it may be announced again"


def test_a_canary_whose_bundle_is_damaged_does_not_keep_the_runtime_down(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    (scene.run.policies / candidate / "weights.safetensors").write_bytes(b"")
    scene.start()
    assert scene.stages(candidate)[-1] == "rejected" and scene.staging.standing()["candidate"] == ""


def test_what_was_made_live_without_staging_is_taken_as_it_is(scene: Scene) -> None:
    candidate = scene.announce(0.11)
    end_all_trials(scene.registry)
    assert scene.why(candidate)[0] == "versions are not staged any more"
    scene.registry.set_live(candidate, why="direct")
    scene.start()
    assert scene.staging().version == candidate
    assert (scene.stages(scene.first)[-1], scene.stages(candidate)[-1]) == ("retired", "live")


def test_rejected_bundles_do_not_fill_the_disk(scene: Scene) -> None:
    live = Live(scene.run, threads=1, keep_versions=2)
    scene.staging = Staging(scene.run, live, CONFIG, horizon_steps=HORIZON_STEPS, warn=scene.said.append)
    made = [scene.announce(0.11 + i / 1000) for i in range(6)]
    kept = {path.name for path in scene.run.policies.iterdir()}
    assert {scene.first, made[-1]} <= kept and len(kept) <= 4


# --- the live version -------------------------------------------------------------------------------------------------


def second_live(scene: Scene) -> str:
    version = scene.announce(0.11)
    scene.staging.govern("promote", "", "Ada")
    return version


def test_when_its_success_falls_the_live_version_is_rolled_back(scene: Scene) -> None:
    version = second_live(scene)
    candidate = scene.announce(0.12)
    for _ in range(30):
        scene.write(version)
    assert scene.look()["drifts"] == [] and scene.staging().version == version
    for _ in range(10):
        scene.write(version, status="timeout")
    standing = scene.look()
    assert scene.staging().version == scene.registry.live() == scene.first
    why, who = scene.why(version)
    assert why.startswith("success fell from 1 to ") and who == "rule"
    assert scene.stages(version)[-1] == "rejected"
    assert scene.why(candidate)[0] == "the live version was rolled back"
    assert scene.staging.policy_of(candidate).version == scene.first
    assert standing["drifts"] == [], "the version that is live now has its own record"


def test_what_is_stopped_is_no_success_of_the_live_version(scene: Scene) -> None:
    version = second_live(scene)
    for _ in range(25):
        scene.write(version)
    for _ in range(10):
        scene.write(version, status="aborted", reason="stopped: by the operator")
    scene.look()
    assert scene.staging().version == scene.first


def test_when_the_safety_stage_intervenes_more_the_live_version_is_rolled_back(scene: Scene) -> None:
    version = second_live(scene)
    for _ in range(25):
        scene.write(version, rules="starved")  # a chunk that was late is not the policy's doing
    for _ in range(15):
        scene.write(version)
    scene.look()
    assert scene.staging().version == version
    for _ in range(15):
        scene.write(version, rules="rate")
    scene.look()
    assert scene.staging().version == scene.first
    assert scene.why(version)[0].startswith("interventions rose from 0 to ")


def test_a_canary_that_waits_for_a_label_does_not_keep_the_watch_from_acting(scene: Scene) -> None:
    version = second_live(scene)
    candidate = scene.announce(0.13)
    scene.write(candidate, status="unjudged")
    for _ in range(25):
        scene.write(version)
    for _ in range(15):
        scene.write(version, rules="rate")
    scene.look()
    assert scene.staging().version == scene.first
    assert scene.why(version)[0].startswith("interventions rose from 0 to ")


def test_other_drift_raises_an_alarm_only(scene: Scene) -> None:
    version = second_live(scene)
    for _ in range(25):
        scene.write(version, steps=2)
    for _ in range(15):
        scene.write(version, steps=4)
    standing = scene.look()
    assert scene.staging().version == version
    assert [(drift["statistic"], drift["direction"]) for drift in standing["drifts"]] == [("steps", "rose")]
    assert any(line.startswith("drift: steps rose, from 2 to") for line in scene.said)


def test_a_pinned_version_is_not_rolled_back_until_it_is_unpinned(scene: Scene) -> None:
    version = second_live(scene)
    scene.staging.govern("pin", "", "Ada")
    for status in ["success"] * 25 + ["timeout"] * 10:
        scene.write(version, status=status)
    standing = scene.look()
    assert scene.staging().version == version
    assert [drift["statistic"] for drift in standing["drifts"]] == ["success"]
    scene.staging.govern("unpin", "", "Ada")
    scene.write(version, status="timeout")
    scene.look()
    assert scene.staging().version == scene.first


def test_without_a_version_before_it_there_is_nothing_to_go_back_to(scene: Scene) -> None:
    for status in ["success"] * 25 + ["timeout"] * 10:
        scene.write(scene.first, status=status)
    standing = scene.look()
    assert [drift["statistic"] for drift in standing["drifts"]] == ["success"]
    assert scene.staging().version == scene.first


def test_after_a_restart_the_record_is_that_of_the_log(scene: Scene) -> None:
    version = second_live(scene)
    for _ in range(25):
        scene.write(version)
    before = scene.look()["drift"]
    assert before["success"] > 0
    assert msgspec.to_builtins(before) == before, "it goes over the wire"
    scene.start()
    assert scene.look()["drift"] == before


def test_the_gate_of_the_deployment_counts(scene: Scene) -> None:
    scene.write(scene.first)
    scene.look()
    scene.start(replace(CONFIG, gate=GateRule(max_divergence=0.01)))
    assert scene.stages(scene.announce(0.11))[-1] == "rejected"


def fail_once(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The next note of a version that comes to this stage does not reach the registry."""
    enter, failed = Registry.enter, []

    def failing(self: Registry, version: str, to: Any, **rest: Any) -> None:
        if to == stage and not failed:
            failed.append(version)
            raise RegistryError("registry.sqlite: database or disk is full; free some space")
        enter(self, version, to, **rest)

    monkeypatch.setattr(Registry, "enter", failing)


def test_a_rollback_whose_note_fails_is_made_once_and_noted_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle = second_live(scene)
    last = scene.announce(0.12)
    scene.staging.govern("promote", "", "Ada")
    for _ in range(25):
        scene.write(last)
    scene.look()
    fail_once(monkeypatch, "rejected")
    for _ in range(10):
        scene.write(last, status="timeout")
    with pytest.raises(RegistryError):
        scene.look()
    for _ in range(3):
        scene.write(middle)
        scene.look()
    assert scene.staging().version == middle, "its own episodes went well"
    assert scene.stages(middle)[-1] == "live" and scene.stages(last)[-1] == "retired"


def test_a_canary_whose_end_could_not_be_noted_ends_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = scene.announce(0.12)
    fail_once(monkeypatch, "rejected")
    with pytest.raises(RegistryError):
        scene.run_canary(candidate, never, always)
    assert scene.registry.stage(candidate) == "canary"
    assert scene.look()["candidate"] == "" and scene.why(candidate)[0].startswith("canary: worse after")


def test_a_promotion_whose_note_failed_is_noted_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = scene.announce(0.12)
    fail_once(monkeypatch, "retired")
    with pytest.raises(RegistryError):
        scene.run_canary(candidate, always, never)
    assert scene.staging().version == candidate and scene.registry.stage(candidate) == "canary"
    scene.write(candidate)
    scene.look()
    assert (scene.stages(candidate)[-1], scene.stages(scene.first)[-1]) == ("live", "retired")


def test_one_whose_verdict_at_the_gate_could_not_be_noted_is_rejected_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, "canary")
    with pytest.raises(RegistryError):
        scene.announce(0.12)
    candidate = scene.bundle(0.12)
    assert scene.registry.stage(candidate) == "candidate"
    scene.look()
    assert scene.registry.stage(candidate) == "rejected"


def test_without_the_bundle_to_go_back_to_the_canary_goes_on(scene: Scene) -> None:
    live = second_live(scene)
    shutil.rmtree(scene.run.policies / scene.first)
    scene.start()
    for _ in range(25):
        scene.write(live)
    scene.look()
    candidate = scene.announce(0.12)
    for _ in range(15):
        scene.write(live, status="timeout")
        scene.write(candidate, status="timeout")
    assert scene.seen() == (15, 15)
    assert scene.staging().version == live
    assert len([text for text in scene.said if "cannot come back" in text]) == 1


def test_after_a_restart_what_was_labelled_since_does_not_drift(scene: Scene) -> None:
    live = second_live(scene)
    for _ in range(25):
        scene.write(live)
    unjudged = [scene.write(live, status="unjudged") for _ in range(20)]
    scene.look()
    for episode in unjudged:
        scene.log.index.label(episode, "failure", "Ada")
    scene.start()
    scene.look()
    assert scene.staging().version == live and not scene.staging.standing()["drifts"]


def test_an_index_that_was_made_anew_is_followed(scene: Scene) -> None:
    for _ in range(5):
        scene.write(scene.first)
    second_live(scene)
    scene.log.close()
    for path in scene.run.episodes.glob("index.sqlite*"):
        path.unlink()
    for path in sorted((scene.run.episodes / "done").iterdir())[:3]:
        path.unlink()
    scene.log, scene.count = EpisodeLog(scene.run.episodes), 2
    scene.start()
    candidate = scene.announce(0.12)
    scene.count = 100
    for _ in range(2):
        scene.write(candidate)
    until(lambda: scene.log.index.count() == 4, "the episodes to be stored")
    scene.staging.look()
    assert scene.staging.standing()["evidence"]["candidate_episodes"] == 2
