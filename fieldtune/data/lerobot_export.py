"""Writes a LeRobotDataset v3 with pyarrow alone: an episode has a data file and a row of its own.

An episode is written once its file in `meta/episodes` is there, which comes after its data. `meta/info.json` comes last
of all: without it there is no dataset yet, with it the episodes that it counts are whole, whatever was added since. So
an export that was killed is gone on with by looking which episodes have their row.
"""

from __future__ import annotations

import fcntl
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bridge.backend import Observation
from fieldtune.data import lerobot_layout as layout
from fieldtune.data.frames import Frames, FramesError, Rows, rows_of
from fieldtune.data.lerobot_layout import DatasetError
from fieldtune.data.lerobot_tables import data_schema, tasks_table
from fieldtune.data.png import encode_png
from fieldtune.data.statistics import Stats, column_stats, image_stats, join
from runtime.durable import write_atomic, write_json
from runtime.episode import Episode
from runtime.index import EpisodeRow

BEGUN = "meta/fieldtune.json"
"""What `meta/info.json` will say apart from the totals; there from the first episode on."""
DICTIONARY_BYTES = 256 * 1024 * 1024  # an image that several rows repeat is stored once
STATS = "stats/"


class LeRobotExport:
    """The dataset in a directory; made there, or gone on with. Methods raise `DatasetError` or `OSError`."""

    def __init__(self, directory: Path, frames: Frames) -> None:
        """See which episodes are there. Raises `DatasetError` if another process exports there, or it is not ours."""
        self.directory = directory
        self._frames = frames
        (directory / "meta" / "episodes").mkdir(parents=True, exist_ok=True)
        self._lock = _claim(directory / "meta" / "fieldtune.lock")
        begun = directory / BEGUN
        if not begun.exists() and (directory / layout.INFO).exists():
            raise DatasetError(f"{directory} has a dataset that was not exported by fieldtune; choose another --out")
        self._info: dict[str, Any] | None = _begun(begun) if begun.exists() else None
        rows_there = "decisions" if self._info and layout.EXECUTED in self._info["features"] else "steps"
        if self._info is not None and rows_there != frames:
            raise DatasetError(
                f"{directory} has rows that are {rows_there}, not {frames}; choose another --out, or "
                f"--frames {rows_there}"
            )
        self._episodes: set[str] = set()
        self._tasks: dict[str, int] = {}
        self._total_frames = 0
        self._stats: dict[str, Stats] = {}
        for row in _rows(directory):
            stats = {name: np.array(value) for name, value in row.items() if name.startswith(STATS)}
            self._count(row["episode"], row["tasks"], row["length"], _nested(stats))

    def has(self, episode: str) -> bool:
        """Whether an episode, by its id, is in the dataset."""
        return episode in self._episodes

    def add(self, row: EpisodeRow, episode: Episode) -> bool:
        """Append an episode; False for one in which nothing was executed. Raises `FramesError`, also for one of another
        backend than those that are there."""
        rows = rows_of(episode, self._frames)
        if not len(rows):
            return False
        self._begin(episode, rows)
        number, text = len(self._episodes), episode.start.instruction
        at = layout.place(number)
        columns = self._columns(rows, number, self._tasks.get(text, len(self._tasks)))
        images = {
            layout.IMAGE + camera.name: [o.images[camera.name] for o in rows.observation]
            for camera in episode.start.spec.cameras
        }
        counted = columns
        if rows.executed is not None and rows.executed.any():
            counted = {**columns, layout.ACTION: rows.action[rows.executed]}  # without what only fills a chunk up
        stats = {
            **{
                name: image_stats(_each_once(values)) | {"count": np.array([len(rows)])}
                for name, values in images.items()
            },
            **{name: column_stats(values) for name, values in counted.items() if isinstance(values, np.ndarray)},
        }
        self._write_data(at, columns, images)
        assert self._info is not None
        meta = {
            "episode_index": number,
            "tasks": [text],
            "length": len(rows),
            **{f"data/{name}": value for name, value in at.items()},
            **{f"meta/episodes/{name}": value for name, value in at.items()},
            "dataset_from_index": self._total_frames,
            "dataset_to_index": self._total_frames + len(rows),
            "episode": row.episode,
            "success": row.status == "success",
            "status": row.status,
            "task_name": row.task,
            "seed": row.seed,
            "source": row.source,
            "policy_versions": list(dict.fromkeys(rows.version)),
            "started_unix_s": row.started_unix_s,
            **{f"{STATS}{name}/{kind}": v.tolist() for name, own in stats.items() for kind, v in own.items()},
        }
        _write_table(self.directory / layout.EPISODES.format(**at), pa.Table.from_pylist([meta]))
        self._count(row.episode, [text], len(rows), stats)
        return True

    def finish(self) -> None:
        """Make what was added part of the dataset."""
        if self._info is None:
            return
        _write_table(self.directory / layout.TASKS, tasks_table(list(self._tasks)))
        stats = {name: {kind: v.tolist() for kind, v in own.items()} for name, own in self._stats.items()}
        write_json(self.directory / layout.STATS, stats)
        totals = {
            "total_episodes": len(self._episodes),
            "total_frames": self._total_frames,
            "total_tasks": len(self._tasks),
            "splits": {"train": f"0:{len(self._episodes)}"},
        }
        write_json(self.directory / layout.INFO, {**self._info, **totals})

    def close(self) -> None:
        """Let others write here; idempotent."""
        self._lock.close()

    def _begin(self, episode: Episode, rows: Rows) -> None:
        """Note what the dataset is, or check that the episode fits what was noted."""
        horizon = rows.action.shape[1] if self._frames == "decisions" else 1
        wanted = layout.info(episode.start.spec, self._frames, horizon)
        if self._info is not None:
            # Datasets that were begun by an earlier version do not say it.
            self._info["features"][layout.ACTION].setdefault("kind", episode.start.spec.action.kind)
        if self._info is None:
            write_json(self.directory / BEGUN, wanted)
            self._info = wanted
        elif self._info != wanted:
            raise FramesError(
                f"{self.directory} was begun with {_difference(self._info, wanted)} of this episode; one dataset has "
                "one backend and one size of chunk: choose another --out for it, with --since, --version or --task"
            )

    def _columns(self, rows: Rows, number: int, task: int) -> dict[str, NDArray[Any] | Sequence[str]]:
        """All but the images."""
        assert self._info is not None
        n = len(rows)
        index = np.arange(n)
        columns: dict[str, NDArray[Any] | Sequence[str]] = {
            layout.ACTION: rows.action,
            layout.REWARD: rows.reward,
            layout.DONE: index == n - 1,
            layout.OBSERVED: rows.observed,
            layout.STEP: rows.step,
            layout.POLICY_VERSION: rows.version,
            "timestamp": (index / self._info["fps"]).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(n, number),
            "index": index + self._total_frames,
            "task_index": np.full(n, task),
        }
        if layout.STATE in self._info["features"]:
            columns[layout.STATE] = np.stack([o.state for o in rows.observation])
        if layout.PRIVILEGED in self._info["features"]:
            columns[layout.PRIVILEGED] = np.stack([_privileged(o) for o in rows.observation])
        if rows.executed is not None:
            columns[layout.EXECUTED] = rows.executed
        return columns

    def _write_data(self, at: dict[str, int], columns: dict[str, Any], images: dict[str, list[Any]]) -> None:
        assert self._info is not None
        features = self._info["features"]
        values: dict[str, Any] = {name: _list(column, features[name]["shape"]) for name, column in columns.items()}
        for name, own in images.items():
            encoded = {id(image): encode_png(image) for image in _each_once(own)}
            values[name] = [{"bytes": encoded[id(image)], "path": None} for image in own]
        schema = data_schema(features)
        table = pa.table({name: values[name] for name in schema.names}, schema=schema)
        _write_table(self.directory / layout.DATA.format(**at), table)

    def _count(self, episode: str, tasks: list[str], length: int, stats: dict[str, Stats]) -> None:
        self._episodes.add(episode)
        for text in tasks:
            self._tasks.setdefault(text, len(self._tasks))
        self._total_frames += length
        for name, own in stats.items():
            self._stats[name] = join(self._stats[name], own) if name in self._stats else own


