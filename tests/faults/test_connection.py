"""The runtime is killed, the network stalled and cut, while a robot plays a chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cable import Cable
from scenes import Scene, until

from bridge.messages import RULES

HOLD = [0.0, 0.0]
HOLDING = 1 << RULES.index("hold") | 1 << RULES.index("starved")


def safety(stop_after_s: float) -> dict[str, Any]:
    return {"hold_after_s": 1.0, "stop_after_s": stop_after_s, "chunk_age_s": 5.0}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "merge"), [("killed", None), ("killed", "switch"), ("cut", "switch")])
def test_a_lost_runtime_costs_one_episode_and_the_robot_goes_on_when_told(scene: Scene, how: str, merge: Any) -> None:
    cable = Cable(scene.endpoint)
    scene.deploy_dot(merge=merge, endpoint=cable.endpoint, request_timeout_s=4.0, safety=safety(3.0))
    runtime, robot = scene.serve(), scene.drive()
    scene.moves_on("the second chunk", 25)
    lost = list(scene.applied)[-1]
    if how == "killed":
        runtime.kill()
        runtime.wait()
    cable.unplug()
    until(lambda: "stopped: " in scene.said, "the robot to stop")
    holding, stopping = scene.warnings[:2]
    assert holding.startswith("holding: the runtime has been silent for 1.")
    assert stopping.startswith(("stopped: the runtime has been silent", "stopped: the control loop has been waiting"))
    until(lambda: scene.notes[-1] == ["stop"], "the call of stop()")
    calls = scene.notes[scene.notes.index(["reset", lost]) + 1 :]
    moved = max(i for i, call in enumerate(calls) if call[0] == "apply" and call[1] != HOLD)
    stopped = calls.index(["stop"])
    holds = calls[moved + 1 : stopped]
    assert holds and all(call[1] == HOLD for call in holds), "the robot holds until it is stopped"
    assert set(map(tuple, calls[stopped:])) == {("stop",)}

    if how == "killed":
        runtime = scene.serve()
    cable.plug()
    until(lambda: scene.state().startswith("stopped: "), "the runtime to know of the stop")
    assert scene.notes[-1] == ["stop"] and list(scene.applied)[-1] == lost
    scene.tell("reset")
    until(lambda: list(scene.applied)[-1] != lost, "the next episode")
    scene.moves_on("the next episode")
    scene.tell("end")
    until(lambda: len(scene.applied) == 3, "the episode after it")
    scene.moves_on("the episode after it")
    scene.stop(robot)
    scene.stop(runtime)
    by_seed = {episode.start.seed: episode for episode in scene.episodes()}
    assert by_seed[lost].status == "aborted" and by_seed[lost].steps > 0
    # The guarding thread tells of a stop, if it speaks before the loop has said hello anew.
    reasons = {
        "killed": ("the process ended before the episode",),
        "cut": ("stopped: the runtime has been silent", "stopped: the control loop", "silent for", "the log is closed"),
    }
    assert by_seed[lost].reason.startswith(reasons[how])
    others = [(episode.status, episode.reason) for seed, episode in by_seed.items() if seed != lost]
    assert others == [("timeout", "ended by the operator"), ("aborted", "the bridge was told to leave")]


@pytest.mark.slow
@pytest.mark.parametrize("merge", [None, "switch"])
def test_a_stalled_network_holds_the_robot_and_the_log_says_so(scene: Scene, merge: Any) -> None:
    cable = Cable(scene.endpoint)
    scene.deploy_dot(merge=merge, endpoint=cable.endpoint, request_timeout_s=50.0, safety=safety(50.0))
    runtime, robot = scene.serve(), scene.drive()
    scene.moves_on("the second chunk", 25)
    stalled = list(scene.applied)[-1]
    cable.whole.clear()
    until(lambda: "holding: the runtime has been silent" in scene.said, "the robot to hold")
    kind = "apply" if merge else "hold"
    until(lambda: scene.notes[-3:] == [[kind, HOLD]] * 3, "the hold actions")
    cable.whole.set()
    scene.moves_on("the robot to go on")
    scene.tell("end")
    until(lambda: list(scene.applied)[-1] != stalled, "the episode to end")
    scene.stop(robot)
    held = scene.status()["interventions"]
    scene.stop(runtime)
    assert not any("stopped" in warning for warning in scene.warnings) and next(iter(scene.applied)) == stalled
    (episode,) = (episode for episode in scene.episodes() if episode.start.seed == stalled)
    assert episode.status == "timeout"
    still, marked = [], []
    for decision in episode.decisions:
        rules = np.zeros(len(decision.sent), np.uint8) if decision.rules is None else decision.rules
        still += (~decision.sent.any(axis=1)).tolist()
        marked += ((rules & HOLDING) != 0).tolist()
    assert still == marked, "just the steps with the hold action are marked"
    if merge is None:
        # The loop waited, and steps do not count meanwhile: at most one hold action stood for a chunk.
        assert sum(still) <= 1 and scene.count("hold") >= 3
    else:
        assert sum(still) >= 3 and held["starved"] >= 2
