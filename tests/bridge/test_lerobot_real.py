"""The real `lerobot` drives our emulated SO-101 and our backend drives `lerobot`: its SDK's bytes on a real terminal.

It pins other versions than ours, so it lives in an environment of its own, which FIELDTUNE_LEROBOT_PYTHON names:

    python -m venv lerobot && lerobot/bin/pip install 'lerobot[feetech]==0.4.4' msgspec pyzmq rich tyro
    FIELDTUNE_LEROBOT_PYTHON=lerobot/bin/python make test
"""

import base64
import functools
import json
import os
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
import zmq

from bridge.backend import BackendError
from bridge.backends.remote import Remote, RemoteOptions
from bridge.backends.so101 import registers as r
from bridge.backends.so101.calibration import Calibration, so101_joints
from bridge.backends.so101.emulator import EmulatedArm, EmulatedPort, emulated_arm
from bridge.backends.so101.scene import JOINTS, Reach

PYTHON = os.environ.get("FIELDTUNE_LEROBOT_PYTHON", "")
NEEDED = ("lerobot", "scservo_sdk", "msgspec", "zmq", "rich", "tyro")
ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 48, 64
MOST = 10.0  # degrees from where a joint stands that LeRobot lets a goal be
ENOUGH_S = 150.0  # importing LeRobot takes half a minute on a busy machine
CALIBRATION = Calibration(so101_joints(), "test")
HOME = np.zeros(6, np.float32)


@functools.cache
def missing() -> str:
    """Why the named Python will not do, or nothing."""
    if not PYTHON:
        return "FIELDTUNE_LEROBOT_PYTHON names no Python with lerobot; see this file"
    code = f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return f"{PYTHON} has no {done.stdout.strip()}; see this file" if done.stdout.strip() else ""


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.slow, pytest.mark.timeout(400)]


class Camera(threading.Thread):
    """A camera that looks at the emulated arm, for LeRobot's `ZMQCamera`: drawn pictures, without loss."""

    def __init__(self, arm: EmulatedArm) -> None:
        super().__init__(daemon=True)
        self._arm, self._reach, self._done = arm, Reach(HOME, CALIBRATION), threading.Event()
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    def picture(self) -> Any:
        return self._reach.draw(told(self._arm), HEIGHT, WIDTH)

    def run(self) -> None:
        from fieldtune.data.png import encode_png

        while not self._done.wait(0.03):
            # OpenCV reads blue first, and LeRobot hands on what it reads.
            png = encode_png(np.ascontiguousarray(self.picture()[..., ::-1]))
            self._socket.send_string(json.dumps({"images": {"side": base64.b64encode(png).decode()}}))

    def close(self) -> None:
        self._done.set()
        self.join()
        self._socket.close(0)


def told(arm: EmulatedArm) -> Any:
    """What the servos would tell, in our units."""
    return CALIBRATION.positions(np.array([round(servo.position_ticks) for servo in arm.servos.values()]))


def torque(arm: EmulatedArm) -> list[int]:
    return [servo.get(r.TORQUE_ENABLE) for servo in arm.servos.values()]


