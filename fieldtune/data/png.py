"""Images as PNG, exact to the bit, and back."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np

from bridge.backend import UInt8
from bridge.errors import FieldtuneError


class ImageError(FieldtuneError):
    """Bytes that are not an image."""


def encode_png(image: UInt8) -> bytes:
    """uint8 RGB `[H, W, 3]` as a PNG file."""
    import av

    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    packets = [*codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def decode_image(data: bytes) -> UInt8:
    """A PNG or JPEG file as uint8 RGB `[H, W, 3]`. Raises `ImageError`."""
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            frame = next(container.decode(video=0))
            return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise ImageError(f"{len(data)} bytes are not an image: {error}") from error
