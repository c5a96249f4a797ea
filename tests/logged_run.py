"""Real logs of a run on the toy backend, made through a real server in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.backend import Backend, Outcome
from bridge.backends.point import Point, PointOptions
from bridge.config import BridgeConfig
from bridge.drive import drive
from runtime.episode import Episode
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.policy import Policy
from runtime.reading import read_episode
from runtime.schedule import FixedList

STEPS = 6


class Brief(Point):
    """`point`, done after `STEPS` steps: success where the seed is even, failure where it is odd."""

    def __init__(self) -> None:
        super().__init__(PointOptions(size_px=8))

    def reset(self, task: str, seed: int) -> None:
        super().reset(task, seed)
        self.steps, self.end = 0, "failure" if seed % 2 else "success"

    def apply(self, action: Any) -> Any:
        self.steps += 1
        return super().apply(action)

    def outcome(self) -> Outcome:
        outcome = super().outcome()
        return Outcome(self.end if self.steps == STEPS else "running", outcome.reward)  # type: ignore[arg-type]


def log_run(
    serve: Callable[..., Any],
    directory: Path,
    policy: Policy,
    backend: Backend,
    *,
    seeds: int = 3,
    explore: bool,
    horizon_steps: int = 20,
) -> list[Episode]:
    """Drive episodes of the seeds 0, 1, ... with `policy` and read what was logged, oldest first."""
    schedule = FixedList([("reach", seed) for seed in range(seeds)])
    log = EpisodeLog(directory)
    serving = serve(policy=policy, log=log, schedule=schedule, explore=explore, horizon_steps=horizon_steps)
    drive(
        backend,
        serving.client(),
        BridgeConfig(),
        stopped=lambda: False,
        report=lambda _report, _assignment: None,
        warn=pytest.fail,
    )
    serving.stop()
    return read_log(directory)


def read_log(directory: Path) -> list[Episode]:
    """All episodes of a log, oldest first."""
    index = EpisodeIndex(directory)
    return [read_episode(index.path(row)) for row in index.after(0)]
