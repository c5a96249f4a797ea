"""An SO-101 without the arm: servos that answer on a pseudo-terminal with the bytes that real ones would send.

Behind each servo is a joint that follows its goal with a first-order lag and a limit on its speed. There is no gravity,
no contact and no motor current: it is for trying the software, and says nothing about what an arm can lift.
"""

from __future__ import annotations

import errno
import math
import os
import pty
import select
import threading
import time
import tty
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bridge.backends.so101 import registers as r
from bridge.backends.so101.calibration import Calibration
from bridge.backends.so101.packets import BROADCAST, Decoder, Instruction, Packet
from bridge.config import ConfigError

FIRMWARE = 3 | 10 << 8  # 3.10
LAG_S = 0.06
"""Time constant of a joint near its goal."""
TOP_SPEED_TICKS_S = 3000.0
"""Some 264 degrees a second: what an STS3215 does at 7.4 V without load."""
FLAGS = {"overload": r.OVERLOAD, "overheat": r.TEMPERATURE, "voltage": r.VOLTAGE}
_READ_ONLY = {
    address
    for register in (r.FIRMWARE, r.MODEL, r.PRESENT_POSITION, r.PRESENT_SPEED, r.PRESENT_LOAD)
    for address in range(register.address, register.address + register.size)
} | {r.PRESENT_VOLTAGE.address, r.PRESENT_TEMPERATURE.address, r.STATUS.address}


class EmulatedServo:
    """One servo: its registers, and the joint that it moves."""

    def __init__(self, servo: int, low_ticks: int = 0, high_ticks: int = 4095, position_ticks: float = 2048.0) -> None:
        """Torque is off, as after power-up; the limits are the servo's own."""
        self.memory = bytearray(128)
        self.errors = 0
        """Error bits of faults; torque can be enabled again only once they are gone."""
        self.position_ticks = position_ticks
        """As the servo tells it: its homing offset is off it."""
        self.speed_ticks_s = 0.0
        for register, value in (
            (r.ID, servo),
            (r.FIRMWARE, FIRMWARE),
            (r.MODEL, r.MODEL_STS3215),
            (r.MIN_POSITION, low_ticks),
            (r.MAX_POSITION, high_ticks),
            (r.GOAL_POSITION, round(position_ticks)),
        ):
            self.set(register, value)

    def get(self, register: r.Register) -> int:
        """The number in a register."""
        return register.decode(bytes(self.memory[register.address :]))

    def set(self, register: r.Register, value: int) -> None:
        """Write a register, read-only ones included."""
        self.memory[register.address : register.address + register.size] = register.encode(value)

    def read(self, address: int, size: int) -> bytes:
        """Registers as the bus sees them now."""
        self.set(r.PRESENT_POSITION, round(self.position_ticks))
        self.set(r.PRESENT_SPEED, round(self.speed_ticks_s))
        drive = min(abs(self.speed_ticks_s) / TOP_SPEED_TICKS_S, 1.0)
        self.set(r.PRESENT_LOAD, round(math.copysign(drive * 1000, self.speed_ticks_s)))
        self.set(r.PRESENT_VOLTAGE, 49 if self.errors & r.VOLTAGE else 74)
        self.set(r.PRESENT_TEMPERATURE, 76 if self.errors & r.TEMPERATURE else 32)
        self.set(r.STATUS, self.errors)
        return bytes(self.memory[address : address + size])

    def write(self, address: int, data: bytes) -> None:
        """Write registers as the bus may; read-only ones keep their values."""
        homed_ticks = self.get(r.HOMING_OFFSET)
        for offset, byte in enumerate(data):
            if address + offset < len(self.memory) and address + offset not in _READ_ONLY:
                self.memory[address + offset] = byte
        # The joint stays where it is; only what the servo calls that place is another number.
        self.position_ticks += homed_ticks - self.get(r.HOMING_OFFSET)
        if self.errors:
            self.set(r.TORQUE_ENABLE, 0)

    def fail(self, bit: int) -> None:
        """Set a bit of the error byte, and let go as a servo does to protect itself."""
        self.errors |= bit
        self.set(r.TORQUE_ENABLE, 0)

    def advance(self, elapsed_s: float) -> None:
        """Move the joint: at top speed while the goal is far, then exponentially. Exact for any `elapsed_s`.

        With e the distance to the goal: de/dt = -min(e / LAG_S, top speed).
        """
        if not self.get(r.TORQUE_ENABLE):
            self.speed_ticks_s = 0.0
            return
        goal = min(max(self.get(r.GOAL_POSITION), self.get(r.MIN_POSITION)), self.get(r.MAX_POSITION))
        limit = self.get(r.GOAL_SPEED)
        top = min(float(limit), TOP_SPEED_TICKS_S) if limit > 0 else TOP_SPEED_TICKS_S
        way = goal - self.position_ticks
        distance = abs(way)
        straight_s = min(elapsed_s, max(distance / top - LAG_S, 0.0))
        distance = (distance - straight_s * top) * math.exp(-(elapsed_s - straight_s) / LAG_S)
        self.position_ticks = goal - math.copysign(distance, way)
        self.speed_ticks_s = math.copysign(min(distance / LAG_S, top), way)


