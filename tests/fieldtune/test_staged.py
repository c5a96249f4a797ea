"""A drill on real processes: what is poisoned never becomes live, what is better does.

The policies are written by hand: they look for the goal's colour in the picture and go there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from msgspec.structs import replace
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from ports import free_endpoint
from safetensors.numpy import load, save

from bridge.backends import make_backend
from bridge.client import PolicyClient, RefusedError
from bridge.config import BackendConfig
from bridge.messages import Announce, Serving
from fieldtune.cli import run as command
from runtime.bundle import PolicySpec, write_bundle
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SIDE, HORIZON, LOG_STD = 32, 2, -1.05
BACKEND = BackendConfig("point", {"size_px": SIDE})
ENOUGH_S = 90.0
GAIN = np.eye(2) * 2.0
GOOD, BIASED = np.zeros(2), np.full(2, 0.22)  # success about 0.95, and about 0.5


def write_policy(directory: Path, spec: PolicySpec, gain: Any, bias: Any, parent: str = "") -> str:
    """mean = clip((goal - place) @ gain + bias), for every action of a chunk; with a probe that is true."""
    spec = replace(
        spec, cameras=make_backend(BACKEND).spec.cameras, horizon=HORIZON, parent=parent, made={"command": "test"}
    )
    weights = {
        "gain": np.tile(np.asarray(gain, np.float32), HORIZON),
        "bias": np.tile(np.asarray(bias, np.float32), (HORIZON, 1)),
        "spread": np.full((HORIZON, 2), LOG_STD, np.float32),
    }
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    state = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
    green = np.maximum(image.astype(np.float32) @ [0, 1, -1], 0).reshape(3, -1)
    goal = green @ _places() / green.sum(1, keepdims=True)
    mean = np.clip(((goal - state) @ weights["gain"]).reshape(3, HORIZON, 2) + weights["bias"], -1, 1)
    probe = {
        "input.image/top": image,
        "input.state": state,
        "output.action_mean": mean.astype(np.float32),
        "output.action_log_std": np.broadcast_to(weights["spread"], mean.shape).copy(),
    }
    parts = {
        "graph.onnx": _graph({name: array.shape for name, array in weights.items()}),
        "weights.safetensors": save(weights),
        "tokenizer.json": b"",
        "probe.safetensors": save(probe),
    }
    return write_bundle(directory, spec, parts)


def _places() -> NDArray[np.float32]:
    """x and y of every pixel, `[side * side, 2]`."""
    along = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x, y = np.meshgrid(along, along[::-1])
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _graph(shapes: dict[str, tuple[int, ...]]) -> bytes:
    outside = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    for weight in outside:
        set_external_data(weight, "weights.bin")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
    constants = {
        "green_only": np.array([[0], [1], [-1]], np.float32),
        "flat": np.array([-1, SIDE * SIDE]),
        "chunk": np.array([-1, HORIZON, 2]),
        "places": _places(),
        "least": np.array(1e-6, np.float32),
        "one": np.array([1]),
        "low": np.array(-1, np.float32),
        "high": np.array(1, np.float32),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image/top"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "green_only"], ["greener"]),
        helper.make_node("Relu", ["greener"], ["green"]),
        helper.make_node("Reshape", ["green", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "places"], ["moment"]),
        helper.make_node("ReduceSum", ["row", "one"], ["sum"], keepdims=1),
        helper.make_node("Max", ["sum", "least"], ["mass"]),
        helper.make_node("Div", ["moment", "mass"], ["goal"]),
        helper.make_node("Sub", ["goal", "state"], ["way"]),
        helper.make_node("MatMul", ["way", "gain"], ["pulled"]),
        helper.make_node("Reshape", ["pulled", "chunk"], ["actions"]),
        helper.make_node("Add", ["actions", "bias"], ["wanted"]),
        helper.make_node("Clip", ["wanted", "low", "high"], ["action_mean"]),
        helper.make_node("Mul", ["action_mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "spread"], ["action_log_std"]),
    ]
    inputs = [
        helper.make_tensor_value_info("image/top", TensorProto.UINT8, ["B", SIDE, SIDE, 3]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", HORIZON, 2])
        for name in ("action_mean", "action_log_std")
    ]
    inside = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, [*outside, *inside])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return bytes(model.SerializeToString())


class Drill:
    """A run with a good live version, a runtime that stages, and two robots."""

    def __init__(self, directory: Path, spec: PolicySpec) -> None:
        self.directory, self._spec = directory, spec
        self.run = RunDir(directory / "drill")
        self.config = str(directory / "drill.yaml")
        self.endpoint = free_endpoint()
        deployment = {
            "name": "drill",
            "runs": str(directory),
            "backend": {"name": "point", "options": BACKEND.options},
            "bridge": {"horizon_steps": 20},
            "runtime": {
                "serve": {"endpoint": self.endpoint},
                "deploy": {"mode": "staged", "gate": {"max_cloning": 4.0}, "canary": {"max_episodes": 600}},
            },
        }
        Path(self.config).write_text(yaml.safe_dump(deployment))
        self.good = write_policy(self.run.policies, spec, GAIN, GOOD)
        self.registry = Registry(self.run.registry)
        self.registry.add(self.good, parent="", made={})
        self.registry.set_live(self.good, why="test")
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with (self.directory / f"{arguments[0]}.log").open("ab") as log:
            line = [sys.executable, "-m", "fieldtune", *arguments[:1], self.config, *arguments[1:]]
            self.running.append(
                subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            )
        return self.running[-1]

    def write(self, gain: Any, bias: Any) -> str:
        return write_policy(self.directory / "new", self._spec, gain, bias, self.good)

    def announce(self, version: str) -> None:
        with PolicyClient(self.endpoint, client="drill", timeout_s=ENOUGH_S) as client:
            client.request(Announce(path=str(self.directory / "new" / version)), Serving)

    def drives(self, version: str) -> int:
        """How many episodes it has had a part in."""
        index = EpisodeIndex(self.run.episodes)
        try:
            return index.count(version=version)
        finally:
            index.close()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + ENOUGH_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what}:\n{(self.directory / 'serve.log').read_text()}"
            time.sleep(0.1)

    def until_stage(self, version: str, stage: str) -> None:
        self.until(lambda: self.registry.stage(version) == stage, f"{stage} version")

    def why(self, version: str) -> str:
        return self.registry.stages(version)[-1].why

    def close(self) -> None:
        for process in self.running:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


@pytest.fixture
def drill(tmp_path: Path, point_policy_spec: PolicySpec) -> Iterator[Drill]:
    made = Drill(tmp_path, point_policy_spec)
    yield made
    made.close()


def with_weights(path: Path, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    """Change the weights of a bundle that is on the disk, and leave all else."""
    weights = load((path / "weights.safetensors").read_bytes())
    (path / "weights.safetensors").write_bytes(save({name: change(array) for name, array in weights.items()}))


def test_what_is_poisoned_never_becomes_live_and_what_is_better_does(
    drill: Drill, capsys: pytest.CaptureFixture[str]
) -> None:
    server = drill.start("serve")
    for _ in range(2):
        drill.start("drive")
    drill.until(lambda: drill.drives(drill.good) >= 30, "episodes")
    # What a bundle's own checks find: it is not even a candidate.
    refused = []
    for change in (lambda array: np.full_like(array, np.nan), lambda array: array[::-1].copy() + 0.1):
        copied = drill.write(GAIN, np.full(2, 0.01 * (1 + len(refused))))
        refused.append(copied)
        with_weights(drill.directory / "new" / copied, change)
        with pytest.raises(RefusedError):
            drill.announce(copied)
        assert drill.registry.stages(copied) == []
    # What only its behaviour shows, on what the robots have seen.
    flipped, shuffled = drill.write(-GAIN, GOOD), drill.write(GAIN[::-1], GOOD)
    for version in (flipped, shuffled):
        drill.announce(version)
        assert drill.registry.stage(version) == "rejected"
        assert drill.why(version).startswith("gate: divergence is")
    # What is small and does harm, on what the robots do.
    biased = drill.write(GAIN, BIASED)
    drill.announce(biased)
    assert drill.registry.stage(biased) == "canary", drill.why(biased)
    drill.until_stage(biased, "rejected")
    assert drill.why(biased).startswith("canary: worse after")
    assert [row.version for row in drill.registry.served()] == [drill.good]
    assert drill.drives(biased) > 10
    assert {drill.drives(version) for version in (*refused, flipped, shuffled)} == {0}
    # With a bad one live, by hand, a good one goes live by the rule.
    assert command(["policies", "promote", drill.config, biased[:12]]) == 0
    assert drill.registry.live() == biased
    better = drill.write(GAIN * 1.05, GOOD)
    drill.announce(better)
    assert drill.registry.stage(better) == "canary", drill.why(better)
    assert command(["status", drill.config]) == 0
    assert better[:12] in capsys.readouterr().out
    drill.until_stage(better, "live")
    assert drill.registry.live() == better
    change = drill.registry.stages(better)[-1]
    assert (change.who, change.evidence["decision"]) == ("rule", "promote")
    before = drill.drives(better)
    drill.until(lambda: drill.drives(better) >= before + 10, "episodes of the version that is live now")
    assert command(["policies", "show", drill.config, better[:12], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in shown["stages"]] == ["candidate", "canary", "live"]
    # Back by hand: one decision later nothing of it drives.
    assert command(["policies", "rollback", drill.config]) == 0
    assert drill.registry.live() == biased and drill.registry.stage(better) == "rejected"
    time.sleep(1.0)
    left = drill.drives(better)
    drill.until(lambda: drill.drives(biased) > 60, "episodes of the version that is live again")
    assert drill.drives(better) == left
    server.send_signal(signal.SIGTERM)
    assert server.wait(ENOUGH_S) == 0, (drill.directory / "serve.log").read_text()
