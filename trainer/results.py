"""The results of several runs, as one page of Markdown with pictures: one group for each number of demonstrations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.durable import write_atomic
from trainer.results_data import Contestant, ResultsError, RunResults
from trainer.results_page import render
from trainer.results_plots import draw
from trainer.results_record import write_record

COMPARED = (
    "backend.name",
    "backend.options",
    "bridge.horizon_steps",
    "bridge.merge",
    "bridge.play_steps",
    "bridge.delay_steps",
    "runtime.balance",
    "trainer",
)
"""Settings that the runs of a mean share ..."""
FREE = ("trainer.stop", "trainer.threads", "trainer.tensorboard", "trainer.demos.workers")
"""... but for these: how far a run goes, and what changes no result."""


def write_results(contestants: Sequence[Contestant], page: Path) -> Path:
    """Write `page` and beside it `pictures/` and, in `records/`, what it was made from; returns the page's path.

    Raises `ResultsError` where `check_together` does.
    """
    check_together(contestants)
    groups = grouped(contestants)
    pictures: dict[str, dict[str, str]] = {}
    for title, group in groups.items():
        stem = f"{page.stem}-{group[0].run.demos_per_task}"
        drawn = draw(group, page.parent / "pictures", stem)
        pictures[title] = {caption: os.path.relpath(path, page.parent) for caption, path in drawn.items()}
    records = [write_record(contestant, page.parent / "records") for contestant in contestants]
    files = [os.path.relpath(path, page.parent) for path in records]
    write_atomic(page, render(groups, pictures, files).encode())
    return page


def grouped(contestants: Sequence[Contestant]) -> dict[str, list[Contestant]]:
    """Runs by how many demonstrations of each task they began with, fewest first, each group in order of seeds."""
    groups: dict[str, list[Contestant]] = {}
    for contestant in sorted(contestants, key=lambda c: (c.run.demos_per_task, c.run.seed, c.run.name)):
        count = contestant.run.demos_per_task
        title = f"{count} demonstrations a task" if count else "A first version made elsewhere"
        groups.setdefault(title, []).append(contestant)
    return groups


def check_together(contestants: Sequence[Contestant]) -> None:
    """Raise `ResultsError` if the runs cannot stand on one page: two have the same name, or those of a group are not
    the same but for their seed, so that a mean over them would be of nothing.
    """
    names = [contestant.run.name for contestant in contestants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ResultsError(
            f"two of the runs are named {', '.join(twice)}; name each run once, and where two of them are called the "
            "same rename the directory or the record of one"
        )
    for title, group in grouped(contestants).items():
        runs = [contestant.run for contestant in group]
        for i, run in enumerate(runs):
            for earlier in runs[:i]:
                if difference := _difference(earlier, run):
                    raise ResultsError(
                        f"{earlier.name} and {run.name} cannot be averaged ({title}): {difference}; leave one of them "
                        "out, or give each a page of its own"
                    )


def _difference(one: RunResults, other: RunResults) -> str:
    """What keeps two runs from being two values of one mean, in words; empty if nothing does."""
    for path in COMPARED:
        for differs, a, b in _differing(path, _at(one.deployment, path), _at(other.deployment, path)):
            return f"{differs} is {a} in the one and {b} in the other"
    if one.seed == other.seed:
        return f"both have seed {one.seed}"
    # What was left out of an evaluation may be missing, and nothing else.
    mine, others = set(one.goals), set(other.goals)
    missing = max(len(mine - others) - other.left_out, len(others - mine) - one.left_out)
    if mine and others and missing > 0:
        return f"the goals of their evaluations differ, {_span(one)} in the one and {_span(other)} in the other"
    return ""


def _differing(path: str, one: Any, other: Any) -> Iterable[tuple[str, Any, Any]]:
    """Settings at `path` and below that differ. One that only either has is of another version of fieldtune."""
    if path in FREE or one is _MISSING or other is _MISSING:
        return
    if path.startswith("trainer") and isinstance(one, dict) and isinstance(other, dict):
        for key in one:
            yield from _differing(f"{path}.{key}", one[key], other.get(key, _MISSING))
    elif one != other:
        yield path, one, other


_MISSING = object()


def _at(deployment: dict[str, Any], path: str) -> Any:
    value: Any = deployment
    for key in path.split("."):
        value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def _span(run: RunResults) -> str:
    seeds = sorted({seed for _, seed in run.goals})
    return f"{len(run.goals)} of {len({task for task, _ in run.goals})} tasks, seeds {seeds[0]} to {seeds[-1]}"