def _begun(path: Path) -> dict[str, Any]:
    try:
        return dict(msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is damaged ({error}); choose another --out") from error


def _rows(directory: Path) -> Iterator[dict[str, Any]]:
    """The rows of the episodes that are there, in order."""
    number = 0
    while (path := directory / layout.EPISODES.format(**layout.place(number))).exists():
        try:
            rows = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise DatasetError(f"{path} is damaged ({error}); choose another --out") from error
        if len(rows) != 1 or rows[0].get("episode") is None:
            raise DatasetError(f"{path} has episodes that others have added to the dataset; choose another --out")
        yield rows[0]
        number += 1


def _nested(stats: dict[str, NDArray[Any]]) -> dict[str, Stats]:
    nested: dict[str, Stats] = {}
    for name, value in stats.items():
        column, _, kind = name.removeprefix(STATS).rpartition("/")
        nested.setdefault(column, {})[kind] = value
    return nested


def _each_once(images: list[Any]) -> list[Any]:
    """Rows repeat an image by referring to it again."""
    return list({id(image): image for image in images}.values())


def _privileged(observation: Observation) -> NDArray[np.float32]:
    if observation.privileged is None:
        raise DatasetError("an observation has no privileged state, though the backend's spec names it")
    return observation.privileged


def _list(column: NDArray[Any] | Sequence[str], shape: list[int]) -> list[Any]:
    """What a column holds in its rows: where that is one element LeRobot has a plain number."""
    if not isinstance(column, np.ndarray):
        return list(column)
    values: list[Any] = (column.reshape(-1) if shape == [1] else column).tolist()
    return values


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    key = next(key for key in old if old[key] != new.get(key))
    if key == "features":
        names = [name for name in {**old[key], **new[key]} if old[key].get(name) != new[key].get(name)]
        return f"other columns ({', '.join(names)}) than those"
    return f"{key} {old[key]}, not the {new[key]}"


def _write_table(path: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy", dictionary_pagesize_limit=DICTIONARY_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _claim(path: Path) -> IO[str]:
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise DatasetError(f"{path.parent.parent}: another process exports there now") from error
    return file
