"""The backend `lerobot`, against a stand-in with the interface of LeRobot's robots."""

import contextlib
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot_robot import Arm

from bridge.backend import Backend, BackendError, HasExpert
from bridge.backends import lerobot, make_backend
from bridge.backends.lerobot import LeRobot
from bridge.backends.lerobot_features import LeRobotOptions, read_spec
from bridge.config import BackendConfig, ConfigError, load_yaml, parse
from bridge.messages import check_observation, observation_tensors

JOINT = {"low": -2.0, "high": 2.0, "unit": "deg"}
ACTIONS = {
    "gripper.pos": {"low": 0, "high": 100.0, "unit": "%"},
    "shoulder_pan.pos": JOINT,
    "elbow_flex.pos": JOINT,
}
CAMERA = {"class": "lerobot_robot:CameraConfig", "width": 12, "height": 8}
OPTIONS: dict[str, Any] = {
    "robot": "lerobot_robot:Arm",
    "config": {"port": "/dev/arm", "cameras": {"wrist": CAMERA, "front": CAMERA}},
    "control_hz": 30,
    "actions": ACTIONS,
    "cameras": {"wrist": {"height": 8, "width": 10}},
    "instructions": {"pick": ["pick up the block", "take the block"]},
}


def make(**changes: Any) -> LeRobot:
    backend = make_backend(BackendConfig("lerobot", {**OPTIONS, **changes}))
    assert isinstance(backend, LeRobot)
    return backend


def connected(**changes: Any) -> tuple[LeRobot, Arm]:
    backend = make(**changes)
    backend.connect()
    backend.reset("pick", 0)
    return backend, backend._robot


def with_config(**changes: Any) -> dict[str, Any]:
    return {**OPTIONS["config"], **changes}


def vector(*values: float) -> Any:
    return np.array(values, np.float32)


def test_features_and_options_make_the_spec_in_the_order_of_the_robot():
    backend = make()
    assert isinstance(backend, Backend) and not isinstance(backend, HasExpert)
    spec = backend.spec
    assert spec.action.names == spec.state.names == ("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos")
    assert spec.action.units == spec.state.units == ("deg", "deg", "%")
    assert (spec.action.low, spec.action.high) == ((-2.0, -2.0, 0.0), (2.0, 2.0, 100.0))
    assert [(c.name, c.height, c.width) for c in spec.cameras] == [("wrist", 8, 10)]
    assert spec.paced and spec.control_hz == 30.0 and spec.action.kind == "absolute" and not spec.judges
    assert spec.instructions == {"pick": ("pick up the block", "take the block")}


def test_the_state_can_be_named():
    spec = make(state={"voltage": "V", "elbow_flex.pos": "deg"}).spec
    assert (spec.state.names, spec.state.units) == (("elbow_flex.pos", "voltage"), ("deg", "V"))


def test_the_configuration_of_the_robot_is_made_from_the_inside_out():
    _, arm = connected(config=with_config(**{"class": "lerobot_robot:ArmConfig"}, max_relative_target=0.5))
    assert (arm.config.port, arm.config.max_relative_target) == ("/dev/arm", 0.5)
    assert (arm.config.cameras["wrist"].height, arm.config.cameras["wrist"].fps) == (8, 30)


def test_a_text_becomes_a_path_where_the_configuration_wants_one(tmp_path):
    config = with_config(id="mine", calibration_dir=str(tmp_path), serial_by="/dev/arm")
    _, arm = connected(config=config)
    # LeRobot calls `mkdir` of it.
    assert arm.calibration_file == tmp_path / "mine.json"
    assert arm.config.serial_by == "/dev/arm" and arm.config.port == "/dev/arm"


def test_an_observation_is_what_the_spec_says_and_what_the_robot_saw():
    backend, arm = connected(cameras={"wrist": {"height": 8, "width": 12}, "front": {"height": 8, "width": 8}})
    arm.positions["gripper"] = 40.0
    seen = backend.observe()
    check_observation(observation_tensors(seen), backend.spec)
    assert seen.state.tolist() == [1.5, 1.5, 40.0]
    np.testing.assert_array_equal(seen.images["wrist"], arm.get_observation()["wrist"])
    assert seen.images["front"].shape == (8, 8, 3)


