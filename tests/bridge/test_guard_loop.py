"""The guard in the control loop: old chunks, operators' wishes, and what is reported of them."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from guarded import ENOUGH_S, ROBOT, STILL, Guarded, Robot, f32
from msgspec.structs import replace

from bridge.backend import Float32
from bridge.config import BridgeConfig
from bridge.control import EpisodeLoop
from bridge.guard import StoppedError
from bridge.messages import Assignment, Chunk, EndEpisode, Infer, Welcome
from bridge.safety import CHUNK_AGE, FIRST_JUMP, HELD, RATE


class Client:
    """Gives chunks of four small steps; `at` maps the number of a request to what happens before its answer."""

    def __init__(self, at: dict[int, Callable[[], None]], step: float = 0.01) -> None:
        self.at, self.step = at, step
        self.reports: list[dict[str, Any]] = []
        self.end: EndEpisode | None = None
        self._infers = 0

    def collect(self, request: int, kind: type) -> Any:
        assert request == self._infers
        self.at.get(self._infers, lambda: None)()
        start = self._infers * 4 * self.step
        actions = f32(*[[start + i * self.step, 0] for i in range(4)])
        return Chunk(episode="e1", decision=self._infers, version="v"), {"actions": actions}

    def post(self, message: Infer | EndEpisode, arrays: Any) -> int:
        self._note(message, arrays)
        if isinstance(message, EndEpisode):
            self.end = message
        else:
            self._infers += 1
        return self._infers

    def forget(self, request: int) -> None:
        assert request == self._infers

    def _note(self, message: Any, arrays: Any) -> None:
        if message.played:
            self.reports.append({name: arrays[name].tolist() for name in ("sent", "reward", "rules") if name in arrays})


def drive(g: Guarded, client: Client, horizon_steps: int = 12) -> Any:
    task = Assignment(episode="e1", task="t", seed=0, horizon_steps=horizon_steps)
    return EpisodeLoop(g.robot, client, WELCOME, task, g.guard, lambda: False, BridgeConfig()).run()  # type: ignore[arg-type]


WELCOME = Welcome(session="s", version="v", horizon=4)
FAST = replace(ROBOT, control_hz=1000.0, max_rate=(1000.0, 1000.0))


def test_an_old_chunk_is_not_played_and_the_next_is_asked_for() -> None:
    g = Guarded(Robot(FAST), chunk_age_s=1.0)
    client = Client({2: lambda: g.clock.work(1.5)})
    report = drive(g, client, 9)
    assert report.steps == 9
    first, second, third = client.reports
    # One hold in place of the chunk, where the robot was.
    assert second == {"sent": [first["sent"][-1]], "reward": [0.0], "rules": [CHUNK_AGE]}
    assert len(first["sent"]) == len(third["sent"]) == 4 and "rules" not in third


def test_a_chunk_that_grows_old_while_it_is_played_is_cut() -> None:
    robot = Robot(FAST)
    g = Guarded(robot, chunk_age_s=1.0)
    robot.on["apply"] = lambda: g.clock.work(0.4)
    client = Client({})
    drive(g, client, 6)
    # Begun at 0, 0.4 and 0.8 s; at 1.2 s it is too old.
    assert [len(report["sent"]) for report in client.reports] == [3, 3]
    assert all("rules" not in report for report in client.reports)


@pytest.mark.parametrize(("ending", "status"), [("end", "timeout"), ("success", "success"), ("failure", "failure")])
def test_the_operator_ends_the_episode(ending: Any, status: str) -> None:
    robot = Robot(FAST)
    g = Guarded(robot)
    robot.on["apply"] = lambda: g.guard.finish(ending) if len(robot.applied) == 5 else None
    client = Client({})
    report = drive(g, client)
    assert report.status == status and report.steps == 6
    assert client.end is not None and "operator" in client.end.reason and client.end.status == status
    assert [len(report["sent"]) for report in client.reports] == [4, 2]


def test_a_paused_robot_holds_and_then_goes_on_with_a_new_chunk() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)

    def applied() -> None:
        if len(robot.applied) == 1:
            g.guard.pause(True)
        if len(robot.applied) == 8:
            g.guard.pause(False)

    robot.on["apply"] = applied
    client = Client({})
    report = drive(g, client, 10)
    # Two of the first chunk, seven holds that are no steps of the episode, and two whole chunks.
    assert report.steps == 10 and [len(r["sent"]) for r in client.reports] == [2, 4, 4]
    assert len(robot.applied) == 10 + 7
    held = [action.tolist() for action in robot.applied[2:9]]
    assert held == [robot.applied[1].tolist()] * 7


def test_a_robot_that_is_paused_on_its_way_home_holds_at_the_start() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)
    asked: list[int] = []
    robot.on["reset"] = lambda: g.guard.pause(True)
    robot.on["observe"] = lambda: asked.append(len(robot.applied))
    robot.on["apply"] = lambda: g.guard.pause(len(robot.applied) < 5)
    drive(g, Client({}, step=0.1), 4)
    assert asked[0] == 6, "no chunk is asked for before"
    assert [action.tolist() for action in robot.applied[:6]] == [[0, 0]] * 6


def test_a_target_that_stays_too_far_is_never_approached() -> None:
    class Far(Client):
        def collect(self, request: int, kind: type) -> Any:
            chunk, _ = super().collect(request, kind)
            return chunk, {"actions": f32(*[[0.95, 0]] * 4)}

    robot = Robot(FAST)
    client = Far({})
    report = drive(Guarded(robot), client, 6)
    assert [r["rules"] for r in client.reports] == [[FIRST_JUMP]] * 6
    assert [r["sent"] for r in client.reports] == [[[0, 0]]] * 6
    assert not any(action.any() for action in robot.applied)
    assert (report.steps, report.decisions, report.ticks.held) == (6, 6, 6) and FIRST_JUMP & HELD


def test_what_was_changed_is_reported_with_its_rule_beside_what_was_sent() -> None:
    robot = Robot(replace(ROBOT, control_hz=1000.0))  # 2 mm of 2 rad a step: 0.002
    client = Client({})
    drive(Guarded(robot), client, 4)
    (report,) = client.reports
    assert report["rules"] == [RATE] * 4
    np.testing.assert_allclose(report["sent"], [[0.002 * (i + 1), 0] for i in range(4)], atol=1e-6)


def test_a_stop_in_mid_chunk_lets_no_further_action_through() -> None:
    robot = Robot(FAST)
    g = Guarded(robot)

    def applied() -> None:
        if len(robot.applied) == 5:
            # From another thread, as it comes from the runtime or from a key; the lock is this action's.
            thread = threading.Thread(target=g.guard.stop, args=("a hand",))
            thread.start()
            thread.join(ENOUGH_S)

    robot.on["apply"] = applied
    client = Client({})
    with pytest.raises(StoppedError, match="a hand"):
        drive(g, client)
    assert client.end is None
    assert robot.calls.count("apply") == 6 and set(robot.calls[robot.calls.index("stop") :]) == {"stop"}


def test_a_target_may_be_a_read_only_array() -> None:
    action: Float32 = STILL.copy()
    action.flags.writeable = False
    g = Guarded()
    g.begin()
    assert g.guard.apply(action)[0].tolist() == [0, 0]