class Robot:
    """An emulated arm on its port, a camera, and a configuration that has LeRobot drive them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arm = emulated_arm(CALIBRATION)
        self.port = EmulatedPort(self.arm)
        self.camera = Camera(self.arm)
        self.camera.start()
        joints = so101_joints()
        # As `lerobot-calibrate` writes it.
        (directory / "emulated.json").write_text(
            json.dumps(
                {
                    name: {
                        "id": joint.id,
                        "drive_mode": 0,
                        "homing_offset": 0,
                        "range_min": joint.low_ticks,
                        "range_max": joint.high_ticks,
                    }
                    for name, joint in joints.items()
                }
            )
        )
        self.config = yaml.safe_load((ROOT / "configs" / "lerobot.yaml").read_text())
        options = self.config["backend"]["options"]
        options["config"] = {
            "port": self.port.path,
            "id": "emulated",
            "calibration_dir": str(directory),
            "max_relative_target": MOST,
            "cameras": {
                "side": {
                    "class": "lerobot.cameras.zmq:ZMQCameraConfig",
                    "server_address": "127.0.0.1",
                    "port": self.camera.port,
                    "camera_name": "side",
                    "width": WIDTH,
                    "height": HEIGHT,
                    "fps": 30,
                }
            },
        }
        options["cameras"] = {"side": {"height": HEIGHT, "width": WIDTH}}
        options["frozen_after_s"] = None  # its pictures are drawn
        self.path = directory / "lerobot.yaml"
        self.path.write_text(yaml.safe_dump(self.config))

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """LeRobot's Python, with fieldtune from here, no network, and caches of its own."""
        home = {"HF_HOME": str(self.directory / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [PYTHON, *arguments],
            env={**os.environ, **home},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self.camera.close()
        self.port.close()


@pytest.fixture
def robot(tmp_path: Path) -> Iterator[Robot]:
    made = Robot(tmp_path)
    yield made
    made.close()


def test_every_rule_for_backends_holds(robot: Robot) -> None:
    check = robot.python("-m", "fieldtune", "backend", "check", str(robot.path), "--moves", "--json")
    said, errors = check.communicate(timeout=ENOUGH_S)
    assert check.returncode == 0, said + errors
    rows = {row["name"]: row for row in json.loads(said)["checks"]}
    assert {name for name, row in rows.items() if row["state"] == "skipped"} == {"hold keeps still", "unplugged"}
    assert not [row for row in rows.values() if row["state"] == "failed"]
    # What its driver sets at the start arrived, and it let go at the end.
    servos = list(robot.arm.servos.values())
    assert [servo.memory[21] for servo in servos] == [16] * 6, "P_Coefficient"
    assert int.from_bytes(servos[5].memory[16:18], "little") == 500, "Max_Torque_Limit of the gripper"
    assert torque(robot.arm) == [0] * 6


# What its calibration does between the questions that it asks; then a new robot that finds the file.
CALIBRATE = """
import json, sys
from pathlib import Path
from lerobot.motors import MotorCalibration
from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
make = lambda: SO101Follower(SO101FollowerConfig(port=sys.argv[1], id="new", calibration_dir=Path(sys.argv[2])))
robot = make()
robot.bus.connect()
found = robot.bus.broadcast_ping()
robot.bus.disable_torque()
offsets = robot.bus.set_half_turn_homings()
centred = robot.bus.sync_read("Present_Position", normalize=False)
robot.calibration = {
    name: MotorCalibration(motor.id, 0, offsets[name], 1000, 3000) for name, motor in robot.bus.motors.items()}
robot.bus.write_calibration(robot.calibration)
robot._save_calibration()
robot.disconnect()
again = make()
again.bus.connect()
print(json.dumps({"found": found, "offsets": offsets, "centred": centred, "calibrated": again.is_calibrated,
    "seen": again.get_observation()}))
again.disconnect()
"""


def test_it_calibrates_the_emulated_arm(robot: Robot) -> None:
    for servo in robot.arm.servos.values():
        servo.position_ticks = 1500.0 + 100 * servo.get(r.ID)
    done = robot.python("-c", CALIBRATE, robot.port.path, str(robot.directory))
    said, errors = done.communicate(timeout=ENOUGH_S)
    assert done.returncode == 0, errors[-3000:]
    found = json.loads(said.splitlines()[-1])
    assert found["found"] == {str(servo): r.MODEL_STS3215 for servo in range(1, 7)}
    assert list(found["offsets"].values()) == [1500 + 100 * servo - 2047 for servo in range(1, 7)]
    assert set(found["centred"].values()) == {2047} and found["calibrated"]
    middle = (2047 - 2000) * 360 / 4095
    assert list(found["seen"].values()) == pytest.approx([middle] * 5 + [100 * 1047 / 2000])


@pytest.fixture
def served(robot: Robot) -> Iterator[str]:
    """The far side in LeRobot's Python; its endpoint."""
    endpoint = f"ipc://{robot.directory}/far/backend.sock"
    far = robot.python("-m", "fieldtune", "backend", "serve", str(robot.path), "--bind", endpoint)
    yield endpoint
    far.send_signal(signal.SIGINT)
    try:
        _, said = far.communicate(timeout=ENOUGH_S)
    finally:
        far.kill()
    assert far.returncode == 0 and "Traceback" not in said, said


def reached(endpoint: str) -> Remote:
    give_up_s = time.monotonic() + ENOUGH_S
    while True:
        try:
            return Remote(RemoteOptions(endpoint))
        except BackendError:
            assert time.monotonic() < give_up_s


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def test_it_is_driven_from_here(robot: Robot, served: str) -> None:
    backend = reached(served)
    assert backend.spec.action.names == tuple(f"{joint}.pos" for joint in JOINTS)
    backend.connect()
    backend.reset("pick", 0)
    assert torque(robot.arm) == [1] * 6

    def same() -> bool:
        """Ours has 4096 ticks a turn and LeRobot's 4095, which makes 0.03 % of 90 degrees."""
        return bool(np.abs(backend.observe().state - told(robot.arm)).max() < 0.03)

    seen = backend.observe()
    assert same()
    np.testing.assert_array_equal(seen.images["side"], robot.camera.picture())

    far = np.array([30, -30, 30, -30, 60, 0], np.float32)
    # It may go so far from where it stands, in one step.
    capped = np.array([MOST, -MOST, MOST, -MOST, MOST, 50 - MOST], np.float32)
    np.testing.assert_allclose(backend.apply(far), capped, atol=0.1)

    def there() -> bool:
        backend.apply(far)
        return bool(np.abs(told(robot.arm) - far).max() < 0.2)

    until(there)
    until(lambda: np.array_equal(backend.observe().images["side"], robot.camera.picture()))

    # A stop stays within a tick of where it was: LeRobot rounds goals down.
    before = told(robot.arm)
    backend.stop()
    time.sleep(0.3)
    np.testing.assert_allclose(told(robot.arm), before, atol=0.2)

    # Damaged answers are asked for again.
    robot.port.set_fault("corrupt=10")
    for _ in range(20):
        backend.observe()
    robot.port.set_fault("clear")

    # An answer that comes too late is not taken for the one to the next request.
    robot.port.set_fault("delay_ms=300")
    with pytest.raises(BackendError, match="There is no status packet"):
        backend.observe()
    robot.port.set_fault("clear")
    time.sleep(1.0)
    for servo in robot.arm.servos.values():
        servo.position_ticks = 2300.0
        servo.set(r.GOAL_POSITION, 2300)
    assert same()

    robot.port.set_fault("missing=2")
    with pytest.raises(BackendError, match="cannot be read"):
        backend.observe()
    robot.port.set_fault("clear")
    assert same()
    backend.close()
    assert torque(robot.arm) == [0] * 6


def test_a_policy_of_ours_drives_it(robot: Robot, served: str, tiny_bundle: Any) -> None:
    from runtime.index import EpisodeIndex
    from runtime.reading import read_episode
    from runtime.registry import Registry
    from runtime.rundir import RunDir

    spec = reached(served).spec
    run = RunDir(robot.directory / "driven")
    fields = {"state": spec.state, "action": spec.action, "control_hz": spec.control_hz}
    version = tiny_bundle(run.policies, 1.0, **fields)
    registry = Registry(run.registry)
    registry.add(version, parent="", made={})
    registry.set_live(version, why="test")
    registry.close()
    near = robot.directory / "driven.yaml"
    near.write_text(
        yaml.safe_dump(
            {
                "name": "driven",
                "runs": str(robot.directory),
                "backend": {"name": "remote", "options": {"endpoint": served}},
                "bridge": {"horizon_steps": 30, "workers": 1},
            }
        )
    )

    def fieldtune(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fieldtune", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    runtime = fieldtune("serve", str(near), "--mean")
    drive = fieldtune("drive", str(near), "--episodes", "2")
    try:
        said, _ = drive.communicate(timeout=ENOUGH_S)
        assert drive.returncode == 0, said
    finally:
        drive.kill()
        runtime.send_signal(signal.SIGINT)
        told_us, _ = runtime.communicate(timeout=ENOUGH_S)
    assert runtime.returncode == 0, told_us
    index = EpisodeIndex(run.episodes)
    rows = index.list(limit=9)
    assert [(row.status, row.steps) for row in rows] == [("unjudged", 30)] * 2
    first = read_episode(index.path(rows[-1]))
    # The policy wants every joint at its upper limit; whatever starved, it came far in a second.
    np.testing.assert_allclose(first.decisions[0].observation.state, [0, 0, 0, 0, 0, 50], atol=0.1)
    assert (first.decisions[-1].observation.state - first.decisions[0].observation.state > 2 * MOST).all()
    images = [decision.observation.images["side"] for decision in first.decisions]
    assert images[0].shape == (HEIGHT, WIDTH, 3) and (images[0] != images[-1]).any()
    index.close()
