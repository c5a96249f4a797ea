"""Whether what came back from an export is what was logged: every step, number and pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from fieldtune.data.lerobot_reading import LeRobotReader
from runtime.episode import Decision, Episode
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import read_episode

MOST_DIFFERENCES = 10


class RoundTrip(Struct, kw_only=True):
    """What was compared. `differences` names the first few things that are not equal; empty if all are."""

    episodes: int
    """In the dataset."""
    failures: int = 0
    """Of these, without success: they show nothing and are not imported."""
    imported: int = 0
    steps: int = 0
    """Of all episodes of the dataset, whose actions are equal to what was sent."""
    observations: int = 0
    images: int = 0
    differences: list[str]


def compare_round_trip(
    log: EpisodeIndex, rows: Sequence[EpisodeRow], dataset: LeRobotReader, demos: EpisodeIndex
) -> RoundTrip:
    """Compare logged episodes `rows`, in the order in which they were exported, with the dataset (success and what was
    sent at every step) and with `demos`, the log that the dataset was imported into (that, states and pixels too).

    One episode of each is in memory at a time.
    """
    there = [dataset.meta(number) for number in range(len(dataset))]
    done = RoundTrip(episodes=len(there), differences=[])
    wrong = done.differences
    if [row.episode for row in rows] != [meta["episode"] for meta in there]:
        wrong.append(f"{len(rows)} episodes were to be exported, the dataset has {len(there)}, or others")
    for row, meta in zip(rows, there, strict=False):
        if (row.status == "success", row.steps) != (meta["success"], meta["length"]):
            wrong.append(
                f"{row.episode}: {row.status} after {row.steps} steps in the log, success {meta['success']} after "
                f"{meta['length']} in the dataset"
            )
    for row, exported in zip(rows, dataset.episodes(["action"], []), strict=False):
        sent = _sent(read_episode(log.path(row)))
        if np.array_equal(sent, exported.columns["action"]):
            done.steps += len(sent)
        else:
            wrong.append(f"{row.episode}: the actions in the dataset differ")
    successes = [row for row in rows if row.status == "success"]
    done.failures = len(rows) - len(successes)
    back = demos.after(0, limit=len(rows) + 1)
    done.imported = len(back)
    if len(back) != len(successes):
        wrong.append(f"{len(successes)} episodes succeeded, {len(back)} were imported")
    for row, copy in zip(successes, back, strict=False):
        found = _difference(read_episode(log.path(row)), read_episode(demos.path(copy)), done)
        if found:
            wrong.append(f"{row.episode}: {found}")
    del wrong[MOST_DIFFERENCES:]
    return done


def holds(demos: EpisodeIndex, episode: Episode) -> bool:
    """Whether one of the demonstrations is this episode: it has its actions, and no other has them to the bit."""
    sent = _sent(episode)
    return any(np.array_equal(sent, _sent(read_episode(demos.path(row)))) for row in demos.after(0, limit=10**9))


def _difference(logged: Episode, back: Episode, done: RoundTrip) -> str:
    """The first thing that differs; what is equal is counted in `done`."""
    if (logged.start.task, logged.start.instruction) != (back.start.task, back.start.instruction):
        return f"told {back.start.instruction!r} for {back.start.task}, was {logged.start.instruction!r}"
    if not np.array_equal(_sent(logged), _sent(back)):
        return "the actions that were sent differ"
    # What was decided on but never played, when the episode had ended, is no row of a dataset.
    seen, again = _played(logged), _played(back)
    if [decision.step for decision in seen] != [decision.step for decision in again]:
        return "it was observed at other steps"
    for one, other in zip(seen, again, strict=True):
        if not np.array_equal(one.observation.state, other.observation.state):
            return f"the state at step {one.step} differs"
        for camera, image in one.observation.images.items():
            if not np.array_equal(image, other.observation.images[camera]):
                return f"the image of camera {camera} at step {one.step} differs"
            done.images += 1
        done.observations += 1
    return ""


def _sent(episode: Episode) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What was sent, `[steps, d]`."""
    d = len(episode.start.spec.action.names)
    return np.concatenate([np.zeros((0, d), np.float32), *(decision.sent for decision in episode.decisions)])


def _played(episode: Episode) -> list[Decision]:
    return [decision for decision in episode.decisions if len(decision.sent)]