def test_what_was_really_sent_is_returned():
    backend, arm = connected(config=with_config(max_relative_target=0.25))
    assert backend.apply(vector(9, -9, 1.5)).tolist() == [1.75, 1.25, 1.5]
    # The limits came first, then the robot's own cap.
    assert arm.commands == [{"shoulder_pan.pos": 2.0, "elbow_flex.pos": -2.0, "gripper.pos": 1.5}]
    assert backend.outcome().status == "running"


@pytest.mark.parametrize("bad", [[0.0, 0.0], [0.0, 0.0, math.nan], [[0.0, 0.0, 0.0]]])
def test_an_action_that_is_none_is_not_sent(bad):
    backend, arm = connected()
    with pytest.raises(BackendError, match="3 finite numbers"):
        backend.apply(np.array(bad, np.float32))
    assert arm.commands == []


def test_holding_sends_one_target_until_something_else_is_applied():
    backend, arm = connected()
    arm.positions.update(shoulder_pan=0.5, gripper=-3.0)
    hold = backend.hold_action()
    assert hold.tolist() == [0.5, 1.5, -3.0]
    # It stands outside its limits, and stays there: the limit would be a movement.
    assert backend.apply(hold).tolist() == [0.5, 1.5, -3.0]
    arm.positions["shoulder_pan"] = 0.25  # it sags
    assert backend.hold_action().tolist() == [0.5, 1.5, -3.0]
    backend.apply(vector(1, 1, 1))
    assert backend.hold_action().tolist() == [1, 1, 1]
    arm.positions["elbow_flex"] = 0.75  # moved by hand between two episodes
    backend.reset("pick", 1)
    assert backend.hold_action().tolist() == [1, 0.75, 1]


def test_stop_holds_where_the_robot_is_as_often_as_it_is_called():
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    arm.positions["elbow_flex"] = 0.25  # blocked on its way
    for _ in range(3):
        backend.stop()
    assert arm.positions == {"shoulder_pan": 1.0, "elbow_flex": 0.25, "gripper": 1.0}
    assert len(arm.commands) == 4
    backend.close()
    backend.close()
    backend.stop()
    assert arm.disconnects == 1


def test_a_camera_that_is_gone_does_not_keep_the_arm_from_holding():
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    arm.missing = TimeoutError("no frame for 1000 ms")
    with pytest.raises(BackendError, match=r"cannot be read: TimeoutError: no frame.*check cables"):
        backend.observe()
    backend.stop()
    assert arm.commands[-1] == dict.fromkeys(("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"), 1.0)


