"""The results of several runs as one page of Markdown. Every figure on it comes from the runs' logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bridge.backends.metaworld_tasks import DIFFICULTY, MT50
from trainer.results_data import Contestant, HeldOut, RunResults, made_in
from trainer.results_table import Figure, Line, bound_mean, headline, verdict
from trainer.statistics import Evaluation, Interval, Result, Trial, result_of

Group = Sequence[Contestant]
UNITS: dict[str, Callable[[float], str]] = {
    "share": "{:.3f}".format,
    "steps": "{:.1f}".format,
    "ratio": "{:.2f}".format,
    "hours": "{:.2f} h".format,
}


def render(groups: Mapping[str, Group], pictures: Mapping[str, Mapping[str, str]], records: Sequence[str]) -> str:
    """The page; `groups` are runs by their title, `pictures` for each title the path of each picture by its caption,
    `records` the paths of what the page was made from.
    """
    runs = [run for group in groups.values() for run in group]
    parts = [
        "# Results",
        f"Written {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC by `fieldtune report` from the logs of "
        f"{', '.join(f'`{run.run.name}`' for run in runs)}.",
        _protocol(runs),
        _unfinished(runs),
    ]
    for title, group in groups.items():
        parts += [f"## {title}", _headline(group), _by_difficulty(group), _by_task(group)]
        parts += [_held_out(group), _seeds(group)]
        parts += [
            f"![{PurePosixPath(path).stem}]({path})\n\n*{caption}*" for caption, path in pictures.get(title, {}).items()
        ]
    parts += ["## The kinematic bound", _bound(runs), "## What ran", _facts(runs), _records(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _protocol(runs: Group) -> str:
    evaluations = [e for run in runs for e in (run.run.after, run.run.before) if e]
    found = next((e for e in evaluations if e.trials), None)
    if found is None:
        return f"No {'episode of an evaluation has been judged' if evaluations else 'run has been evaluated'} yet."
    cameras = runs[0].run.cameras
    sees = f"{len(cameras)} camera{'s' * (len(cameras) != 1)} ({'; '.join(cameras)})" if cameras else "no camera"
    per_task = " or ".join(map(str, sorted({result.n for result in found.tasks.values()})))
    return (
        f"The policy sees {sees}, proprioception and the instruction. Evaluation: {len(found.tasks)} "
        f"task{'s' * (len(found.tasks) != 1)}, {per_task} episodes each, on goals from seeds {found.seeds[0]} to "
        f"{found.seeds[-1]}, which training never drew; {found.action} action, "
        f"at most {found.horizon_steps} steps, the episode ends at success. SFT"
        f"{', post-trained and the scripted expert' if any(run.expert for run in runs) else ' and post-trained'} "
        "were tried on the same goals."
    )


def _unfinished(runs: Group) -> str:
    notes = [f"- `{run.run.name}`: {note}" for run in runs for note in run.run.unfinished]
    return "**Unfinished or incomplete:**\n\n" + "\n".join(notes) if notes else ""


def _headline(group: Group) -> str:
    lines = headline(group)
    seeds = len(group)
    rows = []
    for line in lines:
        sides = ((line.sft, line.sft_note), (line.post, line.post_note))
        figures = [_value(figure, line.unit, seeds) + (f", {note}" if note else "") for figure, note in sides]
        rows.append([line.name, *figures, _goal(line), verdict(line)])
    intervals = (
        f"Mean over {seeds} seeds; in brackets Student's 95 % interval of that mean."
        if seeds > 1
        else "One seed (n = 1): in brackets the 95 % interval within it, Wilson's for success, bootstrap over goals "
        "for steps, which says nothing of how seeds differ."
    )
    bound = bound_mean(group[0])
    stretch = (
        f" The stretch goal of steps is 1.05 times the kinematic bound, {bound:.1f}." if bound and lines[0].goal else ""
    )
    return (
        _markdown(["", "SFT", "post-trained", "goal", ""], rows)
        + f"\n\n{intervals} A goal counts as met if the mean reaches it. Wall-clock: demonstrations, SFT and, on the "
        f"right, post-training; evaluations are not counted.{stretch}"
    )


def _goal(line: Line) -> str:
    if line.goal is None:
        return ""
    sign, text = (">=" if line.at_least else "<="), UNITS[line.unit]
    stretch = f" (stretch {text(line.stretch)})" if line.stretch is not None else ""
    return f"{sign} {text(line.goal)}{stretch}"


def _value(figure: Figure | None, unit: str, seeds: int) -> str:
    """The figure with its interval; where not all `seeds` have it, the interval of one is not that of the mean."""
    if figure is None:
        return "-"
    interval = figure.interval if figure.seeds == seeds or figure.seeds > 1 else None
    if unit == "share" and interval is not None:
        interval = (max(0.0, interval[0]), min(1.0, interval[1]))  # Student's knows nothing of the ends
    some = "" if figure.seeds == seeds else f" ({figure.seeds} of {seeds} seeds)"
    return UNITS[unit](figure.mean) + _interval(interval, UNITS[unit]) + some


def _interval(interval: Interval | None, text: Callable[[float], str]) -> str:
    return "" if interval is None else f" [{text(interval[0])}, {text(interval[1])}]".replace(" h", "")


def _by_task(group: Group) -> str:
    tasks = list(dict.fromkeys(task for run in group for e in (run.run.before, run.run.after) if e for task in e.tasks))
    if not tasks:
        return ""
    expert = group[0].expert
    columns = [
        ("SFT", [run.run.before for run in group if run.run.before]),
        ("post-trained", [run.run.after for run in group if run.run.after]),
        ("expert", [expert] if expert else []),
    ]
    kinds: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
        (
            "Success",
            "Wilson 95 %",
            _success,
        ),
        ("Steps over successes", "bootstrap 95 %", lambda r: _steps(r.steps, r.steps_interval)),
        ("Steps, failures at the horizon", "bootstrap 95 %", lambda r: _steps(r.steps_all, r.steps_all_interval)),
    )
    parts = []
    for title, how, text in kinds:
        with_bound = title == "Steps over successes" and group[0].bound is not None
        rows = []
        for task in [*tasks, None] if len(tasks) > 1 else tasks:
            pooled = [_pooled(evaluations, [task] if task else tasks) for _, evaluations in columns]
            row = [task or "**overall**", *(text(result) if result and result.n else "-" for result in pooled)]
            bound = bound_mean(group[0], task)
            rows.append([*row, *(["-" if bound is None else f"{bound:.1f}"] if with_bound else [])])
        header = ["task", *(name for name, _ in columns), *(["kinematic bound"] if with_bound else [])]
        parts.append(f"### {title}, by task\n\n{_markdown(header, rows)}\n\nIn brackets: {how}.")
    if len(group) > 1:
        parts.append(
            "By task the episodes of all evaluated seeds are pooled: these intervals leave out how seeds differ."
        )
    return "\n\n".join(parts)


def _by_difficulty(group: Group) -> str:
    """Success by the usual groups of MT50; nothing for other tasks."""
    columns = [
        [run.run.before for run in group if run.run.before],
        [run.run.after for run in group if run.run.after],
    ]
    if any({task for e in column for task in e.tasks} != set(MT50) for column in columns):
        return ""
    rows = []
    for difficulty in ("easy", "medium", "hard", "very hard"):
        tasks = [task for task, of in DIFFICULTY.items() if of == difficulty]
        results = [_pooled(column, tasks) for column in columns]
        rows.append(
            [f"{difficulty} ({len(tasks)} tasks)", *(_success(result) if result else "-" for result in results)]
        )
    return (
        f"### Success, by difficulty\n\n{_markdown(['', 'SFT', 'post-trained'], rows)}\n\nIn brackets: Wilson 95 %. "
        "The groups are those of arXiv 2206.14244. RLinf reports 0.781 to 0.858 for "
        "pi0 post-trained with PPO on MT50, at a horizon of 100 steps."
    )


def _success(result: Result) -> str:
    if not result.n:
        return "-"
    return f"{result.success:.2f}" + _interval(result.success_interval, "{:.2f}".format)


def _pooled(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> Result | None:
    """All trials of these tasks, of several seeds together."""
    if not evaluations:
        return None
    trials: list[list[Trial]] = [[t for e in evaluations for t in e.trials if t.task == task] for task in tasks]
    aborted = sum(e.tasks[task].aborted for e in evaluations for task in tasks if task in e.tasks)
    return result_of(trials, aborted, evaluations[0].horizon_steps)


def _steps(mean: float | None, interval: Interval | None) -> str:
    return "-" if mean is None else UNITS["steps"](mean) + _interval(interval, UNITS["steps"])


def _held_out(group: Group) -> str:
    found: list[tuple[RunResults, HeldOut]] = [(run.run, held) for run in group for held in run.run.held_out]
    if not found:
        return ""
    rows = [
        [held.variant, str(run.seed), *(_overall(e) for e in (held.before, held.after)), _overall(run.after)]
        for run, held in found
    ]
    return (
        "### Held-out instructions\n\nSuccess when the instruction is one that no training has used.\n\n"
        + _markdown(["variant", "seed", "SFT", "post-trained", "post-trained, usual instructions"], rows)
        + "\n\nIn brackets: Wilson 95 %."
    )


def _overall(evaluation: Evaluation | None) -> str:
    if evaluation is None or not evaluation.overall.n:
        return "-"
    result = evaluation.overall
    return UNITS["share"](result.success) + _interval(result.success_interval, UNITS["share"])


def _seeds(group: Group) -> str:
    header = ["seed", "run", "success", "steps", "with failures", "environment steps driven", "decisions learned from"]
    header += ["hours: demos, SFT, post-training", "cores idle", "versions", "first -> evaluated version"]
    rows = []
    for run in (contestant.run for contestant in group):
        before, after, cost = run.before, run.after, run.cost
        hours = [
            ("-" if part is None else f"{part:.2f}") for part in (cost.demos_hours, cost.sft_hours, cost.training_hours)
        ]
        row = [str(run.seed), f"`{run.name}`"]
        row += [_change(before, after, lambda r: r.success, 3), _change(before, after, lambda r: r.steps, 1)]
        row += [_change(before, after, lambda r: r.steps_all, 1), f"{cost.env_steps:,}", f"{cost.decisions:,}"]
        last = f"`{run.last.version[:12]}`" if run.last else "-"
        row += [", ".join(hours), _idle(run.metrics), str(run.versions)]
        rows.append([*row, f"`{run.first.version[:12]}` -> {last}"])
    return f"### By seed\n\n{_markdown(header, rows)}"


def _idle(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Share of post-training in which the computer's cores had nothing to do."""
    known = [(line["minutes"], line["cpu_idle_share"]) for line in metrics if line.get("cpu_idle_share") is not None]
    durations = [minutes - before for (minutes, _), (before, _) in zip(known, [(0.0, 0.0), *known], strict=False)]
    if not sum(durations):
        return "-"
    return f"{sum(d * share for d, (_, share) in zip(durations, known, strict=True)) / sum(durations):.1%}"


