"""The backend `so101` on a real pseudo-terminal with emulated servos behind it."""

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from bridge.backend import Backend, BackendError, HasExpert, HasTip
from bridge.backends import make_backend
from bridge.backends.so101 import registers as r
from bridge.backends.so101 import scene
from bridge.backends.so101.arm import SO101, SO101Options
from bridge.backends.so101.bus import BusError
from bridge.backends.so101.calibration import Calibration, JointCalibration, so101_joints
from bridge.backends.so101.emulator import EmulatedPort, emulated_arm
from bridge.backends.so101.port import PortError, SerialPort
from bridge.backends.so101.servos import ServoFaultError
from bridge.config import BackendConfig, ConfigError, SafetyConfig
from bridge.guard import Guard
from bridge.messages import check_observation, observation_tensors
from bridge.safety import WORKSPACE
from fieldtune.deployment import load_deployment

# Emulated servos start in the middle of their ranges, so this way home is short.
QUICK = {
    "emulate": True,
    "timeout_ms": 2000.0,
    "home": {"gripper": 50.0},
    "home_speed_deg_s": 180.0,
    "actions": "absolute",
}
SIDE = ({"name": "side", "device": "drawn", "height": 32, "width": 48},)
ROOT = Path(__file__).resolve().parents[2]


def make(**options) -> SO101:
    return make_backend(BackendConfig("so101", {**QUICK, **options}))


@pytest.fixture
def arm(monkeypatch):
    """Episodes start at home exactly."""
    monkeypatch.setattr(scene, "START_SPREAD", 0.0)
    backend = make(cameras=SIDE)
    backend.connect()
    yield backend
    backend.close()


@pytest.fixture
def stepped(monkeypatch):
    """One whose actions are steps of the goals: at most 4 degrees, or 3.25 percent of the gripper."""
    monkeypatch.setattr(scene, "START_SPREAD", 0.0)
    backend = make(actions="delta")
    backend.connect()
    backend.reset("reach", 0)
    yield backend
    backend.close()


def servo(backend, number):
    return backend.emulated.arm.servos[number]


def torque(backend):
    return [own.get(r.TORQUE_ENABLE) for own in backend.emulated.arm.servos.values()]


def test_the_spec_needs_no_arm_and_names_units_and_limits():
    backend = make(cameras=SIDE)
    spec = backend.spec
    assert isinstance(backend, Backend) and isinstance(backend, HasExpert)
    assert spec.state.names == spec.action.names == tuple(so101_joints())
    assert spec.state.units == ("deg",) * 5 + ("percent",)
    assert spec.action.low[1] == pytest.approx(-90, abs=0.1) and spec.action.high[5] == 100
    assert spec.paced and spec.control_hz == 30 and list(spec.instructions) == ["reach"] and spec.judges
    # 120 degrees a second; the gripper's 100 percent are 1400 ticks.
    rate = [120.0] * 5 + [120 * 4096 / 360 / 14]
    assert spec.action.kind == "absolute" and spec.max_rate == pytest.approx(rate)
    step = make(actions="delta").spec
    assert step.action.kind == "delta" and step.max_rate is None
    assert step.action.high == pytest.approx([each / 30 for each in rate])
    assert step.action.low == tuple(-each for each in step.action.high)


def test_an_episode_of_the_expert_through_the_pty(arm):
    arm.reset("reach", 3)
    check_observation(observation_tensors(arm.observe()), arm.spec)
    for _ in range(150):
        action = arm.expert_action()
        sent = arm.apply(action)
        assert np.abs(sent - action).max() < 0.1
        if arm.outcome().status == "success":
            break
        time.sleep(1 / 30)
    assert arm.outcome().status == "success"
    assert arm.outcome().reward > -scene.TOLERANCE_M
    privileged = arm.observe().privileged
    assert np.linalg.norm(privileged[:3] - privileged[3:]) < 0.07
    assert arm.counts.timeouts == arm.counts.checksum_errors == 0


