"""The demonstration buffer: for each task the SFT demonstrations and the fastest of the policy's own successes.

The rule is fieldtune's own design (the paper's is not public):
- it starts with the demonstrations, the shortest ones if there are more than its capacity; with `admit: false` it stays
  as it is then;
- an own success is admitted if it took at most as many steps as the running quantile of the task's last successes;
- when a task is full its slowest episode goes; among equally slow ones own episodes go before demonstrations, older
  before newer. So a demonstration leaves only in favour of something shorter.

Nothing here is random but `sample`, so the same episodes in the same order give the same buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import BufferConfig
from trainer.samples import CloningSamples


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One episode in the buffer and where it came from. `number` counts admissions: larger is newer."""

    episode: str
    steps: int
    demonstration: bool
    versions: tuple[str, ...]
    number: int
    samples: CloningSamples


class DemoBuffer:
    """Episodes to clone, by task."""

    def __init__(self, config: BufferConfig, tasks: Sequence[str]) -> None:
        self._config = config
        self._entries: dict[str, list[Entry]] = {task: [] for task in tasks}
        self._recent_steps: dict[str, deque[int]] = {task: deque(maxlen=config.window) for task in tasks}
        self._number = 0

    def seed(self, task: str, episode: str, steps: int, versions: Sequence[str], samples: CloningSamples) -> bool:
        """Put in a demonstration; returns whether it stays (a full task keeps the shortest)."""
        return self._insert(task, episode, steps, True, versions, samples)

    def offer(
        self, task: str, episode: str, steps: int, versions: Sequence[str], samples: Callable[[], CloningSamples]
    ) -> bool:
        """Offer an own successful episode; returns whether it was admitted. `samples` is called only if it may be."""
        if not self._config.admit:
            return False
        recent = self._recent_steps[task]
        recent.append(steps)
        if steps > np.quantile(np.array(recent), self._config.quantile):
            return False
        entries = self._entries[task]
        if len(entries) >= self._config.per_task and steps > max(entry.steps for entry in entries):
            return False
        return self._insert(task, episode, steps, False, versions, samples())

    def _insert(
        self,
        task: str,
        episode: str,
        steps: int,
        demonstration: bool,
        versions: Sequence[str],
        samples: CloningSamples,
    ) -> bool:
        entries = self._entries[task]
        if any(entry.episode == episode for entry in entries) or len(samples) == 0:
            return False
        self._number += 1
        entry = Entry(episode, steps, demonstration, tuple(versions), self._number, samples)
        entries.append(entry)
        while len(entries) > self._config.per_task:
            entries.remove(max(entries, key=lambda one: _leaves_first(one.steps, one.demonstration, one.number)))
        return entry in entries

    def discard(self, episode: str) -> None:
        """Take an episode out, if it is there: somebody has said that it was no success."""
        for entries in self._entries.values():
            entries[:] = [entry for entry in entries if entry.episode != episode]

    def sample(self, count: int, rng: np.random.Generator) -> tuple[CloningSamples, NDArray[np.int64]]:
        """`count` samples with replacement, every task that has any equally likely, then every sample of the task.

        Returns them with the index `[count]` of their task. Raises `ValueError` if the buffer is empty.
        """
        filled = [i for i, entries in enumerate(self._entries.values()) if entries]
        if not filled:
            raise ValueError("the demonstration buffer is empty")
        by_task = list(self._entries.values())
        ends = {i: np.cumsum([len(entry.samples) for entry in by_task[i]]) for i in filled}
        task = rng.choice(np.array(filled, np.int64), size=count)
        draw = rng.random(count)
        picked: list[tuple[CloningSamples, int]] = []
        for i, u in zip(task.tolist(), draw.tolist(), strict=True):
            row = int(u * int(ends[i][-1]))
            position = int(np.searchsorted(ends[i], row, side="right"))
            samples = by_task[i][position].samples
            picked.append((samples, row - int(ends[i][position]) + len(samples)))
        return _gather(picked), task

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it holds episodes of, in the order of the indices that `sample` gives."""
        return tuple(self._entries)

    @property
    def episodes(self) -> int:
        """Episodes in the buffer."""
        return sum(len(entries) for entries in self._entries.values())

    @property
    def mean_steps(self) -> float:
        """Mean length of its episodes in environment steps; 0 if it is empty."""
        steps = [entry.steps for entries in self._entries.values() for entry in entries]
        return float(np.mean(steps)) if steps else 0.0

    def mean_steps_of(self, task: str) -> float | None:
        """Mean length of the task's episodes in environment steps; None where it has none."""
        steps = [entry.steps for entry in self._entries[task]]
        return float(np.mean(steps)) if steps else None

    def entries(self, task: str) -> tuple[Entry, ...]:
        """What the buffer holds of one task, in order of admission."""
        return tuple(self._entries[task])

    def own_episodes(self) -> list[str]:
        """Ids of the policy's own episodes in the buffer: their files must be kept."""
        return [e.episode for entries in self._entries.values() for e in entries if not e.demonstration]

    def state(self) -> dict[str, Any]:
        """What is in it, without the samples; ready for JSON."""
        return {
            "number": self._number,
            "recent_steps": {task: list(recent) for task, recent in self._recent_steps.items()},
            "entries": {
                task: [
                    {
                        "episode": entry.episode,
                        "steps": entry.steps,
                        "demonstration": entry.demonstration,
                        "versions": list(entry.versions),
                        "number": entry.number,
                    }
                    for entry in entries
                ]
                for task, entries in self._entries.items()
            },
        }

    def restore(self, state: Mapping[str, Any], load: Callable[[str, bool], CloningSamples | None]) -> None:
        """Be what `state` says, less what a task has no room for any more; `load(episode, demonstration)` reads samples
        again, or returns None for an episode that is to be left out.
        """
        self._number = int(state["number"])
        for task in self._entries:
            recent = self._recent_steps[task]
            recent.clear()
            recent.extend(state["recent_steps"].get(task, ()))
            self._entries[task] = [
                Entry(
                    episode=row["episode"],
                    steps=row["steps"],
                    demonstration=row["demonstration"],
                    versions=tuple(row["versions"]),
                    number=row["number"],
                    samples=samples,
                )
                for row in self._that_stay(state["entries"].get(task, ()))
                if (samples := load(row["episode"], row["demonstration"])) is not None
            ]

    def _that_stay(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those that a task has room for, in order of admission."""
        last_to_leave = sorted(rows, key=lambda row: _leaves_first(row["steps"], row["demonstration"], row["number"]))
        return sorted(last_to_leave[: self._config.per_task], key=lambda row: int(row["number"]))


def thin(samples: CloningSamples, stride: int, offset: int) -> CloningSamples:
    """Every `stride`-th sample from `offset` on (taken modulo the stride and the length).

    Demonstrations decide at every step, so their samples overlap almost wholly; this keeps the buffer's memory small.
    """
    if not len(samples):
        return samples
    rows = slice(offset % min(stride, len(samples)), None, stride)
    return CloningSamples(
        images={name: np.ascontiguousarray(images[rows]) for name, images in samples.images.items()},
        state=samples.state[rows],
        tokens=samples.tokens[rows],
        target=samples.target[rows],
        mask=samples.mask[rows],
    )


def _leaves_first(steps: int, demonstration: bool, number: int) -> tuple[int, bool, int]:
    """The entry with the largest of these goes: the slowest, own before demonstration, older before newer."""
    return steps, not demonstration, -number


def _gather(picked: Sequence[tuple[CloningSamples, int]]) -> CloningSamples:
    first = picked[0][0]
    return CloningSamples(
        images={name: np.stack([samples.images[name][row] for samples, row in picked]) for name in first.images},
        state=np.stack([samples.state[row] for samples, row in picked]),
        tokens=np.stack([samples.tokens[row] for samples, row in picked]),
        target=np.stack([samples.target[row] for samples, row in picked]),
        mask=np.stack([samples.mask[row] for samples, row in picked]),
    )
