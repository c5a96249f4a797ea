"""A backend and a client for tests of the control loop, and a clock that stands still."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge.backend import ActionSpec, BackendError, BackendSpec, Float32, Observation, Outcome, VectorSpec
from bridge.messages import Assignment, Chunk, EndEpisode, Infer, Message, Welcome

H, D = 4, 2
SPEC = BackendSpec(
    name="fake",
    cameras=(),
    state=VectorSpec(("step",), ("1",)),
    action=ActionSpec(("a", "b"), ("1", "1"), (-100.0, -100.0), (100.0, 100.0), "delta"),
    control_hz=1000.0,
    instructions={"t": "go"},
)
WELCOME = Welcome(session="s1", version="v1", horizon=H)
TASK = Assignment(episode="e1", task="t", seed=3, horizon_steps=10)


@dataclass
class FakeBackend:
    """Counts what is done to it; `ends` maps a step to the status after it."""

    ends: dict[int, Any] = field(default_factory=dict)
    spec: BackendSpec = SPEC
    fail_at: int | None = None
    applied: list[Float32] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    stopped: int = 0

    def connect(self) -> None:
        self.calls.append("connect")

    def reset(self, task: str, seed: int) -> None:
        self.calls.append(f"reset {task} {seed}")

    def observe(self) -> Observation:
        self.calls.append("observe")
        return Observation({}, np.array([len(self.applied)], np.float32))

    def apply(self, action: Float32) -> Float32:
        if len(self.applied) == self.fail_at:
            raise BackendError("the arm is in the way")
        self.applied.append(action.copy())
        return np.clip(action, -1, 1)

    def outcome(self) -> Outcome:
        return Outcome(self.ends.get(len(self.applied), "running"), 0.5 * len(self.applied))

    def hold_action(self) -> Float32:
        return np.zeros(D, np.float32)

    def stop(self) -> None:
        self.stopped += 1

    def close(self) -> None:
        self.calls.append("close")


@dataclass
class FakeClient:
    """Gives chunk n the actions n, n, ...; `spoil` may change or raise before a chunk is given."""

    spoil: Callable[[Chunk, dict[str, Any]], tuple[Chunk, dict[str, Any]]] = lambda chunk, arrays: (chunk, arrays)
    infers: list[tuple[Infer, dict[str, Any]]] = field(default_factory=list)
    ends: list[tuple[EndEpisode, dict[str, Any]]] = field(default_factory=list)
    given_up: list[tuple[EndEpisode, dict[str, Any]]] = field(default_factory=list)

    def request(self, message: Message, kind: type, arrays: Any = None, timeout_s: float | None = None) -> None:
        assert isinstance(message, EndEpisode) and message.status == "aborted"
        self.given_up.append((message, arrays))

    def post(self, message: Message, arrays: Any = None) -> int:
        if isinstance(message, Infer):
            self.infers.append((message, arrays))
            return len(self.infers)
        assert isinstance(message, EndEpisode)
        self.ends.append((message, arrays))
        return -len(self.ends)

    def collect(self, request: int, kind: type) -> tuple[Any, Any]:
        assert kind is Chunk
        message, _ = self.infers[request - 1]
        chunk = Chunk(episode=message.episode, decision=request, version=f"v{(request + 1) // 2}")
        return self.spoil(chunk, {"actions": np.full((H, D), request, np.float32)})

    def forget(self, request: int) -> None:
        assert 0 < request <= len(self.infers)

    @property
    def reports(self) -> list[tuple[int, dict[str, Any]]]:
        """(decision, `sent` and `reward`) of every request that reports one, in order."""
        return [
            (message.played[0].decision, {"sent": arrays["sent"], "reward": arrays["reward"]})
            for message, arrays in [*self.infers, *self.ends]
            if message.played
        ]


@dataclass
class Clock:
    """Time that passes only by sleeping and by `work`."""

    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        # A real sleep is never exact.
        self.now_s += seconds + 0.0007

    def work(self, seconds: float) -> None:
        self.now_s += seconds