def test_limits_are_kept_and_what_was_sent_is_returned(arm):
    arm.reset("reach", 0)
    sent = arm.apply(np.full(6, 1000, np.float32))
    assert sent.tolist() == pytest.approx(list(arm.spec.action.high))
    assert [own.get(r.GOAL_POSITION) for own in arm.emulated.arm.servos.values()] == [
        joint.high_ticks for joint in so101_joints().values()
    ]
    assert servo(arm, 1).get(r.GOAL_SPEED) == round(120 * 4096 / 360)
    for bad in (np.zeros(5, np.float32), np.full(6, np.nan, np.float32)):
        with pytest.raises(BackendError, match="6 finite numbers"):
            arm.apply(bad)


def test_steps_add_up_and_end_at_the_limits(stepped):
    step = np.array([1.0, 0.01, 0, 0, 0, 0], np.float32)
    for _ in range(9):
        assert stepped.apply(step) == pytest.approx(step, abs=1e-5)
    # 0.09 degrees are one tick: less than half of it in each step is not lost.
    assert servo(stepped, 1).get(r.GOAL_POSITION) == 2048 + round(9 * r.TICKS_PER_DEG)
    assert servo(stepped, 2).get(r.GOAL_POSITION) == 2048 + 1
    assert stepped.apply(np.full(6, 50, np.float32)).tolist() == pytest.approx(stepped.spec.action.high)
    for _ in range(20):
        servo(stepped, 6).position_ticks = 3390.0
        sent = stepped.apply(np.array([0, 0, 0, 0, 0, 9], np.float32))
    assert servo(stepped, 6).get(r.GOAL_POSITION) == 3400 and sent.tolist() == [0] * 6


def test_a_goal_does_not_run_away_from_a_joint_that_is_blocked(stepped):
    servo(stepped, 1).set(r.GOAL_SPEED, 1)
    servo(stepped, 1).advance = lambda elapsed_s: None
    for _ in range(30):
        sent = stepped.apply(np.array([4, 0, 0, 0, 0, 0], np.float32))
    # 0.3 s at 120 degrees a second, and what counts as arrived.
    assert servo(stepped, 1).get(r.GOAL_POSITION) == 2048 + round((0.3 * 120 + 4) * r.TICKS_PER_DEG)
    assert sent[0] == 0
    # Held, it comes back to the joint as fast as an action may, and stays.
    for _ in range(12):
        stepped.apply(stepped.hold_action())
    assert abs(servo(stepped, 1).get(r.GOAL_POSITION) - 2048) <= 4 * r.TICKS_PER_DEG + 1
    assert stepped.hold_action().tolist() == [0] * 6


@pytest.mark.parametrize("actions", ["absolute", "delta"])
def test_the_guard_changes_nothing_of_what_the_expert_does(actions):
    backend = make(actions=actions)
    guard = Guard(backend, SafetyConfig(), warn=lambda text: None)
    backend.connect()
    guard.begin("e", lambda: backend.reset("reach", 0))
    for _ in range(15):
        (action,), (rules,) = guard.check(backend.expert_action()[None])
        sent, rule = guard.apply(action)
        assert rules == rule == 0
        assert sent == pytest.approx(action, abs=0.05)
    guard.rest(stop=True)
    backend.close()


@pytest.mark.parametrize("actions", ["absolute", "delta"])
def test_the_guard_keeps_the_tip_in_its_box(actions, monkeypatch):
    monkeypatch.setattr(scene, "START_SPREAD", 0.0)
    backend = make(actions=actions, home={"gripper": 50.0})
    low, high = (-1.0, -1.0, 0.2), (1.0, 1.0, 1.0)
    box = SafetyConfig(workspace_low=low, workspace_high=high)
    guard = Guard(backend, box, warn=lambda text: None)
    backend.connect()
    guard.begin("e", lambda: backend.reset("reach", 0))
    rules, heights = set(), []
    for i in range(20):
        bent = 4.0 * (1 if actions == "delta" else i + 1)
        (action,), _ = guard.check(np.array([[0, bent, 0, 0, 0, 0]], np.float32))
        _, rule = guard.apply(action)
        rules.add(rule)
        heights.append(float(backend.tip_after(backend.hold_action())[2]))
    assert WORKSPACE in rules and 0.2 <= min(heights) < 0.22, (rules, heights)
    guard.rest(stop=True)
    backend.close()


