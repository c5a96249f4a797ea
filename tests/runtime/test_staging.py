"""Staged versions: which version drives an episode, and what its end leads to. Episodes are written into the log."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from server_samples import refused
from staging_scene import CONFIG, HORIZON_STEPS, Scene, always, never

from bridge.backend import Backend
from bridge.client import RefusedError
from bridge.messages import Announce, Assignment, Govern, Orders, Serving, Watch
from runtime.bundle import BundleError
from runtime.canary import CanaryRule
from runtime.config import GateRule
from runtime.policy import Policy
from runtime.registry import RegistryError
from runtime.staging import Staging
from runtime.swap import Live

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


def test_the_gate_of_the_deployment_counts(scene: Scene) -> None:
    scene.write(scene.first)
    scene.look()
    scene.start(replace(CONFIG, gate=GateRule(max_divergence=0.01)))
    assert scene.stages(scene.announce(0.11))[-1] == "rejected"


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
