"""Where a process that drives a backend spends its time: processor seconds by part, measured around each call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bridge.backend import Backend, BackendSpec, Float32, Observation, Outcome


class Spent(NamedTuple):
    """What a process has used until now: seconds of the processor, but for `wall_s`; `cpu_s` is the whole process."""

    wall_s: float
    cpu_s: float
    steps: float
    physics_s: float
    reset_s: float
    render_s: float
    inference_s: float

    def since(self, before: Spent) -> Spent:
        """The difference of the two."""
        return Spent(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def rate(self) -> float:
        """Environment steps a second."""
        return self.steps / self.wall_s


class Timed:
    """A backend that adds up the processor time of its process during each call, helpers of a renderer included."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.steps = 0
        self.used_s = {"physics": 0.0, "reset": 0.0, "render": 0.0, "inference": 0.0}
        self.starts: list[Spent] = []
        """The state at the start of each episode."""

    def spent(self) -> Spent:
        """The state now."""
        used = self.used_s
        return Spent(
            time.monotonic(),
            time.process_time(),
            self.steps,
            used["physics"],
            used["reset"],
            used["render"],
            used["inference"],
        )

    def whole(self) -> Spent:
        """What all whole episodes but the first, which warms up, have used."""
        return self.starts[-1].since(self.starts[1])

    def enough(self, seconds: float) -> bool:
        """Whether `whole` covers so many seconds, and one episode at least."""
        return len(self.starts) > 2 and self.whole().wall_s >= seconds

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what is done within to a part."""
        start_s = time.process_time()
        try:
            yield
        finally:
            self.used_s[part] += time.process_time() - start_s

    # --- the backend ----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> BackendSpec:
        """The backend's."""
        return self.backend.spec

    def connect(self) -> None:
        """Not timed."""
        self.backend.connect()

    def reset(self, task: str, seed: int) -> None:
        """An episode starts here."""
        self.starts.append(self.spent())
        with self.timed("reset"):
            self.backend.reset(task, seed)

    def observe(self) -> Observation:
        """Render."""
        with self.timed("render"):
            return self.backend.observe()

    def apply(self, action: Float32) -> Float32:
        """Physics."""
        self.steps += 1
        with self.timed("physics"):
            return self.backend.apply(action)

    def outcome(self) -> Outcome:
        """Physics, too: some simulators compute it when asked."""
        with self.timed("physics"):
            return self.backend.outcome()

    def hold_action(self) -> Float32:
        """Not timed."""
        return self.backend.hold_action()

    def stop(self) -> None:
        """Not timed."""
        self.backend.stop()

    def close(self) -> None:
        """Not timed."""
        self.backend.close()
