"""Episodes for the tests of the log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, VectorSpec
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord, Record
from runtime.episodes import EpisodeLog
from runtime.records import frame, tensor_records

SIDE = 8
SPEC = BackendSpec(
    name="fake",
    cameras=(CameraSpec("eye", SIDE, SIDE), CameraSpec("wrist", SIDE, SIDE)),
    state=VectorSpec(("x", "y", "z"), ("m", "m", "m")),
    action=ActionSpec(("a", "b"), ("1", "1"), (-1.0, -1.0), (1.0, 1.0), "delta"),
    control_hz=10.0,
    instructions={"t": "go"},
    privileged=VectorSpec(("goal",), ("m",)),
)
HORIZON = 4


def make_start(episode: str, **changes: Any) -> EpisodeStart:
    fields: dict[str, Any] = {
        "format": FORMAT, "episode": episode, "task": "t", "instruction": "go", "seed": 7, "source": "policy",
        "explore": True, "client": "c", "spec": SPEC, "started_unix_s": 1.0,
    }  # fmt: skip
    return EpisodeStart(**{**fields, **changes})


def observation(value: int, side: int = SIDE) -> dict[str, Any]:
    return {
        "image/eye": np.full((side, side, 3), value % 256, np.uint8),
        "image/wrist": np.full((side, side, 3), (value + 1) % 256, np.uint8),
        "state": np.full(3, value, np.float32),
        "privileged": np.full(1, value, np.float32),
    }


def make_decision(number: int, version: str = "v1", *, side: int = SIDE, **tensors: Any) -> DecisionRecord:
    arrays = {
        **observation(number, side),
        "actions": np.full((HORIZON, 2), number, np.float32),
        "log_prob": np.full(HORIZON, -number, np.float32),
        **tensors,
    }
    return DecisionRecord(
        decision=number,
        step=(number - 1) * HORIZON,
        version=version,
        tensors=tensor_records({name: array for name, array in arrays.items() if array is not None}),
    )


def make_executed(number: int, k: int = HORIZON, **tensors: Any) -> ExecutedRecord:
    arrays = {"sent": np.full((k, 2), number, np.float32), "reward": np.full(k, number, np.float32), **tensors}
    return ExecutedRecord(decision=number, tensors=tensor_records(arrays))


def make_end(steps: int, status: Any = "success") -> EndRecord:
    return EndRecord(status=status, steps=steps, reason="", tensors=tensor_records(observation(99)))


class Answer:
    """What `stored` was called with."""

    def __init__(self) -> None:
        self.calls: list[str | None] = []
        self._called = threading.Event()

    def __call__(self, error: str | None) -> None:
        self.calls.append(error)
        self._called.set()

    def wait(self) -> str | None:
        assert self._called.wait(20), "`stored` was not called"
        return self.calls[0]


def record_episode(
    log: EpisodeLog, episode: str, decisions: int = 2, *, side: int = SIDE, status: Any = "success", **start: Any
) -> Answer:
    """Log a whole episode; two decisions by v1, those after by v2."""
    log.start(make_start(episode, **start))
    for number in range(1, decisions + 1):
        log.append(episode, make_decision(number, "v1" if number <= 2 else "v2", side=side))
        log.append(episode, make_executed(number))
    answer = Answer()
    log.end(episode, make_end(decisions * HORIZON, status), answer)
    return answer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


@contextmanager
def opened(directory: Path, **settings: Any) -> Iterator[EpisodeLog]:
    log = EpisodeLog(directory, **settings)
    try:
        yield log
    finally:
        log.close()


def frames(*records: Record) -> bytes:
    return b"".join(part for record in records for part in frame(record))
