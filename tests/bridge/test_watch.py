"""Robots that are processes of their own: their runtime is killed in mid-chunk, and all of them are stopped at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guarded import Robot
from runtime_process import ACTION

from bridge import watch
from bridge.config import SafetyConfig
from bridge.guard import Guard
from bridge.messages import Operate, Operated
from bridge.watch import Watcher

ENOUGH_S = 60.0
HERE = Path(__file__).parent


@dataclass
class Note:
    """One call of a robot's backend."""

    at_s: float
    what: str
    x: float | None


@dataclass
class RobotProcess:
    """A bridge process and what it has noted and said."""

    process: subprocess.Popen[bytes]
    notes_path: Path
    said_path: Path

    @property
    def notes(self) -> list[Note]:
        text = self.notes_path.read_text() if self.notes_path.exists() else ""
        fields = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [Note(float(f[0]), f[1], float(f[2]) if len(f) > 2 else None) for f in fields]

    def count(self, what: str) -> int:
        return sum(note.what == what for note in self.notes)

    @property
    def said(self) -> str:
        return self.said_path.read_text()


def run_script(name: str, *arguments: str, said: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path])}
    with said.open("ab") as log:
        return subprocess.Popen([sys.executable, str(HERE / name), *arguments], stderr=log, env=environment)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`start("runtime")` and `start(robot's name)` start processes on one address."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(name: str, stop_after_s: float = 3.0) -> Any:
        endpoint, said = f"ipc://{tmp_path}/policy.sock", tmp_path / f"{name}.log"
        if name == "runtime":
            running.append(run_script("runtime_process.py", endpoint, said=said))
            return running[-1]
        notes = tmp_path / f"{name}.notes"
        running.append(run_script("robot_process.py", endpoint, name, str(notes), str(stop_after_s), said=said))
        return RobotProcess(running[-1], notes, said)

    yield begin
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(ENOUGH_S)
        finally:
            process.kill()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.02)


def test_a_runtime_that_is_killed_in_mid_chunk_leaves_a_robot_that_holds_stops_says_why_and_resumes_when_told(
    start: Any, serve: Any, tmp_path: Path, fake_policy: Any
) -> None:
    runtime, arm = start("runtime"), start("arm")
    until(lambda: arm.count("apply") >= 3, "the chunk to be played")
    assert {note.x for note in arm.notes if note.what == "apply"} == {ACTION}
    runtime.kill()
    runtime.wait()
    until(lambda: arm.count("stop") > 0, "the robot to stop")
    calls = [(note.what, note.x) for note in arm.notes]
    played = calls.index(("apply", 0.0))
    stopped = calls.index(("stop", None))
    assert set(calls[1:played]) == {("apply", ACTION)}
    assert set(calls[played:stopped]) == {("apply", 0.0)}, "between the chunk and the stop the robot holds"
    until(lambda: len(arm.said.splitlines()) >= 2, "the robot to say so")
    holding, stopping = arm.said.splitlines()[:2]
    assert holding.startswith("holding: the runtime has been silent for 1.")
    assert stopping.startswith(("stopped: the runtime has been silent", "stopped: the control loop has been waiting"))
    # Another runtime takes over; the robot speaks with it, and does not move until it is told.
    serving = serve(endpoint=f"ipc://{tmp_path}/policy.sock", policy=fake_policy(value=0.5), horizon_steps=1_000_000)
    until(lambda: serving.status()["sessions"] == 1, "the robot to say hello to the new runtime")
    until(lambda: serving.status()["robots"].get("arm", "").startswith("stopped: "), "the runtime to know of the stop")
    time.sleep(0.3)
    assert {note.what for note in arm.notes[stopped:]} == {"stop"}
    told, _ = serving.client().request(Operate(command="reset"), Operated)
    assert told.robots == ("arm",)
    resets = arm.count("reset")
    until(lambda: arm.notes[-1].what == "apply" and arm.count("reset") == resets + 1, "the robot to go on")
    assert "reset by the operator" in arm.said


def test_a_runtime_that_is_silent_for_a_moment_leaves_a_robot_that_holds_and_goes_on(start: Any) -> None:
    runtime, arm = start("runtime"), start("arm", stop_after_s=50.0)
    until(lambda: arm.count("apply") >= 3, "the chunk to be played")
    runtime.send_signal(signal.SIGSTOP)
    until(lambda: arm.notes[-1].x == 0.0, "the robot to hold")
    runtime.send_signal(signal.SIGCONT)
    until(lambda: arm.notes[-1].x == ACTION, "the robot to go on")
    assert arm.count("stop") == 0 and arm.count("reset") == 1
    assert "holding: the runtime has been silent" in arm.said and "stopped" not in arm.said


