"""The evaluation: one version, mean action, goals never trained on, through a real server and real bridge workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bridge.errors import FieldtuneError
from runtime.config import ServeConfig
from runtime.durable import write_atomic
from runtime.episodes import EpisodeLog
from runtime.rundir import RunDir
from runtime.schedule import FixedList
from runtime.server import PolicyServer
from runtime.supervisor import Child
from runtime.swap import Live
from trainer.statistics import Evaluation, summarise

RESULT = "result.json"
"""The result on the goals of the run's configuration; one on other goals needs another name."""


class EvaluationError(FieldtuneError):
    """The evaluation could not be brought to its end."""


def evaluate(
    run: RunDir,
    version: str,
    tasks: Sequence[str],
    *,
    episodes_per_task: int,
    first_seed: int,
    horizon_steps: int,
    conditions: Mapping[str, Any],
    variant: str = "",
    result: str = RESULT,
    endpoint: str,
    serve: ServeConfig,
    workers: int,
    worker_command: Callable[[int], list[str]],
    stopped: Callable[[], bool],
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> Evaluation | None:
    """Success and steps of `version` on seeds `first_seed`, `first_seed + 1`, ... of each task; None if `stopped`.

    It is served at `endpoint`, as `serve` says, to workers that are processes started by `worker_command(index)`.
    Episodes already in the evaluation's log are not run again, so an interrupted evaluation goes on where it stopped.
    The result is also written there, to the file `result`. An evaluation under other conditions than usual needs the
    name of a `variant`, which gives it a log of its own. `conditions` are what the episodes depend on besides version
    and goal: raises `EvaluationError` where the log has some that were made under others.
    """
    directory = run.evaluation(version, variant)
    _require_same(directory, {"horizon_steps": horizon_steps, **conditions})
    plan = [(task, first_seed + i) for i in range(episodes_per_task) for task in tasks]
    log = EpisodeLog(directory, keep_gb=1e6)
    try:
        wanted = set(plan)
        rows = log.index.after(0, limit=10**9)
        done = wanted & {(row.task, row.seed) for row in rows if row.status != "aborted"}
        schedule = FixedList([episode for episode in plan if episode not in done])
        if not schedule.finished:
            live = Live(run, threads=1, keep_versions=1, version=version)
            server = PolicyServer(
                endpoint, live, log, schedule, explore=False, horizon_steps=horizon_steps, config=serve
            )
            children = [Child(f"eval-{i}", worker_command(i), run.logs / f"eval-{i}.log") for i in range(workers)]
            _run(
                server, children, schedule, lambda: progress(schedule.ended_count + len(done), len(plan)), stopped, warn
            )
            if stopped() and not schedule.finished:
                return None
            if not schedule.finished:
                raise EvaluationError(f"the server of the evaluation of {version[:12]} has died; its error is above")
            if schedule.given_up:
                warn(f"{len(schedule.given_up)} goals were given up after repeated aborts; the result lacks them")
        rows = [row for row in log.index.after(0, limit=10**9) if (row.task, row.seed) in wanted]
    finally:
        log.close()
    evaluation = summarise(rows, version=version, horizon_steps=horizon_steps)
    if evaluation.unjudged:
        warn(
            f"{evaluation.unjudged} of {len(plan)} episodes wait for somebody to say how they went, and the result "
            f"lacks them: `fieldtune episodes label CONFIG EPISODE success --log eval/{directory.name}`, then the same "
            "command again"
        )
    write_atomic(directory / result, msgspec.json.format(msgspec.json.encode(evaluation)))
    return evaluation


def _require_same(directory: Path, conditions: Mapping[str, Any]) -> None:
    """Note the conditions of an evaluation, or compare them with those that its episodes were made under."""
    path = directory / "conditions.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(conditions))
        return
    before = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    for name in {**before, **conditions}:
        if before.get(name) != conditions.get(name):
            raise EvaluationError(
                f"{directory} has episodes with {name} = {before.get(name)}, not {conditions.get(name)}; evaluate "
                "under another `--set name=`, or move it away"
            )


def load_evaluation(run: RunDir, version: str, variant: str = "") -> Evaluation | None:
    """The stored result of the evaluation of a version on the run's own goals, if there is one."""
    path: Path = run.evaluation(version, variant) / RESULT
    return msgspec.json.decode(path.read_bytes(), type=Evaluation) if path.exists() else None


def _run(
    server: PolicyServer,
    children: list[Child],
    schedule: FixedList,
    progress: Callable[[], None],
    stopped: Callable[[], bool],
    warn: Callable[[str], None],
) -> None:
    """Serve until all episodes are over; workers that die are started again within their bound."""
    over = threading.Event()
    thread = threading.Thread(target=server.run, args=(over.is_set,), name="eval-server")
    thread.start()
    try:
        for child in children:
            child.start()
        while not (schedule.finished or stopped() or not thread.is_alive()):
            for child in children:
                child.keep_alive(warn)
            progress()
            over.wait(0.1)
        progress()
    finally:
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
        over.set()
        thread.join(10.0)
