"""Imports: a dataset becomes the run's own demonstrations, or is refused by the name of what does not fit."""

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import HORIZON, SPEC, log_of, observation, picture, sent
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.backend import ActionSpec, CameraSpec, VectorSpec
from bridge.backends import make_backend
from bridge.config import BackendConfig, ConfigError
from fieldtune.cli import run
from fieldtune.commands import up
from fieldtune.data.export import Wanted, export
from fieldtune.data.importing import Imported, import_demos
from fieldtune.data.lerobot_export import LeRobotExport
from fieldtune.data.lerobot_layout import DatasetError
from fieldtune.data.lerobot_reading import LeRobotReader
from fieldtune.data.lerobot_tables import tasks_table
from fieldtune.data.mapping import DatasetConfig, ElementConfig, changes, map_dataset
from fieldtune.deployment import load_deployment
from runtime.episode import Episode
from runtime.index import EpisodeIndex
from runtime.reading import read_episode

STEPS = 3 * HORIZON - 1
AS_NAMED = DatasetConfig()


def exported(log: Path, out: Path) -> Path:
    export(EpisodeIndex(log), LeRobotExport(out, "steps"), Wanted(), lambda done, total: None)
    return out


def imported(dataset: Path, demos: Path, config: DatasetConfig = AS_NAMED, spec: Any = SPEC, **hooks: Any) -> Imported:
    return import_demos(LeRobotReader(dataset), demos, spec, config, 5, lambda done, total: None, **hooks)


def demos_in(directory: Path) -> list[Episode]:
    index = EpisodeIndex(directory)
    return [read_episode(index.path(row)) for row in index.after(0)]


def rewrite_info(dataset: Path, **changes: Any) -> None:
    path = dataset / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- content ----------------------------------------------------------------------------------------------------


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    dataset = exported(log_of(tmp_path / "log", 3), tmp_path / "out")
    assert imported(dataset, tmp_path / "demos") == Imported(written=2, there=0, failures=1, tasks={"t": 2})
    first, second = demos_in(tmp_path / "demos")
    assert (first.start.seed, second.start.seed) == (5, 6) and first.start.source == "expert"
    assert first.success and first.steps == STEPS and first.start.instruction == "go" and first.versions == ["expert"]
    # Steps without an observation of their own belong to the decision before them.
    assert [(d.step, len(d.sent)) for d in second.decisions] == [(0, 4), (4, 4), (8, 3)]
    for decision in second.decisions:
        seen = observation(decision.step)
        np.testing.assert_array_equal(decision.observation.state, seen["state"])
        for camera in ("eye", "wrist"):
            np.testing.assert_array_equal(decision.observation.images[camera], seen[f"image/{camera}"])
        np.testing.assert_array_equal(decision.sent, [sent(decision.step + i) for i in range(len(decision.sent))])
        assert decision.log_prob is None


def test_a_vector_of_one_element_or_none_comes_back(tmp_path: Path) -> None:
    one = ActionSpec(("a",), ("m",), (-1.0,), (1.0,), "absolute")
    for names in (("x",), ()):
        small = replace(SPEC, state=VectorSpec(names, ("m",) * len(names)), action=one)
        where = tmp_path / str(len(names))
        dataset = exported(log_of(where / "log", 1, spec=small), where / "out")
        assert imported(dataset, where / "demos", spec=small).written == 1
        last = demos_in(where / "demos")[0].decisions[-1]
        np.testing.assert_array_equal(last.observation.state, observation(8, small)["state"])
        np.testing.assert_array_equal(last.sent, [sent(step)[:1] for step in (8, 9, 10)])


def test_an_import_goes_on_and_writes_nothing_twice(tmp_path: Path) -> None:
    dataset, demos = exported(log_of(tmp_path / "log", 5), tmp_path / "out"), tmp_path / "demos"
    polls = iter([False, False, True])
    assert imported(dataset, demos, stopped=lambda: next(polls)).written == 1
    assert imported(dataset, demos) == Imported(written=2, there=1, failures=2, tasks={"t": 3})
    assert imported(dataset, demos).written == 0
    assert [episode.start.seed for episode in demos_in(demos)] == [5, 6, 7]


