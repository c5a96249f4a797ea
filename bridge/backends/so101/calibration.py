"""The calibration of one arm: which servo each joint is, where its zero lies, which way it turns, how far it may go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bridge.backend import Float32
from bridge.backends.so101.packets import MAX_ID
from bridge.backends.so101.registers import TICKS_PER_DEG, TICKS_PER_TURN
from bridge.config import ConfigError, load_yaml, parse

Tick = Annotated[int, Meta(ge=0, lt=TICKS_PER_TURN)]
MIN_RANGE_TICKS = 50
"""A joint that may move less than 4 degrees is a slip of the pen."""


class JointCalibration(Struct, frozen=True, forbid_unknown_fields=True):
    """One joint."""

    id: Annotated[int, Meta(ge=0, le=MAX_ID)]
    """The servo's id on the bus."""
    low_ticks: Tick
    """The lowest position it may be sent to, as the servo counts: 4096 ticks a turn."""
    high_ticks: Tick
    """The highest."""
    zero_ticks: Tick | None = None
    """Where the joint is at 0 degrees; the middle of the range if absent."""
    direction: Literal[1, -1] = 1
    """-1 where the joint's positive direction is against the servo's."""
    unit: Literal["deg", "percent"] = "deg"
    """`percent` is for a gripper: 0 at one end of the range (closed), 100 at the other. `zero_ticks` is not used."""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    joints: dict[str, JointCalibration]


class Calibration:
    """All joints of one arm, in the order of the file: positions in their units from ticks and back."""

    def __init__(self, joints: dict[str, JointCalibration], source: str) -> None:
        """Raises `ConfigError` naming `source` and the key that is wrong."""
        _check(joints, source)
        self.names = tuple(joints)
        self.joints = tuple(joints.values())
        self.ids = tuple(joint.id for joint in self.joints)
        self.units = tuple(joint.unit for joint in self.joints)
        zero, units_per_tick = zip(*(_line(joint) for joint in self.joints), strict=True)
        self._zero_ticks, self._units_per_tick = np.array(zero), np.array(units_per_tick)
        self.low_ticks = np.array([joint.low_ticks for joint in self.joints])
        self.high_ticks = np.array([joint.high_ticks for joint in self.joints])
        ends = np.stack([self._units(self.low_ticks), self._units(self.high_ticks)])
        self.low: Float32 = ends.min(axis=0).astype(np.float32)
        """Limits `[joints]` in the joints' units."""
        self.high: Float32 = ends.max(axis=0).astype(np.float32)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """From a YAML file. Raises `ConfigError`."""
        return cls(parse(load_yaml(path), _File, str(path)).joints, str(path))

    def positions(self, ticks: NDArray[np.int64]) -> Float32:
        """Positions `[joints]` in the joints' units."""
        return self._units(ticks).astype(np.float32)

    def ticks(self, positions: Float32 | NDArray[np.float64]) -> NDArray[np.int64]:
        """The nearest ticks `[joints]` inside the range of each joint."""
        ticks = self._zero_ticks + np.asarray(positions, np.float64) / self._units_per_tick
        return np.asarray(np.clip(np.rint(ticks), self.low_ticks, self.high_ticks), np.int64)

    def speed(self, deg_s: float) -> NDArray[np.float64]:
        """A speed of the servos in the joints' units `[joints]` a second: for percent that depends on the range."""
        return np.asarray(np.abs(self._units_per_tick) * TICKS_PER_DEG * deg_s, np.float64)

    def _units(self, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray((ticks - self._zero_ticks) * self._units_per_tick, np.float64)


def _line(joint: JointCalibration) -> tuple[float, float]:
    """(ticks at 0, units a tick)."""
    if joint.unit == "percent":
        zero = joint.low_ticks if joint.direction > 0 else joint.high_ticks
        return float(zero), joint.direction * 100.0 / (joint.high_ticks - joint.low_ticks)
    middle = (joint.low_ticks + joint.high_ticks) / 2
    zero_ticks = middle if joint.zero_ticks is None else float(joint.zero_ticks)
    return zero_ticks, joint.direction / TICKS_PER_DEG


def _check(joints: dict[str, JointCalibration], source: str) -> None:
    if not joints:
        raise ConfigError(f"{source}: $.joints: is empty, expected one entry for each joint")
    owners: dict[int, str] = {}
    for name, joint in joints.items():
        where = f"{source}: $.joints.{name}"
        if joint.id in owners:
            raise ConfigError(f"{where}.id: {joint.id} is already the servo of {owners[joint.id]}")
        owners[joint.id] = name
        if joint.high_ticks - joint.low_ticks < MIN_RANGE_TICKS:
            raise ConfigError(
                f"{where}.high_ticks: {joint.high_ticks} must be at least {MIN_RANGE_TICKS} above low_ticks "
                f"({joint.low_ticks}); a range that passes the servo's zero needs its middle set anew first"
            )
        if joint.zero_ticks is not None and joint.unit == "percent":
            raise ConfigError(f"{where}.zero_ticks: means nothing with unit `percent`; leave it out")


def so101_joints() -> dict[str, JointCalibration]:
    """The joints of an SO-101 whose servos are centred at 2048, with round limits: what the emulator is."""

    def joint(servo: int, low_deg: float, high_deg: float) -> JointCalibration:
        low, high = (round(2048 + degrees * TICKS_PER_DEG) for degrees in (low_deg, high_deg))
        return JointCalibration(servo, low, high, zero_ticks=2048)

    return {
        "shoulder_pan": joint(1, -100, 100),
        "shoulder_lift": joint(2, -90, 90),
        "elbow_flex": joint(3, -90, 90),
        "wrist_flex": joint(4, -90, 90),
        "wrist_roll": joint(5, -150, 150),
        "gripper": JointCalibration(6, 2000, 3400, unit="percent"),
    }
