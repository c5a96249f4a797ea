"""The cameras of the backend `so101`, on a driver that the test makes up."""

import sys
import time
import types
from contextlib import suppress

import numpy as np
import pytest

from bridge.backend import BackendError
from bridge.backends.so101 import cameras
from bridge.backends.so101.cameras import ArmCamera, OpenCVCamera

# Emulated servos start in the middle of their ranges, so this way home is short.


class Capture:
    """Stands in for a camera of OpenCV: pictures of one colour but for a corner, blue first, until it is unplugged."""

    opened = plugged = True
    frozen = False

    def __init__(self, device):
        self.device, self.settings = device, {}
        self.picture = np.full((48, 64, 3), (10, 20, 30), np.uint8)

    def isOpened(self):  # noqa: N802
        return self.opened

    def set(self, key, value):
        self.settings[key] = value

    def read(self):
        time.sleep(0.01)
        self.picture = self.picture.copy()
        self.picture[-1, -1] += not Capture.frozen
        return (True, self.picture) if Capture.plugged else (False, None)

    def release(self):
        self.opened = False


@pytest.fixture
def cv2(monkeypatch):
    monkeypatch.setattr(Capture, "plugged", True)
    module = types.ModuleType("cv2")
    vars(module).update(
        VideoCapture=Capture,
        CAP_PROP_FRAME_WIDTH=3,
        CAP_PROP_FRAME_HEIGHT=4,
        INTER_AREA=3,
        resize=lambda picture, size, interpolation: picture[: size[1], : size[0]],
    )
    monkeypatch.setitem(sys.modules, "cv2", module)


def test_a_camera_gives_rgb_and_notices_that_it_stopped(cv2, monkeypatch):
    camera = OpenCVCamera(ArmCamera("top", "/dev/video0", height=16, width=24))
    picture = camera.read()
    assert picture.shape == (16, 24, 3) and picture[0, 0].tolist() == [30, 20, 10]
    monkeypatch.setattr(cameras, "STALE_S", 0.05)
    Capture.plugged = False
    time.sleep(0.2)
    with pytest.raises(BackendError, match=r"camera top: its last picture is .* old"):
        camera.read()
    camera.close()
    camera.close()


def test_a_camera_that_sends_the_same_picture_again_and_again_is_frozen(cv2, monkeypatch):
    monkeypatch.setattr(cameras, "FROZEN_S", 0.2)
    camera = OpenCVCamera(ArmCamera("top", "/dev/video0", height=16, width=24))
    time.sleep(0.5)
    camera.read()
    monkeypatch.setattr(Capture, "frozen", True)
    time.sleep(0.5)
    with pytest.raises(BackendError, match=r"camera top: it has sent the very same picture for .* s; it is frozen"):
        camera.read()
    monkeypatch.setattr(Capture, "frozen", False)
    deadline_s = time.monotonic() + 10.0
    while True:
        with suppress(BackendError):
            camera.read()
            break
        assert time.monotonic() < deadline_s, "it stays frozen"
        time.sleep(0.05)
    camera.close()


def test_a_camera_that_is_not_there_or_shows_nothing(cv2, monkeypatch):
    monkeypatch.setattr(cameras, "FIRST_PICTURE_S", 0.05)
    Capture.plugged = False
    with pytest.raises(BackendError, match="camera top: opened, but no picture came"):
        OpenCVCamera(ArmCamera("top"))
    monkeypatch.setattr(Capture, "opened", False)
    with pytest.raises(BackendError, match="camera top: 0 cannot be opened"):
        OpenCVCamera(ArmCamera("top"))