def _change(
    before: Evaluation | None, after: Evaluation | None, figure: Callable[[Result], float | None], digits: int
) -> str:
    values = [figure(e.overall) if e and e.overall.n else None for e in (before, after)]
    return " -> ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def _bound(runs: Group) -> str:
    bound = next((run.bound for run in runs if run.bound), None)
    if bound is None:
        return "None is known for these tasks."
    return (
        "The fewest control steps in which the hand can get to the object and bring it to where the simulator reports "
        f"success. Measured in the simulator: at most {100 * bound.hand.speed_m:.2f} cm a step on each axis, "
        f"{bound.hand.lag_steps:.1f} steps late. Distances are those of the evaluation's own goals at reset, on the "
        "longest axis, from the hand to contact and from the object to the edge of the goal. It is crude: obstacles, "
        "approach from the right side, grasping, arcs and the lag at turns are left out, which makes it too low; an "
        "object can be flung, which makes it not strict. `bridge/backends/metaworld_bound.py` has the rules."
    )


def _facts(runs: Group) -> str:
    alike: dict[tuple[str, ...], list[str]] = {}
    for run in (contestant.run for contestant in runs):
        where = run.environment
        libraries = (
            ", ".join(f"{name} {version}" for name, version in where.libraries.items()) if where else "not noted"
        )
        computer = ", ".join(f"{name} {value}" for name, value in where.computer.items()) if where else "not noted"
        simulators = str(run.deployment["bridge"]["workers"])
        alike.setdefault((computer, simulators, libraries, _trained(run.deployment)), []).append(f"`{run.name}`")
    rows = [[", ".join(names), *facts] for facts, names in alike.items()]
    return _markdown(["runs", "computer", "simulators", "libraries", "seeds of training goals"], rows) + (
        "\n\nVersions in full:\n\n" + "\n".join(_hashes(run.run) for run in runs)
    )


def _records(records: Sequence[str]) -> str:
    links = ", ".join(f"[{PurePosixPath(path).name}]({path})" for path in records)
    return (
        f"Every trial, training episode and line of the trainer's metrics: {links}. `fieldtune report` takes these "
        "files as it takes runs, with others beside them."
    )


def _trained(deployment: dict[str, Any]) -> str:
    trainer = deployment["trainer"]
    return f"{trainer['train_first_seed']} to {trainer['train_first_seed'] + trainer['train_seeds'] - 1}"


def _hashes(run: RunResults) -> str:
    last = f", evaluated `{run.last.version}` ({made_in(run.last)})" if run.last else ""
    return f"- `{run.name}`: first `{run.first.version}`{last}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
