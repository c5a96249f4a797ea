"""The backend `replay`: plays episodes of a log back, so that a whole deployment can be run on what a robot once saw.

It lies here and not in the bridge because it reads the episode log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from bridge.backend import BackendError, BackendSpec, Float32, NotSeenError, Observation, Outcome
from bridge.config import ConfigError, Count
from runtime.episode import End, Episode, EpisodeStart
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import EpisodeError, read_episode, read_start

SAME = 1e-3
"""Largest difference between two actions that count as the same, in half ranges of the action: as for a bundle's probe,
float32 on another processor differs by about 1e-5, and another version by 1e-2 and more."""

_OPTIONS = "$.backend.options"
_ENDS: tuple[End, ...] = ("success", "failure", "timeout", "unjudged")


class ReplayOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `replay`."""

    directory: str
    """An episode log: `runs/NAME/episodes`, `runs/NAME/demos` or `runs/NAME/eval/VERSION`."""
    episodes: tuple[str, ...] = ()
    """Ids of the episodes to play; if empty, the newest `last`, without those that were aborted."""
    last: Count = 100


class Replay:
    """The backend. Seed s of a task plays its episode s mod n, oldest first, with the instruction that it was told.

    What is applied changes nothing: observations and rewards are those of the log. It is compared, and only an episode
    whose every action was repeated ends as the logged one did. What the others would have come to is not known, so
    they end as time-outs.
    """

    def __init__(self, options: ReplayOptions) -> None:
        """Find the episodes and read how they began. Raises `ConfigError` naming the option that is wrong."""
        self._index = EpisodeIndex(Path(options.directory))
        self._rows: dict[str, list[EpisodeRow]] = {}
        starts: list[EpisodeStart] = []
        for row in _chosen(self._index, options):
            self._rows.setdefault(row.task, []).append(row)
            try:
                starts.append(read_start(self._index.path(row)))
            except EpisodeError as error:
                raise ConfigError(f"{_OPTIONS}.directory: {error}") from error
        self._spec = _spec(starts)
        ranges = np.subtract(self._spec.action.high, self._spec.action.low) / 2
        self._half_range = np.where(np.isfinite(ranges) & (ranges > 0), ranges, 1.0)
        self._playing: _Playing | None = None

    @property
    def spec(self) -> BackendSpec:
        """That of the log, with an instruction for each episode. Time advances in `apply`."""
        return self._spec

    @property
    def differences(self) -> list[float]:
        """For each action applied so far in this episode its largest difference from the log, in half ranges."""
        return list(self._running().differences)

    def connect(self) -> None:
        """Nothing to open."""

    def reset(self, task: str, seed: int) -> None:
        """Go to the beginning of the episode that the seed (0 or more) means."""
        if task not in self._rows:
            raise BackendError(f"the log has no task {task!r}; it has {', '.join(self._rows)}")
        if seed < 0:
            raise BackendError(f"seed {seed} is negative; seeds are 0 or more")
        rows = self._rows[task]
        row = rows[seed % len(rows)]
        try:
            self._playing = _Playing(read_episode(self._index.path(row)))
        except EpisodeError as error:
            raise BackendError(f"{error}; name others in {_OPTIONS}.episodes") from error

    def observe(self) -> Observation:
        """What was logged at this step. Between the decisions of the log nothing is known: `NotSeenError`."""
        playing = self._running()
        found = playing.observations.get(playing.step)
        if found is None:
            steps = ", ".join(map(str, sorted(playing.observations)))
            raise NotSeenError(
                f"episode {playing.episode.start.episode} has no observation at step {playing.step}, only at {steps}; "
                "set bridge.play_steps to what the run had, and take a policy that plays as many actions of a chunk"
            )
        return found

    def apply(self, action: Float32) -> Float32:
        """Compare with what was logged, and go one step on. Returns what was sent then if the action is the same, else
        the action clipped to the limits: float32 `[d]`.
        """
        playing = self._running()
        limits = self._spec.action
        if np.shape(action) != (len(limits.names),) or not np.isfinite(action).all():
            raise BackendError(f"an action of this log is {len(limits.names)} finite numbers, not {action!r}")
        if playing.step == playing.steps:
            raise BackendError(f"episode {playing.episode.start.episode} is over after {playing.steps} steps")
        sent = playing.sent[playing.step]
        # On its way to a backend an action may be changed by a safety stage: then as now, or then and not now.
        difference = min(self._difference(action, logged) for logged in (playing.actions[playing.step], sent))
        playing.differences.append(difference)
        playing.step += 1
        return sent.copy() if difference <= SAME else self._clipped(action)

    def outcome(self) -> Outcome:
        """The logged reward; at the end the logged status if every action was the logged one, else a time-out."""
        playing = self._running()
        reward = float(playing.reward[playing.step - 1]) if playing.step else 0.0
        if playing.step < playing.steps:
            return Outcome("running", reward)
        status = playing.episode.status
        if status == "aborted" or status == "unjudged" or max(playing.differences) > SAME:
            return Outcome("timeout", reward)
        return Outcome(status, reward)

    def hold_action(self) -> Float32:
        """No change where actions are deltas, else what was sent last (at the start: first)."""
        playing = self._running()
        if self._spec.action.kind == "delta":
            return self._clipped(np.zeros(len(self._half_range), np.float32))
        sent: Float32 = playing.sent[max(playing.step - 1, 0)]
        return sent.copy()

    def stop(self) -> None:
        """Nothing moves."""

    def close(self) -> None:
        """Let go of the episode."""
        self._playing = None

    def _running(self) -> _Playing:
        if self._playing is None:
            raise BackendError("no episode is being played; call reset() first")
        return self._playing

    def _clipped(self, action: Float32) -> Float32:
        return np.asarray(np.clip(action, self._spec.action.low, self._spec.action.high), np.float32)

    def _difference(self, action: Float32, logged: Float32) -> float:
        return float(np.max(np.abs(action.astype(np.float64) - logged) / self._half_range))


