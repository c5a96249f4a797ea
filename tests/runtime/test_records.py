"""The framing: what was written comes back, and damage costs nothing that came before it."""

import io
import struct
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_samples import make_decision, make_end, make_executed, make_start

from bridge.messages import DTYPES, WireError
from runtime import records
from runtime.episode import Record, TensorRecord
from runtime.records import RecordError, frame, scan_records, tensor_arrays, tensor_records


def framed(items: list[Record]) -> list[bytes]:
    return [b"".join(frame(item)) for item in items]


RECORDS: list[Record] = [make_start("e"), make_decision(1), make_executed(1), make_executed(2, 0), make_end(4)]
FRAMES = framed(RECORDS)
ENDS = [sum(map(len, FRAMES[: i + 1])) for i in range(len(FRAMES))]
WHOLE = b"".join(FRAMES)


def scan(data: bytes) -> tuple[list[bytes], bool]:
    """The frames of the records that were read, and whether damage was found."""
    found: list[Record] = []
    try:
        for record, _ in scan_records(io.BytesIO(data)):
            found.append(record)
    except RecordError:
        return framed(found), True
    return framed(found), False


def test_the_format_is_what_the_docstring_says() -> None:
    length, crc = struct.unpack("<II", FRAMES[0][:8])
    payload = FRAMES[0][8:]
    assert length == len(payload) and crc == zlib.crc32(payload)
    plain = msgspec.msgpack.decode(payload)
    assert plain["record"] == "start" and plain["episode"] == "e" and plain["spec"]["name"] == "fake"


def test_records_come_back_with_their_ends() -> None:
    read = list(scan_records(io.BytesIO(WHOLE)))
    assert framed([record for record, _ in read]) == FRAMES
    assert [end for _, end in read] == ENDS


@given(st.integers(0, len(WHOLE)))
def test_a_truncated_file_gives_exactly_the_records_before_the_cut(cut: int) -> None:
    whole = sum(end <= cut for end in ENDS)
    assert scan(WHOLE[:cut]) == (FRAMES[:whole], cut not in (0, *ENDS))


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_exactly_the_records_before_it(place: int, flip: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[place] ^= flip
    assert scan(bytes(damaged)) == (FRAMES[: sum(end <= place for end in ENDS)], True)


@given(st.binary(max_size=200))
def test_any_tail_after_good_records_costs_none_of_them(tail: bytes) -> None:
    found, damaged = scan(WHOLE + tail)
    assert found == FRAMES and damaged == bool(tail)


def test_a_tail_of_zeros_is_damage() -> None:
    assert scan(WHOLE + bytes(4096)) == (FRAMES, True)


def test_a_record_with_a_good_checksum_must_still_be_one_of_ours() -> None:
    for payload in (b"\xc0", msgspec.msgpack.encode({"record": "other"}), msgspec.msgpack.encode({"record": "end"})):
        frame = struct.pack("<II", len(payload), zlib.crc32(payload)) + payload
        assert scan(WHOLE + frame) == (FRAMES, True)


def test_an_announced_length_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class File(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    for length in (2**32 - 1, records.MAX_RECORD_BYTES):
        with pytest.raises(RecordError):
            list(scan_records(File(struct.pack("<II", length, 0) + b"x" * 64)))
    assert max(filter(None, asked)) == 8


def test_a_record_that_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match="cannot be encoded"):
        frame(make_start("e", seed=2**70))
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    with pytest.raises(RecordError, match="at most 100"):
        frame(make_decision(1))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors_come_back_equal_aligned_and_read_only(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    # A name of every length, so that the data lies at every alignment.
    for pad in range(1, 9):
        record = msgspec.structs.replace(make_executed(1), tensors=tensor_records({"n" * pad: array}))
        read, _ = next(scan_records(io.BytesIO(framed([record])[0])))
        (back,) = tensor_arrays(read.tensors).values()  # type: ignore[union-attr]
        assert back.dtype == array.dtype and back.shape == shape and np.array_equal(back, array)
        assert back.flags.aligned and not back.flags.writeable


def test_tensors_are_referred_to_not_copied() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    record = tensor_records({"image": image})["image"]
    image[0, 0, 0] = 5
    assert record.data[0] == 5
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(tensor_arrays(tensor_records({"t": transposed}))["t"], transposed)


def test_a_tensor_that_lies_about_itself_is_refused() -> None:
    for dtype, shape, size in [("|O", (1,), 8), ("<f4", (2,), 4), ("<f4", (-1, -1), 4), ("<f4", (1,) * 5, 4)]:
        with pytest.raises(WireError):
            tensor_arrays({"t": TensorRecord(dtype, shape, memoryview(bytes(size)))})
