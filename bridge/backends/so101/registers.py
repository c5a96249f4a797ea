"""Registers of the Feetech STS3215, and what its error byte says. Source: Feetech's memory table of the STS series."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_STS3215 = 777
TICKS_PER_TURN = 4096
TICKS_PER_DEG = TICKS_PER_TURN / 360.0
POSITION_MODE = 0


@dataclass(frozen=True, slots=True)
class Register:
    """Where a number lies. With a `sign_bit` it is that bit for the sign and those below for the magnitude."""

    name: str
    address: int
    size: int
    sign_bit: int | None = None

    def encode(self, value: int) -> bytes:
        """Little-endian bytes. Raises `ValueError` for a number that does not fit."""
        limit = 1 << (8 * self.size if self.sign_bit is None else self.sign_bit)
        if abs(value) >= limit or (value < 0 and self.sign_bit is None):
            raise ValueError(f"{value} does not fit into the register {self.name}")
        raw = value if value >= 0 or self.sign_bit is None else -value | 1 << self.sign_bit
        return raw.to_bytes(self.size, "little")

    def decode(self, data: bytes) -> int:
        """The number in the first bytes of `data`."""
        raw = int.from_bytes(data[: self.size], "little")
        if self.sign_bit is None or not raw >> self.sign_bit & 1:
            return raw
        return -(raw & ((1 << self.sign_bit) - 1))


FIRMWARE = Register("firmware", 0, 2)  # major in the low byte, minor in the high one
MODEL = Register("model", 3, 2)
ID = Register("id", 5, 1)
MIN_POSITION = Register("min position", 9, 2)
MAX_POSITION = Register("max position", 11, 2)
HOMING_OFFSET = Register("homing offset", 31, 2, sign_bit=11)  # what is taken off the position that is told
OPERATING_MODE = Register("operating mode", 33, 1)
TORQUE_ENABLE = Register("torque enable", 40, 1)
GOAL_POSITION = Register("goal position", 42, 2, sign_bit=15)
GOAL_TIME = Register("goal time", 44, 2)
GOAL_SPEED = Register("goal speed", 46, 2, sign_bit=15)  # ticks/s; 0 is as fast as it can
PRESENT_POSITION = Register("present position", 56, 2, sign_bit=15)
PRESENT_SPEED = Register("present speed", 58, 2, sign_bit=15)  # ticks/s
PRESENT_LOAD = Register("present load", 60, 2, sign_bit=10)  # 0.1 % of the motor's drive
PRESENT_VOLTAGE = Register("present voltage", 62, 1)  # 0.1 V
PRESENT_TEMPERATURE = Register("present temperature", 63, 1)  # degrees Celsius
STATUS = Register("status", 65, 1)  # the error byte

PRESENT_ADDRESS = PRESENT_POSITION.address
PRESENT_SIZE = STATUS.address + STATUS.size - PRESENT_ADDRESS
"""All that is read in a tick lies side by side."""

VOLTAGE, SENSOR, TEMPERATURE, CURRENT, OVERLOAD = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
"""Bits of the error byte."""

FAULTS = {
    VOLTAGE: ("voltage", "check the power supply, its plug and its voltage against the servo's (7.4 V or 12 V)"),
    SENSOR: ("position sensor", "power the arm off and on; if it comes back, replace the servo"),
    TEMPERATURE: ("over-temperature", "let the arm cool down before the next reset, and let it carry less"),
    CURRENT: ("over-current", "power the arm off and see whether the joint is blocked or its cable damaged"),
    OVERLOAD: ("overload", "take the load off or free the joint, then reset"),
}
"""Bit of the error byte -> (what it is called, what to do)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one servo said of itself in one tick."""

    position_ticks: int
    speed_ticks_s: int
    load: float
    """Share of the motor's full drive, -1 to 1."""
    voltage_v: float
    temperature_c: int
    errors: int
    """Bits of the error byte."""

    @classmethod
    def decode(cls, data: bytes, error: int) -> Reading:
        """From the `PRESENT_SIZE` bytes at `PRESENT_ADDRESS` and the error byte of the packet that brought them."""

        def value(register: Register) -> int:
            return register.decode(data[register.address - PRESENT_ADDRESS :])

        return cls(
            position_ticks=value(PRESENT_POSITION),
            speed_ticks_s=value(PRESENT_SPEED),
            load=value(PRESENT_LOAD) / 1000.0,
            voltage_v=value(PRESENT_VOLTAGE) / 10.0,
            temperature_c=value(PRESENT_TEMPERATURE),
            errors=error | value(STATUS),
        )
