"""w(t): how much of the loss of each task is PPO and how much is cloning. This formula is fieldtune's own design.

    w = w_max * ramp * critic * brake * competence(task)

    ramp        tanh(iterations after the critic's warm-up / ramp_iterations): a young policy gradient is not trusted
    critic      1/2 + 1/2 clip(EV / 0.5, 0, 1), EV the smoothed explained variance of the critic on fresh episodes
    brake       min(1, target_kl / KL of the last update): an update that went too far is followed by a shorter one
    competence  by task, with s the success rate of its last 50 episodes, e the standard error of s, and best the
                largest s - 2 e that there ever was:
                max(0.1, min(1, s / 0.2) * clip(1 - (best - (s + e)) / 0.2, 0, 1))

Two settings put a constant in its place, after the critic's warm-up: `fixed`, and `cloning_scale: 0`, for which w = 1:
where nothing is cloned there is nothing to hand a task back to, and a smaller w would only make PPO's step shorter.

Competence hands a task back to cloning when it succeeds less often than it has been seen to, and keeps it there while
it hardly ever succeeds, for then its advantages are noise. Standard errors separate both ends of the comparison, since
the best of many windows is a lucky one. It never reaches zero, because cloning alone drifts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import WeightConfig

WINDOW_EPISODES = 50  # episodes of a task that its success rate is taken over
MIN_EPISODES = 20  # before this many nothing counts as the best
ENOUGH_SUCCESS = 0.2
FULL_DROP = 0.2
ENOUGH_VARIANCE = 0.5
SMOOTHING = 0.3  # share of the newest explained variance in the smoothed one
MIN_COMPETENCE = 0.1


@dataclass(frozen=True, slots=True)
class Weight:
    """w by task, and everything it was computed from."""

    by_task: dict[str, float]
    ramp: float
    critic: float
    brake: float
    competence: dict[str, float]
    success: dict[str, float]
    best: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean of w over the tasks."""
        return sum(self.by_task.values()) / len(self.by_task)

    def inputs(self) -> dict[str, Any]:
        """What moved w, for the log."""
        parts = asdict(self)
        del parts["by_task"]
        return parts


class WeightSchedule:
    """Keeps the measurements that w is computed from. `state` and `restore` carry it through a checkpoint."""

    def __init__(self, config: WeightConfig, target_kl: float, tasks: Sequence[str]) -> None:
        self._config, self._target_kl = config, target_kl
        self._recent: dict[str, deque[bool]] = {task: deque(maxlen=WINDOW_EPISODES) for task in tasks}
        self._best = dict.fromkeys(tasks, 0.0)
        self._explained_variance: float | None = None
        self._kl = 0.0

    def add_results(self, task: str, successes: Iterable[bool]) -> None:
        """Results of exploring episodes of one task, oldest first."""
        recent = self._recent[task]
        for success in successes:
            recent.append(success)
            if len(recent) >= MIN_EPISODES:
                self._best[task] = max(self._best[task], self.success(task) - 2 * self._error(task))

    def add_explained_variance(self, value: float) -> None:
        """The critic's explained variance on episodes that it has not yet learned from."""
        old = self._explained_variance
        self._explained_variance = value if old is None else (1 - SMOOTHING) * old + SMOOTHING * value

    def add_kl(self, kl: float) -> None:
        """KL between the behaviour policy and the policy after the last update."""
        self._kl = kl

    def success(self, task: str) -> float:
        """Success rate over the task's last episodes; 0 before the first."""
        recent = self._recent[task]
        return sum(recent) / len(recent) if recent else 0.0

    def competence(self, task: str) -> float:
        """How far PPO is trusted with the task; in [0.1, 1]."""
        success = self.success(task)
        held = _clip(1 - (self._best[task] - success - self._error(task)) / FULL_DROP)
        return max(MIN_COMPETENCE, min(1.0, success / ENOUGH_SUCCESS) * held)

    def _error(self, task: str) -> float:
        """Standard error of the task's success rate, by the mean of a Beta(1, 1) posterior: 0 of 5 is not certain."""
        n = len(self._recent[task])
        mean = (sum(self._recent[task]) + 1) / (n + 2)
        return math.sqrt(mean * (1 - mean) / (n + 2))

    def weight(self, iterations_after_warmup: int) -> Weight:
        """w for the update that comes next; 0 through the critic's warm-up (`iterations_after_warmup` <= 0)."""
        ramp = math.tanh(max(0, iterations_after_warmup) / self._config.ramp_iterations)
        critic = 0.5 + 0.5 * _clip((self._explained_variance or 0.0) / ENOUGH_VARIANCE)
        brake = min(1.0, self._target_kl / self._kl) if self._kl > 0 else 1.0
        competence = {task: self.competence(task) for task in self._recent}
        common = self._config.w_max * ramp * critic * brake
        by_task = {task: common * value for task, value in competence.items()}
        constant = self._config.fixed
        if constant is None and self._config.cloning_scale == 0:
            constant = 1.0
        if constant is not None and iterations_after_warmup > 0:
            by_task = dict.fromkeys(by_task, constant)
        return Weight(
            by_task=by_task,
            ramp=ramp,
            critic=critic,
            brake=brake,
            competence=competence,
            success={task: self.success(task) for task in self._recent},
            best=dict(self._best),
        )

    def state(self) -> dict[str, Any]:
        """Everything measured so far, ready for JSON."""
        return {
            "recent": {task: list(recent) for task, recent in self._recent.items()},
            "best": dict(self._best),
            "explained_variance": self._explained_variance,
            "kl": self._kl,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; tasks that it does not know start empty."""
        for task, recent in self._recent.items():
            recent.clear()
            recent.extend(bool(success) for success in state["recent"].get(task, ()))
            self._best[task] = float(state["best"].get(task, 0.0))
        self._explained_variance = state["explained_variance"]
        self._kl = float(state["kl"])


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
