"""Packets of the Feetech bus: how they are written, and how they are found in a stream of bytes.

Both directions have the same frame: FF FF, id, length, instruction (to the servo) or error byte (from it), parameters,
checksum. `length` counts what follows it. The checksum is the complement of the low byte of the sum of all bytes from
the id to the last parameter. Numbers of two bytes are little-endian. Source: Feetech's manual of the SMS/STS protocol.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HEADER = b"\xff\xff"
BROADCAST = 0xFE
MAX_ID = 0xFD
_MIN_LENGTH = 2  # the instruction or error byte, and the checksum
_MAX_LENGTH = 250


class Instruction(enum.IntEnum):
    """What a servo can be asked."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


@dataclass(frozen=True, slots=True)
class Packet:
    """One whole packet. `code` is the instruction in a packet to a servo, and the error byte in one from it."""

    servo: int
    code: int
    parameters: bytes = b""

    def encode(self) -> bytes:
        """Its bytes on the bus. Raises `ValueError` for more parameters than a packet can carry."""
        length = len(self.parameters) + _MIN_LENGTH
        if length > _MAX_LENGTH:
            raise ValueError(f"{len(self.parameters)} parameters do not fit into a packet")
        body = bytes((self.servo, length, self.code)) + self.parameters
        return HEADER + body + bytes((checksum(body),))


def checksum(body: bytes) -> int:
    """Of the bytes from the id to the last parameter."""
    return ~sum(body) & 0xFF


def ping(servo: int) -> bytes:
    """Ask a servo whether it is there."""
    return Packet(servo, Instruction.PING).encode()


def read(servo: int, address: int, size: int) -> bytes:
    """Ask a servo for `size` bytes of its registers."""
    return Packet(servo, Instruction.READ, bytes((address, size))).encode()


def write(servo: int, address: int, data: bytes) -> bytes:
    """Have a servo write its registers; it answers unless the id is `BROADCAST`."""
    return Packet(servo, Instruction.WRITE, bytes((address,)) + data).encode()


def sync_read(servos: Sequence[int], address: int, size: int) -> bytes:
    """Ask several servos for the same registers; each answers with a packet of its own, in this order."""
    return Packet(BROADCAST, Instruction.SYNC_READ, bytes((address, size, *servos))).encode()


def sync_write(address: int, data: Mapping[int, bytes]) -> bytes:
    """Have several servos write the same registers at once; none answers. All data must be of one size."""
    sizes = {len(part) for part in data.values()}
    if len(sizes) != 1:
        raise ValueError(f"sync write needs data of one size for at least one servo (found sizes {sorted(sizes)})")
    rows = b"".join(bytes((servo,)) + part for servo, part in data.items())
    return Packet(BROADCAST, Instruction.SYNC_WRITE, bytes((address, sizes.pop())) + rows).encode()


@dataclass(slots=True)
class Decoder:
    """Finds packets in bytes that arrive in any portions, whatever lies between them.

    After a packet that is damaged it goes on one byte behind that packet's header, so a damaged length cannot swallow a
    good packet that follows. `checksum_errors` counts the frames whose checksum was wrong, `skipped_bytes` those that
    belonged to no packet.
    """

    checksum_errors: int = 0
    skipped_bytes: int = 0
    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that are complete with `data`, in their order."""
        self._buffer += data
        packets = []
        while (packet := self._next()) is not None:
            packets.append(packet)
        return packets

    def clear(self) -> None:
        """Forget what has not become a packet."""
        self._buffer.clear()

    def _next(self) -> Packet | None:
        buffer = self._buffer
        while True:
            start = buffer.find(HEADER)
            if start < 0:
                # The last byte may be the first of a header.
                self._skip(len(buffer) - buffer.endswith(HEADER[:1]))
                return None
            self._skip(start)
            if len(buffer) < 4:
                return None
            servo, length = buffer[2], buffer[3]
            # A third FF is no id: the header starts one byte later.
            if servo > BROADCAST or not _MIN_LENGTH <= length <= _MAX_LENGTH:
                self._skip(1)
                continue
            end = 4 + length
            if len(buffer) < end:
                return None
            body = bytes(buffer[2 : end - 1])
            if checksum(body) != buffer[end - 1]:
                self.checksum_errors += 1
                self._skip(1)
                continue
            del buffer[:end]
            return Packet(servo, body[2], body[3:])

    def _skip(self, count: int) -> None:
        self.skipped_bytes += count
        del self._buffer[:count]
