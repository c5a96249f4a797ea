"""The whole system as real processes: `fieldtune up` on the toy backend, through kill -9, Ctrl-C and resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fine_tuning import FINE_TUNING
from ports import free_endpoint

from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SMALL = ["page.serve=false", *FINE_TUNING, "trainer.evaluate.episodes_per_task=10"]


class Deployment:
    """`fieldtune up point` in a directory of its own, and what it left there."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDir(directory / "point")
        self.command = [sys.executable, "-m", "fieldtune", "up", "point", "--set", f"runs={directory}"]
        self.process: subprocess.Popen[bytes] | None = None
        self.output = directory / "up.log"

    def start(self, *settings: str) -> None:
        line = [*self.command, *(x for setting in [*SMALL, *settings] for x in ("--set", setting))]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(200)

    def interrupt(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def children(self) -> dict[str, int]:
        """Command -> process id of the living children."""
        assert self.process is not None
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                words = (path.parent / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue  # ended while we looked
            if parent == self.process.pid and "fieldtune" in words:
                found[words[words.index("fieldtune") + 1]] = int(path.parent.name)
        return found

    def metrics(self) -> list[dict[str, object]]:
        if not self.run.metrics.exists():
            return []
        return [json.loads(line) for line in self.run.metrics.read_text().splitlines() if line.endswith("}")]

    def log(self) -> str:
        return self.output.read_text()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path)
    yield deployment
    if deployment.process is not None and deployment.process.poll() is None:
        os.killpg(deployment.process.pid, signal.SIGKILL)


@pytest.fixture
def goes_on(up: Deployment, fine_tuned: Path) -> None:
    """`up` finds those there."""
    shutil.copytree(fine_tuned, up.run.path)


def until(condition: Callable[[], bool], what: str, deployment: Deployment, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert deployment.process is not None
        assert deployment.process.poll() is None, f"ended before {what}:\n{deployment.log()}"
        assert time.monotonic() < deadline, f"no {what}:\n{deployment.log()}"
        time.sleep(0.1)


def check_run(deployment: Deployment, iterations: int) -> None:
    """Nothing lost, nothing counted twice, one unbroken curve, one unbroken line of versions."""
    lines = deployment.metrics()
    assert [line["iteration"] for line in lines] == list(range(1, iterations + 1))
    steps = [int(str(line["env_steps"])) for line in lines]
    assert steps == sorted(steps)
    index = EpisodeIndex(deployment.run.episodes)
    rows = index.after(0, 1_000_000)
    assert len({row.episode for row in rows}) == len(rows)
    for row in rows:
        if row.status != "aborted":
            assert read_episode(index.path(row)).steps == row.steps
    # The steps learned from are at most those of the exploring episodes that ended: none is counted twice.
    assert steps[-1] <= sum(row.steps for row in rows if row.status != "aborted")
    registry = Registry(deployment.run.registry)
    live = registry.live()
    assert live is not None
    assert live == lines[-1]["version"]
    assert len(registry.lineage(live)) == 1 + sum(not line["warmup"] for line in lines)


@pytest.mark.usefixtures("goes_on")
def test_the_end_of_any_part_costs_no_episode(up: Deployment) -> None:
    """By kill -9, and by a signal on which it leaves in order: nobody but `up` is to end a part of it."""
    kill, ask = signal.SIGKILL, signal.SIGTERM
    up.start("trainer.stop.iterations=12")
    for command, how in (
        ("train", kill),
        ("serve", kill),
        ("drive", kill),
        ("serve", ask),
        ("train", ask),
    ):
        seen = len(up.metrics())
        until(lambda seen=seen: len(up.metrics()) >= seen + 1, "iteration", up)  # type: ignore[misc]
        until(lambda command=command: command in up.children(), command, up)  # type: ignore[misc]
        if len(up.metrics()) < 11:
            os.kill(up.children()[command], how)
    assert up.wait() == 0, up.log()
    assert "was killed by SIGKILL; starting it again" in up.log()
    assert "runtime was stopped from outside; starting it again" in up.log()
    check_run(up, 12)
    report = json.loads((up.run.path / "report.json").read_text())
    assert report["after"]["overall"]["n"] == 10
    assert (up.run.path / "report.html").stat().st_size > 10_000


def test_control_c_stops_everything_and_the_same_command_goes_on(up: Deployment) -> None:
    up.start("trainer.stop.iterations=6")
    until(lambda: up.run.demos.exists(), "demonstrations", up)
    assert up.interrupt() == 1
    assert up.children() == {}
    up.start("trainer.stop.iterations=6", "page.serve=true")
    until(lambda: len(up.metrics()) >= 2, "second iteration", up)
    before = up.metrics()
    children = up.children()
    assert set(children) == {"serve", "train", "drive", "page"}
    url = up.run.page_url.read_text()
    assert f"page: {url}" in up.log()
    with urllib.request.urlopen(f"{url}/healthz", timeout=30) as answer:
        assert answer.status == 200
    config = up.run.config.read_bytes()
    second = subprocess.run(
        [*up.command, "--set", "seed=7"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert second.returncode == 1 and f"process {up.process.pid if up.process else 0} is at work" in second.stderr
    assert up.run.config.read_bytes() == config and up.children() == children
    assert up.interrupt() == 1
    assert all(not Path(f"/proc/{pid}").exists() for pid in children.values())
    assert re.search(r"goes on from here", up.log())
    up.start("trainer.stop.iterations=6")
    assert up.wait() == 0, up.log()
    assert up.metrics()[: len(before)] == before
    check_run(up, 6)


@pytest.mark.usefixtures("goes_on")
def test_children_die_with_a_parent_that_was_killed(up: Deployment) -> None:
    up.start("trainer.stop.iterations=1000")
    until(lambda: len(up.metrics()) >= 1, "first iteration", up)
    children = up.children()
    assert up.process is not None
    up.process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children.values()):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)


@pytest.mark.usefixtures("goes_on")
def test_another_backend_for_the_same_run_is_refused(up: Deployment) -> None:
    up.start()
    until(up.run.config.exists, "beginning of the run", up)
    assert up.interrupt() == 1
    up.start("backend.options.size_px=16")
    assert up.wait() == 2
    assert "$.backend" in up.log() and "--fresh" in up.log()


@pytest.mark.usefixtures("goes_on")
def test_staged_versions_go_live_by_their_canaries(up: Deployment) -> None:
    canary = [f"runtime.deploy.canary.{rule}" for rule in ("promote=not_worse", "margin=0.3", "max_episodes=300")]
    small = ["trainer.episodes_per_iteration=20", "trainer.evaluate.episodes_per_task=2"]
    up.start("runtime.deploy.mode=staged", *canary, *small, "trainer.stop.iterations=6", "trainer.stop.minutes=2")
    assert up.wait() == 0, up.log()
    registry = Registry(up.run.registry)
    changes = registry.stages()
    promoted = [change for change in changes if change.stage == "live" and change.why.startswith("canary of")]
    assert promoted, up.log()
    for change in promoted:
        assert change.evidence["not_worse"] >= change.evidence["needed_to_promote"]
        assert change.evidence["candidate_success"] > change.evidence["live_success"] - 0.3
    # What went live went live so, and nothing else drove alone.
    by_rule = {change.version for change in promoted}
    assert {row.version for row in registry.served()} - {registry.first().version} == by_rule
    # Each version was made from the one that was live, or from the one before, where that was still on trial.
    made = [row for row in registry.list() if row.made["command"] == "train"]
    assert {row.parent for row in made} <= {row.version for row in registry.served()}
    acted = {version for row in EpisodeIndex(up.run.episodes).after(0, 10**6) for version in row.versions}
    assert acted <= set(registry.acted())


def test_a_policy_made_elsewhere_works_until_it_is_stopped_but_is_not_trained(
    up: Deployment, tmp_path: Path, tiny_bundle: Callable[..., str]
) -> None:
    bundle = tmp_path / tiny_bundle(tmp_path, 0.1)
    add = [sys.executable, "-m", "fieldtune", "policies", "add", "point", str(bundle), "--set", f"runs={tmp_path}"]
    subprocess.run(add, check=True, timeout=60, stdin=subprocess.DEVNULL)
    up.start()
    assert up.wait() == 2 and "fieldtune up --no-training" in up.log()
    index = EpisodeIndex(up.run.episodes)
    assert index.count() == 0, "nothing has moved before that was found out"
    up.command.append("--no-training")
    up.start()
    until(lambda: index.count() >= 3, "third episode", up)
    assert set(up.children()) == {"serve", "drive"}
    assert up.interrupt() == 0
    assert {(row.explore, row.versions) for row in index.after(0) if row.versions} == {(False, (bundle.name,))}
    assert not up.run.metrics.exists() and not (up.run.path / "report.json").exists()


@pytest.mark.usefixtures("goes_on")
def test_a_robot_on_another_computer_is_driven_from_there(up: Deployment, tmp_path: Path) -> None:
    fieldtune = [sys.executable, "-m", "fieldtune"]
    address = free_endpoint()
    subprocess.run([*fieldtune, "keys", str(tmp_path / "keys"), "arm1", "here"], check=True, timeout=60)
    served = [f"runtime.serve.endpoint={address}", f"runtime.serve.keys={tmp_path}/keys/server"]
    here = [*served, f"bridge.endpoint={address}", f"bridge.keys={tmp_path}/keys/here", "bridge.workers=0"]
    up.start(*here, "trainer.stop.iterations=2")
    assert up.wait() == 2 and "$.bridge.workers: is 0" in up.log() and "--no-evaluation" in up.log()
    up.command.append("--no-evaluation")
    up.start(*here, "trainer.stop.iterations=2")
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "keys" / "arm1", there / "arm1")
    settings = ["--set", f"bridge.endpoint={address}", "--set", "bridge.keys=arm1"]
    until(lambda: "serve" in up.children(), "runtime", up)
    with subprocess.Popen([*fieldtune, "drive", "point", *settings], cwd=there, stdin=subprocess.DEVNULL) as drive:
        try:
            assert up.wait() == 0, up.log()
        finally:
            drive.kill()
    check_run(up, 2)
    assert {row.client for row in EpisodeIndex(up.run.episodes).after(0)} == {f"{socket.gethostname()}-{drive.pid}"}