def test_a_real_arm_does_not_know_where_its_tip_is(plugged, tmp_path):
    backend = SO101(real_options(plugged.path, tmp_path))
    assert isinstance(make(), HasTip) and not isinstance(backend, HasTip)
    with pytest.raises(ConfigError, match="so101 cannot say where its tip is"):
        Guard(backend, SafetyConfig(workspace_low=(0, 0, 0), workspace_high=(1, 1, 1)), warn=print)


def test_torque_comes_on_without_a_jump(arm):
    joint = servo(arm, 2)
    joint.set(r.GOAL_POSITION, 3000)
    arm.reset("reach", 0)
    assert abs(joint.position_ticks - 2048) < 5
    assert torque(arm) == [1] * 6


@pytest.mark.parametrize("lost", [1, 2])
def test_torque_comes_on_without_a_jump_also_when_a_broadcast_is_lost(arm, lost):
    joint = servo(arm, 2)
    joint.set(r.GOAL_POSITION, 3000)
    arm.emulated.set_fault(f"lost={lost}")
    arm._servos.enable()
    time.sleep(0.2)
    arm.observe()
    assert abs(joint.position_ticks - 2048) < 5
    arm.stop()
    arm.emulated.set_fault("lost=3")
    joint.set(r.GOAL_POSITION, 3000)
    joint.set(r.TORQUE_ENABLE, 0)
    with pytest.raises(BusError, match=r"shoulder_lift \(servo 2\).*has not confirmed"):
        arm._servos.enable()
    assert joint.get(r.TORQUE_ENABLE) == 0, "it would run to its old goal"


@pytest.fixture
def slow_arm(monkeypatch):
    """The way of a test takes seconds, so that a busy computer does not miss it."""
    monkeypatch.setattr(scene, "START_SPREAD", 0.0)
    backend = make(max_speed_deg_s=30.0)
    backend.connect()
    yield backend
    backend.close()


def test_a_stop_is_told_until_every_servo_has_it(slow_arm):
    arm = slow_arm
    arm.reset("reach", 0)
    arm.apply(np.array([80, 0, 0, 0, 0, 50], np.float32))
    time.sleep(0.05)
    arm.emulated.set_fault("lost=2")
    arm.stop()
    stopped_at = servo(arm, 1).get(r.GOAL_POSITION)
    assert stopped_at < 2048 + 75 * r.TICKS_PER_DEG
    arm.reset("reach", 0)
    arm.apply(np.array([80, 0, 0, 0, 0, 50], np.float32))
    arm.emulated.set_fault("lost=3")
    with pytest.raises(BackendError, match="has not confirmed it in 3 attempts; it may still move"):
        arm.stop()
    arm.stop()
    assert servo(arm, 1).get(r.GOAL_POSITION) < 2048 + 75 * r.TICKS_PER_DEG


def test_a_stop_goes_before_what_others_want_and_nothing_goes_out_behind_it():
    backend = make(timeout_ms=200.0, retries=9)
    backend.connect()
    backend.reset("reach", 0)
    backend.emulated.set_fault("missing=4")

    def observe():
        with pytest.raises(BackendError):
            backend.observe()

    asked = threading.Thread(target=observe)
    asked.start()
    time.sleep(0.05)
    before = backend.counts.requests
    with pytest.raises(BackendError, match="may still move"):
        backend.stop()
    # One attempt of the other at most, then reading once and telling three times, each with its look.
    assert backend.counts.requests - before <= 1 + 1 + 2 * 3 + 1
    with pytest.raises(BackendError, match="was stopped"):
        backend._servos.goals(backend._positions)
    asked.join(10)
    backend.emulated.set_fault("clear")
    backend.close()


