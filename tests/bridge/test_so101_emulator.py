"""The emulated arm: its bytes and its joints, with a clock of our own and no port."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.backends.so101 import packets
from bridge.backends.so101 import registers as r
from bridge.backends.so101.calibration import Calibration, so101_joints
from bridge.backends.so101.emulator import LAG_S, TOP_SPEED_TICKS_S, EmulatedServo, emulated_arm
from bridge.backends.so101.packets import Packet
from bridge.backends.so101.scene import (
    JOINTS,
    LINKS_M,
    SHOULDER_M,
    START_SPREAD,
    TOLERANCE_M,
    Reach,
    arm_points,
)
from bridge.config import ConfigError

CALIBRATION = Calibration(so101_joints(), "test")


def arm():
    now = [0.0]
    made = emulated_arm(Calibration(so101_joints(), "test"))
    made._clock = lambda: now[0]
    made._then_s = 0.0
    return made, now


def answers(data):
    return packets.Decoder().feed(data)


def test_it_answers_with_the_bytes_of_a_servo():
    emulated, _ = arm()
    assert emulated.receive(packets.ping(1)) == bytes.fromhex("FF FF 01 02 00 FC")
    assert emulated.receive(packets.read(1, 0x38, 2)) == bytes.fromhex("FF FF 01 04 00 00 08 F2")
    assert emulated.receive(packets.read(2, 3, 2)) == bytes.fromhex("FF FF 02 04 00 09 03 ED")
    assert emulated.receive(packets.write(1, 40, b"\x01")) == bytes.fromhex("FF FF 01 02 00 FC")
    assert emulated.receive(packets.sync_write(42, {1: b"\x00\x09", 2: b"\x00\x07"})) == b""
    found = answers(emulated.receive(packets.sync_read([2, 1, 9], 42, 2)))
    assert found == [Packet(2, 0, b"\x00\x07"), Packet(1, 0, b"\x00\x09")]
    assert emulated.receive(packets.ping(77)) == b""
    # A packet in two parts, and a broken one.
    assert emulated.receive(packets.ping(1)[:3]) == b""
    assert emulated.receive(packets.ping(1)[3:]) == bytes.fromhex("FF FF 01 02 00 FC")
    assert emulated.receive(packets.ping(1)[:-1] + b"\x00") == b""


def test_present_values_cannot_be_written():
    emulated, _ = arm()
    emulated.receive(packets.write(1, 56, b"\x00\x00"))
    assert answers(emulated.receive(packets.read(1, 56, 2)))[0].parameters == b"\x00\x08"


def test_a_homing_offset_is_taken_off_the_position_and_moves_nothing():
    emulated, _ = arm()

    def position():
        return r.PRESENT_POSITION.decode(answers(emulated.receive(packets.read(1, 56, 2)))[0].parameters)

    # As a calibration does it: present = actual - offset, with the sign in bit 11. LeRobot centres at 2047.
    assert position() == 2048
    emulated.receive(packets.write(1, 31, b"\x01\x00"))
    assert position() == 2047
    emulated.receive(packets.write(1, 31, b"\x64\x08"))
    assert position() == 2148
    # Goals are in the numbers that are told.
    emulated.receive(packets.write(1, 42, b"\x00\x09"))
    emulated.receive(packets.write(1, 40, b"\x01"))
    emulated.servos[1].advance(10)
    assert position() == 2304
    emulated.receive(packets.write(1, 31, b"\x00\x00"))
    assert position() == 2304 - 100


def servo(goal, speed=0):
    made = EmulatedServo(1)
    made.set(r.GOAL_POSITION, goal)
    made.set(r.GOAL_SPEED, speed)
    made.set(r.TORQUE_ENABLE, 1)
    return made


def test_a_joint_runs_at_its_top_speed_and_then_lags():
    joint = servo(2048 + 1200)
    joint.advance(0.1)
    assert joint.position_ticks == pytest.approx(2048 + 0.1 * TOP_SPEED_TICKS_S)
    near = servo(2048 + 100)
    near.advance(LAG_S)
    assert near.position_ticks == pytest.approx(2148 - 100 / math.e)
    slow = servo(1000, speed=400)
    slow.advance(0.5)
    assert slow.position_ticks == pytest.approx(2048 - 200)
    assert slow.speed_ticks_s == -400


@given(st.integers(0, 4095), st.integers(0, 4000), st.lists(st.floats(0, 0.3), max_size=8))
def test_motion_does_not_depend_on_how_often_one_looks(goal, speed, pieces):
    whole, cut = servo(goal, speed), servo(goal, speed)
    whole.advance(sum(pieces))
    for piece in pieces:
        cut.advance(piece)
    assert cut.position_ticks == pytest.approx(whole.position_ticks, abs=1e-6)
    low, high = sorted((2048, goal))
    assert low - 1e-6 <= whole.position_ticks <= high + 1e-6


def test_without_torque_nothing_moves_and_limits_hold():
    joint = servo(4000)
    joint.set(r.TORQUE_ENABLE, 0)
    joint.advance(10)
    assert joint.position_ticks == 2048
    joint.set(r.TORQUE_ENABLE, 1)
    joint.set(r.MAX_POSITION, 3000)
    joint.advance(10)
    assert joint.position_ticks == pytest.approx(3000)


def test_faults_of_a_servo_take_its_torque_and_stay_until_cleared():
    emulated, _ = arm()
    emulated.receive(packets.write(3, 40, b"\x01"))
    emulated.set_fault("overload=3")
    assert emulated.receive(packets.ping(3)) == bytes.fromhex("FF FF 03 02 20 DA")
    emulated.receive(packets.write(3, 40, b"\x01"))
    assert answers(emulated.receive(packets.read(3, 40, 1)))[0] == Packet(3, r.OVERLOAD, b"\x00")
    emulated.set_fault("clear")
    emulated.receive(packets.write(3, 40, b"\x01"))
    assert answers(emulated.receive(packets.read(3, 40, 1)))[0] == Packet(3, 0, b"\x01")


def test_faults_of_the_bus():
    emulated, _ = arm()
    emulated.set_fault("missing=2")
    assert [packet.servo for packet in answers(emulated.receive(packets.sync_read([1, 2, 3], 56, 2)))] == [1, 3]
    emulated.set_fault("clear")
    emulated.set_fault("corrupt=2")
    assert [len(answers(emulated.receive(packets.ping(1)))) for _ in range(4)] in ([1, 0, 1, 0], [0, 1, 0, 1])


@pytest.mark.parametrize("text", ["", "missing", "missing=x", "missing=9", "burn=1", "clear=1", "delay_ms=-1"])
def test_faults_that_do_not_exist_are_refused(text):
    with pytest.raises(ConfigError, match="fault"):
        arm()[0].set_fault(text)


def at(**degrees):
    return np.array([degrees.get(name, 0.0) for name in JOINTS], np.float32)


def test_where_the_tip_is():
    upper, fore, hand = LINKS_M
    assert arm_points(at())[-1] == pytest.approx([fore + hand, 0, SHOULDER_M + upper])
    assert arm_points(at(elbow_flex=-90))[-1] == pytest.approx([0, 0, SHOULDER_M + upper + fore + hand], abs=1e-9)
    assert arm_points(at(shoulder_pan=90))[-1] == pytest.approx([0, fore + hand, SHOULDER_M + upper], abs=1e-9)
    assert arm_points(at(wrist_flex=90))[-1] == pytest.approx([fore, 0, SHOULDER_M + upper - hand])


def test_targets_can_be_reached_are_away_from_home_and_depend_on_the_seed_alone():
    home = at(shoulder_lift=-30)
    reach, targets = Reach(home, CALIBRATION), []
    starts = []
    for seed in range(200):
        reach.reset(seed)
        targets.append(reach.target)
        assert reach.distance_m(home) >= 0.1
        assert not reach.reached(home)
        assert reach.target[2] >= 0.03
        assert reach.distance_m(reach.start) > TOLERANCE_M
        assert np.abs(reach.start - home)[:5].max() <= START_SPREAD
        assert (reach.start >= CALIBRATION.low).all()
        starts.append(reach.start)
        goals = reach.start.astype(np.float64)
        for _ in range(45):
            goals = reach.expert_goal(goals)
        assert reach.distance_m(goals) < 1e-5
    reach.reset(7)
    assert np.array_equal(reach.target, targets[7]) and np.array_equal(reach.start, starts[7])
    assert len({tuple(target) for target in targets}) == 200


def test_the_picture_shows_target_and_arm():
    home = at(shoulder_lift=-30)
    reach = Reach(home, CALIBRATION)
    reach.reset(0)
    picture = reach.draw(home, 64, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    green = (picture == (40, 200, 80)).all(axis=-1)
    row, column = np.argwhere(green).mean(axis=0)
    x, z = -0.2 + (column + 0.5) * 0.6 / 64, 0.52 - (row + 0.5) * 0.6 / 64
    assert math.hypot(x - reach.target[0], z - reach.target[2]) < TOLERANCE_M / 2
    moved = reach.draw(at(shoulder_lift=20), 64, 64)
    assert (picture != moved).any()
    assert np.array_equal(picture, reach.draw(home, 64, 64))