@dataclass(slots=True)
class Faults:
    """What is wrong with the bus. Faults of single servos are in `EmulatedServo.errors`."""

    missing: set[int] = field(default_factory=set)
    """Servos that neither hear nor answer."""
    corrupt_every: int = 0
    """Every so-manieth answer has a flipped bit; 0: none."""
    delay_s: float = 0.0
    """Before answers are sent."""
    lost: int = 0
    """So many of the next sync writes, which nobody acknowledges, are heard by nobody."""


class EmulatedArm:
    """All servos of one bus: takes what the computer sends, gives what the servos answer."""

    def __init__(self, servos: Iterable[EmulatedServo], clock: Callable[[], float] = time.monotonic) -> None:
        """Time passes by `clock`, in seconds."""
        self.servos = {servo.get(r.ID): servo for servo in servos}
        self.faults = Faults()
        self._clock = clock
        self._then_s = clock()
        self._decoder = Decoder()
        self._answers = 0

    def receive(self, data: bytes) -> bytes:
        """What the servos answer to `data`; a packet may arrive in parts."""
        now_s = self._clock()
        for servo in self.servos.values():
            servo.advance(now_s - self._then_s)
        self._then_s = now_s
        return b"".join(self._answer(packet) for packet in self._decoder.feed(data))

    def set_fault(self, text: str) -> None:
        """`missing=ID`, `overload=ID`, `overheat=ID`, `voltage=ID`, `corrupt=N`, `delay_ms=T`, `lost=N`, or
        `clear`.

        Raises `ConfigError` for anything else.
        """
        kind, _, value = text.strip().partition("=")
        known = ("missing", *FLAGS, "corrupt", "delay_ms", "lost", "clear")
        if kind not in known or (kind == "clear") == bool(value) or not (value.isdecimal() or kind == "clear"):
            raise ConfigError(f"fault {text.strip()!r}: expected one of {', '.join(known)}; KIND=NUMBER but for clear")
        if kind in ("missing", *FLAGS) and int(value) not in self.servos:
            ids = ", ".join(map(str, self.servos))
            raise ConfigError(f"fault {text.strip()!r}: there is no servo {value} (servos: {ids})")
        if kind == "clear":
            self.faults = Faults()
            for servo in self.servos.values():
                servo.errors = 0
        elif kind == "missing":
            self.faults.missing.add(int(value))
        elif kind == "corrupt":
            self.faults.corrupt_every = int(value)
        elif kind == "lost":
            self.faults.lost = int(value)
        elif kind == "delay_ms":
            self.faults.delay_s = int(value) / 1000
        else:
            self.servos[int(value)].fail(FLAGS[kind])

    def _present(self, servo: int) -> EmulatedServo | None:
        return None if servo in self.faults.missing else self.servos.get(servo)

    def _answer(self, packet: Packet) -> bytes:
        parameters = packet.parameters
        if packet.code == Instruction.SYNC_READ and len(parameters) >= 2:
            address, size = parameters[:2]
            present = [(servo, self._present(servo)) for servo in parameters[2:]]
            return b"".join(self._status(own, servo.read(address, size)) for own, servo in present if servo)
        if packet.code == Instruction.SYNC_WRITE and self.faults.lost:
            self.faults.lost -= 1
            return b""
        if packet.code == Instruction.SYNC_WRITE and len(parameters) >= 2:
            address, size = parameters[:2]
            for start in range(2, len(parameters) - size, size + 1):
                servo = self._present(parameters[start])
                if servo is not None:
                    servo.write(address, parameters[start + 1 : start + 1 + size])
            return b""
        everybody = packet.servo == BROADCAST
        ids = [own for own in self.servos if everybody or own == packet.servo]
        answers = []
        for own in ids:
            servo = self._present(own)
            if servo is None:
                continue
            if packet.code == Instruction.PING:
                answers.append(self._status(own, b""))
            elif packet.code == Instruction.WRITE and parameters:
                servo.write(parameters[0], parameters[1:])
                if not everybody:
                    answers.append(self._status(own, b""))
            elif packet.code == Instruction.READ and len(parameters) == 2 and not everybody:
                answers.append(self._status(own, servo.read(parameters[0], parameters[1])))
        return b"".join(answers)

    def _status(self, own: int, data: bytes) -> bytes:
        answer = Packet(own, self.servos[own].errors, data).encode()
        self._answers += 1
        if self.faults.corrupt_every and self._answers % self.faults.corrupt_every == 0:
            answer = answer[:-1] + bytes((answer[-1] ^ 0x10,))
        return answer


