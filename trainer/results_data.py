"""One run as the results see it: evaluations on common goals, what it cost, what it was made of. Read from its logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bridge.backends.metaworld_bound import KinematicBound
from bridge.errors import FieldtuneError
from runtime.bundle import read_bundle
from runtime.episode import End
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry, VersionRow
from runtime.rundir import RunDir
from trainer.environment import Environment, load_environment
from trainer.evaluate import load_evaluation
from trainer.report_data import read_metrics, training_rows
from trainer.statistics import Evaluation, Trial, left_out, summarise

Goal = tuple[str, int]
"""Task and seed."""


class ResultsError(FieldtuneError):
    """A run whose results cannot be written; the message says why."""


class Cost(Struct, frozen=True):
    """What one run took. Hours are wall-clock; None where the logs do not say."""

    demos_hours: float | None
    """The demonstrations that were kept."""
    sft_hours: float | None
    """Gradient steps of supervised fine-tuning."""
    training_hours: float | None
    """Post-training, pauses between a stop and a resume not counted."""
    env_steps: int
    """Environment steps of the post-training's episodes."""
    episodes: int
    decisions: int
    """Decisions that post-training has learned from."""

    @property
    def hours(self) -> float | None:
        """All together, evaluations not counted; None where a part is not known."""
        parts = (self.demos_hours, self.sft_hours, self.training_hours)
        return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)


class TrainingEpisode(Struct, frozen=True, array_like=True):
    """One episode of the exploring policy."""

    task: str
    success: bool | None
    """None where nobody has judged it: it took its steps, and says nothing of success."""
    steps: int
    hours: float
    """From the start of the first training episode to the end of this one, less the pauses of the trainer's clock."""


class HeldOut(Struct, frozen=True):
    """The evaluations of both versions under a variant, such as instructions that were never trained on."""

    variant: str
    before: Evaluation | None
    after: Evaluation | None


