"""The framing of an episode file: records one after another, each `length u32, crc32 u32, payload` (little-endian).

The payload is a msgpack map of one of the Structs in `runtime.episode`; the crc32 is the payload's. A file is readable
up to its first bad byte, whatever happened to the process that wrote it.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from bridge.errors import FieldtuneError
from bridge.messages import TensorInfo, tensor_from_bytes
from runtime.episode import Record, TensorRecord

MAX_RECORD_BYTES = 256 * 1024 * 1024
HEADER = struct.Struct("<II")

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class RecordError(FieldtuneError):
    """A record that cannot be written or read."""


def frame(record: Record) -> tuple[bytes, bytes]:
    """The frame of `record`: its header and its payload, apart so that images are copied once and not twice.

    Raises `RecordError` for a record that does not fit the format.
    """
    try:
        payload = _encoder.encode(record)
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordError(f"a {type(record).__name__} cannot be encoded: {error}") from error
    if len(payload) > MAX_RECORD_BYTES:
        raise RecordError(f"a {type(record).__name__} of {len(payload)} bytes; at most {MAX_RECORD_BYTES} are allowed")
    return HEADER.pack(len(payload), zlib.crc32(payload)), payload


def scan_records(file: BinaryIO, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """The records of a file from `offset` on and the offset at which each ends. Raises `RecordError` at the first
    damaged one.

    Each record's tensors refer to memory of its own, so keeping one does not keep the others.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(offset)
    while offset < size:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise RecordError(f"the file ends within the record at byte {offset}")
        length, crc = HEADER.unpack(header)
        if length > MAX_RECORD_BYTES:
            raise RecordError(f"{length} bytes are announced at byte {offset}; at most {MAX_RECORD_BYTES} are allowed")
        if length > size - offset - HEADER.size:
            raise RecordError(f"the file ends within the record at byte {offset}")
        payload = file.read(length)
        if len(payload) != length or zlib.crc32(payload) != crc:
            raise RecordError(f"the checksum of the record at byte {offset} is wrong")
        try:
            record = _decoder.decode(payload)
        # Zeros, which power cuts leave at the end, have a good checksum as an empty record; it is refused here.
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RecordError(f"what is at byte {offset} is not a record: {error}") from error
        offset += HEADER.size + length
        yield record, offset


def tensor_records(arrays: Mapping[str, NDArray[Any]]) -> dict[str, TensorRecord]:
    """The arrays as they go into a record: referred to, not copied, so they must not change until they are written."""
    return {name: _tensor_record(array) for name, array in arrays.items()}


def tensor_arrays(tensors: Mapping[str, TensorRecord]) -> dict[str, NDArray[Any]]:
    """The arrays of a record, read-only; images are views of the record. Raises `bridge.messages.WireError`."""
    arrays = {}
    for name, tensor in tensors.items():
        array = tensor_from_bytes(TensorInfo(name, tensor.dtype, tensor.shape), tensor.data)
        if not array.flags.aligned:
            # In a record tensors lie anywhere; numbers wider than a byte must be aligned for torch and for speed.
            array = array.copy()
            array.flags.writeable = False
        arrays[name] = array
    return arrays


def _tensor_record(array: NDArray[Any]) -> TensorRecord:
    data = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
    return TensorRecord(array.dtype.str, array.shape, data)