def test_an_arm_that_cannot_be_connected_keeps_its_torque(plugged, tmp_path):
    options = real_options(plugged.path, tmp_path)
    for own in plugged.arm.servos.values():
        own.set(r.TORQUE_ENABLE, 1)
    plugged.set_fault("missing=2")
    with pytest.raises(BackendError, match="no answer from shoulder_lift"):
        SO101(options).connect()
    assert [own.get(r.TORQUE_ENABLE) for own in plugged.arm.servos.values()] == [1] * 6


def test_the_way_home_from_beyond_the_range_is_slow():
    backend = make(home_speed_deg_s=20.0)
    backend.connect()
    joint = servo(backend, 1)
    limit = joint.get(r.MIN_POSITION)
    joint.position_ticks = limit - 40 * r.TICKS_PER_DEG
    fastest = []
    advance = joint.advance

    def watched(elapsed_s):
        advance(elapsed_s)
        fastest.append(abs(joint.speed_ticks_s))

    joint.advance = watched
    threading.Timer(0.6, backend.stop).start()
    with pytest.raises(BackendError, match="stopped"):
        backend.reset("reach", 0)
    assert 0 < max(fastest) <= 1.25 * 20.0 * r.TICKS_PER_DEG + 1
    backend.close()


def test_stop_holds_or_lets_go_and_needs_a_reset_after_it(slow_arm):
    arm = slow_arm
    arm.reset("reach", 0)
    arm.apply(np.array([90, 0, 0, 0, 0, 50], np.float32))
    time.sleep(0.1)
    arm.stop()
    arm.stop()
    goal = servo(arm, 1).get(r.GOAL_POSITION)
    assert 2048 < goal < 2048 + 900
    assert torque(arm) == [1] * 6
    with pytest.raises(BackendError, match="call reset"):
        arm.apply(arm.hold_action())
    arm.reset("reach", 1)
    arm.apply(arm.hold_action())
    emulated = arm.emulated.arm
    arm.close()
    arm.close()
    assert [own.get(r.TORQUE_ENABLE) for own in emulated.servos.values()] == [0] * 6
    with pytest.raises(BackendError, match="not connected"):
        arm.observe()
    limp = make(on_stop="limp")
    limp.connect()
    limp.reset("reach", 0)
    limp.stop()
    assert torque(limp) == [0] * 6
    limp.close()


def test_a_stop_from_another_thread_ends_the_way_home():
    backend = make(home={"shoulder_pan": 90.0}, home_speed_deg_s=10.0)
    backend.connect()
    threading.Timer(0.3, backend.stop).start()
    with pytest.raises(BackendError, match="stopped on its way home"):
        backend.reset("reach", 0)
    assert backend.observe().state[0] < 45
    backend.close()


def test_a_stop_that_is_not_confirmed_does_not_sink(arm):
    """A loaded joint rests below its goal, and one servo that does not answer has the stop told again and again."""
    arm.reset("reach", 0)
    lift = arm.emulated.arm.servos[2]
    advance, droop_ticks = lift.advance, 2 * r.TICKS_PER_DEG

    def loaded(seconds):
        goal = lift.get(r.GOAL_POSITION)
        lift.set(r.GOAL_POSITION, round(goal + droop_ticks))
        advance(seconds)
        lift.set(r.GOAL_POSITION, goal)

    lift.advance = loaded
    time.sleep(0.3)
    arm._servos._bus._timeout_s = 0.2
    arm.emulated.set_fault("missing=6")
    with pytest.raises(BackendError, match="gripper"):
        arm.stop()
    first = lift.position_ticks
    for _ in range(4):
        time.sleep(0.2)
        with pytest.raises(BackendError, match="gripper"):
            arm.stop()
    arm.emulated.set_fault("clear")
    assert lift.position_ticks <= first + 1.5 * droop_ticks