class RunResults(Struct, frozen=True):
    """One run."""

    name: str
    """That of its directory, or of the file of its record: what it was called when it began may not be unique."""
    deployment: dict[str, Any]
    environment: Environment | None
    """None for a run that did not note it."""
    demos_per_task: int
    """Demonstrations of each task that the first version has learned from; 0 where it was made elsewhere."""
    first: VersionRow
    last: VersionRow | None
    """The version that `after` is of; None before post-training has made one."""
    versions: int
    before: Evaluation | None
    after: Evaluation | None
    """Evaluations on the goals that both were tried on."""
    held_out: tuple[HeldOut, ...]
    cost: Cost
    training: tuple[TrainingEpisode, ...]
    """In the order in which they were stored."""
    cameras: tuple[str, ...]
    """What the policy sees: name and size of each."""
    metrics: tuple[dict[str, Any], ...]
    """The trainer's lines."""
    unfinished: tuple[str, ...]
    """What is missing, in words."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.deployment["seed"])

    @property
    def goals(self) -> list[Goal]:
        """The goals of the evaluations."""
        found = self.after or self.before
        return [(trial.task, trial.seed) for trial in found.trials] if found else []

    @property
    def left_out(self) -> int:
        """Episodes of the evaluations that count for nothing: they broke off, or nobody has judged them."""
        return sum(e.overall.aborted + e.unjudged for e in (self.before, self.after) if e)


class Contestant(Struct, frozen=True):
    """A run with what does not learn but is shown beside it."""

    run: RunResults
    expert: Evaluation | None
    bound: KinematicBound | None


def read_run(path: Path) -> RunResults:
    """The results so far of the run in `path`. Raises `ResultsError` if it has no configuration or no version."""
    run = RunDir(path)
    if not run.config.exists():
        raise ResultsError(f"{path} is not a run: it has no {run.config.name}; `fieldtune up` makes one")
    deployment: dict[str, Any] = msgspec.json.decode(run.config.read_bytes())
    registry = Registry(run.registry)
    versions = registry.served()
    if not versions:
        raise ResultsError(f"{path} has no version yet: its demonstrations or its fine-tuning are not done")
    first = versions[0]
    before = load_evaluation(run, first.version)
    last, after, unfinished = _after(run, versions)
    if before is None:
        unfinished.insert(0, "the first version is not evaluated")
    for number, found in ({first.number: before} | ({last.number: after} if last else {})).items():
        if found is not None and (missing := left_out(found)):
            unfinished.append(f"left out of the evaluation of version {number}: episodes {missing}")
    if before is not None and after is not None:
        both = {(t.task, t.seed) for t in before.trials} & {(t.task, t.seed) for t in after.trials}
        if len(both) < max(len(before.trials), len(after.trials)):
            unfinished.append(
                f"the two versions were not evaluated on the same goals; the {len(both)} common ones count"
            )
        before, after = (on_goals(before, both), on_goals(after, both)) if both else (None, None)
    demonstrations: dict[str, int] = first.made.get("demonstrations", {})
    metrics = read_metrics(run.metrics)
    rows = training_rows(run)
    return RunResults(
        name=path.resolve().name,
        deployment=deployment,
        environment=load_environment(run),
        demos_per_task=max(demonstrations.values(), default=0),
        first=first,
        last=last,
        versions=len(versions),
        before=before,
        after=after,
        held_out=_held_out(run, first.version, last.version if last else None),
        cost=Cost(
            demos_hours=_demos_hours(run, demonstrations),
            sft_hours=_sft_hours(run, first),
            training_hours=metrics[-1]["minutes"] / 60 if metrics else None,
            env_steps=sum(row.steps for row in rows),
            episodes=len(rows),
            decisions=_decisions(rows, versions, metrics),
        ),
        training=tuple(
            TrainingEpisode(
                row.task, None if row.status == "unjudged" else row.status == "success", row.steps, round(hours, 6)
            )
            for row, hours in zip(rows, training_hours(rows, metrics), strict=True)
        ),
        cameras=_cameras(run, first.version),
        metrics=tuple(metrics),
        unfinished=tuple(unfinished),
    )


def on_goals(evaluation: Evaluation, goals: Iterable[Goal]) -> Evaluation:
    """The same evaluation on some of its goals only. What it left out it still leaves out."""
    wanted = set(goals)
    kept = [_Tried.of(trial) for trial in evaluation.trials if (trial.task, trial.seed) in wanted]
    found = summarise(
        kept,
        version=evaluation.version,
        horizon_steps=evaluation.horizon_steps,
        action=evaluation.action,
        confidence=evaluation.confidence,
    )
    return replace(
        found,
        overall=replace(found.overall, aborted=evaluation.overall.aborted),
        tasks={task: replace(own, aborted=evaluation.tasks[task].aborted) for task, own in found.tasks.items()},
        unjudged=evaluation.unjudged,
    )


def training_hours(rows: Sequence[EpisodeRow], metrics: Sequence[dict[str, Any]]) -> list[float]:
    """Hours from the start of the first training episode to the end of each, less the pauses of the trainer's clock."""
    if not rows:
        return []
    ends = np.array([row.ended_unix_s for row in rows])
    clock = np.array([(line["unix_s"], 60 * line["minutes"]) for line in metrics if "unix_s" in line])
    if len(clock):
        since = clock - clock[0]
        ends = ends - np.interp(ends, clock[:, 0], since[:, 0] - since[:, 1])
    return [float(hours) for hours in (ends - rows[0].started_unix_s) / 3600]


def made_in(version: VersionRow) -> str:
    """How the version was made, in a few words."""
    iteration = version.made.get("iteration")
    return str(version.made.get("command", "made elsewhere")) if iteration is None else f"iteration {iteration}"


