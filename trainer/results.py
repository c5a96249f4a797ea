"""The results of several runs, as one page of Markdown with pictures: one group for each number of demonstrations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runtime.durable import write_atomic
from trainer.results_data import Contestant, ResultsError
from trainer.results_page import render
from trainer.results_plots import draw
from trainer.results_record import write_record


def write_results(contestants: Sequence[Contestant], page: Path) -> Path:
    """Write `page` and beside it `pictures/` and, in `records/`, what it was made from; returns the page's path.

    Raises `ResultsError` if two runs have the same name.
    """
    names = [contestant.run.name for contestant in contestants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ResultsError(
            f"two of the runs are named {', '.join(twice)}; name each run once, and where two of them are called the "
            "same rename the directory or the record of one"
        )
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
