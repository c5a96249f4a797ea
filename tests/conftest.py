"""What several tests share: a policy whose output a test can foresee, and a real server on a real socket.

The runtime is imported where it is used, so that the bridge's own tests run where only the bridge is installed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from msgspec.structs import replace

from bridge.backend import Backend, BackendSpec
from bridge.client import PolicyClient
from bridge.messages import (
    Assignment,
    Chunk,
    EndEpisode,
    EpisodeStored,
    GetStatus,
    Infer,
    NextEpisode,
    NoEpisode,
    Played,
    StatusReply,
    Welcome,
    observation_tensors,
)

if TYPE_CHECKING:
    from runtime.bundle import PolicySpec
    from runtime.episodes import EpisodeLog
    from runtime.server import PolicyServer

# Where two cores are shared, how long one example takes says nothing.
settings.register_profile("fieldtune", deadline=None)
settings.load_profile("fieldtune")

ENOUGH_S = 30.0
"""A deadline that only a broken server misses, even on a busy machine."""
HORIZON = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that at the end no worker goes on alone for minutes."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def point() -> Backend:
    """A simulator without a simulator."""
    from bridge.backends.point import Point, PointOptions

    backend = Point(PointOptions(size_px=8))
    backend.connect()
    return backend


@pytest.fixture
def point_policy_spec(point: Backend) -> PolicySpec:
    """The spec of a policy that sees the point's camera and state."""
    from runtime.bundle import FORMAT, PolicySpec

    spec = point.spec
    return PolicySpec(
        format=FORMAT,
        name="fake",
        cameras=spec.cameras,
        state=spec.state,
        action=spec.action,
        control_hz=spec.control_hz,
        horizon=HORIZON,
        tokens=0,
    )


