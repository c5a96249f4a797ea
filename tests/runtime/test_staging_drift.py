"""The live version is watched for drift, and rolled back by rule."""

from __future__ import annotations

import shutil

from staging_scene import Scene, second_live


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
