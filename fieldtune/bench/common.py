"""What the benchmarks share: results and goals, this computer in words, and a real server in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import all_instructions, instruction_of
from bridge.backends import make_backend
from bridge.errors import FieldtuneError
from bridge.messages import Governing, Played
from fieldtune.deployment import Deployment
from runtime.bundle import BundleError
from runtime.config import ServeConfig
from runtime.episodes import EpisodeLog
from runtime.inference import Infers
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.schedule import Training
from runtime.server import LivePolicy, PolicyServer
from runtime.spawn import SPAWN, end, spawn
from runtime.swap import Live
from trainer.environment import LIBRARIES, installed, processor, usable_cores

START_S = 60.0
STOP_S = 15.0


class BenchError(FieldtuneError):
    """A benchmark could not be carried out."""


class Goal(Struct, frozen=True):
    """A goal: `measured` is to be at most (or, if `at_least`, at least) `limit`."""

    name: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it was met in this run."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


class Result(Struct, frozen=True):
    """One benchmark: a table of figures, its goals, and what must be known to read them."""

    bench: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | float, ...]]
    goals: list[Goal]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """For --json: each row a map, each goal with whether it was met."""
        return {
            "bench": self.bench,
            "title": self.title,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "goals": [
                {
                    "name": goal.name,
                    "measured": goal.measured,
                    "limit": goal.limit,
                    "unit": goal.unit,
                    "at_least": goal.at_least,
                    "met": goal.met,
                }
                for goal in self.goals
            ],
            "notes": self.notes,
        }


def machine() -> dict[str, Any]:
    """This computer and what runs on it, so that figures can be compared."""
    return {
        "cpu": processor(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": installed(LIBRARIES),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, with `+` if files differ from it; empty if this is no checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def file_system(directory: Path) -> str:
    """Type of the file system that holds a directory: a log in memory (tmpfs) is not a log on a disk."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def milliseconds(seconds: Sequence[float] | NDArray[np.float64], quantile: float) -> float:
    """A quantile of durations in seconds, as milliseconds."""
    return float(np.quantile(np.asarray(seconds), quantile) * 1e3)


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used until now, in user and kernel mode, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stop_when_closed(connection: Connection) -> threading.Event:
    """An event that is set when the other end of `connection` is closed, by whatever end its process came to."""
    stop = threading.Event()

    def watch() -> None:
        with suppress(EOFError):
            connection.recv()
        stop.set()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
    return stop


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[int, Any]]:
    """Run `target(connection, *arguments)` in a process; yields its pid and the first thing it sent.

    At the end the connection is closed, which is how the process knows, and the process is waited for.
    Raises `BenchError` if it sends nothing in time or does not end in time.
    """
    child, here = spawn(target, *arguments)
    try:
        try:
            if not here.poll(START_S):
                raise BenchError(f"{target.__name__} did not start within {START_S:g} s")
            first = here.recv()
        except EOFError as error:
            raise BenchError(f"{target.__name__} ended at its start; its error is above") from error
        assert child.pid is not None
        yield child.pid, first
    finally:
        end([(child, here)], STOP_S)


def together(targets: list[partial[None]], seconds: float) -> list[Any]:
    """Run processes that say they are ready, wait for a word, and send one result; raises `BenchError`."""
    children = []
    try:
        for target in targets:
            here, there = SPAWN.Pipe()
            child = SPAWN.Process(target=_call, args=(there, target), daemon=True)
            child.start()
            there.close()
            children.append((child, here))
        for _, here in children:
            _receive(here, START_S)
        for _, here in children:
            here.send("go")
        return [_receive(here, 10 * seconds + START_S) for _, here in children]
    finally:
        for child, here in children:
            here.close()
            child.join(STOP_S)
            if child.is_alive():
                child.kill()


def _call(connection: Connection, target: partial[None]) -> None:
    target(connection)


def _receive(here: Connection, timeout_s: float) -> Any:
    try:
        if here.poll(timeout_s):
            return here.recv()
    except EOFError as error:
        raise BenchError("a process ended early; its error is above") from error
    raise BenchError(f"a process was silent for {timeout_s:g} s")


