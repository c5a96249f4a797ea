"""The pictures of the results: curves of the exploring policy, overall and by task, the weight and the buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter
from msgspec import Struct

from trainer.results_data import Contestant, RunResults, TrainingEpisode
from trainer.results_table import bound_mean
from trainer.statistics import Evaluation, mean_interval, wilson

COLOURS = ("#3d7fd9", "#c2528b", "#2a9d6f", "#8a6fd1", "#d9822b")
EXPERT, BOUND = "#808890", "#b03030"
OVERALL_WINDOWS, TASK_WINDOWS = 40, 16
DPI = 150
Kind = Literal["success", "steps"]
Axis = Literal["steps", "hours"]


class Window(Struct, frozen=True):
    """Some consecutive episodes: where they end, and their figure with its 95 % interval."""

    x: float
    y: float
    low: float
    high: float


def windows(episodes: Sequence[TrainingEpisode], x: Sequence[float], kind: Kind, count: int) -> list[Window]:
    """The figure of up to `count` equal stretches of the episodes: success (Wilson) or mean steps of the successes
    (bootstrap). `x[i]` is where episode i ends. A stretch has ten episodes or more; one without success has no steps.
    Episodes that nobody has judged are in no stretch.
    """
    judged = [(episode, at) for episode, at in zip(episodes, x, strict=True) if episode.success is not None]
    size = max(10, -(-len(judged) // count))
    found = []
    for start in range(0, len(judged) - size + 1, size):
        part = judged[start : start + size]
        steps = [episode.steps if episode.success else None for episode, _ in part]
        won = sum(episode.success is True for episode, _ in part)
        end = part[-1][1]
        if kind == "success":
            found.append(Window(end, won / size, *wilson(won, size)))
        elif won:
            mean, interval = mean_interval([steps])
            assert mean is not None
            found.append(Window(end, mean, *(interval or (mean, mean))))
    return found


def draw(group: Sequence[Contestant], directory: Path, stem: str) -> dict[str, Path]:
    """Write the pictures of the runs of one set of demonstrations into `directory`; returns caption -> file."""
    runs = [contestant.run for contestant in group if contestant.run.training]
    if not runs:
        return {}
    tasks = list(dict.fromkeys(episode.task for run in runs for episode in run.training))
    beside = "Grey: the scripted expert" + (", red: the kinematic bound." if group[0].bound else ".")
    pictures: list[tuple[str, str, Figure]] = [
        (
            "curves",
            f"The exploring policy while it learns, with 95 % intervals of each stretch. {beside}",
            _curves(group),
        )
    ]
    if len(tasks) > 1:
        for kind, by in itertools.product(_KINDS, _AXES):
            what = f"{_KINDS[kind].capitalize()} while exploring, by task, against {_AXES[by]}. {beside}"
            pictures.append((f"{kind}-by-task-{by}", what, _by_task(group, tasks, kind, by)))
    learned = [run for run in runs if run.metrics]
    if learned:
        pictures.append(
            ("weight", "The weight of PPO against cloning, and what it is computed from.", _weight(learned))
        )
        if any("buffer_steps_by_task" in line for run in learned for line in run.metrics):
            pictures.append(("buffer", "Mean length of the buffered demonstrations, by task.", _buffer(learned, tasks)))
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, caption, figure in pictures:
        files[caption] = directory / f"{stem}-{name}.png"
        FigureCanvasAgg(figure)
        figure.savefig(files[caption], dpi=DPI, facecolor="white")
    return files


def _curves(group: Sequence[Contestant]) -> Figure:
    figure, axes = _grid(2, 2, (9.2, 5.8))
    for (row, kind), (column, by) in itertools.product(enumerate(_KINDS), enumerate(_AXES)):
        panel = axes[row][column]
        for contestant, colour in zip(group, itertools.cycle(COLOURS), strict=False):
            run = contestant.run
            x = _position(run, by)
            if x:
                _band(panel, windows(run.training, x, kind, OVERALL_WINDOWS), colour, f"seed {run.seed}")
        _references(panel, group[0], kind, None)
        _label(panel, kind, by)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _by_task(group: Sequence[Contestant], tasks: Sequence[str], kind: Kind, by: Axis) -> Figure:
    columns = min(5, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = _grid(lines, columns, (2.6 * columns, 2.3 * lines))
    panels = list(itertools.chain.from_iterable(axes))
    for panel, task in itertools.zip_longest(panels, tasks):
        if task is None:
            panel.set_visible(False)
            continue
        for contestant, colour in zip(group, itertools.cycle(COLOURS), strict=False):
            run = contestant.run
            own = [pair for pair in zip(run.training, _position(run, by), strict=True) if pair[0].task == task]
            found = windows([episode for episode, _ in own], [x for _, x in own], kind, TASK_WINDOWS)
            _band(panel, found, colour, f"seed {run.seed}")
        _references(panel, group[0], kind, task)
        panel.set_title(task.removesuffix("-v3"), fontsize=9, loc="left")
        _label(panel, kind, by, small=True)
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel(_AXES[by], fontsize=9)
    figure.supylabel(_KINDS[kind], fontsize=9)
    return figure


def _weight(runs: Sequence[RunResults]) -> Figure:
    """Left w, right the four factors of it; competence is the mean over tasks."""
    factors: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("w(t), mean over tasks", lambda line: line["weight"]),
        ("ramp", lambda line: line["weight_inputs"]["ramp"]),
        ("critic", lambda line: line["weight_inputs"]["critic"]),
        ("brake (KL)", lambda line: line["weight_inputs"]["brake"]),
        ("competence, mean over tasks", lambda line: _mean(line["weight_inputs"]["competence"])),
        ("success, mean over tasks", lambda line: _mean(line["weight_inputs"]["success"])),
    )
    figure, axes = _grid(2, 3, (9.2, 4.8))
    for panel, (name, factor) in zip(itertools.chain.from_iterable(axes), factors, strict=True):
        for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            lines = [line for line in run.metrics if "weight_inputs" in line]
            x = [line["env_steps"] for line in lines]
            panel.plot(x, [factor(line) for line in lines], color=colour, linewidth=1.5, label=f"seed {run.seed}")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_ylim(-0.03, 1.05)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("environment steps learned from", fontsize=9)
    return figure


def _buffer(runs: Sequence[RunResults], tasks: Sequence[str]) -> Figure:
    columns = min(5, len(tasks))
    lines_of_panels = -(-len(tasks) // columns)
    figure, axes = _grid(lines_of_panels, columns, (max(4.6, 2.6 * columns), 2.3 * lines_of_panels))
    panels = list(itertools.chain.from_iterable(axes))
    for panel, task in itertools.zip_longest(panels, tasks):
        if task is None:
            panel.set_visible(False)
            continue
        for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            steps = [(line["env_steps"], line.get("buffer_steps_by_task", {}).get(task)) for line in run.metrics]
            known = [(x, y) for x, y in steps if y is not None]
            panel.plot(
                [x for x, _ in known], [y for _, y in known], color=colour, linewidth=1.5, label=f"seed {run.seed}"
            )
        panel.set_title(task.removesuffix("-v3"), fontsize=9, loc="left")
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("environment steps learned from", fontsize=9)
    figure.supylabel("mean steps of an episode", fontsize=9)
    return figure


_KINDS: dict[Kind, str] = {"success": "success", "steps": "steps over successes"}
_AXES: dict[Axis, str] = {"steps": "environment steps", "hours": "hours of post-training"}


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = [
            [figure.add_subplot(rows, columns, row * columns + column + 1) for column in range(columns)]
            for row in range(rows)
        ]
    for panel in itertools.chain.from_iterable(axes):
        panel.grid(axis="y", color="#808890", alpha=0.22, linewidth=0.7)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def _label(panel: Axes, kind: Kind, by: Axis, *, small: bool = False) -> None:
    if kind == "success":
        panel.set_ylim(-0.02, 1.03)
    else:
        panel.set_ylim(bottom=0)
    if not small:
        panel.set_ylabel(_KINDS[kind])
        panel.set_xlabel(_AXES[by])
    panel.set_xlim(left=0)
    if by == "hours":
        panel.xaxis.set_major_formatter(ScalarFormatter())


def _band(panel: Axes, found: Sequence[Window], colour: str, label: str) -> None:
    x = [window.x for window in found]
    panel.plot(x, [window.y for window in found], color=colour, linewidth=1.5, marker=".", markersize=3, label=label)
    panel.fill_between(x, [w.low for w in found], [w.high for w in found], color=colour, alpha=0.18, linewidth=0)


def _references(panel: Axes, contestant: Contestant, kind: Kind, task: str | None) -> None:
    expert: Evaluation | None = contestant.expert
    result = expert and (expert.overall if task is None else expert.tasks.get(task))
    level = None if not result else result.success if kind == "success" else result.steps
    if level is not None:
        panel.axhline(level, color=EXPERT, linewidth=1, linestyle="--")
    bound = bound_mean(contestant, task) if kind == "steps" else None
    if bound is not None:
        panel.axhline(bound, color=BOUND, linewidth=1, linestyle=":")


def _position(run: RunResults, by: Axis) -> list[float]:
    """Environment steps, or hours, at the end of each training episode."""
    if by == "hours":
        return [episode.hours for episode in run.training]
    return [float(steps) for steps in itertools.accumulate(episode.steps for episode in run.training)]


def _mean(by_task: dict[str, float]) -> float:
    return sum(by_task.values()) / max(1, len(by_task))
