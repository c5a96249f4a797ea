"""A LeRobotDataset becomes demonstrations: episodes of the run's own log, as if an expert had shown them here."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bridge.backend import BackendSpec, CameraSpec, Observation, UInt8, instruction_of
from bridge.backends.resizing import Resizer
from bridge.messages import observation_tensors
from fieldtune.data.lerobot_layout import OBSERVED, DatasetError
from fieldtune.data.lerobot_reading import DatasetEpisode, LeRobotReader
from fieldtune.data.mapping import DatasetConfig, DatasetMap, check_limits, map_dataset
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.records import tensor_records
from trainer.attempts import EXPERT_VERSION, Demonstration
from trainer.demos import NO_LIMIT_MB, store

CLIENT = "import"


class Imported(Struct, frozen=True):
    """What an import has done."""

    written: int
    there: int
    """Imported before."""
    failures: int
    """Episodes that the dataset says did not succeed; they show nothing and are left out."""
    tasks: dict[str, int]
    """Demonstrations in the log now, by task."""


def import_demos(
    dataset: LeRobotReader,
    directory: Path,
    spec: BackendSpec,
    config: DatasetConfig,
    first_seed: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Imported:
    """Put the successful episodes of a dataset into the log of demonstrations in `directory`.

    All episodes count as successes, unless their rows have `success`. Their ids follow from their content: what was
    imported is not imported again, and an import that was ended goes on. Seeds are the next ones free from
    `first_seed` on. An observation that an export of ours says was held (`observed` is False) makes no decision of its
    own: the decision before it goes on.

    Raises `ConfigError` for what does not fit the backend, before anything is written, and `DatasetError` for what
    cannot be read.
    """
    mapped = map_dataset(dataset.info, dataset.texts, spec, config)
    for episode in _episodes(dataset, mapped, images=[]):
        if not _failed(episode):
            _check_numbers(episode, mapped, spec)
    if mapped.privileged is None:
        spec = replace(spec, privileged=None)
    log = EpisodeLog(directory, queue_mb=NO_LIMIT_MB)
    try:
        index = EpisodeIndex(directory)
        demos = [row for row in index.list(limit=10**9, status="success") if row.source == "expert"]
        known = index.known()
        seeds = dict.fromkeys(spec.instructions, first_seed)
        for row in demos:
            seeds[row.task] = max(seeds.get(row.task, first_seed), row.seed + 1)
        counts = dict.fromkeys(mapped.tasks.values(), 0)
        for row in demos:
            counts[row.task] = counts.get(row.task, 0) + (not row.deleted)
        written = there = failures = 0
        for done, episode in enumerate(_episodes(dataset, mapped, list(mapped.cameras.values())), 1):
            if stopped():
                break
            name = _identity(episode, mapped)
            while (stored := index.get(name)) is not None and (
                stored.deleted or (stored.status == "aborted" and not stored.labelled_by)
            ):
                # An import was killed in it, or its file is gone. Its id is taken: what takes its place has the next.
                name = hashlib.sha256(name.encode()).hexdigest()[: len(name)]
            if _failed(episode):
                failures += 1
            elif name in known:
                there += 1
            else:
                task = mapped.tasks[episode.text]
                store(log, _demonstration(episode, name, task, seeds[task], mapped, spec, config.resize))
                seeds[task] += 1
                counts[task] += 1
                written += 1
            progress(done, len(dataset))
        return Imported(written, there, failures, counts)
    finally:
        log.close()


def _failed(episode: DatasetEpisode) -> bool:
    return episode.meta.get("success") is False


def _check_numbers(episode: DatasetEpisode, mapped: DatasetMap, spec: BackendSpec) -> None:
    where = f"episode {episode.number}"
    check_limits(mapped.action.read(episode.columns), spec, where)
    if not np.isfinite(mapped.state.read(episode.columns)).all():
        raise DatasetError(f"{where}: the state holds a value that is not finite")


def _episodes(dataset: LeRobotReader, mapped: DatasetMap, images: list[str]) -> Iterator[DatasetEpisode]:
    vectors = [mapped.state, mapped.action, *([mapped.privileged] if mapped.privileged else [])]
    numbers = [column for vector in vectors for column in vector.columns]
    if OBSERVED in dataset.info.features:
        numbers.append(OBSERVED)
    return dataset.episodes(numbers, images)


def _identity(episode: DatasetEpisode, mapped: DatasetMap) -> str:
    """An id that the same episode, mapped in the same way, always has."""
    digest = hashlib.sha256(episode.text.encode() + b"\0" + mapped.tasks[episode.text].encode())
    for vector in (mapped.state, mapped.action):
        digest.update(np.ascontiguousarray(vector.read(episode.columns)).data)
    digest.update(str(sorted(mapped.cameras.items())).encode())
    # Two that are the same to the last digit are two nevertheless.
    digest.update(str(episode.number).encode())
    return digest.hexdigest()[:32]


def _demonstration(
    episode: DatasetEpisode, name: str, task: str, seed: int, mapped: DatasetMap, spec: BackendSpec, resize: bool
) -> Demonstration:
    """A dataset's episode as the log has it."""
    where = f"episode {episode.number}"
    state, action = mapped.state.read(episode.columns), mapped.action.read(episode.columns)
    privileged = mapped.privileged.read(episode.columns) if mapped.privileged else None
    observed = episode.columns.get(OBSERVED)
    held = np.zeros(len(episode), bool) if observed is None else ~observed.astype(bool).reshape(-1)
    starts = [0, *(i for i in range(1, len(episode)) if not held[i]), len(episode)]
    images = {
        camera.name: _sized(episode.images(mapped.cameras[camera.name]), camera, resize, where)
        for camera in spec.cameras
    }
    records: list[DecisionRecord | ExecutedRecord] = []
    for start, end in itertools.pairwise(starts):
        seen = {camera: next(own) for camera, own in images.items()}
        for own in images.values():
            for _ in range(end - start - 1):
                next(own)
        observation = Observation(seen, state[start], None if privileged is None else privileged[start])
        sent, number = action[start:end], len(records) // 2 + 1
        tensors = {**observation_tensors(observation), "actions": sent.copy()}
        records.append(
            DecisionRecord(decision=number, step=start, version=EXPERT_VERSION, tensors=tensor_records(tensors))
        )
        executed = {"sent": sent.copy(), "reward": np.zeros(end - start, np.float32)}
        records.append(ExecutedRecord(decision=number, tensors=tensor_records(executed)))
    begun = EpisodeStart(
        format=FORMAT,
        episode=name,
        task=task,
        instruction=episode.text if episode.text in spec.instructions[task] else instruction_of(spec, task, seed),
        seed=seed,
        source="expert",
        explore=False,
        client=CLIENT,
        spec=spec,
        started_unix_s=time.time(),
    )
    return Demonstration(begun, records, EndRecord(status="success", steps=len(episode), reason="", tensors={}))


def _sized(images: Iterator[UInt8], camera: CameraSpec, resize: bool, where: str) -> Iterator[UInt8]:
    """The images in the camera's size. The dataset was asked for theirs when it was mapped; here is what they have."""
    resizer: Resizer | None = None
    size: tuple[int, int] | None = None
    for image in images:
        found = (image.shape[0], image.shape[1])
        if found != (camera.height, camera.width) and not resize:
            raise DatasetError(
                f"{where}: images of camera {camera.name} are {found[0]} x {found[1]}, not {camera.height} x "
                f"{camera.width} as the dataset says; dataset.resize: true resizes them"
            )
        if resizer is None:
            resizer, size = Resizer(found, (camera.height, camera.width)), found
        elif found != size:
            raise DatasetError(f"{where}: images of camera {camera.name} have several sizes")
        yield resizer(image)