@dataclass(slots=True)
class _Playing:
    """An episode by its steps: `actions` and `sent` float32 `[steps, d]`, `reward` `[steps]`."""

    episode: Episode
    observations: dict[int, Observation] = field(init=False)
    actions: Float32 = field(init=False)
    sent: Float32 = field(init=False)
    reward: NDArray[np.float32] = field(init=False)
    step: int = 0
    differences: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        decisions = self.episode.decisions
        executed = sum(len(decision.sent) for decision in decisions)
        if not executed or executed != self.episode.steps:
            raise BackendError(
                f"episode {self.episode.start.episode} has {self.episode.steps} steps, {executed} of them executed; "
                f"name others in {_OPTIONS}.episodes"
            )
        self.observations = {decision.step: decision.observation for decision in decisions}
        if self.episode.final is not None:
            self.observations[self.episode.steps] = self.episode.final
        self.actions = np.concatenate([decision.actions[: len(decision.sent)] for decision in decisions])
        self.sent = np.concatenate([decision.sent for decision in decisions])
        self.reward = np.concatenate([decision.reward for decision in decisions])

    @property
    def steps(self) -> int:
        return len(self.sent)


def _chosen(index: EpisodeIndex, options: ReplayOptions) -> list[EpisodeRow]:
    """The rows that the options mean, in order of storing."""
    if options.episodes:
        rows = []
        for i, episode in enumerate(options.episodes):
            row = index.get(episode)
            where = f"{_OPTIONS}.episodes[{i}]"
            if row is None:
                raise ConfigError(f"{where}: {options.directory} has no episode {episode!r}")
            if row.status == "aborted" or row.deleted:
                raise ConfigError(f"{where}: {episode} {'was aborted' if not row.deleted else 'was deleted'}")
            rows.append(row)
        return rows
    found = [row for end in _ENDS for row in index.list(limit=options.last, status=end) if not row.deleted]
    if not found:
        raise ConfigError(f"{_OPTIONS}.directory: {options.directory} holds no episode that came to its end")
    return sorted(found, key=lambda row: row.seq)[-options.last :]


def _spec(starts: list[EpisodeStart]) -> BackendSpec:
    """One spec for all. Its n wordings of a task are those of its n episodes, so that seed s means both."""
    first, told = starts[0], dict[str, tuple[str, ...]]()
    for start in starts:
        if replace(start.spec, instructions={}) != replace(first.spec, instructions={}):
            raise ConfigError(
                f"{_OPTIONS}.directory: the backend of episode {start.episode} had another spec than that of episode "
                f"{first.episode}; name those of one in {_OPTIONS}.episodes"
            )
        told[start.task] = (*told.get(start.task, ()), start.instruction)
    instructions = {task: texts[:1] if len(set(texts)) == 1 else texts for task, texts in told.items()}
    return replace(first.spec, name="replay", instructions=instructions, paced=False)
