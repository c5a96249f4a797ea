"""`fieldtune stop`, `fieldtune operator`, and the keys in the terminal of `fieldtune drive`, against a real server."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bridge.backend import Backend
from bridge.backends.point import Point, PointOptions
from bridge.client import PolicyClient
from bridge.config import BridgeConfig, SafetyConfig
from bridge.guard import Guard
from bridge.messages import Judge, Judged, Orders, Watch
from bridge.watch import Watcher
from fieldtune.aside import Aside
from fieldtune.cli import run
from fieldtune.commands.common import account
from fieldtune.keyboard import keys
from fieldtune.robot_keys import RobotKeys
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex, EpisodeRow

ENOUGH_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def deployment(tmp_path: Path) -> Callable[[str], str]:
    """Write a deployment whose runtime is at an address."""

    def write(endpoint: str) -> str:
        path = tmp_path / "point.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "name": "point",
                    "runs": str(tmp_path),
                    "backend": {"name": "point", "options": {"size_px": 8}},
                    "runtime": {"serve": {"endpoint": endpoint}},
                }
            )
        )
        return str(path)

    return write


@pytest.fixture
def watched(point: Backend) -> Iterator[Callable[[str, str], Guard]]:
    """Guard a robot that has nothing to do: `watched(endpoint, name)`."""
    watchers: list[Watcher] = []

    def watch(endpoint: str, name: str) -> Guard:
        guard = Guard(point, BridgeConfig().safety, warn=lambda message: None)
        watchers.append(Watcher(guard, endpoint, client=name, keys=None))
        watchers[-1].start()
        return guard

    yield watch
    for watcher in watchers:
        watcher.close()


def test_stop_says_who_is_stopped_and_operator_resets(
    serve: Any, deployment: Any, watched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve()
    config = deployment(serving.endpoint)
    guards = [watched(serving.endpoint, name) for name in ("arm1", "arm2")]
    until(lambda: len(serving.status()["robots"]) == 2, "the robots to be known")
    assert run(["stop", config, "--why", "a [hand]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"robots": {"arm1": "stopped: a [hand]", "arm2": "stopped: a [hand]"}, "late": []}
    assert [guard.stopped for guard in guards] == ["a [hand]"] * 2
    assert run(["status", config]) == 0
    assert "a [hand]" in capsys.readouterr().out
    assert run(["operator", config, "reset"]) == 0
    assert "told arm1, arm2" in capsys.readouterr().out
    until(lambda: not any(guard.stopped for guard in guards), "the reset")
    assert run(["operator", config, "pause", "--robot", "arm2"]) == 0
    until(lambda: guards[1].paused, "the pause")
    assert not guards[0].paused


def test_what_stands_in_brackets_is_said_as_it_is(
    serve: Any, deployment: Any, watched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "no answer on [/dev/ttyACM0], sent [nan 0.5]"
    serving = serve()
    config = deployment(serving.endpoint)
    watched(serving.endpoint, "arm [left]")
    until(lambda: bool(serving.status()["robots"]), "the robot to be known")
    assert run(["stop", config, "--why", why]) == 0
    assert " ".join(capsys.readouterr().out.split()) == f"arm [left]: stopped: {why}"
    assert run(["status", config]) == 0
    assert "[/dev/ttyACM0]" in capsys.readouterr().out
    # fmt: off
    row = EpisodeRow(seq=0, episode="a", file="a", task="[/reach]", seed=1, source="policy", explore=True, steps=0,
        status="aborted", decisions=0, versions=(), client="arm", started_unix_s=1.0, ended_unix_s=2.0, reason=why,
        bytes=0)
    # fmt: on
    EpisodeIndex(tmp_path / "other" / "episodes").add([row])
    assert run(["episodes", "list", config, "--set", "name=other"]) == 0
    assert "[/reach]" in capsys.readouterr().out


def test_a_robot_that_does_not_say_that_it_is_stopped_is_named(
    serve: Any, deployment: Any, watched: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = serve()
    guard = watched(serving.endpoint, "arm")
    until(lambda: bool(serving.status()["robots"]), "the robot to be known")
    monkeypatch.setattr(guard, "obey", lambda orders: None)
    monkeypatch.setattr("fieldtune.commands.operator.CONFIRM_S", 0.1)
    assert run(["stop", deployment(serving.endpoint)]) == 1
    assert "not stopped: arm" in capsys.readouterr().err


def test_a_robot_that_is_given_up_as_silent_meanwhile_is_named(
    serve: Any, deployment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve(session_timeout_s=1.0)
    with PolicyClient(serving.endpoint, client="arm", timeout_s=ENOUGH_S) as robot:
        robot.request(Watch(bridge="a", client="arm", session="", state="driving"), Orders)
        assert run(["stop", deployment(serving.endpoint)]) == 1
    assert serving.status()["robots"] == {}
    assert "not stopped: arm" in capsys.readouterr().err


def test_without_a_runtime_or_a_robot_it_is_an_error(
    serve: Any, deployment: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = deployment(serve().endpoint)
    assert run(["operator", point, "pause"]) == 1
    assert "no robot is connected" in capsys.readouterr().err
    assert run(["operator", point, "success"]) == 1
    assert "no robot is in an episode; `fieldtune episodes label` judges" in capsys.readouterr().err
    monkeypatch.setattr("fieldtune.commands.operator.TIMEOUT_S", 0.1)
    assert run(["stop", deployment("tcp://127.0.0.1:9")]) == 1
    assert "nobody listens" in capsys.readouterr().err


def test_what_the_safety_stage_changed_is_shown_decision_by_decision(
    serve: Any, deployment: Any, point: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve(log=EpisodeLog(tmp_path / "point" / "episodes"))
    robot = serving.robot(point.spec)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(3)
    robot.report["rules"] = np.array([1, 3, 0], np.uint8)
    robot.infer(robot.observation(point.spec))
    robot.executed(1)
    stored = robot.end(robot.observation(point.spec))
    config = deployment(serving.endpoint)
    assert run(["episodes", "show", config, stored.episode, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["decisions"]
    assert first["rules"] == {"range": 2, "rate": 1} and second["rules"] == {}
    assert run(["episodes", "show", config, stored.episode]) == 0
    assert "range 2 rate 1" in " ".join(capsys.readouterr().out.split())


def test_keys_are_read_one_by_one_and_the_terminal_is_left_as_it_was() -> None:
    import termios

    master, terminal = pty.openpty()
    pressed: list[str] = []
    before = termios.tcgetattr(terminal)
    try:
        with keys(pressed.append, terminal) as there:
            assert there
            os.write(master, b"p \x1b")
            until(lambda: pressed == ["p", " ", "\x1b"], "the keys")
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(master)
        os.close(terminal)


def test_where_there_is_no_terminal_no_key_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file, keys(lambda key: pytest.fail(key), file.fileno()) as there:
        assert not there


STUCK = """
import time
from pathlib import Path
from msgspec.structs import replace
from bridge.backends.point import Point, PointOptions


