"""A robot and its runtime as processes of their own, started with the commands of a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from ports import free_endpoint

from bridge.client import PolicyClient, SilentError
from bridge.config import BackendConfig
from bridge.messages import GetStatus, StatusReply
from fieldtune.cli import run

ENOUGH_S = 60.0
HERE = Path(__file__).parent


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {ENOUGH_S} s for {what}"
        time.sleep(0.02)


class Scene:
    """One deployment: its processes, what the robot noted and said, and the episode log."""

    def __init__(self, directory: Path, tiny_bundle: Callable[..., str]) -> None:
        self.directory, self._tiny_bundle = directory, tiny_bundle
        self.notes_path, self.fault_path = directory / "robot.notes", directory / "robot.fault"
        self.config = str(directory / "scene.yaml")
        self.python_path = [str(HERE.parent.parent), str(HERE), *sys.path]
        self.endpoint = free_endpoint()
        self.running: list[subprocess.Popen[bytes]] = []

    def deploy(self, backend: dict[str, Any], value: float = 0.02, horizon: int = 20, **bridge: Any) -> None:
        """Write the configuration, and a policy for the backend's state."""
        from bridge.backends import make_backend
        from runtime.registry import Registry
        from runtime.rundir import RunDir

        options = {"notes": str(self.notes_path), **backend.pop("options", {})}
        spec = make_backend(BackendConfig(backend["name"], options)).spec
        deployment = {
            "name": "scene",
            "runs": str(self.directory),
            "backend": {"name": backend["name"], "options": options},
            "bridge": {"horizon_steps": 10_000, **bridge},
            "runtime": {"serve": {"endpoint": self.endpoint}},
        }
        Path(self.config).write_text(yaml.safe_dump(deployment))
        run = RunDir(self.directory / "scene")
        version = self._tiny_bundle(
            run.policies,
            value,
            horizon=horizon,
            state=spec.state,
            action=spec.action,
            control_hz=spec.control_hz,
        )
        with_registry = Registry(run.registry)
        with_registry.add(version, parent="", made={})
        with_registry.set_live(version, why="test")
        with_registry.close()

    def deploy_dot(self, **settings: Any) -> None:
        self.deploy({"name": "faulty:Dot", "options": {"fault": str(self.fault_path)}}, **settings)

    # --- processes ------------------------------------------------------------------------------------------------

    def run(self, *arguments: str, said: str) -> subprocess.Popen[bytes]:
        """`fieldtune ARGUMENTS`; what it says goes to a file of that name, what it prints to one with `.out`."""
        python_path = os.pathsep.join(self.python_path)
        environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        log = self.directory / said
        with log.open("ab") as errors, log.with_suffix(".out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fieldtune", *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def serve(self) -> subprocess.Popen[bytes]:
        return self.run("serve", self.config, said="runtime.log")

    def drive(self, *arguments: str) -> subprocess.Popen[bytes]:
        return self.run("drive", self.config, "--name", "arm", *arguments, said="robot.log")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask it to leave; it must do so well."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENOUGH_S) == 0, self.said + (self.directory / "runtime.log").read_text()

    def status(self) -> dict[str, Any]:
        with PolicyClient(self.endpoint, client="status", timeout_s=1.0) as client:
            try:
                return client.request(GetStatus(), StatusReply)[0].status
            except SilentError:
                return {"robots": {}}

    def tell(self, command: str) -> None:
        """The operator's word to all robots."""
        assert run(["operator", self.config, command, "--set", f"bridge.endpoint={self.endpoint}"]) == 0

    def state(self) -> str:
        """What the robot is known to do."""
        return str(self.status()["robots"].get("arm", ""))

    # --- what became of it ----------------------------------------------------------------------------------------

    @property
    def said(self) -> str:
        path = self.directory / "robot.log"
        return path.read_text() if path.exists() else ""

    @property
    def notes(self) -> list[Any]:
        """The calls of the backend, in order."""
        text = self.notes_path.read_text() if self.notes_path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def warnings(self) -> list[str]:
        """What the robot's process has said, without the time of day."""
        return [line.partition(" ")[2] for line in self.said.splitlines()]

    def count(self, what: str) -> int:
        return sum(note[0] == what for note in self.notes)

    def moves(self) -> int:
        """How often the loop has sent something else than the dot's hold action."""
        return sum(note[0] == "apply" and any(note[1]) for note in self.notes)

    def moves_on(self, what: str, steps: int = 8) -> None:
        before = self.moves()
        until(lambda: self.moves() >= before + steps, what)

    @property
    def applied(self) -> dict[int, list[list[float]]]:
        """What the loop has sent, by the seed of its episode."""
        by_seed: dict[int, list[list[float]]] = {}
        for what, *arguments in self.notes:
            if what == "reset":
                actions = by_seed.setdefault(arguments[0], [])
            elif what == "apply":
                actions += arguments
        return by_seed

    def rows(self, status: str | None = None) -> list[Any]:
        """The log's index, the oldest episode first."""
        from runtime.index import EpisodeIndex

        index = EpisodeIndex(self.directory / "scene" / "episodes")
        try:
            return index.list(limit=1000, status=status)[::-1]
        finally:
            index.close()

    def episodes(self) -> list[Any]:
        """All logged episodes, once each is found to say what the robot was really sent: all of it, or what was known
        of it where it was aborted."""
        from runtime.index import EpisodeIndex
        from runtime.reading import read_episode

        index = EpisodeIndex(self.directory / "scene" / "episodes")
        try:
            read = [read_episode(index.path(row)) for row in index.list(limit=1000)[::-1]]
        finally:
            index.close()
        applied = self.applied
        for episode in read:
            sent = [action.tolist() for decision in episode.decisions for action in decision.sent]
            really = applied[episode.start.seed]
            assert episode.steps == len(sent) <= len(really)
            assert sent == really[: len(sent)]
            assert episode.status == "aborted" or len(sent) == len(really)
        return read

    def close(self) -> None:
        """Leave nothing behind."""
        for process in self.running:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()