class _Tried(Struct, frozen=True):
    """A trial as an episode's row."""

    task: str
    seed: int
    status: End
    steps: int

    @classmethod
    def of(cls, trial: Trial) -> _Tried:
        return cls(trial.task, trial.seed, "success" if trial.success else "timeout", trial.steps)


def _after(run: RunDir, versions: list[VersionRow]) -> tuple[VersionRow | None, Evaluation | None, list[str]]:
    """The live version if it was evaluated, else the newest one that was; and what is missing."""
    live = next((row for row in versions if row.live), versions[-1])
    if len(versions) == 1:
        return None, None, ["post-training has not made a version yet"]
    if live.number == versions[0].number:
        # What post-training has come to is what it began with: left out, it would make the mean better than it is.
        return (
            live,
            load_evaluation(run, live.version),
            ["it was rolled back to its first version, which counts as both"],
        )
    for row in [live, *reversed(versions[1:])]:
        if (found := load_evaluation(run, row.version)) is not None:
            behind = (
                "" if row is live else f"the live version is number {live.number}, the newest evaluated {row.number}"
            )
            return row, found, [behind] if behind else []
    return live, None, [f"no version after the first is evaluated yet (live: number {live.number})"]


def _held_out(run: RunDir, first: str, last: str | None) -> tuple[HeldOut, ...]:
    """Evaluations in directories that are named as a version with something behind it."""
    found: dict[str, dict[str, Evaluation]] = defaultdict(dict)
    for version in (first, last):
        directory = run.evaluation(version) if version else None
        for other in sorted(directory.parent.glob(f"{directory.name}-*")) if directory else ():
            variant = other.name.removeprefix(f"{version}-")
            if (result := load_evaluation(run, str(version), variant)) is not None:
                found[variant][str(version)] = result
    return tuple(
        HeldOut(variant, own.get(first), own.get(last) if last else None) for variant, own in sorted(found.items())
    )


def _cameras(run: RunDir, version: str) -> tuple[str, ...]:
    directory = run.policies / version
    if not directory.exists():
        return ()
    cameras = read_bundle(directory).spec.cameras
    return tuple(f"{camera.name}, {camera.width} x {camera.height} px" for camera in cameras)


def _demos_hours(run: RunDir, demonstrations: dict[str, int]) -> float | None:
    """Time during which one of them or several side by side were made."""
    if not run.demos.exists() or not demonstrations:
        return None
    rows = [row for row in EpisodeIndex(run.demos).after(0, limit=10**9) if row.source == "expert"]
    by_task: dict[str, list[EpisodeRow]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    used = [row for task, count in demonstrations.items() for row in by_task[task][:count]]
    seconds = through_s = 0.0
    for row in sorted(used, key=lambda row: row.started_unix_s):
        seconds += max(0.0, row.ended_unix_s - max(through_s, row.started_unix_s))
        through_s = max(through_s, row.ended_unix_s)
    return seconds / 3600


def _sft_hours(run: RunDir, first: VersionRow) -> float | None:
    """From the rate that each line of its metrics has."""
    batch = first.made.get("settings", {}).get("batch")
    lines = read_metrics(run.sft / "metrics.jsonl")
    if batch is None or not lines:
        return None
    steps = np.diff([0, *(line["step"] for line in lines)])
    return float(np.sum(steps * batch / np.array([line["samples_per_s"] for line in lines]))) / 3600


def _decisions(rows: list[EpisodeRow], versions: list[VersionRow], metrics: list[dict[str, Any]]) -> int:
    """Of the episodes up to the last one that a version was made from, less what was too old to learn from and what
    waits for somebody to judge it.
    """
    taken = max((int(row.made["episodes_seq"][1]) for row in versions if "episodes_seq" in row.made), default=0)
    dropped: int = sum(line.get("dropped_stale", 0) for line in metrics)
    learned = sum(row.decisions for row in rows if row.seq <= taken and row.status != "unjudged")
    return max(0, learned - dropped)
