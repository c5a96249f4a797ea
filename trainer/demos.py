"""Scripted demonstrations: the backend's expert drives, its successes go into an episode log like any other's."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from bridge.backend import Backend, Float32, HasExpert, Observation, instruction_of
from bridge.errors import FieldtuneError
from bridge.messages import observation_tensors
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.records import tensor_records
from trainer.config import DemosConfig

EXPERT_VERSION = "expert"
ATTEMPTS_PER_DEMO = 5
STORE_TIMEOUT_S = 60.0

Record = DecisionRecord | ExecutedRecord


class DemosError(FieldtuneError):
    """Demonstrations that cannot be had; the message says why and what to do."""


class TaskDemos(Struct, frozen=True):
    """The demonstrations of one task."""

    kept: int
    failed: int
    """Attempts that did not succeed and were not stored."""
    steps_mean: float | None
    """Mean steps of those kept; None without one."""


class DemoSummary(Struct, frozen=True):
    """What is in the log of demonstrations now."""

    kept: int
    failed: int
    env_steps: int
    """Environment steps of all demonstrations kept."""
    steps_mean: float
    """Mean steps of a demonstration; 0 without one."""
    tasks: dict[str, TaskDemos]


def collect_demos(
    backend: Backend,
    directory: Path,
    config: DemosConfig,
    tasks: Sequence[str],
    horizon_steps: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> DemoSummary:
    """Let the expert of `backend` succeed `config.per_task` times at each task and log that in `directory`.

    The backend is connected and closed here; no `tasks` means all of its tasks. The attempt of a seed depends on the
    seed alone; seeds are tried upwards from `config.first_seed`, so the same settings give the same demonstrations, and
    what is in the log already is not collected again. Attempts that do not succeed within `horizon_steps` are not
    stored. `progress(kept, wanted)` is called after every attempt; `stopped` is asked before each.

    Raises `DemosError` where the backend has no expert or does not know a task, and where the expert fails too often:
    after five attempts for each demonstration wanted.
    """
    if not isinstance(backend, HasExpert):
        raise DemosError(
            f"backend {backend.spec.name} has no scripted expert (no `expert_action`), so it cannot demonstrate; "
            "start from a bundle that was made elsewhere, or log demonstrations of yours"
        )
    tasks = tasks or tuple(backend.spec.instructions)
    for task in tasks:
        if task not in backend.spec.instructions:
            known = ", ".join(backend.spec.instructions)
            raise DemosError(f"trainer.tasks: backend {backend.spec.name} has no task {task!r} (known: {known})")
    log = EpisodeLog(directory)
    try:
        index = EpisodeIndex(directory)
        wanted = config.per_task * len(tasks)
        kept = sum(len(demo_rows(index, task, config)) for task in tasks)
        progress(kept, wanted)
        backend.connect()
        for task in tasks:
            for success in _attempts(backend, backend.expert_action, log, index, task, config, horizon_steps, stopped):
                kept += success
                progress(kept, wanted)
        return _summary(index, tasks, config)
    finally:
        backend.close()
        log.close()


def demo_rows(index: EpisodeIndex, task: str, config: DemosConfig) -> list[EpisodeRow]:
    """The demonstrations of a task that `config` asks for and the log has, in order of their seeds."""
    rows = [
        row
        for row in index.list(limit=10**9, task=task, status="success")
        if row.source == "expert" and row.seed >= config.first_seed and not row.deleted
    ]
    # One a seed: a crash between storing and counting may have left the same demonstration twice.
    return [row for _, row in sorted({row.seed: row for row in reversed(rows)}.items())][: config.per_task]


def _attempts(
    backend: Backend,
    expert: Callable[[], Float32],
    log: EpisodeLog,
    index: EpisodeIndex,
    task: str,
    config: DemosConfig,
    horizon_steps: int,
    stopped: Callable[[], bool],
) -> Iterator[bool]:
    """Attempts at one task until enough succeeded; yields after each whether it did. Successes are on disk by then."""
    rows = demo_rows(index, task, config)
    kept, wanted = len(rows), config.per_task
    seed = rows[-1].seed + 1 if rows else config.first_seed
    # Bounded by the seed, not by a count of attempts, so that stopping and resuming does not extend it.
    last_seed = config.first_seed + ATTEMPTS_PER_DEMO * wanted
    while kept < wanted and not stopped():
        if seed >= last_seed:
            raise DemosError(
                f"{task}: the expert succeeded {kept} times in {ATTEMPTS_PER_DEMO * wanted} attempts of at most "
                f"{horizon_steps} steps, {wanted} were wanted; ask for fewer (trainer.demos.per_task) or allow more "
                "steps (bridge.horizon_steps)"
            )
        start = EpisodeStart(
            format=FORMAT,
            episode=uuid.uuid4().hex,
            task=task,
            instruction=instruction_of(backend.spec, task, seed),
            seed=seed,
            source="expert",
            explore=False,
            client="demos",
            spec=backend.spec,
            started_unix_s=time.time(),
        )
        records, end = _attempt(backend, expert, task, seed, horizon_steps)
        if end is not None:
            _store(log, start, records, end)
            kept += 1
        seed += 1
        yield end is not None


def _attempt(
    backend: Backend, expert: Callable[[], Float32], task: str, seed: int, horizon_steps: int
) -> tuple[list[Record], EndRecord | None]:
    """One episode of the expert, a decision for every step; the end is None unless it succeeded."""
    records: list[Record] = []
    backend.reset(task, seed)
    for step in range(horizon_steps):
        tensors = observation_tensors(_owned(backend.observe()))
        action = np.asarray(expert(), np.float32)
        sent = np.array(backend.apply(action), np.float32)
        outcome = backend.outcome()
        tensors["actions"] = action[None].copy()
        records.append(
            DecisionRecord(decision=step + 1, step=step, version=EXPERT_VERSION, tensors=tensor_records(tensors))
        )
        executed = {"sent": sent[None], "reward": np.array([outcome.reward], np.float32)}
        records.append(ExecutedRecord(decision=step + 1, tensors=tensor_records(executed)))
        if outcome.status == "success":
            final = tensor_records(observation_tensors(_owned(backend.observe())))
            return records, EndRecord(status="success", steps=step + 1, reason="", tensors=final)
        if outcome.status != "running":
            break
    return records, None


def _store(log: EpisodeLog, start: EpisodeStart, records: list[Record], end: EndRecord) -> None:
    """Log a whole episode and wait until it is on disk."""
    answered = threading.Event()
    answer: list[str | None] = []

    def stored(error: str | None) -> None:
        answer.append(error)
        answered.set()

    log.start(start)
    for record in records:
        log.append(start.episode, record)
    log.end(start.episode, end, stored)
    if not answered.wait(STORE_TIMEOUT_S):
        raise DemosError(
            f"the episode log did not store a demonstration within {STORE_TIMEOUT_S:.0f} s; is the disk well?"
        )
    if answer[0] is not None:
        raise DemosError(f"a demonstration could not be stored: {answer[0]}")


def _owned(observation: Observation) -> Observation:
    """A copy: the log refers to the arrays until they are written, the backend may reuse its own."""
    return Observation(
        {name: image.copy() for name, image in observation.images.items()},
        observation.state.copy(),
        None if observation.privileged is None else observation.privileged.copy(),
    )


def _summary(index: EpisodeIndex, tasks: Sequence[str], config: DemosConfig) -> DemoSummary:
    rows = {task: demo_rows(index, task, config) for task in tasks}
    # Every seed up to the last success was tried once.
    failed = {task: own[-1].seed + 1 - config.first_seed - len(own) if own else 0 for task, own in rows.items()}
    steps = {task: [row.steps for row in own] for task, own in rows.items()}
    kept = sum(map(len, rows.values()))
    env_steps = sum(map(sum, steps.values()))
    return DemoSummary(
        kept=kept,
        failed=sum(failed.values()),
        env_steps=env_steps,
        steps_mean=env_steps / kept if kept else 0.0,
        tasks={
            task: TaskDemos(len(own), failed[task], sum(own) / len(own) if own else None) for task, own in steps.items()
        },
    )
