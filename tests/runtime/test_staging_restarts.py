"""Staged versions after a restart, an index that was made anew, and notes that did not reach the disk."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from server_samples import until
from staging_scene import CONFIG, HORIZON_STEPS, Scene, always, never, second_live

from runtime.episodes import EpisodeLog
from runtime.registry import Registry, RegistryError
from runtime.staging import Staging, end_all_trials
from runtime.swap import Live


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


def test_after_a_restart_the_record_is_that_of_the_log(scene: Scene) -> None:
    version = second_live(scene)
    for _ in range(25):
        scene.write(version)
    before = scene.look()["drift"]
    assert before["success"] > 0
    assert msgspec.to_builtins(before) == before, "it goes over the wire"
    scene.start()
    assert scene.look()["drift"] == before


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


# --- notes that did not reach the disk --------------------------------------------------------------------------------


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


def test_a_disk_that_stays_full_is_told_of_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look() -> None:
        looks.append("")
        raise RegistryError("disk is full" if len(looks) < 4 else "disk is gone")

    monkeypatch.setattr(scene.staging, "look", look)
    scene.staging.start(lambda: np.inf)
    until(lambda: len(looks) > 5, "it to look again and again")
    scene.staging.close()
    assert scene.said == ["staging: disk is full", "staging: disk is gone"]
