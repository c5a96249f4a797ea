"""Images as PNG, exact to the bit, and back."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

from bridge.backend import UInt8
from bridge.errors import FieldtuneError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 6
_UP = 2
"""The filter that stores each row as its difference from the one above (PNG, third edition, 9.2)."""


class ImageError(FieldtuneError):
    """Bytes that are not an image."""


def encode_png(image: UInt8) -> bytes:
    """uint8 RGB `[H, W, 3]` as a PNG file."""
    height, width, _ = image.shape
    rows = image.reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    pixels = zlib.compress(filtered.tobytes(), LEVEL)
    return b"".join([SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")])


def decode_image(data: bytes) -> UInt8:
    """A PNG or JPEG file as uint8 RGB `[H, W, 3]`. Raises `ImageError`."""
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            frame = next(container.decode(video=0))
            return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise ImageError(f"{len(data)} bytes are not an image: {error}") from error


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
