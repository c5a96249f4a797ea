"""A stand-in for a LeRobot robot, with the members of `lerobot.robots.Robot` and the behaviour of `SOFollower`:
features before connecting, errors of its own when it is not connected, relative targets capped. No lerobot in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

MOTORS = ("shoulder_pan", "elbow_flex", "gripper")


class DeviceNotConnectedError(ConnectionError):
    """As LeRobot's."""


@dataclass
class CameraConfig:
    width: int
    height: int
    fps: int = 30

    def __post_init__(self):
        if self.fps <= 0:
            raise ValueError("fps must be above 0")


@dataclass
class ArmConfig:
    port: str
    id: str | None = None
    calibration_dir: Path | None = None
    serial_by: Path | str = ""
    cameras: dict[str, CameraConfig] = field(default_factory=dict)
    max_relative_target: float | None = None


class Arm:
    """Joints go to their targets at once. Tests reach in: `fault` raises in the bus, `missing` in a camera, and
    `damaged` is how many calls fail before one succeeds.
    """

    config_class = ArmConfig
    name = "arm"
    calibrated = True

    def __init__(self, config):
        if config.port == "/dev/none":
            raise ImportError("feetech-servo-sdk")
        self.calibration_file = config.calibration_dir and config.calibration_dir / f"{config.id}.json"
        self.config = config
        self.positions = dict.fromkeys(MOTORS, 1.5)
        self.commands = []
        self.fault = self.missing = None
        self.damaged = 0
        self.is_connected = False
        self.disconnects = 0

    @property
    def observation_features(self):
        cameras = {name: (c.height, c.width, 3) for name, c in self.config.cameras.items()}
        depth = {f"{name}_depth": (c.height, c.width, 1) for name, c in self.config.cameras.items()}
        return {**{f"{m}.pos": float for m in MOTORS}, "voltage": float, **cameras, **depth}

    @property
    def action_features(self):
        return {f"{m}.pos": float for m in MOTORS}

    @property
    def is_calibrated(self):
        return self.calibrated

    def connect(self, calibrate=True):
        assert not calibrate, "calibrating asks questions on the terminal"
        if self.is_connected:
            raise RuntimeError("already connected")
        if self.config.port == "/dev/unplugged":
            raise ConnectionError("no such port")
        self.is_connected = True

    def get_observation(self):
        self._check()
        if self.missing is not None:
            raise self.missing
        images = {
            name: np.arange(c.height * c.width * 3, dtype=np.int64).reshape(c.height, c.width, 3).astype(np.uint8)
            for name, c in self.config.cameras.items()
        }
        return {**{f"{m}.pos": np.float32(x) for m, x in self.positions.items()}, "voltage": 12.1, **images}

    def send_action(self, action):
        self._check()
        sent = {}
        for motor, now in self.positions.items():
            step = action[f"{motor}.pos"] - now
            most = self.config.max_relative_target
            sent[motor] = now + (step if most is None else min(max(step, -most), most))
        self.positions = sent
        self.commands.append(dict(action))
        return {f"{motor}.pos": x for motor, x in sent.items()}

    def disconnect(self):
        self._check()
        self.is_connected = False
        self.disconnects += 1

    def _check(self):
        if not self.is_connected:
            raise DeviceNotConnectedError("Arm is not connected. Run `.connect()` first.")
        if self.fault is not None:
            raise self.fault
        if self.damaged:
            self.damaged -= 1
            raise ConnectionError("Failed to sync read.\n[TxRxResult] There is no status packet!")


class Uncalibrated(Arm):
    calibrated = False


class Plain(Arm):
    """Its `connect` takes nothing, and it does not say whether it is calibrated, as third parties' do."""

    is_calibrated = True

    def connect(self):
        self.is_connected = True


class SerialInput:
    """What came in on a serial port and was not read."""

    def __init__(self):
        self.waiting = []

    def reset_input_buffer(self):
        self.waiting.clear()


class Late(Arm):
    """On a bus whose SDK takes for the answer what came first, as Feetech's does."""

    def __init__(self, config):
        super().__init__(config)
        self.input = SerialInput()
        self.bus = SimpleNamespace(port_handler=SimpleNamespace(ser=self.input))

    def get_observation(self):
        self.input.waiting.append(super().get_observation())
        return self.input.waiting.pop(0)


class LateSecondArm(Late):
    """The bus is that of an arm of the robot."""

    def __init__(self, config):
        super().__init__(config)
        self.left_arm = SimpleNamespace(bus=self.bus)
        del self.bus


class Base(Plain):
    """Wheels: velocities that are commanded and read under the same names."""

    def __init__(self, config):
        super().__init__(config)
        self.positions = {"x.vel": 0.3}

    @property
    def observation_features(self):
        return {"x.vel": float}

    @property
    def action_features(self):
        return {"x.vel": float}

    def get_observation(self):
        return dict(self.positions)

    def send_action(self, action):
        self.positions = dict(action)
        return dict(action)


class NoFeatures(Arm):
    observation_features = None


class NoSend(Arm):
    send_action = None


class Vector(Arm):
    @property
    def action_features(self):
        return {"all": (3,)}
