"""The driver of a real arm, against `fieldtune emulate so101` and a camera that is a video stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import yaml
from scenes import Scene, until

from bridge.backends.so101.calibration import so101_joints

cv2 = pytest.importorskip("cv2")

PICTURE_S = 0.03


class Stream:
    """A camera on the network: noise, a picture every `PICTURE_S` while `running` is set; `plugged` ends it."""

    def __init__(self) -> None:
        self.running, self.plugged = threading.Event(), threading.Event()
        self.running.set()
        self.plugged.set()
        stream, random = self, np.random.default_rng(0)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not stream.plugged.is_set():
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
                self.end_headers()
                while stream.plugged.is_set():
                    if stream.running.is_set():
                        jpeg = cv2.imencode(".jpg", random.integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()
                        head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                        self.wfile.write(head.encode() + jpeg + b"\r\n")
                    time.sleep(PICTURE_S)

            def log_message(self, *what: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/camera.mjpg"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream()
    yield made
    made.plugged.clear()
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.slow
def test_an_arm_whose_camera_and_bus_fail_says_what_and_goes_on(scene: Scene, stream: Stream) -> None:
    joints = {
        name: {"id": joint.id, "low_ticks": joint.low_ticks, "high_ticks": joint.high_ticks, "unit": joint.unit}
        for name, joint in so101_joints().items()
    }
    calibration = scene.directory / "arm.yaml"
    calibration.write_text(yaml.safe_dump({"joints": joints}))
    emulator = scene.run("emulate", "so101", "--calibration", str(calibration), said="emulator.log")
    printed = scene.directory / "emulator.out"
    until(lambda: printed.read_text().endswith("\n"), "the emulated arm")

    def fault(text: str) -> None:
        assert emulator.stdin is not None
        emulator.stdin.write(text.encode() + b"\n")
        emulator.stdin.flush()

    options = {
        "port": printed.read_text().strip(),
        "calibration": str(calibration),
        "cameras": [{"name": "top", "device": stream.address, "height": 16, "width": 16}],
        "tasks": {"pick": "pick it up"},
        "home": {"gripper": 50.0},
        "timeout_ms": 200.0,
        "home_speed_deg_s": 180.0,
        "control_hz": 20.0,
    }
    calm = {"hold_after_s": 10.0, "stop_after_s": 50.0, "chunk_age_s": 10.0}
    scene.deploy({"name": "faulty:Arm", "options": options}, value=0.0, horizon=5, safety=calm)
    runtime, robot = scene.serve(), scene.drive()
    scene.moves_on("the arm to drive")

    def forgiven(number: int) -> None:
        """An episode is stored, so what was before does not count any more."""
        scene.moves_on("the arm to drive", 2)
        scene.tell("end")
        until(lambda: scene.status()["episodes"].get("unjudged") == number, "an episode without a fault")

    # Some packets arrive damaged: asked for again, and counted.
    fault("corrupt=9")
    scene.moves_on("the arm to drive on", 20)
    forgiven(1)
    fault("clear")
    assert scene.warnings == []
    (counts,) = [note[1] for note in scene.notes if note[0] == "counts"]
    assert counts["checksum_errors"] > 0 and counts["retries"] > 0

    # The camera freezes for a moment, and goes on by itself.
    stream.running.clear()
    until(lambda: len(scene.warnings) == 1, "the frozen camera to be noticed")
    assert scene.warnings[0].startswith("camera top: its last picture is ") and scene.warnings[0].endswith("(1/3)")
    stream.running.set()
    forgiven(2)

    # The camera is gone, and comes back as a new one.
    stream.plugged.clear()
    until(lambda: "(2/3)" in scene.said, "the camera to be missed")
    assert scene.said.count("camera top: its last picture is ") >= 3
    stream.plugged.set()
    forgiven(3)
    assert scene.count("connect") > 1

    # A servo goes missing for good: the robot stays stopped until it is told.
    scene.moves_on("the arm to drive", 2)
    fault("missing=3")
    until(lambda: "stopped: " in scene.said, "the arm to be stopped for good")
    until(lambda: "elbow_flex" in scene.state(), "the runtime to know which joint")
    fault("clear")
    scene.tell("reset")
    scene.moves_on("the arm to go on when told")
    scene.stop(robot)
    scene.stop(runtime)
    episodes = scene.episodes()
    reasons = [episode.reason for episode in episodes if episode.status == "aborted"]
    assert reasons[0].startswith("stopped by its own fault: camera top: its last picture is")
    assert "camera top" in reasons[1]
    assert any("elbow_flex" in reason for reason in reasons[2:])
    assert reasons[-1] == "the bridge was told to leave"
    applied = scene.applied
    assert all(episode.steps == len(applied[episode.start.seed]) for episode in episodes)
