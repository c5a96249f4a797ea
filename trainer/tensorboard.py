"""Curves for TensorBoard: the numbers of each metrics line as scalars, in event files of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.rundir import RunDir

TAGS = {
    "policy/success": "success",
    "policy/steps_to_success": "steps_to_success",
    "policy/kl": "kl",
    "policy/clip_fraction": "clip_fraction",
    "policy/effective_share": "effective_share",
    "policy/ppo_loss": "policy_loss",
    "policy/cloning_loss": "cloning_loss",
    "policy/grad_norm": "grad_norm",
    "policy/gradient_steps": "gradient_steps",
    "policy/lr": "lr",
    "policy/sigma": "sigma",
    "critic/loss": "value_loss",
    "critic/explained_variance": "explained_variance",
    "buffer/episodes": "buffer_episodes",
    "buffer/steps": "buffer_steps",
    "weight/mean": "weight",
    "data/env_steps": "env_steps",
    "data/episodes": "episodes",
    "data/aborted": "aborted",
    "data/unreadable": "unreadable",
    "data/dropped_stale": "dropped_stale",
    "data/staleness_versions": "staleness_versions",
    "data/ratio_error": "ratio_error",
    "time/minutes": "minutes",
    "time/collect_wait_s": "collect_wait_s",
    "time/learn_s": "learn_s",
    "time/cpu_idle_share": "cpu_idle_share",
}
"""Tag -> key of the metrics line."""
TASK_TAGS = {
    "success": "success_by_task",
    "steps": "steps_by_task",
    "buffer_steps": "buffer_steps_by_task",
    "weight_by_task": "weight_by_task",
}
"""Group of tags, one for each task -> key of the metrics line."""


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of what a metrics line has; what is None (no success, no task of that name) has no point."""
    for tag, key in TAGS.items():
        if line.get(key) is not None:
            yield tag, line[key]
    for name, value in line.get("weight_inputs", {}).items():
        if isinstance(value, int | float):  # the others are by task
            yield f"weight/{name}", value
    for group, key in TASK_TAGS.items():
        for task, value in line.get(key, {}).items():
            if value is not None:
                yield f"{group}/{task}", value


def require_tensorboard() -> None:
    """Raise `ModuleNotFoundError` where the package is missing."""
    import tensorboard  # noqa: F401


class Curves:
    """Event files in `run.curves`. The step of a point is the iteration: one that is done again after a crash has the
    number that it had, so its points take the place of the earlier ones also in readers that go by the order of steps
    alone. By environment steps, which it need not take as many of again, the earlier ones would stay between.
    """

    def __init__(self, run: RunDir, iteration: int) -> None:
        """Go on after `iteration`: points after it count no more. A run that had no curves gets those of its metrics
        up to here.
        """
        from torch.utils.tensorboard import SummaryWriter

        if not run.curves.exists() and (earlier := _lines(run.metrics)):
            # Whole or not at all: one that was killed meanwhile would not be filled up later.
            begun = run.curves.with_name(f"{run.curves.name}.begun")
            shutil.rmtree(begun, ignore_errors=True)
            self._writer = SummaryWriter(str(begun))
            for line in earlier:
                self._write(line)
            self._writer.close()
            begun.rename(run.curves)
        self._writer = SummaryWriter(str(run.curves), purge_step=iteration + 1)
        self._writer.flush()

    def add(self, line: dict[str, Any]) -> None:
        """The points of one metrics line; readers see them on return."""
        self._write(line)
        self._writer.flush()

    def _write(self, line: dict[str, Any]) -> None:
        for tag, value in scalars(line):
            self._writer.add_scalar(tag, value, line["iteration"], walltime=line["unix_s"])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