class Stuck(Point):
    # Its stop() does not return.
    def __init__(self):
        super().__init__(PointOptions(size_px=8))

    @property
    def spec(self):
        return replace(super().spec, paced=True)

    def stop(self):
        Path("stopping").touch()
        time.sleep(600)
"""


def test_the_stop_key_reaches_the_others_while_this_robot_hangs_in_its_stop(
    serve: Any, fake_policy: Any, tmp_path: Path
) -> None:
    serving = serve(policy=fake_policy(value=0.0, log_std=-9.0), horizon_steps=1_000_000)
    (tmp_path / "stuck.py").write_text(STUCK)
    config = tmp_path / "stuck.yaml"
    deployment = {"name": "stuck", "runs": str(tmp_path), "backend": {"name": "stuck:Stuck"}}
    config.write_text(yaml.safe_dump({**deployment, "runtime": {"serve": {"endpoint": serving.endpoint}}}))
    master, terminal = pty.openpty()
    log = tmp_path / "drive.log"
    with log.open("wb") as output:
        line = [sys.executable, "-m", "fieldtune", "drive", str(config), "--name", "arm"]
        process = subprocess.Popen(line, stdin=terminal, stdout=output, stderr=output, cwd=tmp_path)
    try:
        until(lambda: serving.status()["robots"].get("arm") == "driving", "the robot to drive")
        os.write(master, b" ")
        until(lambda: (tmp_path / "stopping").exists(), "the stop here")
        until(lambda: serving.status()["stopped"] == "by a key at arm", "the runtime to know")
        os.write(master, b"r")
        until(lambda: serving.status()["stopped"] == "", "the next key to be heard")
        hangs = "stop() of point has not returned"
        until(lambda: hangs in serving.status()["robots"]["arm"], "the runtime to know that it is not stopped")
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENOUGH_S) == 1 and hangs in log.read_text(), "it leaves all the same, and says so"
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(terminal)


def test_the_keys_of_drive_stop_reset_and_judge(serve: Any, deployment: Any, fake_policy: Any, tmp_path: Path) -> None:
    serving = serve(policy=fake_policy(value=0.0, log_std=-9.0), horizon_steps=1_000_000)
    master, terminal = pty.openpty()
    log = tmp_path / "drive.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fieldtune", "drive", deployment(serving.endpoint), "--name", "arm"],
            stdin=terminal,
            stdout=output,
            stderr=output,
        )

    def robot() -> str:
        return str(serving.status()["robots"].get("arm", ""))

    try:
        until(lambda: robot() == "driving" and "keys: space" in log.read_text(), "the robot to drive")
        os.write(master, b"p")
        until(lambda: robot() == "paused: at the robot", "the pause")
        os.write(master, b"p")
        until(lambda: robot() == "driving", "the robot to go on")
        os.write(master, b"s")
        until(lambda: serving.status()["episodes"] == {"success": 1}, "the episode to end as a success")
        until(lambda: robot() == "driving", "the next episode")
        os.write(master, b"d")
        until(lambda: "counts as discarded" in log.read_text(), "the next one to be ended and discarded")
        os.write(master, b"p")
        until(lambda: robot() == "paused: at the robot", "the pause")
        os.write(master, b"e")
        until(lambda: serving.status()["episodes"].get("timeout") == 2, "the end of the episode")
        os.write(master, b"f")
        until(lambda: "counts as failure" in log.read_text(), "the label of the episode that has ended")
        os.write(master, b"p")
        until(lambda: robot() == "driving", "the robot to go on")
        os.write(master, b" ")
        until(lambda: robot() == "stopped: by a key at arm", "the stop")
        until(lambda: serving.status()["stopped"] == "by a key at arm", "the runtime to know")
        os.write(master, b"r")
        until(lambda: robot() == "driving", "the reset")
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENOUGH_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(terminal)
    rows = [row for row in reversed(serving.log.index.list(limit=10)) if row.labelled_by or row.status == "success"]
    who = account()
    assert [(row.status, row.reason) for row in rows] == [
        ("success", "marked by the operator"),
        ("aborted", f"discarded by {who}"),
        ("failure", "ended by the operator"),
    ]
    assert rows[2].labelled_by == who


def test_no_key_freezes_the_robots_process_and_a_lost_terminal_ends_the_reading() -> None:
    master, terminal = pty.openpty()
    seen: list[str] = []
    with keys(seen.append, terminal) as there:
        assert there
        os.write(master, b"\x1a\x13s")  # Ctrl-Z and Ctrl-S
        until(lambda: "s" in seen, "the keys")
        assert seen == ["\x1a", "\x13", "s"]
        reader = next(thread for thread in threading.enumerate() if thread.name == "keys")
        os.close(master)
        until(lambda: not reader.is_alive(), "the reading to end")
    os.close(terminal)


def test_whoever_guards_a_robot_does_not_wait_for_a_terminal() -> None:
    go, said = threading.Event(), list[str]()

    def say(message: str) -> None:
        assert go.wait(ENOUGH_S)
        said.append(message)

    with Aside(say) as aside:
        for number in range(5):
            aside(str(number))
        assert not said
        go.set()
    assert said == ["0", "1", "2", "3", "4"]
    with Aside(lambda message: [][0]) as aside:  # type: ignore[index, return-value]
        aside("what cannot be said is lost")


def test_a_label_key_that_is_held_down_labels_once() -> None:
    labels: list[str] = []
    go = threading.Event()

    class Client:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def request(self, message: Judge, kind: Any) -> Any:
            labels.append(message.label)
            assert go.wait(ENOUGH_S)
            return Judged(episode=message.episode, status=message.label), {}

    said: list[str] = []
    guard = Guard(Point(PointOptions(size_px=8)), SafetyConfig(), warn=said.append)
    with RobotKeys(guard, Client, name="arm", who="ada", warn=said.append) as robot_keys:  # type: ignore[arg-type]
        robot_keys.handle("s")
        guard.ended = "e1"
        for key in "sssfff":
            robot_keys.handle(key)
        go.set()
    assert labels == ["success", "failure"]
    assert said[0] == "success: no episode has ended here that could be judged"
    assert said[1:] == ["episode e1 counts as success, says ada", "episode e1 counts as failure, says ada"]
