"""A robot that sees what it cannot see, is slower than its rate, or whose clock jumps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scenes import Scene, until

from bridge.drive import MAX_FAULTS

CALM = {"hold_after_s": 5.0, "stop_after_s": 50.0, "chunk_age_s": 10.0}
"""So that a busy machine is not taken for a fault."""


@pytest.mark.slow
def test_a_wrong_observation_costs_the_episode_and_is_named_and_a_lasting_one_stops_the_robot(scene: Scene) -> None:
    scene.deploy_dot(horizon=5, safety=CALM)
    runtime, robot = scene.serve(), scene.drive()
    wrong = {
        "shape": "tensors.state: is <f4[1], expected <f4[2]",
        "dtype": "tensors.image/top: is <f4[8, 8, 3], expected |u1[8, 8, 3]",
    }
    lasting = "tensors.state: holds a value that is not finite"
    for number, (fault, field) in enumerate(wrong.items(), start=1):
        scene.moves_on("the robot to drive", 3)
        scene.fault_path.write_text(fault)
        until(lambda number=number: len(scene.warnings) == number, "the fault to be said")
        why, trying = scene.warnings[-1].split("; the episode is given up, ")
        assert why == f"what point observes is not as its spec says: {field}"
        assert trying == f"trying again (1/{MAX_FAULTS})"
        assert scene.notes[-1] == ["stop"]
        scene.fault_path.write_text("")
        # One that is stored forgives what was before.
        scene.moves_on("the robot to go on by itself", 3)
        scene.tell("end")
        until(lambda number=number: scene.status()["episodes"].get("timeout") == number, "an episode without a fault")
    assert scene.count("connect") == 1
    scene.moves_on("the robot to drive", 3)
    scene.fault_path.write_text("nan")
    until(lambda: "stopped: " in scene.said, "the robot to be stopped for good")
    assert [warning[-5:] for warning in scene.warnings[len(wrong) : -1]] == ["(1/3)", "(2/3)", "(3/3)"]
    assert scene.count("connect") == MAX_FAULTS, "from the second time on the backend is connected anew"
    why = f"what point observes is not as its spec says: {lasting}"
    until(lambda: scene.state() == f"stopped: {why}", "the runtime to know why")
    scene.fault_path.write_text("")
    scene.tell("reset")
    scene.moves_on("the robot to go on when told", 3)
    assert scene.count("connect") == MAX_FAULTS + 1
    scene.stop(robot)
    scene.stop(runtime)
    episodes = scene.episodes()
    reasons = [episode.reason for episode in episodes if episode.status == "aborted"]
    assert [reason.partition("says: ")[2] for reason in reasons] == [*wrong.values(), lasting, ""]
    assert reasons[-1] == "the bridge was told to leave"
    # Not one of the steps until then is missing.
    applied = scene.applied
    assert all(episode.steps == len(applied[episode.start.seed]) > 0 for episode in episodes)


def test_a_robot_that_is_slower_than_its_rate_counts_and_shows_it(scene: Scene) -> None:
    scene.deploy_dot(safety=CALM, horizon_steps=60)
    scene.fault_path.write_text("slow")
    runtime, robot = scene.serve(), scene.drive("--episodes", "1")
    scene.moves_on("slow steps", 20)
    slow = scene.moves()
    scene.fault_path.write_text("")
    assert robot.wait(60) == 0
    scene.stop(runtime)
    last = (scene.directory / "robot.out").read_text().splitlines()[-1]
    found = re.fullmatch(r"60 ticks: work (\S+) s, sleep (\S+) s, (\d+) overruns, 0 starved, 0 held", last)
    assert found is not None, last
    assert 20 <= slow <= int(found[3]) + 1 and float(found[1]) > 20 * 0.07 and float(found[2]) > 0
    (episode,) = scene.episodes()
    assert (episode.status, episode.steps) == ("timeout", 60)


def test_a_wall_clock_that_jumps_by_hours_changes_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = scene.directory / "clock"
    offset.write_text("0")
    monkeypatch.setenv("CLOCK_OFFSET", str(offset))
    scene.python_path.insert(0, str(Path(__file__).parent / "jumping_clock"))
    scene.deploy_dot(safety=CALM, merge="switch", horizon_steps=15)
    runtime, robot = scene.serve(), scene.drive()
    for hours in (3, -5, 1000, -1000):
        offset.write_text(str(3600 * hours))
        scene.moves_on("the robot to drive", 20)
    scene.stop(robot)
    scene.stop(runtime)
    assert [line for line in scene.warnings if "holding" in line or "stopped" in line or "given up" in line] == []
    episodes = scene.episodes()
    ended = [(episode.status, episode.steps) for episode in episodes if episode.status != "aborted"]
    assert len(ended) >= 4 and set(ended) == {("timeout", 15)} and len(episodes) <= len(ended) + 1
    started_s = [episode.start.started_unix_s for episode in episodes]
    assert max(started_s) - min(started_s) > 3600, "the processes have seen the jumps"
