"""The bus of the SO-101 byte by byte: packets, registers, the decoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.backends.so101 import packets
from bridge.backends.so101 import registers as r
from bridge.backends.so101.packets import Decoder, Packet


@pytest.mark.parametrize(
    ("packet", "expected"),
    [  # The examples of Feetech's manual.
        (packets.ping(1), "FF FF 01 02 01 FB"),
        (packets.read(1, 0x38, 2), "FF FF 01 04 02 38 02 BE"),
        (packets.write(1, 0x2A, bytes.fromhex("00 08 00 00 E8 03")), "FF FF 01 09 03 2A 00 08 00 00 E8 03 D5"),
        (packets.sync_read([1, 2], 0x38, 8), "FF FF FE 06 82 38 08 01 02 36"),
        (
            packets.sync_write(0x2A, {servo: bytes.fromhex("00 08 00 00 E8 03") for servo in (1, 2, 3, 4)}),
            "FF FF FE 20 83 2A 06 01 00 08 00 00 E8 03 02 00 08 00 00 E8 03 "
            "03 00 08 00 00 E8 03 04 00 08 00 00 E8 03 58",
        ),
    ],
)
def test_packets_are_those_of_the_manual(packet, expected):
    assert packet == bytes.fromhex(expected)


def test_the_manuals_answer_is_read():
    decoder = Decoder()
    assert decoder.feed(bytes.fromhex("FF FF 01 04 00 18 05 DD")) == [Packet(1, 0, b"\x18\x05")]
    assert r.PRESENT_POSITION.decode(b"\x18\x05") == 1304
    assert (decoder.checksum_errors, decoder.skipped_bytes) == (0, 0)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="one size"):
        packets.sync_write(42, {1: b"ab", 2: b"a"})
    with pytest.raises(ValueError, match="at least one servo"):
        packets.sync_write(42, {})
    with pytest.raises(ValueError, match="do not fit"):
        packets.write(1, 0, bytes(249))


PACKETS = st.builds(Packet, st.integers(0, 253), st.integers(0, 255), st.binary(max_size=20))


@given(st.lists(PACKETS, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_packets_are_found_however_they_are_cut(sent, cuts):
    data, decoder, found = b"".join(packet.encode() for packet in sent), Decoder(), []
    for cut in cuts:
        found += decoder.feed(data[:cut])
        data = data[cut:]
    assert found + decoder.feed(data) == sent
    assert (decoder.checksum_errors, decoder.skipped_bytes) == (0, 0)


@given(st.binary(max_size=300), PACKETS)
def test_any_bytes_before_a_packet_are_survived(noise, packet):
    decoder = Decoder()
    # The longest packet that the noise may have promised has to pass before it is known to be none.
    found = decoder.feed(noise + packet.encode() + bytes(300) + packet.encode() + bytes(300))
    assert found.count(packet) >= 1


@given(PACKETS, st.integers(0, 30), st.integers(0, 7), PACKETS)
def test_a_flipped_bit_never_gives_the_same_frame_another_content(packet, byte, bit, after):
    data = bytearray(packet.encode())
    data[byte % len(data)] ^= 1 << bit
    found = Decoder().feed(bytes(data) + after.encode() + bytes(300))
    assert packet not in found or packet == after
    assert all(other.encode() in bytes(data) + after.encode() + bytes(300) for other in found)


def test_a_damaged_packet_is_counted_and_the_next_one_read():
    data = bytes.fromhex("FF FF 01 04 00 19 05 DD  FF FF 02 02 00 FB")
    decoder = Decoder()
    assert decoder.feed(data) == [Packet(2, 0)]
    assert decoder.checksum_errors == 1
    assert decoder.skipped_bytes == 8


def test_a_third_ff_moves_the_header():
    assert Decoder().feed(b"\xff" + packets.ping(3)) == [Packet(3, 1)]


@pytest.mark.parametrize(
    ("register", "value", "data"),
    [
        (r.PRESENT_POSITION, 2048, "00 08"),
        (r.PRESENT_POSITION, -5, "05 80"),
        (r.PRESENT_SPEED, -1000, "E8 83"),
        (r.PRESENT_LOAD, -250, "FA 04"),
        (r.MODEL, 777, "09 03"),
        (r.TORQUE_ENABLE, 1, "01"),
    ],
)
def test_registers(register, value, data):
    assert register.encode(value) == bytes.fromhex(data)
    assert register.decode(bytes.fromhex(data) + b"\xff") == value


@pytest.mark.parametrize(("register", "value"), [(r.TORQUE_ENABLE, 256), (r.TORQUE_ENABLE, -1), (r.GOAL_SPEED, 32768)])
def test_numbers_that_do_not_fit_are_refused(register, value):
    with pytest.raises(ValueError, match=register.name):
        register.encode(value)


def test_a_reading():
    data = bytes.fromhex("00 08  E8 83  FA 04  4A  2D  00  20")
    assert len(data) == r.PRESENT_SIZE
    reading = r.Reading.decode(data, r.TEMPERATURE)
    assert reading == r.Reading(2048, -1000, -0.25, 7.4, 45, r.OVERLOAD | r.TEMPERATURE)
