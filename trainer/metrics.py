"""metrics.jsonl: one JSON object a line for each iteration of the trainer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.durable import write_atomic
from runtime.episode import Episode
from runtime.rundir import RunDir
from trainer.chunked_ppo import Update
from trainer.finite import NotFiniteError


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line, durable on return. Raises `ValueError` for a number that JSON has not (NaN, infinity)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def require_finite(line: dict[str, Any]) -> None:
    """Raise `NotFiniteError`, naming them, where there are numbers in it that JSON has not (NaN, infinity)."""
    odd = [name for name, value in line.items() if not _is_json(value)]
    if odd:
        raise NotFiniteError(f"iteration {line['iteration']} is not kept; these are not finite: {', '.join(odd)}")


def cut(path: Path, iteration: int) -> None:
    """Drop the lines after `iteration`, and a torn last one: what they tell of is done again.

    Writes nothing where there are none: on a full disk the trainer could not come up otherwise.
    """
    if not path.exists():
        return
    kept, content = [], path.read_bytes()
    for text in content.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or line.get("iteration", iteration + 1) > iteration:
            break
        kept.append(text + "\n")
    if (whole := "".join(kept).encode()) != content:
        write_atomic(path, whole)


def put_aside(run: RunDir) -> list[Path]:
    """Move metrics and curves of an earlier training to NAME.old-TIME beside them; returns where they are now."""
    moved = []
    for path in (run.metrics, run.curves):
        if path.exists() and (path.is_dir() or path.stat().st_size):
            moved.append(path.rename(path.with_name(f"{path.name}.old-{int(time.time())}")))
    return moved


def results(episodes: Sequence[Episode], tasks: Sequence[str]) -> dict[str, Any]:
    """Success and mean steps to success (None without one) of these episodes, overall and by task."""
    by_task = {task: [episode for episode in episodes if episode.start.task == task] for task in tasks}
    return {
        "episodes": len(episodes),
        "success": _success(episodes),
        "steps_to_success": _steps(episodes),
        "success_by_task": {task: _success(own) if own else None for task, own in by_task.items()},
        "steps_by_task": {task: _steps(own) for task, own in by_task.items()},
    }


def losses(result: Update | None) -> dict[str, Any]:
    """What the update of the policy did; all zero in the critic's warm-up, when there is none."""
    return {
        "kl": result.kl if result else 0.0,
        "kl_stop": result.kl_stop if result else False,
        "clip_fraction": result.clip_fraction if result else 0.0,
        "effective_share": result.effective_share if result else 0.0,
        "policy_loss": result.policy_loss if result else 0.0,
        "cloning_loss": result.cloning_loss if result else 0.0,
        "grad_norm": result.grad_norm if result else 0.0,
        "gradient_steps": result.gradient_steps if result else 0,
        "bfloat16": result.bfloat16 if result else False,
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _success(episodes: Sequence[Episode]) -> float:
    return sum(episode.success for episode in episodes) / max(1, len(episodes))


def _steps(episodes: Sequence[Episode]) -> float | None:
    steps = [episode.steps for episode in episodes if episode.success]
    return sum(steps) / len(steps) if steps else None