def serve(
    connection: Connection,
    make_live: Callable[[], LivePolicy],
    endpoint: str,
    log_directory: Path,
    tasks: Sequence[str],
    horizon_steps: int,
) -> None:
    """A `PolicyServer` with its `EpisodeLog`, as `fieldtune serve` runs it; sends its endpoint, then serves."""
    stop = stop_when_closed(connection)
    log = EpisodeLog(log_directory)
    try:
        schedule = Training(tasks, 0, 1_000_000, np.random.default_rng(0), balance="equal")
        server = PolicyServer(
            endpoint,
            make_live(),
            log,
            schedule,
            explore=True,
            horizon_steps=horizon_steps,
            config=ServeConfig(session_timeout_s=120.0),
        )
        connection.send(server.endpoint)
        server.run(stop.is_set)
    finally:
        log.close()


@dataclass
class FixedLive:
    """One policy, live for good."""

    policy: Infers
    previous: str = ""
    swaps: int = 0

    def __call__(self) -> Infers:
        """The policy."""
        return self.policy

    def arm_for(self, client: str) -> str:
        """Whatever is live."""
        return ""

    def policy_of(self, arm: str) -> Infers:
        """The policy."""
        return self.policy

    def failed(self, version: str, why: str) -> None:
        """Whoever asked is told."""

    def standing(self) -> dict[str, Any]:
        """Nothing is staged."""
        return {}

    def announce(self, path: Path) -> str:
        """Refused."""
        raise BundleError("version", f"a benchmark serves one version; {path} is not loaded")

    def rollback(self, version: str) -> str:
        """Refused."""
        raise BundleError("version", f"a benchmark serves one version, not {version}")

    def govern(self, command: Governing, version: str, who: str) -> str:
        """Refused."""
        raise BundleError("version", f"a benchmark serves one version; {command} is not for it")


def live_of(run: RunDir) -> Callable[[], LivePolicy]:
    """Makes the live policy of a run, in the process that serves it."""
    return partial(Live, run, threads=1, keep_versions=20)


def untrained_run(deployment: Deployment, directory: Path, versions: int) -> tuple[RunDir, list[Path]]:
    """A run in `directory` with fresh policies for the deployment's backend, the first one live, and their bundles.

    The network is the deployment's; only its weights know nothing. Raises `BackendError` if the backend cannot start.
    """
    import torch

    from bridge.messages import observation_tensors
    from runtime.policy import encode
    from trainer.export import Exporter, probe_prefixes
    from trainer.sft import policy_spec
    from trainer.tokens import build_tokenizer
    from trainer.vla import VLA

    torch.set_num_threads(1)
    run, config = RunDir(directory / "run"), deployment.trainer
    backend = make_backend(deployment.backend)
    task = next(iter(backend.spec.instructions))
    backend.connect()
    try:
        backend.reset(task, 0)
        seen = observation_tensors(backend.observe())
    finally:
        backend.stop()
        backend.close()
    tokenizer = build_tokenizer(all_instructions(backend.spec), config.vla.vocabulary, config.vla.max_tokens)
    seen["tokens"] = encode(tokenizer, instruction_of(backend.spec, task, 0), config.vla.max_tokens)
    probe = {name: np.stack([array, array]) for name, array in seen.items() if name != "privileged"}
    still = np.zeros((2, config.vla.horizon_steps, len(backend.spec.action.names)), np.float32)
    probe.update(probe_prefixes(still, config.vla.prefix_steps))
    registry = Registry(run.registry)
    torch.manual_seed(0)
    vla = VLA(config.vla, policy_spec("bench", backend.spec, config))
    state = torch.from_numpy(seen["state"])
    vla.set_state_statistics(state, torch.ones_like(state))
    exporter = Exporter(vla, tokenizer, probe)
    bundles = []
    for _ in range(versions):
        version = exporter.publish(run.policies, parent="", made={"command": "bench"})
        registry.add(version, parent="", made={"command": "bench"})
        bundles.append(run.policies / version)
        with torch.no_grad():
            vla.head.bias.add_(0.01)
    registry.set_live(bundles[0].name, why="bench")
    return run, bundles


def whole_chunk(decision: int, horizon: int) -> tuple[Played, ...]:
    """The report that all of a decision's chunk was played; before the first decision (0) nothing was."""
    return (Played(decision, 0, horizon),) if decision else ()