def test_an_arm_whose_power_was_cut_while_it_did_not_stop_is_held_where_it_fell(arm):
    arm.reset("reach", 0)
    arm._servos._bus._timeout_s = 0.2
    for servos in ([6], [1, 2, 3, 4, 5]):
        for number in servos:
            arm.emulated.set_fault(f"missing={number}")
        with pytest.raises(BackendError, match="has not confirmed it"):
            arm.stop()
    lift, fallen = servo(arm, 2), 2048 + 40 * r.TICKS_PER_DEG
    lift.set(r.TORQUE_ENABLE, 0)
    lift.position_ticks = fallen
    arm._servos._bus._timeout_s = 2.0
    arm.emulated.set_fault("clear")
    arm.stop()
    assert abs(lift.get(r.GOAL_POSITION) - fallen) <= 1, "it would rise where a hand may be"


def test_holding_does_not_sink(arm):
    arm.reset("reach", 0)
    goal = np.array([0, 10, 0, 0, 0, 50], np.float32)
    sent = arm.apply(goal)
    servo(arm, 2).position_ticks = 2048 + 8 * r.TICKS_PER_DEG
    servo(arm, 2).set(r.GOAL_SPEED, 1)
    arm.observe()
    assert arm.hold_action()[1] == sent[1]
    servo(arm, 2).position_ticks = 2048 + 2 * r.TICKS_PER_DEG
    arm.observe()
    assert arm.hold_action()[1] == pytest.approx(2, abs=0.3)


def test_a_blocked_joint_is_named():
    backend = make(home={"elbow_flex": 45.0, "gripper": 50.0})
    backend.connect()
    servo(backend, 3).set(r.MAX_POSITION, 2200)
    with pytest.raises(BackendError, match="elbow_flex did not get home"):
        backend.reset("reach", 0)
    backend.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("overload=3", ("elbow_flex (servo 3) reports overload", "take the load off")),
        ("overheat=2", ("shoulder_lift (servo 2) reports over-temperature (76 degrees C", "cool down")),
        ("voltage=6", ("gripper (servo 6) reports voltage", "4.9 V", "power supply")),
    ],
)
def test_faults_of_a_servo_name_joint_and_remedy(arm, fault, words):
    arm.reset("reach", 0)
    arm.emulated.set_fault(fault)
    with pytest.raises(ServoFaultError) as error:
        arm.apply(arm.hold_action())
    for word in words:
        assert word in str(error.value)
    arm.stop()
    arm.emulated.set_fault("clear")
    arm.reset("reach", 0)
    arm.apply(arm.hold_action())


def test_a_servo_that_goes_missing_is_named_after_bounded_attempts():
    backend = make(timeout_ms=150.0, retries=1)
    backend.connect()
    backend.reset("reach", 0)
    before = backend.counts
    backend.emulated.set_fault("missing=4")
    with pytest.raises(BusError, match=r"no answer from wrist_flex \(servo 4\) in 2 attempts of 150 ms") as error:
        backend.observe()
    assert error.value.missing == (4,)
    assert backend.counts.retries >= before.retries + 1
    assert backend.counts.timeouts >= before.timeouts + 2
    with pytest.raises(BusError, match=r"wrist_flex \(servo 4\) was told to stay.*has not confirmed"):
        backend._servos.hold()
    with pytest.raises(BackendError, match="it may still move: use its emergency stop"):
        backend.stop()
    with pytest.raises(BackendError, match=r"wrist_flex \(servo 4\) was told to let go.*may still have torque"):
        backend.close()
    backend.close()


def test_damaged_and_late_answers_are_asked_for_again_and_counted(arm):
    arm.reset("reach", 0)
    arm.emulated.set_fault("corrupt=7")
    arm._servos._bus._timeout_s = 0.25
    for _ in range(4):
        arm.apply(arm.hold_action())
    arm.emulated.set_fault("clear")
    assert arm.counts.checksum_errors >= 3
    assert arm.counts.retries >= 3
    # Answers later than the deadline: given up, and what arrives then answers nothing else.
    arm._servos._bus._retries = 0
    arm.emulated.set_fault("delay_ms=400")
    with pytest.raises(BusError, match="no servo answers"):
        arm.observe()
    arm.emulated.set_fault("clear")
    arm._servos._bus._timeout_s = 3.0
    time.sleep(1.5)
    assert arm.observe().state[5] == pytest.approx(50, abs=1)