@pytest.mark.parametrize("frozen_after_s", [2.0, None])
def test_a_camera_that_is_frozen_stops_the_robot_and_it_can_hold(frozen_after_s, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bridge.backends.lerobot.time.monotonic", lambda: clock[0])
    backend, arm = connected(frozen_after_s=frozen_after_s)
    picture = np.zeros((8, 12, 3), np.uint8)
    reading = {**arm.get_observation(), "wrist": picture}  # a driver that fills one and the same array
    monkeypatch.setattr(arm, "get_observation", lambda: reading)
    for now in (0.0, 1.9, 2.0, 3.0):
        clock[0] = now
        picture[0, 0] = min(now, 1.0)
        backend.observe()
    backend.apply(vector(1, 1, 1))
    clock[0] = 4.0
    if frozen_after_s is None:
        backend.observe()
        return
    with pytest.raises(
        BackendError, match=r"wrist of lerobot_robot:Arm has sent the very same picture for 2.1 s; it is f"
    ):
        backend.observe()
    backend.stop()
    assert arm.commands[-1] == dict.fromkeys(("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"), 1.5)
    picture[0, 0] = 7
    backend.observe()


def test_what_was_sent_before_a_reset_is_no_place_to_hold_at():
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    backend.reset(next(iter(backend.spec.instructions)), 0)
    arm.missing = TimeoutError("no frame for 1000 ms")
    sent = len(arm.commands)
    with pytest.raises(BackendError, match="emergency stop or cut its power"):
        backend.stop()
    assert len(arm.commands) == sent


def test_a_cable_that_is_pulled_is_said_and_stop_says_that_it_could_not():
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    arm.fault = OSError("Input/output error")
    with pytest.raises(BackendError, match="took no action: OSError: Input/output error"):
        backend.apply(vector(1, 1, 1))
    with pytest.raises(BackendError, match="emergency stop or cut its power"):
        backend.stop()
    with pytest.raises(BackendError, match="cannot be disconnected"):
        backend.close()
    # Plugged in again: the robot was made anew, for LeRobot's does not connect twice.
    backend.connect()
    assert backend.observe().state.tolist() == [1.5] * 3


def test_a_packet_that_is_lost_is_asked_for_again(monkeypatch):
    monkeypatch.setattr(lerobot, "_LAST_TRY_S", 60.0)  # a busy computer is no slow device
    backend, arm = connected()
    arm.damaged = 2
    assert backend.observe().state.tolist() == [1.5] * 3
    arm.damaged = 2
    assert backend.apply(vector(1, 1, 1)).tolist() == [1, 1, 1]
    arm.damaged = 2
    backend.stop()
    arm.damaged = 100
    with pytest.raises(BackendError, match=r"cannot be read: ConnectionError: Failed to sync read\. \[TxRx"):
        backend.observe()
    assert arm.damaged == 97


@pytest.mark.parametrize("robot", ["lerobot_robot:Late", "lerobot_robot:LateSecondArm"])
def test_an_answer_that_came_too_late_is_not_taken_for_the_next(robot):
    backend, arm = connected(robot=robot)
    arm.get_observation()
    arm.input.waiting.append(Arm.get_observation(arm))  # that of a request which was given up
    arm.positions["gripper"] = 40.0
    assert backend.observe().state.tolist() == [1.5, 1.5, 40.0]
    assert backend.hold_action().tolist() == [1.5, 1.5, 40.0]


def test_a_stop_waits_for_the_call_that_is_under_way_and_nothing_goes_out_behind_it(monkeypatch):
    backend, arm = connected()
    reading, go = threading.Event(), threading.Event()
    observation = arm.get_observation
    inside = []

    def get_observation():
        inside.append(threading.get_ident())
        assert len(inside) == 1, "two threads in the driver at once"
        reading.set()
        assert go.wait(10)
        inside.pop()
        return observation()

    arm.get_observation = get_observation
    loop = threading.Thread(target=backend.observe)
    loop.start()
    assert reading.wait(10)
    stopping = threading.Thread(target=backend.stop)
    stopping.start()
    time.sleep(0.05)
    assert arm.commands == []
    go.set()
    loop.join(10)
    stopping.join(10)
    assert len(arm.commands) == 1
    with pytest.raises(BackendError, match="is stopped; call reset"):
        backend.apply(vector(1, 1, 1))
    assert len(arm.commands) == 1
    backend.reset("pick", 0)
    backend.apply(vector(1, 1, 1))


def test_a_stop_does_not_wait_for_a_driver_that_hangs_nor_for_the_tries_that_are_left(monkeypatch):
    monkeypatch.setattr(lerobot, "_WAIT_S", 0.05)
    backend, arm = connected()
    hangs, go = threading.Event(), threading.Event()
    calls = []

    def get_observation():
        calls.append(threading.get_ident())
        hangs.set()
        assert go.wait(10)
        raise ConnectionError("no status packet")

    arm.get_observation = get_observation

    def observe():
        with pytest.raises(BackendError, match="no status packet"):
            backend.observe()

    loop = threading.Thread(target=observe)
    loop.start()
    assert hangs.wait(10)
    with pytest.raises(BackendError, match=r"in one call of its driver.*emergency stop"):
        backend.stop()
    monkeypatch.setattr(lerobot, "_WAIT_S", 10.0)
    monkeypatch.setattr(lerobot, "_LAST_TRY_S", 60.0)

    def stop():
        with pytest.raises(BackendError, match="emergency stop"):
            backend.stop()

    waiting = threading.Thread(target=stop)
    waiting.start()
    deadline_s = time.monotonic() + 10
    while not backend._stop_waits:
        assert time.monotonic() < deadline_s
    go.set()
    loop.join(10)
    assert calls.count(loop.ident) == 1, "it is not tried again while a stop waits"
    waiting.join(10)


def test_a_stop_holds_at_what_was_just_seen_without_waiting_for_cameras(monkeypatch):
    monkeypatch.setattr(lerobot, "_FRESH_S", 60.0)
    backend, arm = connected()
    backend.observe()
    arm.missing = TimeoutError("no frame for 1000 ms")
    backend.stop()
    assert arm.commands == [{"shoulder_pan.pos": 1.5, "elbow_flex.pos": 1.5, "gripper.pos": 1.5}]


def test_what_was_sent_last_is_held_at_only_until_the_robot_can_be_read():
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    arm.positions["elbow_flex"] = 0.25  # blocked on its way
    arm.missing = TimeoutError("no frame for 1000 ms")
    assert backend.hold_action().tolist() == [1, 1, 1]
    arm.missing = None
    assert backend.hold_action().tolist() == [1, 0.25, 1]
    backend.close()
    with pytest.raises(BackendError, match="not connected"):
        backend.hold_action()


def test_a_reading_that_is_no_number_is_not_what_a_stop_holds_at(monkeypatch):
    monkeypatch.setattr(lerobot, "_FRESH_S", 60.0)
    backend, arm = connected()
    backend.apply(vector(1, 1, 1))
    arm.positions["elbow_flex"] = math.nan
    with pytest.raises(BackendError, match="not finite"):
        backend.observe()
    arm.positions["elbow_flex"] = 0.25
    backend.stop()
    assert arm.commands[-1]["elbow_flex.pos"] == 0.25


def test_what_was_sent_last_is_held_at_even_outside_the_limits():
    backend, arm = connected(config=with_config(max_relative_target=0.25))
    arm.positions["gripper"] = -3.0
    assert backend.apply(vector(1.5, 1.5, 0))[2] == -2.75
    arm.missing = TimeoutError("no frame")
    hold = backend.hold_action()
    assert hold[2] == -2.75
    backend.apply(hold)
    assert arm.commands[-1]["gripper.pos"] == -2.75


def test_a_robot_that_cannot_be_made_again_is_said_at_connect():
    backend, arm = connected()
    arm.fault = OSError("Input/output error")
    backend._options.config["port"] = "/dev/none"
    try:
        with pytest.raises(BackendError, match="may still have torque"):
            backend.close()
        with pytest.raises(BackendError, match=r"cannot be connected: ConfigError.*cannot be made"):
            backend.connect()
    finally:
        backend._options.config["port"] = "/dev/arm"
    backend.connect()


def test_the_age_of_a_reading_counts_from_its_beginning(monkeypatch):
    backend, arm = connected()
    clock = [0.0]
    monkeypatch.setattr("bridge.backends.lerobot.time.monotonic", lambda: clock[0])
    observation = arm.get_observation

    def slow():
        seen = observation()
        clock[0] += 0.2
        return seen

    monkeypatch.setattr(arm, "get_observation", slow)
    backend.observe()
    arm.positions["elbow_flex"] = 0.25
    backend.stop()
    assert arm.commands[-1]["elbow_flex.pos"] == 0.25


def test_an_old_reading_is_not_held_at(monkeypatch):
    backend, arm = connected()
    clock = [0.0]
    monkeypatch.setattr("bridge.backends.lerobot.time.monotonic", lambda: clock[0])
    backend.observe()
    arm.positions["elbow_flex"] = 0.25
    clock[0] += 0.11
    backend.stop()
    assert arm.commands[-1]["elbow_flex.pos"] == 0.25


@contextlib.contextmanager
def in_a_long_reading(backend, arm):
    """Another thread is in `observe`, which ends with the block."""
    entered, go = threading.Event(), threading.Event()
    observation = arm.get_observation

    def get_observation():
        entered.set()
        assert go.wait(10)
        return observation()

    arm.get_observation = get_observation
    loop = threading.Thread(target=backend.observe)
    loop.start()
    assert entered.wait(10)
    try:
        yield
    finally:
        go.set()
        loop.join(10)


def test_close_does_not_disconnect_while_another_call_runs(monkeypatch):
    monkeypatch.setattr(lerobot, "_WAIT_S", 0.05)
    backend, arm = connected()
    with in_a_long_reading(backend, arm):
        with pytest.raises(BackendError, match="may still have torque"):
            backend.close()
        assert arm.disconnects == 0
    backend.close()
    assert arm.disconnects == 1


def test_nothing_is_sent_after_a_stop_that_could_not_wait(monkeypatch):
    monkeypatch.setattr(lerobot, "_WAIT_S", 0.05)
    backend, arm = connected()
    with in_a_long_reading(backend, arm), pytest.raises(BackendError, match="emergency stop"):
        backend.stop()
    with pytest.raises(BackendError, match="is stopped"):
        backend.apply(vector(1, 1, 1))
    backend.stop()
    assert len(arm.commands) == 1


def test_a_delta_is_never_sent_twice():
    backend, arm = connected(kind="delta")
    arm.damaged = 1
    with pytest.raises(BackendError, match="took no action"):
        backend.apply(vector(1, 1, 1))
    assert arm.damaged == 0 and arm.commands == []


def test_a_device_that_is_slow_to_fail_is_not_asked_again(monkeypatch):
    backend, arm = connected()
    asked = []

    def slow():
        asked.append(1)
        clock[0] += 1.0
        raise TimeoutError("no frame")

    clock = [0.0]
    monkeypatch.setattr("bridge.backends.lerobot.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(arm, "get_observation", slow)
    with pytest.raises(BackendError, match="no frame"):
        backend.observe()
    assert len(asked) == 1


def test_a_velocity_holds_at_what_the_options_say():
    moving = {"x.vel": {"low": -1.0, "high": 1.0, "unit": "m/s", "hold": 0.0}}
    backend, base = connected(robot="lerobot_robot:Base", actions=moving, cameras={})
    backend.apply(vector(0.5))
    backend.stop()
    assert base.positions == {"x.vel": 0.0}


def test_a_delta_that_is_to_hold_elsewhere_is_refused():
    actions = {**ACTIONS, "gripper.pos": {**ACTIONS["gripper.pos"], "hold": 1.0}}
    with pytest.raises(ConfigError, match=r"actions.gripper.pos.hold: 1.0, and a delta holds at 0"):
        make(kind="delta", actions=actions)


def test_a_delta_holds_at_zero():
    backend, _ = connected(kind="delta")
    assert backend.hold_action().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": with_config(port="/dev/unplugged")}, "cannot be connected: ConnectionError: no such port; check"),
        ({"robot": "lerobot_robot:Uncalibrated"}, "is not calibrated: .*; run `lerobot-calibrate`"),
    ],
)
def test_a_robot_that_cannot_be_connected_says_what_to_do_each_time(changes, message):
    backend = make(**changes)
    for _ in range(2):
        with pytest.raises(BackendError, match=message):
            backend.connect()
    with pytest.raises(BackendError, match=r"connect\(\) first"):
        backend.observe()
    backend.stop()
    backend.close()


