"""Reads a LeRobotDataset v3 with pyarrow and PyAV, an episode at a time."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bridge.backend import UInt8
from fieldtune.data.lerobot_layout import INFO, TASKS, DatasetError, Info
from fieldtune.data.png import ImageError, decode_image

ROWS = 64  # of a data file read at once
INCOMPLETE = "is the dataset whole? Copy or download it again"


class DatasetEpisode:
    """An episode of n frames. `columns` `[n, ...]` are its numbers, `meta` its row in `meta/episodes`."""

    def __init__(
        self,
        dataset: LeRobotReader,
        number: int,
        columns: dict[str, NDArray[Any]],
        encoded: dict[str, list[bytes | None]],
    ) -> None:
        """`encoded` are its images as files, by column."""
        self.number, self.columns = number, columns
        self.meta: Mapping[str, Any] = dataset.meta(number)
        self._dataset, self._encoded = dataset, encoded

    def __len__(self) -> int:
        """How many frames."""
        return len(self.columns["task_index"])

    @property
    def text(self) -> str:
        """The text of its task, that of its first frame."""
        return self._dataset.texts[int(self.columns["task_index"][0])]

    def images(self, column: str) -> Iterator[UInt8]:
        """Its n images uint8 `[H, W, 3]`, decoded one after the other. Raises `DatasetError`."""
        if column not in self._encoded:
            yield from self._dataset.video(column, self.meta, len(self))
            return
        for frame, data in enumerate(self._encoded[column]):
            if data is None:
                raise DatasetError(f"episode {self.number}: {column} of frame {frame} is not in the data file")
            try:
                yield decode_image(data)
            except ImageError as error:
                raise DatasetError(f"episode {self.number}: {column} of frame {frame}: {error}") from error


class LeRobotReader:
    """A dataset in a directory. Methods raise `DatasetError`."""

    def __init__(self, directory: Path) -> None:
        """Read what it says of itself."""
        self.directory = directory
        path = directory / INFO
        try:
            self.info = msgspec.json.decode(path.read_bytes(), type=Info)
        except OSError as error:
            raise DatasetError(f"{directory} has no LeRobotDataset: {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} is not that of a LeRobotDataset: {error}") from error
        version = self.info.codebase_version
        if not version.startswith("v3."):
            raise DatasetError(
                f"{path}: codebase_version is {version}, expected v3.0; older ones are converted by lerobot's "
                "`lerobot.scripts.convert_dataset_v21_to_v30`"
            )
        self.texts = self._read_texts()
        self._meta = self._read_meta()

    def __len__(self) -> int:
        """How many episodes."""
        return len(self._meta)

    def meta(self, number: int) -> Mapping[str, Any]:
        """The row of an episode in `meta/episodes`, without its statistics."""
        return self._meta[number]

    def episodes(self, numbers: Sequence[str], images: Sequence[str]) -> Iterator[DatasetEpisode]:
        """All episodes in order, with these columns of numbers and of images or videos."""
        stored = [name for name in images if self.info.features[name].dtype == "image"]
        wanted = list(dict.fromkeys([*numbers, "task_index", "episode_index", *stored]))
        places = {(row["data/chunk_index"], row["data/file_index"]) for row in self._meta.values()}
        rows = (
            batch
            for chunk, file in sorted(places)
            for batch in _batches(
                self._path(self.info.data_path, chunk_index=chunk, file_index=file), wanted, set(stored)
            )
        )
        pieces = (piece for batch in rows for piece in _by_episode(batch))
        missing = set(self._meta)
        for number, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
            if number in self._meta:
                missing.discard(number)
                yield self._episode(number, pa.Table.from_batches([piece for _, piece in group]), stored)

        if missing:
            raise DatasetError(
                f"{self.directory}: the data files have no frames of episode {min(missing)}; {INCOMPLETE}"
            )

    def video(self, column: str, meta: Mapping[str, Any], frames: int) -> Iterator[UInt8]:
        """The images of an episode in a video."""
        for name in ("chunk_index", "file_index", "from_timestamp"):
            if meta.get(f"videos/{column}/{name}") is None:
                raise DatasetError(f"{self.directory}: the rows of episodes have no videos/{column}/{name}")
        at = {name: meta[f"videos/{column}/{name}"] for name in ("chunk_index", "file_index")}
        path = self._path(self.info.video_path, video_key=column, **at)
        # Frames are stamped from the episode's own start on; half a frame earlier none of another episode is meant.
        begin_s = meta[f"videos/{column}/from_timestamp"] - 0.5 / self.info.fps
        found = 0
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert stream.time_base is not None
                container.seek(max(0, int(begin_s / stream.time_base)), stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.time is None or frame.time < begin_s:
                        continue
                    if found == frames:
                        break
                    found += 1
                    yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise DatasetError(f"{path} cannot be read: {error}") from error
        if found < frames:
            raise DatasetError(f"{path} ends after {found} of the {frames} frames of episode {meta['episode_index']}")

    def _episode(self, number: int, table: pa.Table, stored: Sequence[str]) -> DatasetEpisode:
        if len(table) != self._meta[number]["length"]:
            raise DatasetError(
                f"{self.directory}: episode {number} has {len(table)} frames, its row says "
                f"{self._meta[number]['length']}"
            )
        encoded = {name: [(image or {}).get("bytes") for image in table[name].to_pylist()] for name in stored}
        columns = {name: _numbers(table, name, number) for name in table.column_names if name not in stored}
        for name, values in columns.items():
            said = self.info.features[name].shape if name in self.info.features else [1]
            if math.prod(values.shape[1:]) != math.prod(said):
                raise DatasetError(
                    f"{self.directory}: {name} of episode {number} has rows of shape {list(values.shape[1:])}, {INFO} "
                    f"says {said}"
                )
        if not 0 <= columns["task_index"].min() <= columns["task_index"].max() < len(self.texts):
            raise DatasetError(f"{self.directory}: episode {number} has a task_index without a text")
        return DatasetEpisode(self, number, columns, encoded)

    def _read_texts(self) -> list[str]:
        table = _table(self.directory / TASKS)
        texts = (pa.string(), pa.large_string())
        column = next((field.name for field in table.schema if field.type in texts), None)
        if column is None or "task_index" not in table.column_names:
            raise DatasetError(f"{self.directory / TASKS} has no texts, or no task_index")
        _require_integers(table, ["task_index"], self.directory / TASKS)
        by_index = dict(zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True))
        return [by_index.get(i, "") for i in range(max(by_index, default=-1) + 1)]

    def _read_meta(self) -> dict[int, Mapping[str, Any]]:
        found: dict[int, Mapping[str, Any]] = {}
        for path in sorted((self.directory / "meta" / "episodes").glob("*/*.parquet")):
            table = _table(path)
            table = table.select([name for name in table.column_names if not name.startswith("stats/")])
            needed = ["data/chunk_index", "data/file_index", "episode_index", "length"]
            if missing := [name for name in needed if name not in table.column_names]:
                raise DatasetError(f"{path} has no column {', '.join(missing)}")
            _require_integers(table, needed, path)
            found.update({row["episode_index"]: row for row in table.to_pylist()})
        # What is beyond the total was being added when its writer ended.
        counted = {number: found[number] for number in sorted(found) if number < self.info.total_episodes}
        if len(counted) < self.info.total_episodes:
            raise DatasetError(
                f"{self.directory}: meta/episodes has {len(counted)} of the {self.info.total_episodes} episodes that "
                f"{INFO} counts; {INCOMPLETE}"
            )
        return counted

    def _path(self, template: str | None, **at: Any) -> Path:
        if template is None:
            raise DatasetError(f"{self.directory / INFO}: video_path is missing")
        try:
            name = Path(os.path.normpath(template.format(**at)))
        except (LookupError, ValueError, AttributeError) as error:
            raise DatasetError(f"{self.directory / INFO}: {template} is no path") from error
        # By its name alone: what huggingface_hub downloads are links to files that lie elsewhere in its cache.
        if name.is_absolute() or name.parts[:1] == (os.pardir,) or "\0" in str(name):
            raise DatasetError(f"{self.directory / INFO}: {template} is outside of the dataset")
        return self.directory / name


def _batches(path: Path, columns: list[str], images: set[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}")
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                batch.validate(full=True)
                _require_integers(batch, ["episode_index", "task_index"], path)
                for name in images:
                    if not pa.types.is_struct(batch.column(name).type):
                        raise DatasetError(f"{path}: {name} is {batch.column(name).type}, and no files of images")
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _by_episode(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The parts of a batch that are of one episode each."""
    episode = np.asarray(batch.column("episode_index").to_pylist())
    starts = [0, *(np.flatnonzero(np.diff(episode)) + 1).tolist(), len(episode)]
    for start, end in itertools.pairwise(starts):
        yield int(episode[start]), batch.slice(start, end - start)


def _numbers(table: pa.Table, name: str, episode: int) -> NDArray[Any]:
    try:
        values = np.array(table[name].to_pylist())
    except ValueError as error:
        raise DatasetError(f"episode {episode}: rows of {name} have several sizes") from error
    if values.dtype.kind not in "fiub":
        raise DatasetError(f"episode {episode}: {name} has values that are missing or no numbers")
    return values


def _require_integers(table: pa.Table | pa.RecordBatch, names: Sequence[str], path: Path) -> None:
    for name in names:
        column = table.column(name)
        if not pa.types.is_integer(column.type) or column.null_count:
            raise DatasetError(f"{path}: {name} has values that are missing or no integers")


def _table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
