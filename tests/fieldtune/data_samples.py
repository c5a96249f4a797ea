"""Logs to export: of the toy backend through a real server, and made up ones with known content."""

from pathlib import Path
from typing import Any

import numpy as np

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, VectorSpec
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.records import tensor_records
from trainer.attempts import Demonstration
from trainer.demos import store

SIDE = 8
SPEC = BackendSpec(
    name="fake",
    cameras=(CameraSpec("eye", SIDE, SIDE + 4), CameraSpec("wrist", SIDE, SIDE)),
    state=VectorSpec(("x", "y", "z"), ("m", "m", "rad")),
    action=ActionSpec(("a", "b"), ("m", "deg"), (-1.0, -1.0), (1.0, 1.0), "absolute"),
    control_hz=10.0,
    instructions={"t": ("go", "move"), "u": "stay"},
)
HORIZON = 4


def picture(number: int, height: int = SIDE, width: int = SIDE) -> Any:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def observation(number: int, spec: BackendSpec = SPEC) -> dict[str, Any]:
    images = {
        f"image/{camera.name}": picture(number + 1000 * i, camera.height, camera.width)
        for i, camera in enumerate(spec.cameras)
    }
    seen = {**images, "state": np.array([number, -number, 0.5], np.float32)[: len(spec.state.names)]}
    return seen if spec.privileged is None else {**seen, "privileged": np.zeros(len(spec.privileged.names), np.float32)}


def sent(step: int) -> Any:
    return np.array([step / 100, -step / 100], np.float32)


def log_episode(
    log: EpisodeLog,
    name: str,
    decisions: int = 3,
    *,
    status: Any = "success",
    chunk: int = HORIZON,
    late: int = 0,
    versions: tuple[str, ...] = ("v1", "v2"),
    spec: BackendSpec = SPEC,
    **start: Any,
) -> None:
    """An episode that sent `sent(step)` at every step and saw `observation(step)`; the last chunk is cut short by one.

    Chunks arrive `late` steps after their observation: until then the one before plays on.
    """
    fields: dict[str, Any] = {
        "format": FORMAT, "episode": name, "task": "t", "instruction": "go", "seed": 7, "source": "policy",
        "explore": True, "client": "c", "spec": spec, "started_unix_s": 1000.0,
    }  # fmt: skip
    records: list[DecisionRecord | ExecutedRecord] = []
    every, d = chunk - late, len(spec.action.names)

    def executed(number: int, first: int, start: int, k: int) -> ExecutedRecord:
        arrays = {
            "sent": np.array([sent(first + start + i)[:d] for i in range(k)], np.float32).reshape(-1, d),
            "reward": np.arange(first + start, first + start + k, dtype=np.float32),
        }
        return ExecutedRecord(decision=number, start=start, tensors=tensor_records(arrays))

    for number in range(1, decisions + 1):
        step = (number - 1) * every
        tensors = {
            **observation(step, spec),
            "actions": np.full((chunk, d), 0.25, np.float32),
            "log_prob": np.full(chunk, -number, np.float32),
        }
        version = versions[(number - 1) % len(versions)]
        records.append(DecisionRecord(decision=number, step=step, version=version, tensors=tensor_records(tensors)))
        if late and number > 1:
            records.append(executed(number - 1, step - every, every, late))
        first = late if number > 1 else 0
        records.append(executed(number, step, first, every - first - (number == decisions)))
    steps = decisions * every - 1
    end = EndRecord(
        status=status,
        steps=steps,
        reason="",
        tensors=tensor_records(observation(steps, spec)) if status != "aborted" else {},
    )
    store(log, Demonstration(EpisodeStart(**{**fields, **start}), records, end))


def log_of(directory: Path, count: int = 3, **fields: Any) -> Path:
    """A log of `count` episodes e0, e1, ...: e1, e3, ... failed."""
    log = EpisodeLog(directory)
    for i in range(count):
        log_episode(log, f"e{i}", **{"status": "failure" if i % 2 else "success", "seed": i, **fields})
    log.close()
    return directory