def test_unplugging_is_said_by_all(arm):
    arm.reset("reach", 0)
    arm.emulated.close()
    with pytest.raises(PortError, match="the port is gone"):
        arm.apply(arm.hold_action())
    with pytest.raises(BackendError, match="it may still move"):
        arm.stop()
    with pytest.raises(BackendError, match="may still have torque"):
        arm.close()


def real_options(port, tmp_path, **joints):
    described = {
        name: {"id": joint.id, "low_ticks": joint.low_ticks, "high_ticks": joint.high_ticks, "unit": joint.unit}
        for name, joint in so101_joints().items()
    }
    path = tmp_path / "arm.yaml"
    path.write_text(yaml.safe_dump({"joints": described | joints}))
    return SO101Options(
        port=port, calibration=str(path), tasks={"pick": "pick it up"}, timeout_ms=500.0, home={"gripper": 50.0}
    )


@pytest.fixture
def plugged():
    port = EmulatedPort(emulated_arm(Calibration(so101_joints(), "test")))
    yield port
    port.close()


def test_a_real_arm_runs_on_and_has_no_expert(plugged, tmp_path):
    backend = SO101(real_options(plugged.path, tmp_path))
    assert not isinstance(backend, HasExpert) and backend.spec.privileged is None and not backend.spec.judges
    backend.connect()
    with pytest.raises(BackendError, match="no task 'reach'"):
        backend.reset("reach", 0)
    backend.reset("pick", 0)
    backend.apply(backend.hold_action())
    assert backend.outcome().status == "running"
    assert backend.observe().privileged is None
    with pytest.raises(PortError, match="another process holds this arm"):
        SerialPort(plugged.path, 1_000_000)
    backend.close()


