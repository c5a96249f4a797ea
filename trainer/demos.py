"""Scripted demonstrations: the backend's expert drives, its successes go into an episode log like any other's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from msgspec import Struct

from bridge.backend import Backend, BackendSpec, HasExpert
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex, EpisodeRow
from trainer.attempts import (
    ATTEMPT_TIMEOUT_S,
    Attempt,
    Demonstration,
    DemosError,
    Job,
    attempts_here,
    attempts_in_workers,
)
from trainer.config import ATTEMPTS_PER_DEMO, DemosConfig
from trainer.environment import usable_cores

STORE_TIMEOUT_S = 60.0
DEMOS_PER_WORKER = 10
"""Where the number of workers is left to us: to start a simulator costs as much as about ten demonstrations with it."""
SEEDS_AHEAD = 64
"""How far attempts of a task may go ahead of the first one that is not answered: what waits for it is in memory."""


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
    make: Callable[[], Backend],
    directory: Path,
    config: DemosConfig,
    tasks: Sequence[str],
    horizon_steps: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> DemoSummary:
    """Let the expert of a backend succeed `config.per_task` times at each task and log that in `directory`.

    `make` makes a backend that is not connected; where several workers drive, each makes its own. No `tasks` means all
    of its tasks. The attempt of a seed depends on the seed alone; seeds are tried upwards from `config.first_seed` and
    stored in this order, so the same settings give the same demonstrations whatever the number of workers, and what is
    in the log already is not collected again. Attempts that do not succeed within `horizon_steps` are not stored.
    `progress(kept, wanted)` is called after every attempt; `stopped` is asked often and ends running attempts.

    Raises `DemosError` where the backend has no expert or does not know a task, where a worker is lost, and where the
    expert fails too often: after five attempts for each demonstration wanted.
    """
    backend = make()
    spec = backend.spec
    if not isinstance(backend, HasExpert):
        raise DemosError(
            f"backend {spec.name} has no scripted expert (no `expert_action`), so it cannot demonstrate; "
            "start from a bundle that was made elsewhere, or import demonstrations of yours (fieldtune demos import)"
        )
    tasks = tasks or tuple(spec.instructions)
    for task in tasks:
        if task not in spec.instructions:
            known = ", ".join(spec.instructions)
            raise DemosError(f"trainer.tasks: backend {spec.name} has no task {task!r} (known: {known})")
    log = EpisodeLog(directory, queue_mb=NO_LIMIT_MB)
    try:
        index = EpisodeIndex(directory)
        seeds = {task: _Seeds(task, demo_rows(index, task, config), config, horizon_steps) for task in tasks}
        wanted = config.per_task * len(seeds)
        kept = sum(own.successes for own in seeds.values())
        progress(kept, wanted)

        def pick(last: str) -> Job | None:
            """For a worker that drove the task `last`: that again, for its scene is built, else the loneliest task."""
            ready = [] if stopped() else [own for own in seeds.values() if own.ready()]
            return min(ready, key=lambda own: (own.task != last, own.running)).take() if ready else None

        workers = worker_count(config, spec, wanted - kept)
        if workers == 1:
            answers = attempts_here(backend, horizon_steps, pick, stopped)
        else:
            timeout_s = ATTEMPT_TIMEOUT_S + horizon_steps / spec.control_hz
            answers = attempts_in_workers(make, workers, horizon_steps, timeout_s, pick, stopped)
        with closing(answers):
            for attempt in answers:
                for demonstration in seeds[attempt.task].answered(attempt):
                    store(log, demonstration)
                    kept += 1
                progress(kept, wanted)
        return _summary(index, tasks, config)
    finally:
        log.close()


def worker_count(config: DemosConfig, spec: BackendSpec, missing: int) -> int:
    """How many workers collect `missing` demonstrations: 1 is this process itself."""
    if config.workers is not None:
        return max(1, min(config.workers, missing))
    return 1 if spec.paced else max(1, min(usable_cores(), missing // DEMOS_PER_WORKER))


def demo_rows(index: EpisodeIndex, task: str, config: DemosConfig) -> list[EpisodeRow]:
    """The demonstrations of a task that `config` asks for and the log has, in order of their seeds."""
    rows = [
        row
        for row in index.list(limit=10**9, task=task, status="success")
        if row.source == "expert" and row.seed >= config.first_seed and not row.deleted
    ]
    # One a seed: a crash between storing and counting may have left the same demonstration twice.
    return [row for _, row in sorted({row.seed: row for row in reversed(rows)}.items())][: config.per_task]


class _Seeds:
    """The seeds of one task: given out upwards, answered in any order, kept in their own.

    A seed is given out only while all that run may succeed without making more than wanted. So each would also be
    tried one after another, none is tried in vain, and which ones succeed decides alone which are kept.
    """

    def __init__(self, task: str, rows: Sequence[EpisodeRow], config: DemosConfig, horizon_steps: int) -> None:
        self.task = task
        self.running = 0
        self.successes = len(rows)
        """Also those that are not kept yet."""
        self._wanted, self._horizon_steps = config.per_task, horizon_steps
        self._next = self._first_open = rows[-1].seed + 1 if rows else config.first_seed
        # Bounded by the seed, not by a count of attempts, so that stopping and resuming does not extend it.
        self._end = config.seeds.stop
        self._waiting: dict[int, Attempt] = {}

    def ready(self) -> bool:
        """Whether a seed can be given out now. Raises `DemosError` if none is left and too few have succeeded."""
        if self.successes + self.running >= self._wanted:
            return False
        if self._next < self._end:
            return self._next < self._first_open + SEEDS_AHEAD
        if self.running:
            return False
        tries = ATTEMPTS_PER_DEMO * self._wanted
        raise DemosError(
            f"{self.task}: the expert succeeded {self.successes} times in {tries} attempts of at most "
            f"{self._horizon_steps} steps, {self._wanted} were wanted; ask for fewer (trainer.demos.per_task) or allow "
            "more steps (bridge.horizon_steps)"
        )

    def take(self) -> Job:
        """Give out the next seed."""
        self.running += 1
        self._next += 1
        return Job(self.task, self._next - 1)

    def answered(self, attempt: Attempt) -> list[Demonstration]:
        """Take an answer; returns what is to be kept now: successes with no open seed below them, in order."""
        self.running -= 1
        self.successes += attempt.demonstration is not None
        self._waiting[attempt.seed] = attempt
        keep = []
        while self._first_open in self._waiting:
            demonstration = self._waiting.pop(self._first_open).demonstration
            self._first_open += 1
            if demonstration is not None:
                keep.append(demonstration)
        return keep


NO_LIMIT_MB = 1e6
"""Of the queue of a log that `store` fills: the episode is in memory already, and no robot is served beside it."""


def store(log: EpisodeLog, demonstration: Demonstration) -> None:
    """Log a whole episode and wait until it is on disk. Raises `DemosError` if it cannot be stored."""
    answered = threading.Event()
    answer: list[str | None] = []

    def stored(error: str | None) -> None:
        answer.append(error)
        answered.set()

    episode = demonstration.start.episode
    log.start(demonstration.start)
    for record in demonstration.records:
        log.append(episode, record)
    log.end(episode, demonstration.end, stored)
    if not answered.wait(STORE_TIMEOUT_S):
        raise DemosError(
            f"the episode log did not store a demonstration within {STORE_TIMEOUT_S:.0f} s; is the disk well?"
        )
    if answer[0] is not None:
        raise DemosError(f"a demonstration could not be stored: {answer[0]}")


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
