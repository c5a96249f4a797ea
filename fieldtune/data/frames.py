"""An episode as rows of a table: one for each environment step, or one for each decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.backend import Float32, Observation
from bridge.errors import FieldtuneError
from runtime.episode import Decision, Episode

Frames = Literal["steps", "decisions"]


class FramesError(FieldtuneError):
    """An episode that cannot be put into rows."""


@dataclass(slots=True)
class Rows:
    """n rows of an episode.

    `observation` has one for each row; `observed` bool `[n]` says whether it was made at that very step, or is the last
    one before it. `step` int64 `[n]` is the environment step. `action` float32 `[n, d]` is what was sent at the step,
    `reward` float32 `[n]` the backend's. For rows that are decisions `action` is `[n, h, d]` with what was sent of each
    chunk, `executed` bool `[n, h]` is True where something was (0 elsewhere), and `reward` sums over it. `version` is
    that of the action.
    """

    observation: Sequence[Observation]
    observed: NDArray[np.bool_]
    step: NDArray[np.int64]
    action: Float32
    reward: Float32
    version: Sequence[str]
    executed: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.step)


def rows_of(episode: Episode, frames: Frames) -> Rows:
    """The rows of an episode; none where nothing was executed. Raises `FramesError`."""
    return _steps(episode) if frames == "steps" else _decisions(episode)


def _steps(episode: Episode) -> Rows:
    """What was sent at each step, with the newest observation that existed then."""
    sent = [
        (decision.step + decision.start + i, decision, i)
        for decision in episode.decisions
        for i in range(len(decision.sent))
    ]
    sent.sort(key=lambda each: each[0])
    step = np.array([at for at, _, _ in sent], np.int64)
    if not np.array_equal(step, np.arange(len(step))):
        wrong = int(np.flatnonzero(step != np.arange(len(step)))[0])
        raise FramesError(f"the log does not say, or says twice, what was sent at step {wrong}")
    seen = np.array([decision.step for decision in episode.decisions], np.int64)
    # The last decision that was asked for at this step or before; there is one, for the first was at step 0.
    newest = np.searchsorted(seen, step, side="right") - 1
    d = len(episode.start.spec.action.names)
    return Rows(
        observation=[episode.decisions[i].observation for i in newest],
        observed=np.isin(step, seen),
        step=step,
        action=np.array([decision.sent[i] for _, decision, i in sent], np.float32).reshape(-1, d),
        reward=np.array([decision.reward[i] for _, decision, i in sent], np.float32),
        version=[decision.version for _, decision, _ in sent],
    )


def _decisions(episode: Episode) -> Rows:
    played = [decision for decision in episode.decisions if len(decision.sent)]
    sizes = {len(decision.actions) for decision in played}
    if len(sizes) > 1:
        raise FramesError(f"its chunks have {', '.join(map(str, sorted(sizes)))} actions; rows need them equal")
    h, d = sizes.pop() if sizes else 0, len(episode.start.spec.action.names)
    action = np.zeros((len(played), h, d), np.float32)
    executed = np.zeros((len(played), h), bool)
    for i, decision in enumerate(played):
        own = decision.executed
        action[i, own] = _of_chunk(decision, decision.sent)
        executed[i, own] = True
    return Rows(
        observation=[decision.observation for decision in played],
        observed=np.ones(len(played), bool),
        step=np.array([decision.step for decision in played], np.int64),
        action=action,
        reward=np.array([decision.reward.sum() for decision in played], np.float32),
        version=[decision.version for decision in played],
        executed=executed,
    )


def _of_chunk(decision: Decision, values: NDArray[Any]) -> NDArray[Any]:
    """Without the hold actions that were sent beyond the end of the chunk."""
    return values[: decision.executed.stop - decision.executed.start]