HOLDER = """
import sys
from bridge.backends import make_backend
from bridge.config import BackendConfig
arm = make_backend(BackendConfig("so101", {"emulate": True, "port": sys.argv[1], "timeout_ms": 2000.0}))
arm.connect()
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_what_to_do(plugged):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, plugged.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert first.stdout.readline() == "connected\n"
        second = make(port=plugged.path)
        refusal = rf"another process holds this arm; stop it first \(`fuser {plugged.path}` tells which\)"
        with pytest.raises(PortError, match=refusal):
            second.connect()
        first.kill()
        first.wait()
        second.connect()
        second.close()
    finally:
        first.kill()
        first.communicate()


def test_connect_checks_every_servo(plugged, tmp_path):
    servos = plugged.arm.servos

    def refused(match, options=None):
        backend = SO101(options or real_options(plugged.path, tmp_path))
        with pytest.raises(BackendError, match=match):
            backend.connect()

    plugged.set_fault("missing=2")
    plugged.set_fault("missing=5")
    refused(r"no answer from shoulder_lift \(servo 2\), wrist_roll \(servo 5\)")
    plugged.set_fault("clear")
    servos[3].set(r.MODEL, 1284)
    refused(r"elbow_flex \(servo 3\) is a servo of model 1284, expected 777")
    servos[3].set(r.MODEL, 777)
    servos[1].set(r.OPERATING_MODE, 1)
    refused(r"shoulder_pan \(servo 1\) is not in position mode")
    servos[1].set(r.OPERATING_MODE, 0)
    wide = {"id": 6, "low_ticks": 100, "high_ticks": 3400, "unit": "percent"}
    refused("gripper .* itself allows 2000 to 3400", real_options(plugged.path, tmp_path, gripper=wide))
    plugged.set_fault("overheat=1")
    refused("shoulder_pan .* over-temperature")


def test_ports_that_cannot_be_opened(tmp_path):
    with pytest.raises(PortError, match="plugged in"):
        SerialPort(str(tmp_path / "nothing"), 1_000_000)
    (tmp_path / "file").write_text("")
    with pytest.raises(PortError, match="is not a serial port"):
        SerialPort(str(tmp_path / "file"), 1_000_000)
    master, slave = pty.openpty()
    with pytest.raises(PortError, match="cannot run at 9 baud"):
        SerialPort(os.ttyname(slave), 9)
    os.close(master)
    os.close(slave)


def test_degrees_and_percent_from_ticks_and_back():
    joints = {
        "a": JointCalibration(1, 1024, 3072),
        "b": JointCalibration(2, 1000, 3000, zero_ticks=2048, direction=-1),
        "gripper": JointCalibration(3, 2000, 3000, direction=-1, unit="percent"),
    }
    calibration = Calibration(joints, "test")
    assert calibration.positions(np.array([2048, 1024, 2250])).tolist() == [0, 90, 75]
    assert calibration.ticks(np.array([45, -45, 10], np.float32)).tolist() == [2560, 2560, 2900]
    assert calibration.ticks(np.array([999, 999, 999], np.float32)).tolist() == [3072, 1000, 2000]
    assert calibration.low[0] == -90 and calibration.high[2] == 100


JOINT = {"id": 1, "low_ticks": 1000, "high_ticks": 3000}


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        ({}, "$.joints: is empty"),
        ({"a": {**JOINT, "low": 1}}, "$.joints[...].low: unknown key"),
        ({"a": {**JOINT, "id": 300}}, "`int` <= 253"),
        ({"a": {**JOINT, "high_ticks": 5000}}, "`int` <= 4095"),
        ({"a": {**JOINT, "direction": 0}}, "Invalid enum value 0"),
        ({"a": JOINT, "b": JOINT}, "$.joints.b.id: 1 is already the servo of a"),
        ({"a": {**JOINT, "low_ticks": 3000}}, "$.joints.a.high_ticks: 3000 must be at least 50 above low_ticks (3000)"),
        ({"a": {**JOINT, "zero_ticks": 1, "unit": "percent"}}, "$.joints.a.zero_ticks"),
    ],
)
def test_a_wrong_calibration_says_where(joints, message, tmp_path):
    path = tmp_path / "arm.yaml"
    path.write_text(yaml.safe_dump({"joints": joints}))
    with pytest.raises(ConfigError) as error:
        Calibration.load(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emulate": False}, "options.calibration: missing"),
        ({"tasks": {"pick": "pick"}}, "options.tasks: the emulated arm"),
        ({"home": {"elbow": 1.0}}, "options.home.elbow: no such joint"),
        ({"home": {"elbow_flex": 120.0}}, "options.home.elbow_flex: 120 is outside of the joint's range"),
        ({"cameras": [{"name": "a", "device": 0}]}, "options.cameras[0].device"),
        ({"cameras": [*SIDE, *SIDE]}, "options.cameras[1].name"),
        ({"on_stop": "fall"}, "options.on_stop: Invalid enum value 'fall'"),
    ],
)
def test_wrong_options_say_where(options, message):
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert message in str(error.value)


def test_the_emulator_is_a_command_and_the_backend_drives_it():
    command = [sys.executable, "-m", "fieldtune", "emulate", "so101", "--fault", "missing=2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        path = process.stdout.readline().strip()
        assert path.startswith("/dev/")
        silent = make(port=path, timeout_ms=100.0, retries=0)
        with pytest.raises(BackendError, match="shoulder_lift"):
            silent.connect()
        process.stdin.write("clear\n")
        process.stdin.flush()
        backend = make(port=path)
        for _ in range(100):
            try:
                backend.connect()
                break
            except BusError:
                time.sleep(0.05)
        backend.reset("reach", 0)
        backend.apply(backend.expert_action())
        backend.close()
    finally:
        process.kill()
        process.communicate()


def test_an_unknown_fault_ends_the_command():
    command = [sys.executable, "-m", "fieldtune", "emulate", "so101", "--fault", "fire=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 2 and "fault 'fire=1'" in done.stderr


def test_the_shipped_configurations_are_sound(tmp_path, monkeypatch):
    emulated = load_deployment("so101_emulated")
    spec = make_backend(emulated.backend).spec
    assert [camera.name for camera in spec.cameras] == ["side"]
    monkeypatch.chdir(ROOT / "configs" / "calibrations")
    spec = make_backend(load_deployment("so101").backend).spec
    assert spec.instructions and spec.cameras and spec.privileged is None