def test_a_stop_reaches_all_robots_and_not_one_action_follows(
    start: Any, serve: Any, tmp_path: Path, fake_policy: Any, record_property: Callable[[str, object], None]
) -> None:
    serving = serve(endpoint=f"ipc://{tmp_path}/policy.sock", policy=fake_policy(value=0.1), horizon_steps=1_000_000)
    robots = {name: start(name) for name in ("arm1", "arm2")}
    for robot in robots.values():
        until(lambda robot=robot: robot.count("apply") >= 6, "the robots to move")
    operator = serving.client("operator")
    asked_s = time.monotonic()
    told, _ = operator.request(Operate(command="stop", why="a hand"), Operated)
    assert told.robots == ("arm1", "arm2")
    stopped = dict.fromkeys(robots, "stopped: a hand")
    until(lambda: serving.status()["robots"] == stopped, "the robots to say that they are stopped")
    time.sleep(0.5)  # five control periods
    for name, robot in robots.items():
        calls = [note.what for note in robot.notes]
        first = calls.index("stop")
        assert set(calls[first:]) == {"stop"}
        after = [note for note in robot.notes[:first] if note.at_s > asked_s]
        record_property(f"{name}_ms", round(1e3 * (robot.notes[first].at_s - asked_s), 1))
        record_property(f"{name}_actions_before_the_stop", len(after))
        until(lambda robot=robot: "stopped: a hand" in robot.said, "the robot to say so")
    aborted = serving.log.index.list(limit=10, status="aborted")
    assert [row.reason for row in aborted] == ["stopped: a hand"] * 2
    assert serving.status()["stopped"] == "a hand"
    moves = {name: robot.count("apply") for name, robot in robots.items()}
    operator.request(Operate(command="reset"), Operated)
    for name, robot in robots.items():
        until(lambda name=name, robot=robot: robot.count("apply") > moves[name], "the robots to go on")
    assert serving.status()["stopped"] == ""


def test_a_robot_is_not_driven_without_its_guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(watch, "encode", broken)
    robot, warnings = Robot(), list[str]()
    guard = Guard(robot, SafetyConfig(), warn=warnings.append)
    watcher = Watcher(guard, f"ipc://{tmp_path}/policy.sock", client="arm", keys=None)
    watcher.start()
    until(lambda: bool(guard.stopped), "the stop")
    watcher.close()
    assert "its guard has failed (RuntimeError: a bug)" in guard.stopped and robot.calls == ["stop"]


def unreliable(times: int) -> Robot:
    """A robot that cannot be stopped so many times."""
    fails = [OSError("no answer")] * times

    def stop() -> None:
        if fails:
            raise fails.pop()

    return Robot(on={"stop": stop})


def test_a_guard_that_has_failed_goes_on_asking_for_the_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(watch, "encode", broken)
    robot = unreliable(2)
    guard = Guard(robot, SafetyConfig(), warn=lambda message: None)
    watcher = Watcher(guard, f"ipc://{tmp_path}/policy.sock", client="arm", keys=None)
    watcher.start()
    until(lambda: guard.state[0] == "stopped", "the stop")
    watcher.close()
    assert robot.calls == ["stop"] * 3


def test_a_warning_that_fails_does_not_end_the_guard(serve: Any) -> None:
    def full(message: str) -> None:
        raise OSError(28, "No space left on device")

    serving = serve()
    robot = unreliable(2)
    guard = Guard(robot, SafetyConfig(), warn=full)
    watcher = Watcher(guard, serving.endpoint, client="arm", keys=None)
    watcher.start()
    try:
        until(lambda: bool(serving.status()["robots"]), "the robot to be known")
        operator = serving.client("operator")
        operator.request(Operate(command="stop", why="a hand"), Operated)
        until(lambda: serving.status()["robots"] == {"arm": "stopped: a hand"}, "the stop to be confirmed")
        assert robot.calls == ["stop"] * 3
        operator.request(Operate(command="reset"), Operated)
        until(lambda: not guard.stopped, "the reset")
    finally:
        watcher.close()


def test_a_stop_is_obeyed_while_the_hold_of_the_dead_man_hangs(serve: Any) -> None:
    hangs, go = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        go.wait(2 * ENOUGH_S)

    serving = serve()
    robot = Robot(on={"apply": hang})
    guard = Guard(robot, SafetyConfig(stop_after_s=3 * ENOUGH_S), warn=lambda message: None)
    watcher = Watcher(guard, serving.endpoint, client="arm", keys=None)
    watcher.start()
    try:
        guard.begin("e", lambda: None)
        guard.waiting()
        assert hangs.wait(ENOUGH_S)
        serving.client("operator").request(Operate(command="stop", why="a hand"), Operated)
        until(lambda: serving.status()["robots"].get("arm") == "stopped: a hand", "the stop")
        assert robot.calls == ["apply", "stop"]
    finally:
        go.set()
        watcher.close()


def test_a_runtime_that_starts_anew_while_a_paused_robot_is_stopped_leaves_it_paused(
    serve: Any, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/policy.sock"
    serving = serve(endpoint=endpoint)
    guard = Guard(Robot(), SafetyConfig(), warn=lambda message: None)
    watcher = Watcher(guard, endpoint, client="arm", keys=None)
    watcher.start()
    try:
        until(lambda: bool(serving.status()["robots"]), "the robot to be known")
        serving.client("operator").request(Operate(command="pause"), Operated)
        until(lambda: guard.paused, "the pause")
        guard.stop("a hand")
        until(lambda: serving.status()["robots"] == {"arm": "stopped: a hand"}, "the stop")
        serving.stop()
        again = serve(endpoint=endpoint)
        until(lambda: again.status()["robots"] == {"arm": "stopped: a hand"}, "the robot to be known again")
        again.client("operator").request(Operate(command="reset"), Operated)
        until(lambda: again.status()["robots"] == {"arm": "paused"}, "the reset, and the pause that goes on")
    finally:
        watcher.close()
