"""Logs of a whole run, written without running one: for tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bridge.config import BackendConfig
from fieldtune.deployment import Deployment
from runtime.durable import write_atomic
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import DemosConfig, TrainerConfig
from trainer.environment import this_environment
from trainer.statistics import Evaluation, Trial, result_of, summarise

HORIZON = 200
FIRST, LAST = "a1" * 32, "b2" * 32
EVALUATION_SEED = 2_000_000
STARTED_S = 1_000_000.0
EPISODE_S = 0.5


def trial_row(task: str, seed: int, success: bool, steps: int, number: int = 0, *, explore: bool = True) -> EpisodeRow:
    """An episode's row; `number` places it in time."""
    steps = steps if success else HORIZON
    return EpisodeRow(
        seq=0,
        episode=f"{task}-{seed}-{number}",
        file="none.ep",
        task=task,
        seed=seed,
        source="policy",
        explore=explore,
        status="success" if success else "timeout",
        steps=steps,
        decisions=-(-steps // 8),
        versions=(FIRST,),
        client="test",
        started_unix_s=STARTED_S + number * EPISODE_S,
        ended_unix_s=STARTED_S + (number + 1) * EPISODE_S,
        reason="",
        bytes=0,
    )


def evaluation(version: str, results: Mapping[str, Sequence[int | None]]) -> Evaluation:
    """The evaluation in which goal i of each task took `results[task][i]` steps; None is a failure."""
    rows = [
        trial_row(task, EVALUATION_SEED + i, steps is not None, steps or HORIZON)
        for task, own in results.items()
        for i, steps in enumerate(own)
    ]
    return summarise(rows, version=version, horizon_steps=HORIZON)


def store_evaluation(directory: Path, found: Evaluation) -> None:
    directory.mkdir(parents=True)
    write_atomic(directory / "result.json", msgspec.json.encode(found))


def make_run(
    path: Path,
    tasks: Sequence[str],
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    backend: str = "metaworld",
    seed: int = 0,
    demos: int = 10,
    iterations: int = 8,
    episodes_per_task: int = 5,
) -> RunDir:
    """A run with its registry, training episodes, metrics and evaluations; without `after` nothing was trained yet."""
    run = RunDir(path)
    run.path.mkdir(parents=True)
    deployment = Deployment(
        name=path.name,
        backend=BackendConfig(backend),
        seed=seed,
        trainer=TrainerConfig(demos=DemosConfig(per_task=demos)),
    )
    write_atomic(run.config, msgspec.json.encode(deployment))
    write_atomic(run.environment, msgspec.json.encode(this_environment()))
    registry = Registry(run.registry)
    made = {"command": "sft", "demonstrations": dict.fromkeys(tasks, demos), "settings": {"batch": 64}}
    registry.add(FIRST, parent="", made=made)
    registry.set_live(FIRST, why="sft")
    run.sft.mkdir()
    (run.sft / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "samples_per_s": 64.0}) + "\n" for step in (25, 50, 360))
    )  # 360 steps of 64 samples at 64 samples a second: six minutes
    run.demos.mkdir()
    shown = [trial_row(task, i, True, 80, t * demos + i) for t, task in enumerate(tasks) for i in range(demos)]
    EpisodeIndex(run.demos).add([msgspec.structs.replace(row, source="expert", explore=False) for row in shown])
    if before is not None:
        store_evaluation(run.evaluation(FIRST), before)
    if after is None:
        return run
    rng = np.random.default_rng(seed)
    count = iterations * episodes_per_task
    rows = [
        trial_row(
            task, 10_000 + i, bool(rng.random() < 0.5 + 0.5 * i / count), int(90 - 40 * i / count), i * len(tasks) + t
        )
        for i in range(count)
        for t, task in enumerate(tasks)
    ]
    run.episodes.mkdir()
    EpisodeIndex(run.episodes).add(rows)
    registry.add(LAST, parent=FIRST, made={"command": "train", "iteration": iterations, "episodes_seq": [1, len(rows)]})
    registry.set_live(LAST, why="train")
    run.trainer.mkdir()
    batch = episodes_per_task * len(tasks)
    lines = []
    for i in range(1, iterations + 1):
        weight = 0.1 * i
        lines.append(
            {
                "iteration": i,
                "unix_s": rows[i * batch - 1].ended_unix_s,
                "minutes": i * batch * EPISODE_S / 60,
                "env_steps": sum(row.steps for row in rows[: i * batch]),
                "weight": weight,
                "weight_inputs": {
                    "ramp": weight,
                    "critic": 0.5 + 0.05 * i,
                    "brake": 1.0,
                    "competence": dict.fromkeys(tasks, 0.9),
                    "success": dict.fromkeys(tasks, 0.8),
                    "best": dict.fromkeys(tasks, 0.85),
                },
                "buffer_steps_by_task": dict.fromkeys(tasks, 80.0 - i),
                "dropped_stale": 3,
                "cpu_idle_share": 0.05 * i,
            }
        )
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store_evaluation(run.evaluation(LAST), after)
    return run


def pooled_steps(*evaluations: Evaluation, task: str) -> float | None:
    """Mean steps over the successes of a task in all of these."""
    trials: list[Trial] = [t for e in evaluations for t in e.trials if t.task == task]
    return result_of([trials], 0, HORIZON).steps