def test_an_episode_in_which_an_import_was_killed_is_imported(tmp_path: Path) -> None:
    dataset, demos = exported(log_of(tmp_path / "log", 5), tmp_path / "out"), tmp_path / "demos"
    assert imported(dataset, demos).written == 3
    index = EpisodeIndex(demos)
    names = [row.episode for row in index.after(0)]
    index.close()
    for path in demos.glob("index.sqlite*"):
        path.unlink()
    torn = demos / "done" / f"{names[1]}.ep"
    content = torn.read_bytes()
    torn.unlink()
    (demos / "open" / torn.name).write_bytes(content[: len(content) // 2])
    assert imported(dataset, demos) == Imported(written=1, there=2, failures=2, tasks={"t": 3})
    assert imported(dataset, demos).written == 0, "once"
    statuses = sorted(row.status for row in EpisodeIndex(demos).after(0))
    assert statuses == ["aborted", "success", "success", "success"]


def test_a_demonstration_whose_file_is_gone_is_imported_again(tmp_path: Path) -> None:
    dataset, demos = exported(log_of(tmp_path / "log", 5), tmp_path / "out"), tmp_path / "demos"
    assert imported(dataset, demos).written == 3
    gone, damaged, _ = (demos / "done" / row.file for row in EpisodeIndex(demos).after(0))
    gone.unlink()
    assert imported(dataset, demos) == Imported(written=1, there=2, failures=2, tasks={"t": 3})
    assert imported(dataset, demos) == Imported(written=0, there=3, failures=2, tasks={"t": 3})
    damaged.unlink()
    polls = iter([True])
    assert imported(dataset, demos, stopped=lambda: next(polls)).tasks == {"t": 2}


def made(
    path: Path, frames: int = 6, episodes: int = 2, video: bool = False, fps: int = 10, jpeg: bool = False
) -> Path:
    """A dataset as others make them: several episodes in a file, names of their own, degrees, no success."""
    n = frames * episodes
    pictures = [picture(i, 16, 24) for i in range(n)]
    features = {
        "observation.images.front": {"dtype": "video" if video else "image", "shape": [3, 16, 24],
                                     "names": ["channels", "height", "width"]},
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["j1", "j2", "j3"]}},
        "action": {"dtype": "float32", "shape": [2], "names": None},
    }  # fmt: skip
    columns: dict[str, Any] = {
        "observation.state": [[i, 2 * i, 90] for i in range(n)],
        "action": [[i / 100, 45] for i in range(n)],
        "episode_index": [i // frames for i in range(n)],
        "task_index": [0] * n,
    }
    if not video:
        columns["observation.images.front"] = [{"bytes": encoded(image, jpeg), "path": None} for image in pictures]
    at = {"chunk_index": 0, "file_index": 0}
    rows = [
        {
            "episode_index": e, "length": frames, "tasks": ["Pick it up"],
            **{f"data/{name}": value for name, value in at.items()},
            **{f"videos/observation.images.front/{name}": value for name, value in at.items()},
            "videos/observation.images.front/from_timestamp": e * frames / fps,
        }
        for e in range(episodes)
    ]  # fmt: skip
    for name in ("meta/episodes/chunk-000", "data/chunk-000", "videos/observation.images.front/chunk-000"):
        (path / name).mkdir(parents=True)
    pq.write_table(pa.table(columns), path / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(tasks_table(["Pick it up"]), path / "meta/tasks.parquet")
    if video:
        write_video(path / "videos/observation.images.front/chunk-000/file-000.mp4", pictures, fps)
    info = {
        "codebase_version": "v3.0", "fps": fps, "features": features, "total_episodes": episodes,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


def encoded(image: Any, jpeg: bool) -> bytes:
    codec = av.CodecContext.create("mjpeg" if jpeg else "png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.width, codec.height = image.shape[1], image.shape[0]
    codec.pix_fmt = "yuvj444p" if jpeg else "rgb24"
    codec.time_base = 1  # type: ignore[assignment]
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=codec.pix_fmt)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def write_video(path: Path, pictures: list[Any], fps: int) -> None:
    """h264 in RGB without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0", "g": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for image in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


DEGREE = 0.01
MAPPED = DatasetConfig(
    cameras={"eye": "observation.images.front"},
    state={
        "x": "observation.state/j1",
        "y": "observation.state/j2",
        "z": ElementConfig("observation.state/j3", DEGREE),
    },
    action={"a": "action/0", "b": ElementConfig("action/1", DEGREE, offset=-1.0)},
    tasks={"Pick it up": "u"},
)
ONE_CAMERA = replace(SPEC, cameras=(CameraSpec("eye", 16, 24),))


@pytest.mark.parametrize("video", [False, True])
def test_names_units_and_texts_are_mapped(video: bool, tmp_path: Path) -> None:
    dataset = made(tmp_path / "theirs", video=video)
    done = imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)
    assert done == Imported(written=2, there=0, failures=0, tasks={"u": 2})
    second = demos_in(tmp_path / "demos")[1]
    assert second.start.task == "u" and second.start.instruction == "stay" and len(second.decisions) == 6
    for i, decision in enumerate(second.decisions, 6):
        np.testing.assert_allclose(decision.observation.state, [i, 2 * i, 0.9], rtol=1e-6)
        np.testing.assert_allclose(decision.sent, [[i / 100, -0.55]], rtol=1e-6)
        np.testing.assert_array_equal(decision.observation.images["eye"], picture(i, 16, 24))


def test_a_dataset_in_the_cache_of_a_download_is_links(tmp_path: Path) -> None:
    dataset = made(tmp_path / "snapshots/main", video=True)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate([*dataset.rglob("*.parquet"), *dataset.rglob("*.mp4"), dataset / "meta/info.json"]):
        path.rename(tmp_path / f"blobs/{i}")
        path.symlink_to(tmp_path / f"blobs/{i}")
    assert imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA).written == 2


def test_images_are_resized_where_that_is_asked_for(tmp_path: Path) -> None:
    dataset, small = made(tmp_path / "theirs", jpeg=True), replace(SPEC, cameras=(CameraSpec("eye", 8, 8),))
    with pytest.raises(ConfigError, match=r"cameras\.eye: .* is 16 x 24 x 3 and the camera of fake 8 x 8 x 3"):
        imported(dataset, tmp_path / "demos", MAPPED, small)
    # The description says the camera's own size, the images have another.
    features = json.loads((dataset / "meta/info.json").read_text())["features"]
    features["observation.images.front"]["shape"] = [3, 8, 8]
    rewrite_info(dataset, features=features)
    with pytest.raises(DatasetError, match="images of camera eye are 16 x 24, not 8 x 8 as the dataset says"):
        imported(dataset, tmp_path / "demos", MAPPED, small)
    imported(dataset, tmp_path / "demos", replace(MAPPED, resize=True), small)
    image = demos_in(tmp_path / "demos")[0].decisions[3].observation.images["eye"]
    blocks = picture(3, 16, 24).reshape(8, 2, 8, 3, 3).mean((1, 3))
    assert np.abs(image - blocks).mean() < 10  # JPEG


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cameras": {}},
            r"cameras\.eye: the dataset has no images in a column 'observation.images.eye' \(it has obser",
        ),
        ({"cameras": {"nose": "x"}}, r"cameras\.nose: the backend has no such camera \(eye\)"),
        ({"state": {}}, r"state\.x: observation.state has no element 'x' \(j1, j2, j3\)"),
        ({"state": {"x": "joints/j1"}}, r"state\.x: the dataset has no numbers in a column 'joints'"),
        ({"action": {"a": "action/2"}}, r"action\.a: action has no element '2' \(elements 0 to 1 without names\)"),
        ({"action": {"a": "action/0", "b": "action/1"}}, r"action\.b: 45 deg at frame 0 of episode 0 is outside of -1"),
        ({"tasks": {}}, r"tasks: the dataset's text 'Pick it up' is no instruction of fake"),
        ({"tasks": {"Pick it up": "w"}}, r"tasks: fake has no task 'w'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    dataset = made(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=message):
        imported(dataset, tmp_path / "demos", replace(MAPPED, **change), ONE_CAMERA)
    assert not (tmp_path / "demos").exists()


def test_nothing_is_written_where_a_later_episode_does_not_fit(tmp_path: Path) -> None:
    dataset = made(tmp_path / "theirs", frames=6, episodes=20)
    with pytest.raises(ConfigError, match=r"action\.a: 1\.01 m at frame 5 of episode 16 is outside of -1 to 1"):
        imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)
    assert not (tmp_path / "demos").exists()


def test_goals_become_how_far_they_move(tmp_path: Path) -> None:
    delta = replace(ONE_CAMERA, action=replace(ONE_CAMERA.action, kind="delta", low=(-0.5, -0.5), high=(0.5, 0.5)))
    change = replace(MAPPED, action={"a": "action/0", "b": ElementConfig("action/1", DEGREE, change=True)})
    imported(made(tmp_path / "theirs"), tmp_path / "demos", change, delta)
    first, second = demos_in(tmp_path / "demos")
    for demo in (first, second):
        np.testing.assert_allclose([decision.sent[0, 1] for decision in demo.decisions], 0.0, atol=1e-6)
    absolute = replace(delta, action=replace(delta.action, kind="absolute"))
    with pytest.raises(ConfigError, match=r"action\.b\.change: is for an action that says how far its goal moves"):
        imported(tmp_path / "theirs", tmp_path / "other", change, absolute)
    with pytest.raises(ConfigError, match=r"state\.z\.change: is for an action"):
        state = {**MAPPED.state, "z": ElementConfig("observation.state/j3", change=True)}
        imported(tmp_path / "theirs", tmp_path / "other", replace(change, state=state), delta)
    with pytest.raises(ConfigError, match=r"action\.b: 45 deg .* \(change: true\)"):
        imported(
            tmp_path / "theirs", tmp_path / "other", replace(MAPPED, action={"a": "action/0", "b": "action/1"}), delta
        )


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(0.1, 10), st.floats(0.1, 10))
def test_what_moves_by_changes_follows_the_goals_as_fast_as_it_may(goals: list[float], down: float, up: float) -> None:
    moved = changes(np.array(goals), -down, up)
    assert moved[0] == 0.0 and (moved >= -down).all() and (moved <= up).all()
    at = goals[0] + np.cumsum(moved)
    for step, place, goal in zip(moved, at, goals, strict=True):
        assert place == pytest.approx(goal, abs=1e-9) or step in (-down, up)


def test_the_shipped_configuration_of_an_arm_takes_what_lerobot_records(tmp_path: Path) -> None:
    deployment = load_deployment("so101")
    calibration = Path("configs/calibrations/so101_calibration.yaml").resolve()
    options = {**deployment.backend.options, "calibration": str(calibration)}
    spec = make_backend(BackendConfig("so101", options)).spec
    joints = [f"{name}.pos" for name in spec.state.names]
    numbers = {"dtype": "float32", "shape": [6], "names": joints}
    pictures = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
    features = {"action": numbers, "observation.state": numbers}
    features |= {f"observation.images.{camera.name}": pictures for camera in spec.cameras}
    made(tmp_path / "theirs", fps=30)
    rewrite_info(tmp_path / "theirs", features=features)
    info = LeRobotReader(tmp_path / "theirs").info
    found = map_dataset(info, ["pick up the red block"], spec, deployment.dataset)
    assert found.action.changes.keys() == set(range(6)) and found.tasks == {"pick up the red block": "pick"}


def test_rates_and_units_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="30 frames a second and fake is controlled at 10 Hz"):
        imported(made(tmp_path / "fast", fps=30), tmp_path / "demos", MAPPED, ONE_CAMERA)
    dataset = exported(log_of(tmp_path / "log", 1), tmp_path / "out")
    other = replace(SPEC, state=replace(SPEC.state, units=("m", "m", "deg")))
    info = LeRobotReader(dataset).info
    with pytest.raises(ConfigError, match=r"state\.z: observation.state/z is in rad and the backend's in deg"):
        map_dataset(info, ["go"], other, DatasetConfig())
    map_dataset(info, ["go"], other, DatasetConfig(state={"z": ElementConfig("observation.state/z", scale=57.3)}))


def test_goals_are_not_taken_for_moves_where_the_dataset_says_what_they_are(tmp_path: Path) -> None:
    delta = replace(SPEC, action=replace(SPEC.action, kind="delta"))
    goals, moves = (
        LeRobotReader(exported(log_of(tmp_path / f"{i}log", 1, spec=spec), tmp_path / f"{i}")).info
        for i, spec in enumerate((SPEC, delta))
    )
    with pytest.raises(ConfigError, match=r"action\.a: action/a is absolute, not delta; change: true makes moves"):
        map_dataset(goals, ["go"], delta, AS_NAMED)
    with pytest.raises(ConfigError, match=r"action\.a: action/a is delta, not absolute$"):
        map_dataset(moves, ["go"], SPEC, AS_NAMED)
    change = DatasetConfig(action={name: ElementConfig(f"action/{name}", change=True) for name in "ab"})
    with pytest.raises(ConfigError, match=r"action\.a: action/a is delta, not absolute$"):
        map_dataset(moves, ["go"], delta, change)
    map_dataset(goals, ["go"], delta, change)
    map_dataset(moves, ["go"], delta, AS_NAMED)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no LeRobotDataset"):
        LeRobotReader(tmp_path)
    dataset = made(tmp_path / "theirs", video=True)
    rewrite_info(dataset, codebase_version="v2.1")
    with pytest.raises(DatasetError, match=r"codebase_version is v2\.1"):
        LeRobotReader(dataset)
    for outside in ("../../{video_key}", "videos/../../{video_key}", "/{video_key}", "..", "videos\0{video_key}"):
        rewrite_info(dataset, codebase_version="v3.0", video_path=outside)
        with pytest.raises(DatasetError, match="outside of the dataset"):
            imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)
    for wrong, message in [
        ("data/gone-{file_index}.parquet", r"gone-0\.parquet cannot be read"),
        ("{x}", "is no path"),
    ]:
        rewrite_info(dataset, data_path=wrong)
        with pytest.raises(DatasetError, match=message):
            imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)
    rewrite_info(dataset, features={"action": {"shape": "wide"}})
    with pytest.raises(DatasetError, match=r"info\.json is not that of a LeRobotDataset: Expected `array`"):
        LeRobotReader(dataset)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_description_is_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("damaged")
    path = made(where / "theirs", frames=2) / "meta/info.json"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with contextlib.suppress(ConfigError, DatasetError):
        imported(where / "theirs", where / "demos", MAPPED, ONE_CAMERA)


# Not with flipped bytes: Parquet's reader believes the sizes that it finds, and asks for as much memory.
@pytest.mark.parametrize("file", ["data", "meta/episodes", "meta/tasks", "videos"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(file: str, share: float, tmp_path: Path) -> None:
    dataset = made(tmp_path / "theirs", video=True)
    (path,) = [each for each in dataset.rglob("*.[pm]*") if str(each.relative_to(dataset)).startswith(file)]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DatasetError, match=path.name):
        imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)


def test_a_dataset_that_lacks_episodes_is_refused(tmp_path: Path) -> None:
    dataset = exported(log_of(tmp_path / "log", 3), tmp_path / "out")
    (dataset / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(DatasetError, match=r"meta/episodes has 2 of the 3 episodes that meta/info\.json counts"):
        imported(dataset, tmp_path / "demos")
    for rows in (0, 6):
        theirs = made(tmp_path / f"theirs{rows}")
        path = theirs / "data/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(path).slice(0, rows), path)
        with pytest.raises(DatasetError, match=f"the data files have no frames of episode {rows // 6}"):
            imported(theirs, tmp_path / "demos", MAPPED, ONE_CAMERA)
    assert not (tmp_path / "demos").exists()


ONE_IMAGE = {"bytes": encoded(picture(0, 16, 24), False), "path": None}


@pytest.mark.parametrize(
    ("file", "column", "values", "message"),
    [
        ("data", "action", None, "has no column action"),
        ("data", "action", [[1.0, 2.0]] * 11 + [[1.0]], "rows of action have several sizes"),
        ("data", "action", [None] * 12, "action has values that are missing"),
        ("data", "action", [[1.0]] * 12, r"action of episode 0 has rows of shape \[1\], meta/info.json says \[2\]"),
        ("data", "observation.images.front", [None] * 12, "front is null, and no files of images"),
        ("data", "observation.images.front", [ONE_IMAGE, *[None] * 11], "front of frame 1 is not in the data file"),
        ("data", "observation.images.front", [b"PNG"] * 12, "front is binary, and no files of images"),
        ("data", "episode_index", [None, *[0] * 11], "episode_index has values that are missing or no integers"),
        ("data", "task_index", ["0"] * 12, "task_index has values that are missing or no integers"),
        ("meta/episodes", "data/chunk_index", [None, 0], "data/chunk_index has values that are missing or no integ"),
        ("meta/tasks", "task_index", ["0"], "task_index has values that are missing or no integers"),
        ("data", "task_index", [3] * 12, "episode 0 has a task_index without a text"),
        ("data", "observation.images.front", [{"bytes": b"PNG", "path": None}] * 12, "3 bytes are not an image"),
        ("data", "observation.images.front", [{"bytes": None, "path": "x.png"}] * 12, "is not in the data file"),
        ("data", "episode_index", [0] * 12, "episode 0 has 12 frames, its row says 6"),
        ("meta/episodes", "length", None, "has no column length"),
        ("meta/tasks", "task_index", None, "has no texts, or no task_index"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(file: str, column: str, values: Any, message: str, tmp_path: Path) -> None:
    dataset = made(tmp_path / "theirs")
    (path,) = [each for each in dataset.rglob("*.parquet") if str(each.relative_to(dataset)).startswith(file)]
    columns = pq.read_table(path).to_pydict()
    columns.pop(column)
    pq.write_table(pa.table({**columns, **({} if values is None else {column: values})}), path)
    with pytest.raises(DatasetError, match=message):
        imported(dataset, tmp_path / "demos", MAPPED, ONE_CAMERA)


# --- from one run to another ------------------------------------------------------------------------------------

CONFIG = """
name: {name}
backend: {{name: point, options: {{size_px: 16}}}}
bridge: {{horizon_steps: 60}}
trainer:
  demos: {{per_task: 3, workers: 1}}
  vla: {{horizon_steps: 4, channels: [8, 16], width: 32, text_width: 8, max_tokens: 16, vocabulary: 300}}
  sft: {{steps: 5, batch: 16}}
"""


def test_demonstrations_of_one_run_start_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(CONFIG.format(name=name))
    assert run(["demos", "one.yaml"]) == 0
    assert run(["episodes", "export", "one.yaml", "--format", "lerobot", "--out", "out", "--log", "demos"]) == 0
    assert run(["demos", "import", "out", "two.yaml"]) == 0
    assert "3 demonstrations imported, 0 were there already" in capsys.readouterr().out
    ours, theirs = demos_in(Path("runs/one/demos")), demos_in(Path("runs/two/demos"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.steps == b.steps and len(a.decisions) == len(b.decisions)
        for x, y in zip(a.decisions, b.decisions, strict=True):
            np.testing.assert_array_equal(x.sent, y.sent)
            np.testing.assert_array_equal(x.observation.images["top"], y.observation.images["top"])
            np.testing.assert_array_equal(x.observation.privileged, y.observation.privileged)
    assert run(["sft", "two.yaml", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["version"]) == 64
    # Nothing is missing, so nothing is demonstrated again; and a second import adds nothing.
    assert run(["demos", "two.yaml"]) == 0
    capsys.readouterr()
    assert run(["demos", "import", "out", "two.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 0, "there": 3, "failures": 0, "tasks": {"reach": 3}}


MUTE = """
from bridge.backends.point import Point, PointOptions

class Mute:
    def __init__(self):
        self._point = Point(PointOptions(size_px=16))
    def __getattr__(self, name):
        if name in ("expert_action", "_point"):
            raise AttributeError(name)
        return getattr(self._point, name)
"""


def test_up_starts_a_robot_without_an_expert_from_what_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mute.py").write_text(MUTE)
    config = CONFIG.format(name="mute").replace("{name: point, options: {size_px: 16}}", "{name: 'mute:Mute'}")
    Path("mute.yaml").write_text(config)
    this = up.Up(load_deployment("mute.yaml"), "mute.yaml", (), threading.Event(), True)
    with pytest.raises(ConfigError, match=r"no scripted expert.*fieldtune demos import DATASET mute\.yaml"):
        up.prepare(this)
    Path("one.yaml").write_text(CONFIG.format(name="one"))
    assert run(["demos", "one.yaml"]) == 0
    assert run(["episodes", "export", "one.yaml", "--format", "lerobot", "--out", "out", "--log", "demos"]) == 0
    assert run(["demos", "import", "out", "mute.yaml"]) == 0
    started: list[str] = []

    class Recorded:
        def __init__(self, name: str, *_: Any) -> None:
            started.append(name)

        def start(self) -> None: ...

        def wait(self, _: Any) -> int:
            return 0

    monkeypatch.setattr(up, "Child", Recorded)
    assert up.prepare(this) and started == ["sft"]
