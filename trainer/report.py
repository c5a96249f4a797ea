"""The report of a run, from its own logs: report.json holds every figure, report.html shows the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.durable import write_atomic
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import read_episode
from runtime.rundir import RunDir
from trainer.report_data import gather
from trainer.report_page import Strip, render
from trainer.report_plots import draw
from trainer.statistics import Evaluation

STRIPS = 3
STRIP_FRAMES = 7


def write_report(run: RunDir, deployment: dict[str, Any], before: Evaluation, after: Evaluation) -> Path:
    """Write `report.json`, `report.html` and `plots/NAME.png` into the run; returns the path of the page.

    `deployment` is the resolved configuration. The page is one file without scripts that needs no network.
    """
    report = gather(run, deployment, before, after)
    drawn = {plot.name: draw(plot, run.path / "plots") for plot in report.plots}
    page = run.path / "report.html"
    write_atomic(run.path / "report.json", msgspec.json.format(msgspec.json.encode(report)))
    write_atomic(page, render(report, drawn, _strips(run, before, after)).encode())
    return page


def _strips(run: RunDir, before: Evaluation, after: Evaluation) -> list[Strip]:
    """For some tasks one goal, before above after, at the same steps: the goal whose change of steps is the median."""
    old, new = (_evaluated(run, evaluation) for evaluation in (before, after))
    strips: list[Strip] = []
    for task in after.tasks:
        both = [goal for goal in old if goal in new and goal[0] == task]
        won = [goal for goal in both if old[goal].status == new[goal].status == "success"]
        if not both or len(strips) == STRIPS:
            continue
        goals = sorted(won or both, key=lambda goal: (new[goal].steps - old[goal].steps, goal))
        goal = goals[len(goals) // 2]
        last = max(old[goal].steps, new[goal].steps)
        at = [round(last * i / (STRIP_FRAMES - 1)) for i in range(STRIP_FRAMES)]
        rows = []
        for label, evaluation, row in (("before", before, old[goal]), ("after", after, new[goal])):
            frames = _frames(EpisodeIndex(run.evaluation(evaluation.version)).path(row), at)
            rows.append((f"{label}: {row.status} after {row.steps} steps", frames))
        if all(frames for _, frames in rows):
            strips.append(Strip(task, goal[1], rows))
    return strips


def _evaluated(run: RunDir, evaluation: Evaluation) -> dict[tuple[str, int], EpisodeRow]:
    """Rows of the evaluation's own log that still have their file, by goal."""
    directory = run.evaluation(evaluation.version)
    if not directory.exists():
        return {}
    index = EpisodeIndex(directory)
    rows = [row for row in index.after(0, limit=10**9) if row.status != "aborted" and index.path(row).exists()]
    return {(row.task, row.seed): row for row in reversed(rows)}


def _frames(path: Path, at: list[int]) -> list[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """The first camera at these steps (the newest image by then), until the end is reached; empty without cameras."""
    episode = read_episode(path)
    if not episode.start.spec.cameras:
        return []
    camera = episode.start.spec.cameras[0].name
    seen = [(decision.step, decision.observation.images[camera]) for decision in episode.decisions]
    if episode.final is not None:
        seen.append((episode.steps, episode.final.images[camera]))
    frames = []
    for step in at:
        shown, image = max((pair for pair in seen if pair[0] <= step), key=lambda pair: pair[0])
        frames.append((f"step {shown}", image))
        if shown == episode.steps:
            break
    return frames
