"""The layout of a LeRobotDataset v3 on disk, as `lerobot` 0.4.4 to 0.6.1 read it (`src/lerobot/datasets/utils.py`).

meta/info.json                               features, rate, totals
meta/tasks.parquet                           text of a task -> its index
meta/stats.json                              statistics of all frames
meta/episodes/chunk-000/file-000.parquet     one row an episode: where it lies, its length, its statistics
data/chunk-000/file-000.parquet              one row a frame, images in it as PNG
videos/KEY/chunk-000/file-000.mp4            instead of images, in datasets that have videos
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

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


class Feature(Struct):
    """A column of a dataset, as its `info.json` says."""

    dtype: str
    shape: list[int]
    names: Any = None
    units: list[str] | None = None
    kind: str | None = None

    @property
    def is_image(self) -> bool:
        """Whether it holds images, in the data files or as a video."""
        return self.dtype in ("image", "video")

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers."""
        return not self.is_image and self.dtype not in ("string", "language")

    @property
    def elements(self) -> list[str]:
        """The names of its elements; some datasets keep them as `{"motors": [...]}`. Empty without names."""
        names = self.names
        if isinstance(names, dict):
            names = next((value for value in names.values() if isinstance(value, list)), None)
        return [str(name) for name in names] if isinstance(names, list) else []


class Info(Struct):
    """What an import needs of a dataset's `info.json`."""

    codebase_version: str
    fps: float
    features: dict[str, Feature]
    data_path: str
    total_episodes: int
    video_path: str | None = None


def place(number: int) -> dict[str, int]:
    """Chunk and file of the number-th file."""
    return {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}


def features(spec: BackendSpec, frames: Frames, horizon: int) -> Features:
    """The columns of an export of this backend. `horizon` is the size of a chunk, for rows that are decisions.

    `units` and `kind` are ours: LeRobot has no place for them and ignores the keys. Raises `DatasetError` for a camera
    that cannot be the name of a column.
    """
    for camera in spec.cameras:
        if "/" in camera.name:
            raise DatasetError(f"camera {camera.name!r}: LeRobot has no columns with a / in their name")

    def number(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [1], "names": None}

    def vector(names: tuple[str, ...], units: tuple[str, ...]) -> dict[str, Any]:
        return {"dtype": "float32", "shape": [len(names)], "names": list(names), "units": list(units)}

    action = {**vector(spec.action.names, spec.action.units), "kind": spec.action.kind}
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
        **({STATE: vector(spec.state.names, spec.state.units)} if spec.state.names else {}),
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
