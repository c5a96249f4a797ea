"""`fieldtune backend serve`: what it serves, what it refuses, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.backend import BackendError
from bridge.backends import make_backend
from bridge.config import BackendConfig, ConfigError
from fieldtune.cli import run
from fieldtune.commands.backend_serve import backend_config

ENOUGH_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


def test_what_is_served_is_a_class_a_backend_or_that_of_a_configuration(tmp_path: Path) -> None:
    port = ("backend.options.port=/dev/ttyACM0",)
    assert backend_config("my_robot:Arm", port) == BackendConfig("my_robot:Arm", {"port": "/dev/ttyACM0"})
    assert backend_config("gymnasium", ("backend.options.id=Reach-v1",)).options == {"id": "Reach-v1"}
    path = tmp_path / "arm.yaml"
    path.write_text("name: arm\nbackend: {name: 'my_robot:Arm', options: {port: /dev/a}}\n")
    assert backend_config(str(path), ("backend.options.speed=2",)).options == {"port": "/dev/a", "speed": 2}
    assert backend_config("point") == BackendConfig("point", {"size_px": 32})
    with pytest.raises(ConfigError, match="no such file"):
        backend_config("nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind", "tcp://0.0.0.0:5556"], "--bind: tcp://0.0.0.0:5556 can be reached from other computers"),
        (["--bind", "ipc"], "--bind: expected `ipc://PATH`"),
        (["--bind", "5556"], "expected `ipc`, `ipc://PATH` or `tcp://HOST:PORT`"),
        (["--bind", "tcp://127.0.0.1:*", "--silence-s", "0"], "--silence-s: expected at least 0.1"),
        (["--bind", "tcp://127.0.0.1:*", "--silence-s", "nan"], "--silence-s: expected at least 0.1"),
        (["--bind", "tcp://127.0.0.1:*", "--set", "backend.options.sizepx=8"], "did you mean `size_px`?"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backend", "serve", "point", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_stops_the_robot_and_closes_it(tmp_path: Path) -> None:
    endpoint, log = f"ipc://{tmp_path}/far/backend.sock", tmp_path / "calls.txt"
    options = ["--bind", endpoint, "--set", f"backend.options.log={log}"]
    far = subprocess.Popen(
        [sys.executable, "-m", "fieldtune", "backend", "serve", "far_robot:Robot", *options],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'bridge'}"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up_s = time.monotonic() + ENOUGH_S
    while True:
        try:
            remote = make_backend(BackendConfig("remote", {"endpoint": endpoint}))
            break
        except BackendError:
            assert time.monotonic() < give_up_s and far.poll() is None
    remote.connect()
    remote.reset("reach", 0)
    far.send_signal(signal.SIGINT)
    _, said = far.communicate(timeout=ENOUGH_S)
    assert far.returncode == 0, said
    assert log.read_text().split() == ["connect", "reset", "stop", "close"]
    said = said.replace("\n", "")  # lines are broken at the width of a terminal
    assert f"serving point on {endpoint}" in said and "the robot was stopped" in said and "Traceback" not in said
