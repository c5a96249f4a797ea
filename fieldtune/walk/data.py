"""The last steps of the walk: an episode is judged anew, and the log goes out and comes back."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bridge.backends import make_backend
from fieldtune.commands.common import account
from fieldtune.commands.evaluate import fieldtune_command
from fieldtune.data.export import Wanted, export
from fieldtune.data.importing import import_demos
from fieldtune.data.lerobot_export import LeRobotExport
from fieldtune.data.lerobot_reading import LeRobotReader
from fieldtune.walk.comparison import compare_round_trip, holds
from fieldtune.walk.walking import Walk, WalkError
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from runtime.rundir import RunDir
from trainer.checkpoint import TrainerState, load_checkpoint

TRAINER_S = 240.0
ENOUGH = 5  # that one in the middle has neighbours


def relabel(walk: Walk, version: str) -> str:
    """A success in the trainer's buffer is said to be none: it leaves, and the others stay. Returns the episode."""
    step = walk.begin(
        "An episode is labelled anew",
        "/episodes and /learning",
        "The trainer starts beside the robots and fills its buffer of demonstrations with their fast successes. One of "
        "these is then labelled `failure`. With its next iteration the trainer has to let go of that one alone.",
    )
    up = walk.up
    trainer = up.child("trainer", fieldtune_command("train", up.config, up.overrides))
    saved = SavedState(walk.run.trainer / "checkpoint.pt")
    walk.start(trainer)
    what = f"{ENOUGH} successes of {version[:12]} of one task in the trainer's buffer"
    walk.until(lambda: len(most_of(saved.read(), version)) >= ENOUGH, what, TRAINER_S, trainer)
    # One state for all that is said of it: the trainer may write the next one at any time.
    state = saved.state
    assert state is not None
    before, own = buffered(state), most_of(state, version)
    chosen, neighbours = own[len(own) // 2], [own[len(own) // 2 - 1], own[len(own) // 2 + 1]]
    was = walk.index.get(chosen)
    row = walk.index.label(chosen, "failure", account())
    number = walk.index.labels_after(0)[-1].number
    walk.check(
        f"{chosen} of {row.task} ended as {was.status if was else '-'} after {row.steps} steps and is in the buffer, "
        f"one of {len(before)}; now it is a {row.status}, says {row.labelled_by}",
        (was is not None and was.status, row.status) == ("success", "failure"),
    )
    what = "the iteration of the trainer that takes up the label"
    walk.until(lambda: (newest := saved.read()) is not None and newest.labels >= number, what, TRAINER_S, trainer)
    later = saved.state
    assert later is not None
    after = buffered(later)
    walk.check(f"after iteration {later.iteration} the buffer has it no more", chosen not in after)
    walk.check(f"those before and after it are still there: {' '.join(neighbours)}", set(neighbours) <= after)
    left = before - after
    walk.check(f"{len(before) - len(left)} of the {len(before)} that were in it still are", left == {chosen})
    walk.end([trainer])
    step.figures = {
        "episode": chosen,
        "task": row.task,
        "labelled_by": row.labelled_by,
        "neighbours": neighbours,
        "iterations": [state.iteration, later.iteration],
        "buffer_before": len(before),
        "buffer_after": len(after),
        "left": sorted(left),
    }
    return chosen


class SavedState:
    """The trainer's state as its checkpoint has it."""

    def __init__(self, path: Path) -> None:
        """`path` need not be there yet."""
        self._path, self._read_ns = path, 0
        self.state: TrainerState | None = None
        """As it was last read."""

    def read(self) -> TrainerState | None:
        """Read it again if it has changed; None before the first."""
        changed_ns = self._path.stat().st_mtime_ns if self._path.exists() else 0
        if changed_ns != self._read_ns:
            checkpoint = load_checkpoint(self._path)
            self.state, self._read_ns = checkpoint.state if checkpoint else None, changed_ns
        return self.state


def buffered(state: TrainerState) -> set[str]:
    """The episodes in the demonstration buffer."""
    return {entry["episode"] for entries in state.buffer["entries"].values() for entry in entries}


def most_of(state: TrainerState | None, version: str) -> list[str]:
    """The buffer's episodes that `version` drove, of the task that has most of them, in order of admission."""
    entries = state.buffer["entries"] if state else {}
    own = [[e["episode"] for e in of_task if e["versions"] == [version]] for of_task in entries.values()]
    return max(own, key=len, default=[])


def export_and_import(walk: Walk, version: str, relabelled: str) -> None:
    """What was logged since the good version came goes out as a LeRobotDataset and comes back as demonstrations."""
    step = walk.begin(
        "The log is exported and imported again",
        "/episodes",
        f"The robots stop. All episodes since {version[:12]} was announced become a LeRobotDataset v3, and that "
        "becomes demonstrations of another run. What came back is compared with what was logged.",
    )
    walk.end(walk.robots)
    deployment, stopped = walk.up.deployment, walk.up.stop.is_set
    again = RunDir(walk.run.path / "imported")
    canary = next(change for change in walk.registry.stages(version) if change.stage == "candidate")
    wanted = Wanted(since_unix_s=canary.unix_s)
    rows = [row for row in walk.index.after(0, 10**9) if wanted.fits(row) and not row.deleted]
    dataset = walk.run.path / "dataset"
    done = export(walk.index, LeRobotExport(dataset, "steps"), wanted, lambda done, of: None, stopped)
    walk.check(f"{done.written} episodes exported to {dataset}", done.written == len(rows) and not done.left_out)
    reader = LeRobotReader(dataset)
    spec, first_seed = make_backend(deployment.backend).spec, deployment.trainer.demos.first_seed
    imported = import_demos(reader, again.demos, spec, deployment.dataset, first_seed, lambda done, of: None, stopped)
    walk.check(
        f"{imported.written} imported into {again.demos}, {imported.failures} without success left out",
        imported.written + imported.failures == len(rows),
    )
    if stopped():
        raise WalkError("stopped")
    trip = compare_round_trip(walk.index, rows, reader, EpisodeIndex(again.demos))
    walk.check(
        f"equal: success and actions of {trip.episodes} episodes, {trip.steps} steps; of those imported "
        f"{trip.observations} states and {trip.images} images",
        not trip.differences,
    )
    for difference in trip.differences:
        walk.check(difference, False)
    labels = [meta["success"] for meta in map(reader.meta, range(len(reader))) if meta["episode"] == relabelled]
    told = f"with success {labels[0]}" if labels else "not"
    walk.check(f"{relabelled} is in the dataset: {told}", labels == [False])
    row = walk.index.get(relabelled)
    there = row is None or holds(EpisodeIndex(again.demos), read_episode(walk.index.path(row)))
    walk.check(f"it is {'' if there else 'not '}among the imported demonstrations", not there)
    step.figures = {"dataset": str(dataset), **msgspec.to_builtins(trip)}