def test_a_robot_of_third_parties_connects():
    backend, _ = connected(robot="lerobot_robot:Plain")
    backend.connect()
    with pytest.raises(BackendError, match="the tasks are pick"):
        backend.reset("push", 0)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"shoulder_pan.pos": 1.0}, "gives no number for each of"),
        (dict.fromkeys(ACTIONS, "1,5"), "gives no number for each of"),
        (dict.fromkeys(ACTIONS, math.inf), "as not finite"),
        (dict.fromkeys(ACTIONS, 1.0), "camera wrist .* gives object"),
        ({**dict.fromkeys(ACTIONS, 1.0), "wrist": np.zeros((8, 12), np.uint8)}, r"gives uint8\[8, 12\], expected"),
    ],
)
def test_a_reading_that_is_not_what_was_promised_is_refused(reading, message, monkeypatch):
    backend, arm = connected()
    monkeypatch.setattr(arm, "get_observation", lambda: reading)
    with pytest.raises(BackendError, match=message):
        backend.observe()


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ACTIONS.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": without("gripper.pos")}, "options.actions: 'gripper.pos' is missing; every action"),
        ({"actions": {**ACTIONS, "gripper.pos": {"low": 0, "unit": "%"}}}, "missing required field `high`"),
        ({"actions": {**ACTIONS, "griper.pos": JOINT}}, "options.actions.griper.pos: the robot has no action feature"),
        ({"actions": {**ACTIONS, "gripper.pos": {**JOINT, "low": 2}}}, "low 2.0 must be below high 2.0"),
        ({"actions": {**ACTIONS, "gripper.pos": {**JOINT, "high": math.inf}}}, "both finite"),
        ({"actions": {**ACTIONS, "gripper.pos": {**JOINT, "hold": 3}}}, "gripper.pos.hold: 3.0 is outside the limits"),
        ({"actions": {**ACTIONS, "gripper.pos": {**JOINT, "unit": "deg/s"}}}, "a velocity needs it"),
        ({"robot": "lerobot_robot:Base", "actions": {"x.vel": JOINT}, "cameras": {}}, "a velocity needs it"),
        ({"robot": "lerobot_robot:Vector"}, "its action 'all' is (3,)"),
        ({"robot": "lerobot_robot:NoFeatures"}, "has no observation_features"),
        ({"robot": "lerobot_robot:NoSend"}, "has no method send_action()"),
        ({"robot": "lerobot_robot:Ram"}, "options.robot: lerobot_robot has no class 'Ram'"),
        ({"robot": "Arm"}, "options.robot: expected module:Class"),
        ({"robot": "no_such_module_here:Arm"}, "install it in this environment"),
        ({"robot": "lerobot_robot:CameraConfig"}, "config.class: missing"),
        ({"config": {}}, "options.config: ArmConfig refuses it: TypeError"),
        ({"config": with_config(port="/dev/none")}, "cannot be made: ImportError: feetech-servo-sdk"),
        ({"config": with_config(cameras={"wrist": {**CAMERA, "fps": 0}})}, "cameras.wrist: CameraConfig refuses it"),
        ({"config": with_config(cameras={"wrist": {"class": 5}})}, "cameras.wrist.class: expected module:Class"),
        ({"cameras": {"wrst": {"height": 8, "width": 8}}}, "options.cameras.wrst: the robot has no image feature"),
        ({"cameras": {"wrist_depth": {"height": 8, "width": 8}}}, "no image feature of this name (known: wrist, front"),
        ({"state": {"wrist": "px"}}, "options.state.wrist: the robot has no number feature"),
        ({"instructions": {}}, "options.instructions: is empty"),
        ({"instructions": {"pick": []}}, "options.instructions: "),
        ({"control_hz": 0}, "options.control_hz"),
    ],
)
def test_options_that_do_not_fit_the_robot_are_refused_by_path(changes, message):
    with pytest.raises(ConfigError) as error:
        make(**changes)
    assert "$.backend.options" in str(error.value) and message in str(error.value)


def test_lerobot_is_not_imported():
    code = "import sys, bridge.backends.lerobot; print([m for m in sys.modules if m.split('.')[0] == 'lerobot'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_shipped_configuration_fits_the_features_of_an_so101():
    shipped = load_yaml(Path(__file__).resolve().parents[2] / "configs" / "lerobot.yaml")["backend"]
    options = parse(shipped["options"], LeRobotOptions, "lerobot.yaml")
    # As `lerobot.robots.so_follower.SOFollower` gives them.
    joints = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    features = {f"{joint}.pos": float for joint in joints}
    spec = read_spec({**features, "wrist": (480, 640, 3)}, features, options)
    assert shipped["name"] == "lerobot"
    assert len(spec.action.names) == len(spec.state.names) == 6
    assert spec.cameras[0].width / spec.cameras[0].height == 640 / 480
