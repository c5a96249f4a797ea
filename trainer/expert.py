"""The scripted expert on the goals of an evaluation, and how few steps those goals could take: what to compare with.

The expert drives the backend itself, without a server: there is no policy to serve. Its result is a file like that
of any version, under the name `expert`; the bound lies beside it. Both are made once for a set of goals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from bridge.backend import Backend, HasExpert
from bridge.backends import make_backend
from bridge.backends.metaworld_bound import SUCCESS, KinematicBound, kinematic_bound
from bridge.config import BackendConfig
from bridge.pacing import Pacer
from runtime.durable import write_atomic
from runtime.episode import End
from runtime.rundir import RunDir
from trainer.attempts import EXPERT_VERSION
from trainer.evaluate import RESULT, load_evaluation
from trainer.statistics import Evaluation, summarise

Goal = tuple[str, int]
"""Task and seed."""


class Attempt(Struct, frozen=True):
    """One episode of the expert."""

    task: str
    seed: int
    status: End
    steps: int


def evaluate_expert(
    run: RunDir, config: BackendConfig, goals: Iterable[Goal], horizon_steps: int, progress: Callable[[int, int], None]
) -> Evaluation | None:
    """The expert's result on these goals, from the run if it is there; None if the backend has no expert."""
    wanted = sorted(set(goals))
    known = load_evaluation(run, EXPERT_VERSION)
    if (
        known is not None
        and known.horizon_steps == horizon_steps
        and wanted == [(t.task, t.seed) for t in known.trials]
    ):
        progress(len(wanted), len(wanted))
        return known
    backend = make_backend(_blind(config))
    if not isinstance(backend, HasExpert):
        return None
    attempts = []
    backend.connect()
    try:
        for done, (task, seed) in enumerate(wanted):
            progress(done, len(wanted))
            attempts.append(_attempt(backend, backend, task, seed, horizon_steps))
        progress(len(wanted), len(wanted))
    finally:
        backend.close()
    evaluation = summarise(attempts, version=EXPERT_VERSION, horizon_steps=horizon_steps)
    directory = run.evaluation(EXPERT_VERSION)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / RESULT, msgspec.json.format(msgspec.json.encode(evaluation)))
    return evaluation


def bound_of(run: RunDir, config: BackendConfig, goals: Iterable[Goal]) -> KinematicBound | None:
    """The kinematic bound of these goals, from the run if it is there; None where none is known: it is for MT10."""
    wanted = {goal for goal in goals if goal[0] in SUCCESS} if config.name == "metaworld" else set()
    if not wanted:
        return None
    path = run.evaluation(EXPERT_VERSION) / "kinematic_bound.json"
    if path.exists():
        known = msgspec.json.decode(path.read_bytes(), type=KinematicBound)
        if {(goal.task, goal.seed) for goal in known.goals} == wanted:
            return known
    bound = kinematic_bound(wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(bound)))
    return bound


def _attempt(backend: Backend, expert: HasExpert, task: str, seed: int, horizon_steps: int) -> Attempt:
    backend.reset(task, seed)
    pacer = Pacer(1.0 / backend.spec.control_hz) if backend.spec.paced else None
    if pacer:
        pacer.start()
    for step in range(1, horizon_steps + 1):
        backend.apply(expert.expert_action())
        status = backend.outcome().status
        if status != "running":
            return Attempt(task, seed, "success" if status == "success" else "failure", step)
        if pacer:
            pacer.wait()
    return Attempt(task, seed, "timeout", horizon_steps)


def _blind(config: BackendConfig) -> BackendConfig:
    """The same backend without cameras, where that can be said: the expert sees the state, and needs no OpenGL."""
    return replace(config, options={**config.options, "cameras": ()}) if config.name == "metaworld" else config
