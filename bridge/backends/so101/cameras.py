"""Cameras by OpenCV: a thread grabs, so that the newest picture is at hand and a camera that stopped is noticed."""

from __future__ import annotations

import threading
import time
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from bridge.backend import BackendError, UInt8
from bridge.backends.frozen import FROZEN_S, Frozen

Pixels = Annotated[int, Meta(ge=8, le=2160)]
FIRST_PICTURE_S = 5.0
"""USB cameras take a second or two to start."""
STALE_S = 0.5
"""A picture older than this is not what the robot sees now."""


class ArmCamera(Struct, frozen=True, forbid_unknown_fields=True):
    """One camera. Its picture is brought to `[height, width]` by area before the policy sees it."""

    name: str
    device: int | str = 0
    """A number or a path as OpenCV takes it (`/dev/v4l/by-id/...` keeps its name), or `drawn` with `emulate`."""
    height: Pixels = 96
    width: Pixels = 96
    capture_height: Pixels = 480
    """What the camera is asked for."""
    capture_width: Pixels = 640


class OpenCVCamera:
    """One camera that is open."""

    def __init__(self, options: ArmCamera) -> None:
        """Open it and wait for its first picture. Raises `BackendError`; `ModuleNotFoundError` without OpenCV."""
        import cv2

        self._cv2: Any = cv2
        self._options = options
        self._capture = cv2.VideoCapture(options.device)
        if not self._capture.isOpened():
            self._capture.release()
            raise BackendError(
                f"camera {options.name}: {options.device!r} cannot be opened; see that it is plugged in and that no "
                "other program has it (`ls /dev/v4l/by-id` lists cameras)"
            )
        self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, options.capture_width)
        self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, options.capture_height)
        self._newest: tuple[float, float, Any] | None = None  # when it was taken, for how long it is the same, and it
        self._frozen = Frozen()
        self._arrived = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._grab, name=f"camera {options.name}", daemon=True)
        self._thread.start()
        if not self._arrived.wait(FIRST_PICTURE_S):
            self.close()
            raise BackendError(f"camera {options.name}: opened, but no picture came within {FIRST_PICTURE_S:g} s")

    def read(self) -> UInt8:
        """The newest picture, uint8 RGB `[height, width, 3]`. Raises `BackendError` if it is old."""
        newest = self._newest
        assert newest is not None
        taken_s, same_s, picture = newest
        age_s = time.monotonic() - taken_s
        if age_s > STALE_S:
            raise BackendError(f"camera {self._options.name}: its last picture is {age_s:.1f} s old; see its cable")
        if same_s > FROZEN_S:
            raise BackendError(
                f"camera {self._options.name}: it has sent the very same picture for {same_s:.1f} s; it is frozen, "
                "plug it in again"
            )
        size = (self._options.width, self._options.height)
        small = self._cv2.resize(picture, size, interpolation=self._cv2.INTER_AREA)
        return np.ascontiguousarray(small[:, :, ::-1])

    def close(self) -> None:
        """Idempotent. A camera that hangs is let go of when it comes back."""
        self._closing = True
        self._thread.join(timeout=2.0)

    def _grab(self) -> None:
        while not self._closing:
            good, picture = self._capture.read()
            if good:
                now_s = time.monotonic()
                self._newest = (now_s, self._frozen.same_s(picture, now_s), picture)
                self._arrived.set()
            else:
                # Unplugged: `read` says so once the last picture is old.
                time.sleep(0.01)
        # Here, because OpenCV may not be told so by another thread while it waits for a picture.
        self._capture.release()
