"""A trainer on the toy backend, made to iterate at once: for the tests of `ContinualTrainer`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from ppo_robot import BACKEND, SMALL, Robot
from ppo_robot import announce as make_live

from bridge.backend import BackendSpec
from bridge.backends import make_backend
from runtime.rundir import RunDir
from trainer.config import TrainerConfig
from trainer.continual import ContinualTrainer

torch.set_num_threads(1)
SPEC = make_backend(BACKEND).spec
WARMS_UP = replace(SMALL, ppo=replace(SMALL.ppo, critic_warmup_iterations=1))
"""As `SMALL`; but the first iteration warms up the critic and makes no version."""


def changed(**sections: dict[str, Any]) -> TrainerConfig:
    """`WARMS_UP` with other values in some of its sections."""
    return replace(WARMS_UP, **{name: replace(getattr(WARMS_UP, name), **values) for name, values in sections.items()})


def make_trainer(
    run: RunDir,
    config: TrainerConfig = WARMS_UP,
    announce: Callable[[Path], None] | None = None,
    warnings: list[str] | None = None,
    spec: BackendSpec = SPEC,
) -> ContinualTrainer:
    return ContinualTrainer(
        run,
        spec,
        config,
        0,
        announce=announce or partial(make_live, run),
        stop=threading.Event(),
        warn=(warnings if warnings is not None else []).append,
    )


def iterate(trainer: ContinualTrainer, robot: Robot, episodes: int = 4) -> dict[str, Any]:
    robot.run(episodes)
    rows = trainer.collect()
    assert rows is not None
    line = trainer.iterate(rows)
    assert line is not None
    return line


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


class CrashError(Exception):
    pass


def crash(*_: Any, **__: Any) -> None:
    raise CrashError
