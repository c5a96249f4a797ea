"""`fieldtune walk`: the versions that it makes, the comparison that it trusts, and the whole of it on MetaWorld."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pytest
from data_samples import HORIZON, SPEC, log_episode, log_of

from bridge.errors import FieldtuneError
from fieldtune.cli import run
from fieldtune.commands.up import Up, put_aside
from fieldtune.data.export import Wanted, export
from fieldtune.data.importing import import_demos
from fieldtune.data.lerobot_export import LeRobotExport
from fieldtune.data.lerobot_reading import DatasetEpisode, LeRobotReader
from fieldtune.data.mapping import DatasetConfig
from fieldtune.deployment import load_deployment, shipped_bundles
from fieldtune.walk.bundles import broken_copy, changed_bundle, flipped, shifted
from fieldtune.walk.comparison import RoundTrip, compare_round_trip, holds
from fieldtune.walk.walking import Walk, WalkError
from runtime.bundle import BundleError, read_bundle
from runtime.durable import ClaimedError
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.policy import Policy
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.supervisor import Child, ChildFailedError

MT10 = shipped_bundles()["mt10"]

# --- versions made on purpose ---------------------------------------------------------------------------------------


def test_a_shifted_version_is_sound_and_differs_in_what_was_shifted_alone(tmp_path: Path) -> None:
    version = changed_bundle(MT10, tmp_path, shifted("dy", 0.25), "dy is 0.25 more")
    source, made = read_bundle(MT10), read_bundle(tmp_path / version)
    assert (made.spec.parent, made.spec.made) == (source.version, {"command": "walk", "change": "dy is 0.25 more"})
    policy = Policy.load(tmp_path / version)  # replays the probe
    mean, log_std = policy.infer(source.probe_inputs)
    wanted = source.probe_outputs["action_mean"].copy()
    wanted[..., 1] += 0.25
    np.testing.assert_allclose(mean, wanted, atol=1e-5)
    np.testing.assert_allclose(log_std, source.probe_outputs["action_log_std"], atol=1e-6)
    assert {name for name in made.weights if not np.array_equal(made.weights[name], source.weights[name])} == {
        "head.bias"
    }


def test_a_flipped_version_is_sound_and_does_the_opposite(tmp_path: Path) -> None:
    source = read_bundle(MT10)
    policy = Policy.load(tmp_path / changed_bundle(MT10, tmp_path, flipped, "the other sign"))
    mean, _ = policy.infer(source.probe_inputs)
    np.testing.assert_allclose(mean, -source.probe_outputs["action_mean"], atol=1e-5)


def test_a_broken_copy_is_refused_by_its_weights(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not finite") as refused:
        read_bundle(broken_copy(MT10, tmp_path / "nan"))
    assert refused.value.part == "weights.safetensors"


# --- out and in again -----------------------------------------------------------------------------------------------


def there_and_back(tmp_path: Path, imported: Path | None = None) -> tuple[EpisodeIndex, LeRobotReader, EpisodeIndex]:
    """A log of four episodes, of which two failed, its dataset, and the import of that (or of another log)."""
    log = EpisodeIndex(log_of(tmp_path / "log", 4))
    export(log, LeRobotExport(tmp_path / "out", "steps"), Wanted(), lambda done, of: None)
    source = tmp_path / "out"
    if imported is not None:
        source = tmp_path / "other"
        export(EpisodeIndex(imported), LeRobotExport(source, "steps"), Wanted(), lambda done, of: None)
    import_demos(LeRobotReader(source), tmp_path / "demos", SPEC, DatasetConfig(), 5, lambda done, of: None)
    return log, LeRobotReader(tmp_path / "out"), EpisodeIndex(tmp_path / "demos")


def compared(log: EpisodeIndex, dataset: LeRobotReader, demos: EpisodeIndex) -> RoundTrip:
    return compare_round_trip(log, log.after(0), dataset, demos)


def test_what_came_back_whole_is_counted(tmp_path: Path) -> None:
    # Two episodes of 3 decisions with two cameras; the last chunk is one action short.
    assert compared(*there_and_back(tmp_path)) == RoundTrip(
        episodes=4, failures=2, imported=2, steps=4 * (3 * HORIZON - 1), observations=6, images=12, differences=[]
    )


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("sent", lambda step: np.array([step / 100, 0.5], np.float32), "the actions that were sent differ"),
        (
            "picture",
            lambda number, *size: np.full((*size, 3), 7, np.uint8),
            "the image of camera eye at step 0 differs",
        ),
    ],
)
def test_one_other_number_or_picture_is_found(
    name: str, other: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data_samples, name, other)
        changed = log_of(tmp_path / "changed", 4)
    found = compared(*there_and_back(tmp_path, changed)).differences
    assert found == [f"e0: {message}", f"e2: {message}"]


def test_an_episode_that_is_missing_or_judged_otherwise_is_found(tmp_path: Path) -> None:
    log, dataset, demos = there_and_back(tmp_path, log_of(tmp_path / "fewer", 2))
    assert compared(log, dataset, demos).differences == ["2 episodes succeeded, 1 were imported"]
    log.label("e1", "success", "ada")
    assert (
        "e1: success after 11 steps in the log, success False after 11" in compared(log, dataset, demos).differences[0]
    )


def test_an_episode_is_found_among_demonstrations_by_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _, demos = there_and_back(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data_samples, "sent", lambda step: np.array([step / 100, 0.5], np.float32))
        other = EpisodeIndex(log_of(tmp_path / "changed", 1))
    for index, there in ((log, True), (other, False)):
        assert holds(demos, read_episode(index.path(index.after(0)[0]))) is there


def test_an_episode_in_which_nothing_was_sent_is_among_no_demonstrations(tmp_path: Path) -> None:
    _, _, demos = there_and_back(tmp_path)
    log = EpisodeLog(tmp_path / "empty")
    log_episode(log, "e", decisions=1, chunk=1)
    log.close()
    (row,) = (index := EpisodeIndex(tmp_path / "empty")).after(0)
    assert row.steps == 0
    assert not holds(demos, read_episode(index.path(row)))


def test_what_failed_is_compared_with_the_dataset_too(tmp_path: Path) -> None:
    log, dataset, demos = there_and_back(tmp_path)
    rows = log.after(0)
    (failed, *_) = [row for row in rows if row.status != "success"]
    index = next(number for number in range(len(dataset)) if dataset.meta(number)["episode"] == failed.episode)
    episodes = dataset.episodes

    def other(numbers: Sequence[str], images: Sequence[str]) -> Iterator[DatasetEpisode]:
        for episode in episodes(numbers, images):
            if episode.number == index:
                episode.columns["action"] = episode.columns["action"] + np.float32(0.01)
            yield episode

    dataset.episodes = other  # type: ignore[method-assign]
    assert compared(log, dataset, demos).differences == [f"{failed.episode}: the actions in the dataset differ"]


def test_a_run_that_runs_is_not_moved_away(tmp_path: Path) -> None:
    up = Up(load_deployment("point", [f"runs={tmp_path}"]), "point", (), threading.Event(), True)
    put_aside(up)
    log = EpisodeLog(up.run.episodes)
    with pytest.raises(ClaimedError, match="is at work here already; stop it first"):
        put_aside(up)
    assert up.run.episodes.is_dir()
    log.close()
    put_aside(up)
    assert not up.run.path.exists()


def test_each_line_is_one_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"\n\n")
    walk = Walk.__new__(Walk)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for _ in range(2):
            walk._wait_for_enter()
        os.close(writing)
        walk._wait_for_enter()


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_wait_ends_and_says_what_for_with_the_end_of_the_log(tmp_path: Path) -> None:
    up = Up(load_deployment("walk", [f"runs={tmp_path}"]), "walk", (), threading.Event(), quiet=True)
    walk = Walk(up, pause=False)
    child, other = (Child(name, [], tmp_path / f"{name}.log") for name in ("runtime", "robot"))
    (tmp_path / "runtime.log").write_text("out of memory\n")
    (tmp_path / "robot.log").write_text("no power\n")
    with pytest.raises(WalkError, match=r"in vain for: an episode(.|\n)*out of memory(.|\n)*no power"):
        walk.until(lambda: False, "an episode", 0.01, child, other)
    up.stop.set()
    with pytest.raises(WalkError, match="stopped"):
        walk.until(lambda: False, "an episode", 60.0, child)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start the command in a directory of its own, with one task and an easier test; what it started is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        settings = (
            f"runs={tmp_path}",
            "backend.options.tasks=[reach-v3]",
            "bridge.workers=3",
            "runtime.deploy.canary.false_rollback=0.2",
            "runtime.deploy.canary.false_promotion=0.2",
        )
        line = [sys.executable, "-m", "fieldtune", "walk", *arguments, *(x for s in settings for x in ("--set", s))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(line, env=environment, text=True, start_new_session=True, **pipes))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def walk_of_two_steps(monkeypatch: pytest.MonkeyPatch, error: FieldtuneError | None) -> None:
    """The command without processes: with an error its first step finds something wrong, and its second ends in it."""

    def first(walk: Walk, _weak: str) -> None:
        walk.begin("one", "/", "")
        walk.check("as it is", error is None)

    def second(walk: Walk) -> None:
        walk.begin("two", "/", "")
        if error is not None:
            raise error

    command = importlib.import_module("fieldtune.commands.walk")
    monkeypatch.setattr(command, "stop_on_signals", threading.Event)
    for name in ("reject_at_gate", "reject_in_canary", "promote_good", "relabel", "export_and_import"):
        monkeypatch.setattr(command, name, lambda *_: "")
    monkeypatch.setattr(command, "start_from_weak", lambda _: "")
    monkeypatch.setattr(command, "put_to_work", first)
    monkeypatch.setattr(command, "refuse_broken", second)


@pytest.mark.parametrize("error", [WalkError("in vain"), ChildFailedError("a robot failed")])
def test_an_error_keeps_what_was_found_before_it(
    error: FieldtuneError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    walk_of_two_steps(monkeypatch, error)
    assert run(["walk", "--json", "--set", f"runs={tmp_path}", "--set", "page.serve=false"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["failed"] == ["1. one: as it is", f"2. two: {error}"]
    assert [step["title"] for step in answer["steps"]] == ["one", "two"]


def test_the_command_for_the_page_has_the_settings_of_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    walk_of_two_steps(monkeypatch, None)
    settings = [f"runs={tmp_path}", "page.serve=false", "backend.options.tasks=[reach-v3]"]
    assert run(["walk", *(word for setting in settings for word in ("--set", setting))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    command = told[told.index("`") + 1 : told.rindex("`")]
    assert shlex.split(command) == ["fieldtune", "page", "walk", *(w for s in settings for w in ("--set", s))]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_step_goes_as_it_must(start: Any, tmp_path: Path) -> None:
    earlier = tmp_path / "walk"
    earlier.mkdir()
    (earlier / "mine").touch()
    process = start("--json", "--step")
    printed, told = process.communicate("\n" * 7, timeout=380)
    assert process.returncode == 0, told
    assert "NOT" not in told
    (aside,) = tmp_path.glob("walk.old-*")
    assert (aside / "mine").exists()
    answer = json.loads(printed)
    weak, broken, flipped_one, beside, good, relabelled, data = answer["steps"]
    assert answer["failed"] == [] and not any(step["failed"] for step in answer["steps"])
    assert "head" in broken["refusal"]
    run = RunDir(tmp_path / "walk")
    registry, index = Registry(run.registry), EpisodeIndex(run.episodes)
    assert [row.version for row in registry.served()] == [weak["version"], good["version"]]
    assert good["version"] == read_bundle(MT10).version == registry.live()
    stages = {
        step["version"]: [change.stage for change in registry.stages(step["version"])] for step in (flipped_one, beside)
    }
    assert stages == {
        flipped_one["version"]: ["candidate", "rejected"],
        beside["version"]: ["candidate", "canary", "rejected"],
    }
    assert index.count(version=flipped_one["version"]) == 0 < index.count(version=beside["version"])
    row = index.get(relabelled["episode"])
    assert row is not None and row.status == "failure" and row.labelled_by == relabelled["labelled_by"] != ""
    demos = EpisodeIndex(run.path / "imported" / "demos")
    assert demos.count(status="success") == data["imported"] == data["episodes"] - data["failures"] > 10


@pytest.mark.slow
def test_ctrl_c_stops_everything(start: Any, tmp_path: Path) -> None:
    process = start()
    run = RunDir(tmp_path / "walk")
    deadline_s = time.monotonic() + 90
    while not EpisodeIndex(run.episodes).count():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "fieldtune: stopped" in told
    # Whoever lives still has the run's directory on its command line.
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            lines.append(path.read_bytes())
    assert not any(str(tmp_path).encode() in line and b"fieldtune" in line for line in lines)