def emulated_arm(calibration: Calibration) -> EmulatedArm:
    """The servos of a calibration, each in the middle of its range with torque off."""
    return EmulatedArm(
        EmulatedServo(joint.id, joint.low_ticks, joint.high_ticks, (joint.low_ticks + joint.high_ticks) / 2)
        for joint in calibration.joints
    )


class EmulatedPort:
    """The emulated arm on a pseudo-terminal of its own, served by a thread."""

    def __init__(self, arm: EmulatedArm) -> None:
        """Open the pseudo-terminal and start."""
        self.arm = arm
        # The computer's end stays open here too, so that a bridge may leave and come back.
        self._servo_end, self._computer_end = pty.openpty()
        tty.setraw(self._computer_end)
        self.path = os.ttyname(self._computer_end)
        self._wake_read, self._wake_write = os.pipe()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="emulated so101", daemon=True)
        self._thread.start()

    def set_fault(self, text: str) -> None:
        """As `EmulatedArm.set_fault`, from any thread."""
        with self._lock:
            self.arm.set_fault(text)

    def close(self) -> None:
        """Pull the plug: whoever has the port open sees it go. Idempotent."""
        if self._wake_write < 0:
            return
        os.write(self._wake_write, b"x")
        self._thread.join()
        for end in (self._servo_end, self._computer_end, self._wake_read, self._wake_write):
            os.close(end)
        self._wake_write = -1

    def _serve(self) -> None:
        while True:
            ready = select.select((self._servo_end, self._wake_read), (), ())[0]
            if self._wake_read in ready:
                return
            try:
                data = os.read(self._servo_end, 4096)
            except OSError as error:
                # Nobody has the other end open.
                if error.errno == errno.EIO:
                    continue
                raise
            with self._lock:
                answer, delay_s = self.arm.receive(data), self.arm.faults.delay_s
            if answer:
                if delay_s:
                    time.sleep(delay_s)
                os.write(self._servo_end, answer)
