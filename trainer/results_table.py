"""The headline table of the results: SFT against post-trained over several seeds, against the goals that were set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bridge.backends.metaworld_tasks import MT10
from trainer.results_data import Contestant
from trainer.statistics import Evaluation, Interval, Result, ratio_interval, t_interval

PAPER_RATIO = 0.63
"""42.17 / 66.62 steps, post-trained against SFT (arXiv 2509.25718)."""


class Figure(Struct, frozen=True):
    """A mean over seeds with its 95 % interval: Student's over seeds, with a single seed that within it."""

    mean: float
    interval: Interval | None
    seeds: int


class Line(Struct, frozen=True):
    """One line of the table. `sft` and `post` are None where a run does not say (yet)."""

    name: str
    unit: str
    """How the figures are written: `share`, `steps`, `ratio` or `hours`."""
    sft: Figure | None
    post: Figure | None
    goal: float | None = None
    stretch: float | None = None
    at_least: bool = False
    """Whether the goal is reached from below."""
    sft_note: str = ""
    post_note: str = ""


def headline(group: Sequence[Contestant]) -> list[Line]:
    """The table of the runs of one set of demonstrations. Goals are those of MT10; other tasks have none."""
    evaluations = [found for run in group for found in (run.run.before, run.run.after) if found]
    bound = bound_mean(group[0]) if group else None
    lines = [
        _line(group, "success, mean of the tasks", "share", _success, 0.93, stretch=0.98, at_least=True),
        _line(group, "steps over successes", "steps", _steps, 48.0, stretch=1.05 * bound if bound else None),
        _ratio_line(group),
        _line(group, "steps, failures counted at the horizon", "steps", _steps_all, 58.0),
        replace(
            _line(group, "worst task's success", "share", _worst_success, 0.80, at_least=True),
            sft_note=_worst_tasks(run.run.before for run in group),
            post_note=_worst_tasks(run.run.after for run in group),
        ),
        Line(
            "wall-clock of one seed",
            "hours",
            _figure([_spent(run.run.cost.demos_hours, run.run.cost.sft_hours) for run in group], [None]),
            _figure([run.run.cost.hours for run in group], [None]),
            goal=3.0,
        ),
    ]
    if {task for evaluation in evaluations for task in evaluation.tasks} == set(MT10):
        return lines
    return [replace(line, goal=None, stretch=None) for line in lines]


def over_seeds(group: Sequence[Contestant], side: str, measure: Measure) -> Figure | None:
    """`measure` of the evaluation `before` or `after` of every run that has it."""
    found = [measure(e) for run in group if (e := getattr(run.run, side)) is not None]
    return _figure([value for value, _ in found], [interval for _, interval in found])


def verdict(line: Line) -> str:
    """Whether the mean reaches the goal, in a word or two."""
    if line.goal is None or line.post is None:
        return ""

    def reached(goal: float) -> bool:
        assert line.post is not None
        return line.post.mean >= goal if line.at_least else line.post.mean <= goal

    if line.stretch is not None and reached(line.stretch):
        return "met, stretch too"
    return "met" if reached(line.goal) else "missed"


def bound_mean(run: Contestant, task: str | None = None) -> float | None:
    """Mean kinematic bound over the goals of a task, or over all."""
    steps = [goal.steps for goal in (run.bound.goals if run.bound else ()) if task in (None, goal.task)]
    return float(np.mean(steps)) if steps else None


Measure = Callable[[Evaluation], tuple[float | None, Interval | None]]


def _line(
    group: Sequence[Contestant],
    name: str,
    unit: str,
    measure: Measure,
    goal: float,
    *,
    stretch: float | None = None,
    at_least: bool = False,
) -> Line:
    sides = (over_seeds(group, "before", measure), over_seeds(group, "after", measure))
    return Line(name, unit, *sides, goal, stretch, at_least)


def _success(evaluation: Evaluation) -> tuple[float | None, Interval | None]:
    """The mean over tasks; they have equally many episodes, so Wilson's interval of all together goes with it."""
    rates = [result.success for result in evaluation.tasks.values() if result.n]
    return (float(np.mean(rates)) if rates else None), evaluation.overall.success_interval


def _steps(evaluation: Evaluation) -> tuple[float | None, Interval | None]:
    return evaluation.overall.steps, evaluation.overall.steps_interval


def _steps_all(evaluation: Evaluation) -> tuple[float | None, Interval | None]:
    return evaluation.overall.steps_all, evaluation.overall.steps_all_interval


def _worst(evaluation: Evaluation) -> tuple[str, Result | None]:
    tried = [(task, result) for task, result in evaluation.tasks.items() if result.n]
    return min(tried, key=lambda pair: pair[1].success) if tried else ("", None)


def _worst_success(evaluation: Evaluation) -> tuple[float | None, Interval | None]:
    _, result = _worst(evaluation)
    return (result.success, result.success_interval) if result else (None, None)


def _worst_tasks(evaluations: Iterable[Evaluation | None]) -> str:
    """The worst task of each, once."""
    tasks = [_worst(evaluation)[0] for evaluation in evaluations if evaluation]
    return ", ".join(dict.fromkeys(task.removesuffix("-v3") for task in tasks if task))


def _ratio_line(group: Sequence[Contestant]) -> Line:
    ratios: list[float | None] = []
    intervals: list[Interval | None] = []
    for before, after in ((run.run.before, run.run.after) for run in group):
        if before and after and before.overall.steps and after.overall.steps:
            ratios.append(after.overall.steps / before.overall.steps)
            intervals.append(ratio_interval(_step_groups(after), _step_groups(before)) if len(group) == 1 else None)
    return Line("steps over successes against SFT", "ratio", None, _figure(ratios, intervals), PAPER_RATIO)


def _step_groups(evaluation: Evaluation) -> list[list[int | None]]:
    trials = evaluation.trials
    return [[t.steps if t.success else None for t in trials if t.task == task] for task in evaluation.tasks]


def _figure(values: Sequence[float | None], within: Sequence[Interval | None]) -> Figure | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Figure(float(np.mean(known)), t_interval(known) if len(known) > 1 else within[0], len(known))


def _spent(*hours: float | None) -> float | None:
    known = [part for part in hours if part is not None]
    return sum(known) if len(known) == len(hours) else None
