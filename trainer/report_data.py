"""The figures of a report, gathered from the logs of a run.

Nothing is measured here: evaluations are given, training success comes from the episode index, the rest from the
trainer's metrics. Keys that the metrics lack are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from runtime.index import EpisodeIndex, EpisodeRow
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.attempts import DEMOS_CLIENT
from trainer.environment import load_environment, this_environment
from trainer.report_plots import Line, Plot, Point
from trainer.statistics import Comparison, Evaluation, Result, StatisticsError, compare, wilson

FORMAT = 1
MAX_POINTS = 300
# Series of the trainer's metrics: name, title, unit, keys with their labels, lower end, upper end, log scale.
METRIC_PLOTS: tuple[tuple[str, str, str, dict[str, str], float | None, float | None, bool], ...] = (
    ("weight", "Weight of PPO against cloning", "w(t)", {"weight": ""}, 0.0, 1.0, False),
    ("buffer_steps", "Length of buffered demonstrations", "mean steps", {"buffer_steps": ""}, None, None, False),
    ("buffer_episodes", "Episodes in the buffer", "episodes", {"buffer_episodes": ""}, 0.0, None, False),
    ("kl", "KL of an update", "nats a decision", {"kl": ""}, 0.0, None, False),
    ("policy_loss", "PPO loss", "loss", {"policy_loss": ""}, None, None, False),
    ("cloning_loss", "Cloning loss", "negative log-prob an action", {"cloning_loss": ""}, None, None, False),
    ("value_loss", "Value loss", "squared error", {"value_loss": ""}, None, None, True),
    ("explained_variance", "Explained variance of the critic", "share", {"explained_variance": ""}, None, 1.0, False),
    ("ratio_error", "Gap of logged and recomputed log-probs", "nats", {"ratio_error": ""}, None, None, True),
)


class Seeds(Struct, frozen=True):
    """Which seeds were used for what."""

    run: int | None
    training_first: int | None
    training_count: int | None
    evaluation: tuple[int, ...]


class Report(Struct, frozen=True):
    """Content of report.json."""

    format: int
    name: str
    written_unix_s: float
    tasks: tuple[str, ...]
    seeds: Seeds
    before: Evaluation
    after: Evaluation
    comparison: Comparison | None
    """None where the evaluations share no goals; `note` says so then."""
    note: str
    expert: Result | None
    """The scripted expert over the seeds of the demonstrations; None without demonstrations."""
    versions: dict[str, int]
    """Every version of the registry with its number there."""
    env_steps: int
    """Environment steps of all training episodes that ran to their end."""
    episodes: int
    minutes: float | None
    """Wall-clock minutes of training; None if the metrics do not say."""
    plots: list[Plot]
    libraries: dict[str, str]
    computer: dict[str, str]
    deployment: dict[str, Any]


def gather(run: RunDir, deployment: dict[str, Any], before: Evaluation, after: Evaluation) -> Report:
    """All figures of the report; `deployment` is the resolved configuration."""
    rows = training_rows(run)
    metrics = read_metrics(run.metrics)
    comparison, note = _comparison(before, after)
    environment = load_environment(run) or this_environment()
    trainer = deployment.get("trainer", {})
    versions = {row.version: row.number for row in Registry(run.registry).list()} if run.registry.exists() else {}
    return Report(
        format=FORMAT,
        name=str(deployment.get("name", run.path.name)),
        written_unix_s=time.time(),
        tasks=tuple(dict.fromkeys([*before.tasks, *after.tasks])),
        seeds=Seeds(deployment.get("seed"), trainer.get("train_first_seed"), trainer.get("train_seeds"), after.seeds),
        before=before,
        after=after,
        comparison=comparison,
        note=note,
        expert=_expert(run, before.horizon_steps, trainer.get("demos", {}).get("first_seed", 0)),
        versions=versions,
        env_steps=sum(row.steps for row in rows),
        episodes=len(rows),
        minutes=next((line["minutes"] for line in reversed(metrics) if _number(line.get("minutes"))), None),
        plots=[*_training_plots(rows, before, after), *_metric_plots(metrics)],
        libraries=environment.libraries,
        computer=environment.computer,
        deployment=deployment,
    )


def rolling_mean(x: list[float], y: list[float], window: int) -> tuple[list[float], list[float]]:
    """Mean of the last `window` values of y at each x from the first full window on, thinned to 300 points."""
    if len(y) < window:
        return [], []
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(y, np.float64))])
    means = (sums[window:] - sums[:-window]) / window
    at = np.unique(np.linspace(0, len(means) - 1, min(MAX_POINTS, len(means))).round().astype(int))
    return [float(x[window - 1 + i]) for i in at], [float(means[i]) for i in at]


def training_rows(run: RunDir) -> list[EpisodeRow]:
    """Training episodes that ran to their end, in the order in which they were stored."""
    if not run.episodes.exists():
        return []
    rows = EpisodeIndex(run.episodes).after(0, limit=10**9)
    return [row for row in rows if row.explore and row.source == "policy" and row.status != "aborted"]


def _training_plots(rows: list[EpisodeRow], before: Evaluation, after: Evaluation) -> list[Plot]:
    """Success and steps to success while training, with the two evaluations at the ends.

    Episodes that nobody has judged took their steps, and are in neither curve.
    """
    x = [float(step) for step in itertools.accumulate(row.steps for row in rows)]
    judged = [(at, row.status == "success") for at, row in zip(x, rows, strict=True) if row.status != "unjudged"]
    window = max(10, min(200, len(judged) // 8))
    success_x, success_y = rolling_mean([at for at, _ in judged], [float(success) for _, success in judged], window)
    won = [(at, float(row.steps)) for at, row in zip(x, rows, strict=True) if row.status == "success"]
    steps_x, steps_y = rolling_mean([at for at, _ in won], [steps for _, steps in won], window)
    first_seen: dict[str, float] = {}
    for at, row in zip(x, rows, strict=True):
        for version in row.versions:
            first_seen.setdefault(version, at)
    marks = list(first_seen.values())
    end = x[-1] if x else 1.0
    ends = ((before, "before", 0.0), (after, "after", end))
    caption = f"Line: mean of the last {window} {{}} while exploring. Dots: the evaluations, with 95 % intervals."
    waiting = (
        f" {len(rows) - len(judged)} episodes that nobody has judged are left out." if len(judged) < len(rows) else ""
    )
    ticks = " Ticks: a new version takes over." if marks else ""
    return [
        Plot(
            name="success",
            title="Success",
            caption=caption.format("episodes") + waiting + ticks,
            unit="share of episodes",
            lines=[Line(label="training", x=success_x, y=success_y)] if success_x else [],
            points=[
                Point(label=label, x=at, y=e.overall.success, **_ends(e.overall.success_interval))
                for e, label, at in ends
                if e.overall.n
            ],
            marks=marks,
            y_low=0.0,
            y_high=1.03,
        ),
        Plot(
            name="steps_to_success",
            title="Steps to success",
            caption=caption.format("successes") + ticks,
            unit="steps",
            lines=[Line(label="training", x=steps_x, y=steps_y)] if steps_x else [],
            points=[
                Point(label=label, x=at, y=e.overall.steps, **_ends(e.overall.steps_interval))
                for e, label, at in ends
                if e.overall.steps is not None
            ],
            marks=marks,
        ),
    ]


def _metric_plots(metrics: list[dict[str, Any]]) -> list[Plot]:
    plots = []
    for name, title, unit, keys, low, high, log in METRIC_PLOTS:
        lines = []
        for key, label in keys.items():
            points = [(m["env_steps"], m[key]) for m in metrics if _number(m.get("env_steps")) and _number(m.get(key))]
            if len(points) > 1:
                lines.append(Line(label=label, x=[float(x) for x, _ in points], y=[float(y) for _, y in points]))
        if lines:
            plots.append(
                Plot(name=name, title=title, caption="", unit=unit, lines=lines, y_low=low, y_high=high, log=log)
            )
    return plots


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The trainer's lines; a torn last one is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _comparison(before: Evaluation, after: Evaluation) -> tuple[Comparison | None, str]:
    try:
        return compare(before, after), ""
    except StatisticsError as error:
        return None, str(error)


def _expert(run: RunDir, horizon_steps: int, first_seed: int) -> Result | None:
    """What the demonstrations say of the scripted expert: failed attempts are the seeds from `first_seed` on that were
    passed over. None where there is none, or where the demonstrations were imported: nobody knows what failed there.
    """
    if not run.demos.exists():
        return None
    rows = [row for row in EpisodeIndex(run.demos).after(0, limit=10**9) if row.status == "success"]
    rows = [row for row in rows if row.seed >= first_seed]
    if not rows or any(row.client != DEMOS_CLIENT for row in rows):
        return None
    by_task: dict[str, list[EpisodeRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    n = sum(max(r.seed for r in own) - first_seed + 1 for own in by_task.values())
    steps = sum(row.steps for row in rows)
    return Result(
        n=n,
        successes=len(rows),
        success=len(rows) / n,
        success_interval=wilson(len(rows), n),
        steps=steps / len(rows),
        steps_interval=None,
        steps_all=(steps + horizon_steps * (n - len(rows))) / n,
        steps_all_interval=None,
        aborted=0,
    )


def _ends(interval: tuple[float, float] | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if interval is None else {"low": interval[0], "high": interval[1]}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
