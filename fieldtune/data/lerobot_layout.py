"""The layout of a LeRobotDataset v3 on disk, as `lerobot` 0.4.4 to 0.6.1 read it (`src/lerobot/datasets/utils.py`).

    meta/info.json                               features, rate, totals
    meta/tasks.parquet                           text of a task -> its index
    meta/stats.json                              statistics of all frames
    meta/episodes/chunk-000/file-000.parquet     one row an episode: where it lies, its length, its statistics
    data/chunk-000/file-000.parquet              one row a frame, images in it as PNG
    videos/KEY/chunk-000/file-000.mp4            instead of images, in datasets that have videos
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from bridge.backend import BackendSpec
from bridge.errors import FieldtuneError
from fieldtune.data.frames import Frames

VERSION = "v3.0"
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA = "data/" + FILE + ".parquet"
EPISODES = "meta/episodes/" + FILE + ".parquet"
VIDEO = "videos/{video_key}/" + FILE + ".mp4"
FILES_PER_CHUNK = 1000

IMAGE = "observation.images."
STATE = "observation.state"
ACTION = "action"
# Not `observation.environment_state`: lerobot's policies would take it as an input, and a robot has none.
PRIVILEGED = "privileged"
OBSERVED = "observed"
EXECUTED = "executed"
STEP = "step"
POLICY_VERSION = "policy_version"
REWARD = "next.reward"
DONE = "next.done"

Features = dict[str, dict[str, Any]]


class DatasetError(FieldtuneError):
    """A dataset that cannot be written or read; the message says why."""


def place(number: int) -> dict[str, int]:
    """Chunk and file of the number-th file."""
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def features(spec: BackendSpec, frames: Frames, horizon: int) -> Features:
    """The columns of an export of this backend. `horizon` is the size of a chunk, for rows that are decisions.

    `units` is ours: LeRobot has no place for them and ignores the key. Raises `DatasetError` for a camera that cannot
    be the name of a column.
    """
    for camera in spec.cameras:
        if "/" in camera.name:
            raise DatasetError(f"camera {camera.name!r}: LeRobot has no columns with a / in their name")

    def number(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [1], "names": None}

    def vector(names: tuple[str, ...], units: tuple[str, ...]) -> dict[str, Any]:
        return {"dtype": "float32", "shape": [len(names)], "names": list(names), "units": list(units)}

    action = vector(spec.action.names, spec.action.units)
    if frames == "decisions":
        action["shape"] = [horizon, *action["shape"]]
    own: Features = {
        **{
            IMAGE + camera.name: {
                "dtype": "image",
                "shape": [camera.height, camera.width, 3],
                "names": ["height", "width", "channels"],
            }
            for camera in spec.cameras
        },
        STATE: vector(spec.state.names, spec.state.units),
        ACTION: action,
        REWARD: number("float32"),
        DONE: number("bool"),
        OBSERVED: number("bool"),
        STEP: number("int64"),
        POLICY_VERSION: number("string"),
    }
    if spec.privileged is not None:
        own[PRIVILEGED] = vector(spec.privileged.names, spec.privileged.units)
    if frames == "decisions":
        own[EXECUTED] = {"dtype": "bool", "shape": [horizon], "names": None}
    indices = ("frame_index", "episode_index", "index", "task_index")
    return {**own, "timestamp": number("float32"), **{name: number("int64") for name in indices}}


def info(spec: BackendSpec, frames: Frames, horizon: int) -> dict[str, Any]:
    """`meta/info.json` of a dataset without episodes."""
    fps = spec.control_hz / (horizon if frames == "decisions" else 1)
    return {
        "codebase_version": VERSION,
        "robot_type": spec.name,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if fps == int(fps) else fps,
        "splits": {},
        "data_path": DATA,
        "video_path": None,
        "features": features(spec, frames, horizon),
    }


def data_schema(columns: Features) -> pa.Schema:
    """The Arrow types that `datasets` expects for these features."""
    return pa.schema([(name, _arrow(feature)) for name, feature in columns.items()])


def tasks_table(texts: list[str]) -> pa.Table:
    """`meta/tasks.parquet`. lerobot reads it with pandas and wants the texts as its index, which pandas' notes say."""
    index = "__index_level_0__"
    notes = {
        "index_columns": [index],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema([("task_index", pa.int64()), (index, pa.string())], metadata={"pandas": json.dumps(notes)})
    return pa.table({"task_index": list(range(len(texts))), index: texts}, schema=schema)


def _arrow(feature: dict[str, Any]) -> pa.DataType:
    if feature["dtype"] == "image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = {
        "float32": pa.float32(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "string": pa.string(),
    }[feature["dtype"]]
    shape = feature["shape"]
    if shape == [1]:
        return kind
    return pa.list_(kind, shape[0]) if len(shape) == 1 else pa.list_(pa.list_(kind))
