"""What a run has to learn from, read from its two episode logs: the demonstrations, and the policy's own episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendSpec
from bridge.errors import FieldtuneError
from runtime.episode import Episode
from runtime.index import EpisodeIndex
from runtime.reading import EpisodeError, read_row
from runtime.rundir import RunDir
from trainer.buffer import DemoBuffer, thin
from trainer.checkpoint import START_AGAIN
from trainer.config import DemosConfig
from trainer.demos import demo_rows
from trainer.samples import CloningSamples, cloning_samples, wordings


class ExperienceError(FieldtuneError):
    """The episodes that the trainer counts on are gone; the message says where and what to do."""


class Experience:
    """Turns episodes of a run into samples for the demonstration buffer."""

    def __init__(
        self, run: RunDir, spec: BackendSpec, horizon: int, tokens: Callable[[str], NDArray[np.int64]]
    ) -> None:
        """`spec` is the backend's, `horizon` the policy's; `tokens` encodes an instruction as `[L]`."""
        self.own = EpisodeIndex(run.episodes)
        self._demos = EpisodeIndex(run.demos)
        self._spec, self._horizon, self._tokens = spec, horizon, tokens

    def samples(self, episode: Episode) -> CloningSamples:
        """The samples of an own episode."""
        told = wordings(self._spec, episode.start.task, episode.start.instruction, self._tokens)
        return cloning_samples(episode, self._horizon, told)

    def demonstration(self, episode: Episode) -> CloningSamples:
        """The samples of a demonstration, which decides at every step: one every half chunk."""
        return thin(self.samples(episode), max(1, self._horizon // 2), episode.start.seed)

    def seed(self, buffer: DemoBuffer, tasks: Sequence[str], config: DemosConfig) -> int:
        """Put the demonstrations that supervised fine-tuning saw into the buffer; returns how many stayed.

        A deployment that started from a bundle made elsewhere has none.
        """
        kept = 0
        for task in tasks:
            for row in demo_rows(self._demos, task, config):
                samples = self.demonstration(read_row(self._demos, row))
                kept += buffer.seed(task, row.episode, row.steps, row.versions, samples)
        return kept

    def restore(self, buffer: DemoBuffer, state: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Fill the buffer with what it held as `DemoBuffer.state` was taken.

        An episode that can no longer be read is left out, and `warn` is told; raises `ExperienceError` where none can.
        """
        lost: list[str] = []

        def load(episode: str, demonstration: bool) -> CloningSamples | None:
            index = self._demos if demonstration else self.own
            row = index.get(episode)
            if row is None or row.deleted:
                lost.append(f"{index.directory}: episode {episode} is no longer in the log")
                return None
            try:
                read = read_row(index, row)
            except EpisodeError as error:
                lost.append(str(error))
                return None
            return self.demonstration(read) if demonstration else self.samples(read)

        buffer.restore(state, load)
        if lost and not buffer.episodes:
            raise ExperienceError(
                f"none of the {len(lost)} episodes of the demonstration buffer can be read: {lost[0]}; put their files "
                f"back, or move the trainer's checkpoint away {START_AGAIN}"
            )
        if lost:
            warn(f"{len(lost)} episodes of the demonstration buffer are left out, {buffer.episodes} remain: {lost[0]}")