@dataclass
class FakePolicy:
    """The mean of every action is `value` plus the first element of the state; sigma is `exp(log_std)`."""

    spec: PolicySpec
    version: str = "a" * 64
    value: float = 0.0
    log_std: float = -2.0
    error: Callable[[Mapping[str, Any]], None] = lambda inputs: None
    gate: threading.Event = field(default_factory=threading.Event)
    """While this is clear, no inference ends."""
    waiting: threading.Event = field(default_factory=threading.Event)
    """Set when an inference has begun."""
    batches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def tokens(self, instruction: str) -> Any:
        """No instruction is read."""
        raise AssertionError("a policy without tokens was asked for them")

    def infer(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Batched inputs -> (mean, log_std), float32 `[B, h, d]`."""
        self.waiting.set()
        assert self.gate.wait(ENOUGH_S)
        state = inputs["state"]
        self.batches.append(len(state))
        self.error(inputs)
        shape = (len(state), self.spec.horizon, len(self.spec.action.names))
        mean = np.broadcast_to(np.float32(self.value) + state[:, :1, None], shape).astype(np.float32)
        return mean, np.full(shape, self.log_std, np.float32)


@pytest.fixture
def fake_policy(point_policy_spec: PolicySpec) -> Callable[..., FakePolicy]:
    """Make a `FakePolicy` for the point backend."""
    return lambda **fields: FakePolicy(point_policy_spec, **fields)


@dataclass
class FakeLive:
    """A live policy that is changed by the test; `change` stands for what a swap does."""

    policy: Any
    previous: str = ""
    change: Callable[[str], Any] = lambda wanted: None
    swaps: int = 0

    def __call__(self) -> Any:
        """The policy that serves now."""
        return self.policy

    def arm_for(self, client: str) -> str:
        """Whatever is live."""
        return ""

    def policy_of(self, arm: str) -> Any:
        """The policy that serves now."""
        return self.policy

    def failed(self, version: str, why: str) -> None:
        """Nothing comes of it."""

    def standing(self) -> dict[str, Any]:
        """Nothing is staged."""
        return {}

    def govern(self, command: str, version: str, who: str) -> str:
        """The same as a rollback."""
        return self._flip(version)

    def announce(self, path: Path) -> str:
        """Flip to what `change` gives."""
        return self._flip(str(path))

    def rollback(self, version: str) -> str:
        """The same."""
        return self._flip(version)

    def _flip(self, wanted: str) -> str:
        policy = self.change(wanted)
        self.swaps += policy.version != self.policy.version
        self.previous, self.policy = self.policy.version, policy
        return str(policy.version)


@dataclass
class Serving:
    """A server in a thread, and what it was made of."""

    server: PolicyServer
    log: EpisodeLog
    live: Any
    endpoint: str
    thread: threading.Thread
    stopped: threading.Event
    clients: list[PolicyClient] = field(default_factory=list)

    def client(self, name: str = "test", timeout_s: float = ENOUGH_S, keys: Path | None = None) -> PolicyClient:
        """A client of this server; closed with the server."""
        self.clients.append(PolicyClient(self.endpoint, client=name, timeout_s=timeout_s, keys=keys))
        return self.clients[-1]

    def robot(self, spec: BackendSpec, name: str = "robot") -> Robot:
        """A client that has said hello with a backend's spec."""
        client = self.client(name)
        return Robot(client, client.hello(spec))

    def status(self) -> dict[str, Any]:
        """The server's counters."""
        # A client for each look: tests look hundreds of times, from several threads, and a process has 1024 files.
        with PolicyClient(self.endpoint, client="status", timeout_s=ENOUGH_S) as client:
            reply, _ = client.request(GetStatus(), StatusReply)
        return reply.status

    @property
    def alive(self) -> bool:
        """Whether the server's thread has not died."""
        return self.thread.is_alive()

    def stop(self) -> None:
        """Stop the server, close its clients and its log; idempotent."""
        assert self.stopped.is_set() or self.alive, "the server's thread has died; its traceback is above"
        self.stopped.set()
        self.thread.join(ENOUGH_S)
        assert not self.thread.is_alive()
        for client in self.clients:
            client.close()
        self.log.close()


@dataclass
class Robot:
    """The messages of a bridge, one method each, for tests that send them out of order."""

    client: PolicyClient
    welcome: Welcome
    episode: str = ""
    decision: int = 0
    steps: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    def next(self) -> Assignment | NoEpisode:
        """Ask for the next episode."""
        reply, _ = self.client.ask(NextEpisode(session=self.welcome.session))
        assert isinstance(reply, Assignment | NoEpisode)
        if isinstance(reply, Assignment):
            self.episode, self.decision, self.steps, self.report = reply.episode, 0, 0, {}
        return reply

    def observation(self, spec: BackendSpec, x: float = 0.0) -> dict[str, Any]:
        """An observation of the point with its first state element at `x`."""
        from bridge.backend import Observation

        (camera,) = spec.cameras
        image = np.full((camera.height, camera.width, 3), int(100 * abs(x)) % 256, np.uint8)
        return observation_tensors(
            Observation({camera.name: image}, np.array([x, 0], np.float32), np.zeros(4, np.float32))
        )

    def infer(self, arrays: Any, **changes: Any) -> tuple[Chunk, dict[str, Any]]:
        """Ask for a chunk, and report what was executed of the last one."""
        fields = {**self._fields(), "step": self.steps, **changes}
        chunk, tensors = self.client.request(Infer(**fields), Chunk, {**arrays, **self.report})
        self.decision, self.report = chunk.decision, {}
        return chunk, tensors

    def executed(self, k: int = 1) -> None:
        """Have k actions of the last chunk executed; the next request reports them."""
        self.report = {"sent": np.zeros((k, 2), np.float32), "reward": np.zeros(k, np.float32)}
        self.steps += k

    def _fields(self) -> dict[str, Any]:
        played = (Played(self.decision, 0, len(self.report["sent"])),) if self.report else ()
        return {"session": self.welcome.session, "episode": self.episode, "played": played}

    def end(self, arrays: Any, status: Any = "timeout", **changes: Any) -> EpisodeStored:
        """End the episode, and report what was executed of the last chunk."""
        fields = {**self._fields(), "steps": self.steps, **changes}
        reply, _ = self.client.request(EndEpisode(status=status, **fields), EpisodeStored, {**arrays, **self.report})
        return reply

    def run_episode(self, spec: BackendSpec, decisions: int = 2) -> EpisodeStored:
        """A whole episode of one step a decision."""
        assert isinstance(self.next(), Assignment)
        for i in range(decisions):
            self.infer(self.observation(spec, i / 10))
            self.executed()
        return self.end(self.observation(spec))


@pytest.fixture
def serve(tmp_path: Path, point: Backend, fake_policy: Callable[..., FakePolicy]) -> Iterator[Callable[..., Serving]]:
    """Start servers; `serve(policy=, live=, endpoint=, schedule=, explore=, horizon_steps=, log=, **ServeConfig)`."""
    from runtime.config import ServeConfig
    from runtime.episodes import EpisodeLog
    from runtime.schedule import Training
    from runtime.server import PolicyServer

    running: list[Serving] = []

    def start(
        *,
        policy: Any = None,
        live: Any = None,
        endpoint: str = "",
        schedule: Any = None,
        explore: bool = True,
        horizon_steps: int = 20,
        log: Any = None,
        **config: Any,
    ) -> Serving:
        server_log = log or EpisodeLog(tmp_path / "episodes")
        the_live = live or FakeLive(policy or fake_policy())
        try:
            server = PolicyServer(
                endpoint or "tcp://127.0.0.1:*",
                the_live,
                server_log,
                schedule or Training(tuple(point.spec.instructions), 0, 1000, np.random.default_rng(0)),
                explore=explore,
                horizon_steps=horizon_steps,
                config=ServeConfig(**config),
            )
        except BaseException:
            server_log.close()
            raise
        stopped = threading.Event()
        thread = threading.Thread(target=server.run, args=(stopped.is_set,), daemon=True)
        thread.start()
        running.append(Serving(server, server_log, the_live, server.endpoint, thread, stopped))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def tiny_bundle(point_policy_spec: PolicySpec) -> Callable[..., str]:
    """`tiny_bundle(directory, value, parent=, claimed=, **spec changes)` writes a real bundle and gives its version.

    It sees the state (x, y) only; every element of a chunk is `value * (1 + x + y)`, computed from two weights, so that
    a mixture of two versions shows. `claimed` is the value that its probe was made with, if another.
    """
    from safetensors.numpy import save

    from runtime.bundle import write_bundle

    def write(directory: Path, value: float, parent: str = "", claimed: float | None = None, **changes: Any) -> str:
        fields = {"cameras": (), "parent": parent, "made": {"value": value}, **changes}
        spec = replace(point_policy_spec, **fields)
        n, h, d = len(spec.state.names), spec.horizon, len(spec.action.names)
        state = np.random.default_rng(0).uniform(-1, 1, (3, n)).astype(np.float32)
        mean = np.empty((3, h, d), np.float32)
        mean[:] = ((value if claimed is None else claimed) * (1 + state.sum(1)))[:, None, None]
        spread = np.full((h, d), -3.0, np.float32)
        weights = {
            "slope": np.full((n, h * d), value, np.float32),
            "bias": np.full((h, d), value, np.float32),
            "spread": spread,
        }
        probe = {
            "input.state": state,
            "output.action_mean": mean,
            "output.action_log_std": np.broadcast_to(spread, (3, h, d)).copy(),
        }
        parts = {
            "graph.onnx": _linear_graph({name: array.shape for name, array in weights.items()}),
            "weights.safetensors": save(weights),
            "tokenizer.json": b"",
            "probe.safetensors": save(probe),
        }
        return write_bundle(directory, spec, parts)

    return write


@pytest.fixture
def scene(tmp_path: Path, point: Backend, tiny_bundle: Callable[..., str]) -> Iterator[Any]:
    """A `staging_scene.Scene`."""
    from staging_scene import Scene

    from runtime.rundir import RunDir

    made = Scene(RunDir(tmp_path / "run"), point, tiny_bundle)
    yield made
    made.log.close()


def _linear_graph(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """mean = reshape(state @ slope) + bias, log_std = spread; the three weights are outside the graph."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.external_data_helper import set_external_data

    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    for weight in weights:
        set_external_data(weight, "weights.bin")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
    constants = [
        numpy_helper.from_array(np.array([-1, *shapes["bias"]], np.int64), "shape"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("MatMul", ["state", "slope"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["moved"]),
        helper.make_node("Add", ["moved", "bias"], ["action_mean"]),
        helper.make_node("Mul", ["moved", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "spread"], ["action_log_std"]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shapes["bias"]])
        for name in ("action_mean", "action_log_std")
    ]
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", shapes["slope"][0]])
    graph = helper.make_graph(nodes, "test", [state], outputs, [*weights, *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return bytes(model.SerializeToString())
