"""Exports: what is in the files is what is in the log, to the bit, and an export that was ended goes on."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_samples import HORIZON, SPEC, log_episode, log_of, observation, sent
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mcap.reader import make_reader
from msgspec.structs import replace

from bridge.backend import ActionSpec, VectorSpec
from fieldtune.cli import run
from fieldtune.data.export import Exported, Wanted, export
from fieldtune.data.frames import FramesError, rows_of
from fieldtune.data.lerobot_export import LeRobotExport
from fieldtune.data.lerobot_layout import DatasetError
from fieldtune.data.mcap_export import McapExport
from fieldtune.data.png import ImageError, decode_image, encode_png
from fieldtune.data.statistics import column_stats, image_stats, join
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.reading import read_episode

STEPS = 3 * HORIZON - 1
ALL = Wanted()


def to_lerobot(log: Path, out: Path, frames: Any = "steps", wanted: Wanted = ALL, **hooks: Any) -> Exported:
    return export(EpisodeIndex(log), LeRobotExport(out, frames), wanted, lambda done, total: None, **hooks)


def to_mcap(log: Path, out: Path, wanted: Wanted = ALL) -> Exported:
    return export(EpisodeIndex(log), McapExport(out), wanted, lambda done, total: None)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def data(out: Path, number: int) -> dict[str, list[Any]]:
    return dict(pq.read_table(out / f"data/chunk-000/file-{number:03d}.parquet").to_pydict())


def meta(out: Path, number: int) -> dict[str, Any]:
    return dict(pq.read_table(out / f"meta/episodes/chunk-000/file-{number:03d}.parquet").to_pylist()[0])


# --- images -----------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 17), st.integers(1, 17), st.just(3))))
def test_png_is_exact(image: Any) -> None:
    assert np.array_equal(decode_image(encode_png(image)), image)


def test_what_is_not_an_image_is_refused() -> None:
    with pytest.raises(ImageError):
        decode_image(b"not an image")


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_step_is_paired_with_the_newest_observation_and_the_version_that_acted(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", 1, late=1)
    rows = rows_of(read_episode(log / "done" / "e0.ep"), "steps")
    # Decisions at steps 0, 3, 6. A chunk of 4 plays on for the step after that; the next begins with its second action.
    assert rows.step.tolist() == list(range(8))
    assert rows.observed.tolist() == [True, False, False, True, False, False, True, False]
    assert [o.state[0] for o in rows.observation] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert rows.version == ["v1"] * 4 + ["v2"] * 3 + ["v1"]
    np.testing.assert_array_equal(rows.action, np.stack([sent(step) for step in range(8)]))
    assert rows.reward.tolist() == list(range(8))


def test_a_decision_has_what_was_executed_of_its_chunk(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", 1, late=1)
    rows = rows_of(read_episode(log / "done" / "e0.ep"), "decisions")
    assert rows.step.tolist() == [0, 3, 6] and rows.action.shape == (3, HORIZON, 2)
    assert rows.executed is not None
    assert rows.executed.tolist() == [[True] * 4, [False, True, True, True], [False, True, False, False]]
    np.testing.assert_array_equal(rows.action[1], [[0, 0], sent(4), sent(5), sent(6)])
    assert rows.reward.tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6, 7]


def test_an_episode_with_a_hole_is_not_put_into_rows(tmp_path: Path) -> None:
    episode = read_episode(log_of(tmp_path / "log", 1) / "done" / "e0.ep")
    del episode.decisions[1]
    with pytest.raises(FramesError, match="step 4"):
        rows_of(episode, "steps")


# --- statistics -------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_values() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(50, 3)).astype(np.float32)
    stats = column_stats(values)
    np.testing.assert_allclose(stats["std"], values.std(0), rtol=1e-5)
    np.testing.assert_allclose(stats["q90"], np.quantile(values, 0.9, axis=0), rtol=1e-6)
    assert stats["count"].tolist() == [50] and column_stats(np.arange(5))["mean"].tolist() == [2.0]
    images = [random.integers(0, 256, (4, 5, 3), np.uint8) for _ in range(7)]
    pixels = np.stack(images).reshape(-1, 3) / 255
    stats = image_stats(images)
    np.testing.assert_allclose(stats["mean"].ravel(), pixels.mean(0))
    np.testing.assert_allclose(stats["std"].ravel(), pixels.std(0))
    np.testing.assert_allclose(stats["max"].ravel(), pixels.max(0))
    np.testing.assert_allclose(stats["q50"].ravel(), np.quantile(pixels, 0.5, axis=0), atol=1 / 255)
    assert stats["min"].shape == (3, 1, 1)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_joined_statistics_are_those_of_all_frames(sizes: list[int]) -> None:
    random = np.random.default_rng(sum(sizes))
    parts = [random.normal(size=(n, 2)) for n in sizes]
    joined = column_stats(parts[0])
    for part in parts[1:]:
        joined = join(joined, column_stats(part))
    whole = column_stats(np.concatenate(parts))
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(joined[name], whole[name], atol=1e-12)


# --- LeRobotDataset ---------------------------------------------------------------------------------------------


def test_a_dataset_holds_the_log(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 2), tmp_path / "out"
    assert to_lerobot(log, out) == Exported(written=2, there=0, left_out={})
    info = load(out / "meta/info.json")
    assert info["codebase_version"] == "v3.0" and info["fps"] == 10 and info["robot_type"] == "fake"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 2 * STEPS, 1)
    assert info["splits"] == {"train": "0:2"} and info["video_path"] is None
    features = info["features"]
    assert features["observation.images.eye"] == {
        "dtype": "image", "shape": [8, 12, 3], "names": ["height", "width", "channels"],
    }  # fmt: skip
    assert features["action"] == {
        "dtype": "float32", "shape": [2], "names": ["a", "b"], "units": ["m", "deg"], "kind": "absolute",
    }  # fmt: skip
    table = data(out, 1)
    assert set(table) == set(features)
    assert table["frame_index"] == list(range(STEPS)) and table["index"] == list(range(STEPS, 2 * STEPS))
    np.testing.assert_array_equal(np.float32(table["timestamp"]), np.arange(STEPS, dtype=np.float32) / np.float32(10))
    assert table["policy_version"] == ["v1"] * 4 + ["v2"] * 4 + ["v1"] * 3
    assert table["next.done"] == [False] * (STEPS - 1) + [True] and table["episode_index"] == [1] * STEPS
    assert table["observed"] == [step % HORIZON == 0 for step in range(STEPS)]
    for step in range(STEPS):
        seen = observation(step - step % HORIZON)
        np.testing.assert_array_equal(np.float32(table["action"][step]), sent(step))
        np.testing.assert_array_equal(np.float32(table["observation.state"][step]), seen["state"])
        for camera in ("eye", "wrist"):
            image = decode_image(table[f"observation.images.{camera}"][step]["bytes"])
            np.testing.assert_array_equal(image, seen[f"image/{camera}"])
    rows = [meta(out, 0), meta(out, 1)]
    assert [row["success"] for row in rows] == [True, False] and rows[1]["status"] == "failure"
    assert rows[1]["tasks"] == ["go"] and rows[1]["task_name"] == "t" and rows[1]["seed"] == 1
    assert (rows[1]["dataset_from_index"], rows[1]["dataset_to_index"]) == (STEPS, 2 * STEPS)
    assert rows[1]["policy_versions"] == ["v1", "v2"] and rows[1]["data/file_index"] == 1
    # Statistics of every column but texts, an episode's and those of all.
    for name, feature in features.items():
        wanted = (
            []
            if feature["dtype"] == "string"
            else ["count", "max", "mean", "min", "q01", "q10", "q50", "q90", "q99", "std"]
        )
        assert sorted(key.rpartition("/")[2] for key in rows[0] if key.startswith(f"stats/{name}/")) == wanted, name
    stats = load(out / "meta/stats.json")
    assert stats["action"]["max"] == pytest.approx([0.1, 0]) and stats["action"]["count"] == [2 * STEPS]
    assert np.shape(stats["observation.images.eye"]["mean"]) == (3, 1, 1)
    tasks = pq.read_table(out / "meta/tasks.parquet")
    assert tasks["task_index"].to_pylist() == [0] and tasks["__index_level_0__"].to_pylist() == ["go"]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]


def test_an_image_that_many_steps_repeat_is_stored_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    big = replace(SPEC, cameras=(replace(SPEC.cameras[0], height=128, width=128),))
    to_lerobot(log_of(tmp_path / "log", 1, spec=big), out)
    assert (out / "data/chunk-000/file-000.parquet").stat().st_size < 3.2 * 128 * 128 * 3


def test_rows_may_be_decisions(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 1, late=1), tmp_path / "out"
    to_lerobot(log, out, "decisions")
    info, table = load(out / "meta/info.json"), data(out, 0)
    assert info["fps"] == 10 / HORIZON and info["features"]["action"]["shape"] == [HORIZON, 2]
    assert table["step"] == [0, 3, 6] and table["executed"][2] == [False, True, False, False]
    np.testing.assert_array_equal(np.float32(table["action"][2])[1], sent(7))


def test_statistics_of_chunks_are_those_of_what_was_sent(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 2, late=1), tmp_path / "out"
    to_lerobot(log, out, "decisions")
    whole = np.stack([sent(step) for step in range(8)]).astype(np.float64)
    stats = load(out / "meta/stats.json")["action"]
    assert stats["count"] == [16]
    for name, wanted in (("mean", whole.mean(0)), ("std", whole.std(0)), ("min", whole.min(0)), ("max", whole.max(0))):
        np.testing.assert_allclose(stats[name], wanted, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(stats["q90"], np.quantile(whole, 0.9, axis=0), rtol=1e-6)
    assert meta(out, 1)["stats/action/count"] == [8] and meta(out, 1)["stats/executed/count"] == [3]


def test_a_vector_of_one_element_is_a_column_of_numbers_and_one_of_none_is_no_column(tmp_path: Path) -> None:
    one = ActionSpec(("a",), ("m",), (-1.0,), (1.0,), "absolute")
    small = replace(SPEC, state=VectorSpec(("x",), ("m",)), action=one)
    log = log_of(tmp_path / "log", 1, spec=replace(small, privileged=VectorSpec(("goal",), ("m",))))
    to_lerobot(log, tmp_path / "out")
    table = data(tmp_path / "out", 0)
    np.testing.assert_array_equal(np.float32(table["action"]), [sent(step)[0] for step in range(STEPS)])
    assert table["observation.state"] == [0.0] * 4 + [4.0] * 4 + [8.0] * 3 and table["privileged"] == [0.0] * STEPS
    blind = replace(small, state=VectorSpec((), ()))
    to_lerobot(log_of(tmp_path / "blind", 1, spec=blind), tmp_path / "no_state")
    assert "observation.state" not in load(tmp_path / "no_state/meta/info.json")["features"]
    for name, horizon in (("chunks", HORIZON), ("single", 1)):
        short = log_of(tmp_path / name / "log", 1, spec=small, chunk=horizon)
        to_lerobot(short, tmp_path / name / "out", "decisions")
        table = data(tmp_path / name / "out", 0)
        assert np.shape(table["action"])[1:] == (horizon, 1)
        assert np.shape(table["executed"])[1:] == ((horizon,) if horizon > 1 else ())


def test_only_wanted_episodes_are_exported(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "log")
    log_episode(log, "a", versions=("aaa",), started_unix_s=1.0)
    log_episode(log, "b", status="failure", versions=("bbb",), started_unix_s=2.0)
    log_episode(log, "c", task="u", instruction="stay", versions=("aab",), started_unix_s=3.0)
    log_episode(log, "d", status="aborted", started_unix_s=4.0)
    log_episode(log, "e", status="unjudged", started_unix_s=5.0)
    log_episode(log, "f", status="unjudged", task="u", instruction="stay", started_unix_s=6.0)
    log.close()
    left_out = []

    def names(**fields: Any) -> set[str]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        left_out.append(to_mcap(tmp_path / "log", out, Wanted(**fields)).unjudged)
        return {path.stem for path in out.iterdir()}

    assert names() == {"a", "b", "c"}
    assert names(status=("failure", "aborted")) == {"b", "d"}
    assert names(task="u") == {"c"} and names(version="aa") == {"a", "c"} and names(since_unix_s=2.0) == {"b", "c"}
    assert names(status=("unjudged", "success")) == {"a", "c", "e", "f"}
    assert left_out == [2, 0, 1, 0, 2, 0]  # of those that fit but for that


def test_an_export_goes_on_and_writes_nothing_twice(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 5), tmp_path / "out"
    polls = iter([False, False, True])
    assert to_lerobot(log, out, stopped=lambda: next(polls)).written == 2
    assert load(out / "meta/info.json")["total_episodes"] == 2
    first = out / "data/chunk-000/file-000.parquet"
    before = first.stat().st_mtime_ns
    assert to_lerobot(log, out) == Exported(written=3, there=2, left_out={})
    assert first.stat().st_mtime_ns == before
    whole = tmp_path / "whole"
    to_lerobot(log, whole)
    assert load(out / "meta/info.json") == load(whole / "meta/info.json")
    for name, own in load(whole / "meta/stats.json").items():
        for kind, value in own.items():
            np.testing.assert_allclose(load(out / "meta/stats.json")[name][kind], value, rtol=1e-12)
    for i in range(5):
        assert data(out, i) == data(whole, i) and meta(out, i) == meta(whole, i)
    assert to_lerobot(log, out).written == 0


def test_an_export_that_did_not_say_the_kind_of_its_actions_goes_on(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 2), tmp_path / "out"
    to_lerobot(log, out, wanted=Wanted(status=("success",)))
    begun = load(out / "meta/fieldtune.json")
    del begun["features"]["action"]["kind"]
    (out / "meta/fieldtune.json").write_text(json.dumps(begun))
    assert to_lerobot(log, out) == Exported(written=1, there=1, left_out={})
    assert load(out / "meta/info.json")["features"]["action"]["kind"] == "absolute"


def test_what_was_half_written_is_written_again(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 3), tmp_path / "out"
    to_lerobot(log, out)
    # As a kill leaves it: the data of the last episode are there, its row and the totals are not.
    for name in ("meta/info.json", "meta/stats.json", "meta/episodes/chunk-000/file-002.parquet"):
        (out / name).unlink()
    (out / "data/chunk-000/file-002.parquet").write_bytes(b"torn")
    assert to_lerobot(log, out).written == 1
    assert load(out / "meta/info.json")["total_episodes"] == 3 and data(out, 2)["episode_index"] == [2] * STEPS


def test_a_killed_export_leaves_whole_episodes_and_goes_on(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 40), tmp_path / "out"
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_data_export import to_lerobot
to_lerobot(Path({str(log)!r}), Path({str(out)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (out / "meta/episodes/chunk-000/file-004.parquet").exists():
        assert child.poll() is None and time.monotonic() < deadline
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    assert not (out / "meta/info.json").exists()
    done = to_lerobot(log, out)
    assert done.there >= 5 and done.written + done.there == 40
    assert [meta(out, i)["episode"] for i in range(40)] == [f"e{i}" for i in range(40)]
    assert [i for n in range(40) for i in data(out, n)["index"]] == list(range(40 * STEPS))


def test_episodes_of_another_backend_are_left_out_by_name(tmp_path: Path) -> None:
    log, out = EpisodeLog(tmp_path / "log"), tmp_path / "out"
    log_episode(log, "first")
    log_episode(log, "unit", spec=replace(SPEC, action=replace(SPEC.action, units=("m", "rad"))))
    log_episode(log, "moves", spec=replace(SPEC, action=replace(SPEC.action, kind="delta")))
    log_episode(log, "rate", spec=replace(SPEC, control_hz=20.0))
    log_episode(log, "camera", spec=replace(SPEC, cameras=SPEC.cameras[:1]))
    log_episode(log, "last")
    log.close()
    done = to_lerobot(tmp_path / "log", out)
    assert done.written == 2 and list(done.left_out) == ["unit", "moves", "rate", "camera"]
    assert "was begun with other columns (action) than those of this episode" in done.left_out["unit"]
    assert "other columns (action)" in done.left_out["moves"]
    assert "was begun with fps 10, not the 20 of this episode" in done.left_out["rate"]
    assert "other columns (observation.images.wrist)" in done.left_out["camera"]
    assert load(out / "meta/info.json")["total_episodes"] == 2 and meta(out, 1)["episode"] == "last"
    log = EpisodeLog(tmp_path / "chunks")
    log_episode(log, "long")
    log_episode(log, "short", chunk=HORIZON - 1)
    log.close()
    assert list(to_lerobot(tmp_path / "chunks", tmp_path / "decisions", "decisions").left_out) == ["short"]


def test_what_does_not_fit_the_dataset_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = log_of(tmp_path / "log", 1)
    to_lerobot(log, out)
    with pytest.raises(DatasetError, match="has rows that are steps, not decisions; choose another --out"):
        to_lerobot(log, out, "decisions")
    to_lerobot(log, tmp_path / "chunks", "decisions")
    with pytest.raises(DatasetError, match=r"has rows that are decisions, not steps.* or --frames decisions"):
        to_lerobot(log, tmp_path / "chunks")
    added = out / "meta/episodes/chunk-000/file-001.parquet"
    theirs = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").drop_columns(["episode", "success"])
    pq.write_table(theirs, added)
    with pytest.raises(DatasetError, match=r"file-001\.parquet has episodes that others have added to the dataset"):
        to_lerobot(log, out)
    added.write_bytes(b"torn")
    with pytest.raises(DatasetError, match=r"file-001\.parquet is damaged \(.*\); choose another --out"):
        to_lerobot(log, out)
    added.unlink()
    held = LeRobotExport(out, "steps")
    with pytest.raises(DatasetError, match="another process"):
        LeRobotExport(out, "steps")
    held.close()
    (out / "meta/fieldtune.json").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"fieldtune\.json is damaged"):
        LeRobotExport(out, "steps")
    (out / "meta/fieldtune.json").unlink()
    with pytest.raises(DatasetError, match="not exported by fieldtune"):
        LeRobotExport(out, "steps")


def test_a_damaged_episode_is_left_out_by_name(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", 3)
    (log / "done" / "e1.ep").write_bytes(b"damaged")
    done = to_lerobot(log, tmp_path / "out")
    assert done.written == 2 and list(done.left_out) == ["e1"] and "e1.ep" in done.left_out["e1"]


def test_memory_does_not_grow_with_the_episodes(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", 60)
    peaks = []

    def progress(done: int, total: int) -> None:
        if done in (20, 60):
            peaks.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    try:
        export(EpisodeIndex(log), LeRobotExport(tmp_path / "out", "steps"), Wanted(), progress)
    finally:
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


# --- MCAP -------------------------------------------------------------------------------------------------------


def test_an_mcap_file_holds_the_episode(tmp_path: Path) -> None:
    log, out = log_of(tmp_path / "log", 1, late=1), tmp_path / "out"
    assert to_mcap(log, out).written == 1
    with (out / "e0.mcap").open("rb") as file:
        reader = make_reader(file)
        messages = [(s, c, m, json.loads(m.data)) for s, c, m in reader.iter_messages() if s is not None]
        (metadata,) = reader.iter_metadata()
    assert metadata.name == "episode" and metadata.metadata["status"] == "success"
    schemas = {c.topic: (s.name, s.encoding, c.message_encoding) for s, c, _, _ in messages}
    assert schemas["/camera/eye"] == ("foxglove.CompressedImage", "jsonschema", "json")
    by_topic: dict[str, list[tuple[int, Any]]] = {}
    for _, channel, message, value in messages:
        by_topic.setdefault(channel.topic, []).append((message.log_time, value))
    images = by_topic["/camera/wrist"]
    assert [at for at, _ in images] == [int((1000 + step / 10) * 1e9) for step in (0, 3, 6, 8)]
    for step, (at, value) in zip((0, 3, 6, 8), images, strict=True):
        assert value["format"] == "png" and value["timestamp"] == {"sec": at // 10**9, "nsec": at % 10**9}
        image = decode_image(base64.b64decode(value["data"]))
        np.testing.assert_array_equal(image, observation(step)["image/wrist"])
    actions = by_topic["/action"]
    assert [at for at, _ in actions] == [int((1000 + step / 10) * 1e9) for step in range(8)]
    assert [np.float32(value["b"]) for _, value in actions] == [sent(step)[1] for step in range(8)]
    (schema,) = {s.data for s, c, _, _ in messages if c.topic == "/action"}
    assert json.loads(schema)["properties"]["b"] == {"type": "number", "description": "unit: deg"}
    assert [value["version"] for _, value in by_topic["/decision"]] == ["v1", "v2", "v1"]
    assert by_topic["/episode"][0][1]["success"] is True and by_topic["/state"][1][1] == {"x": 3, "y": -3, "z": 0.5}
    assert to_mcap(log, out) == Exported(written=0, there=1, left_out={})


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\nbackend: {name: point}\n")
    log_of(tmp_path / "runs/mine/episodes", 3)
    command = ["episodes", "export", "mine.yaml", "--out", "out"]
    assert run([*command, "--format", "lerobot", "--status", "success", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 2, "there": 0, "left_out": {}, "unjudged": 0}
    assert run([*command, "--format", "lerobot", "--status", "success", "failure"]) == 0
    assert "1 episodes written to out, 2 were there already" in capsys.readouterr().out
    assert run(["episodes", "export", "mine.yaml", "--out", "m", "--format", "mcap", "--since", "2020-01-01"]) == 1
    assert "no episode that fits" in capsys.readouterr().err
    assert run([*command, "--format", "mcap", "--since", "yesterday"]) == 1
    assert "--since yesterday: expected a date" in capsys.readouterr().err
    log = EpisodeLog(tmp_path / "runs/mine/episodes")
    log_episode(log, "waits", status="unjudged")
    log.close()
    assert run([*command, "--format", "lerobot"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "left out 1 episodes that nobody has judged: `fieldtune episodes label`" in said
    assert "`--status unjudged` exports them" in said
