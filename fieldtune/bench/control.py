"""What a slow policy costs a robot: chunks asked for and waited for, against chunks asked for while others play.

The deployment's simulator is paced by the clock as a robot is, at 20 and 50 ticks a second, and the policy's answers
take 50, 150 and 300 ms. Everything else is what `fieldtune up` runs: server, wire, log, guard, control loop. Lanes run
side by side, each a process with a server and a bridge of its own, so that no request waits for another's inference.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from bridge.backend import Backend, BackendSpec, Float32, Observation, Outcome
from bridge.backends import make_backend
from bridge.client import PolicyClient
from bridge.drive import drive
from bridge.endpoint import resolve_endpoint
from bridge.pacing import Ticks
from bridge.safety import STARVED
from fieldtune.bench.common import BenchError, FixedLive, Goal, Result, together, untrained_run
from fieldtune.deployment import Deployment, find_bundle
from runtime.bundle import PolicySpec
from runtime.config import ServeConfig
from runtime.episode import Episode
from runtime.episodes import EpisodeLog
from runtime.policy import Policy
from runtime.reading import read_episode
from runtime.schedule import FixedList
from runtime.server import PolicyServer

RATES_HZ, QUICK_RATES_HZ = (20.0, 50.0), (50.0,)
DELAYS_MS, QUICK_DELAYS_MS = (50, 150, 300), (50,)
EPISODES = 25  # of each task in a cell
LANES = 4
TASKS = 2
MAX_LOSS = 0.03  # of success, asynchronous against synchronous
FIRST_SEED = 3_000_000  # goals that neither training nor evaluation takes

Merge = Literal["switch", "blend", "prefix"] | None
MERGES: tuple[Merge, ...] = (None, "switch", "blend", "prefix")


class Cell(NamedTuple):
    """One row: a rate, a delay, and how chunks take over."""

    hz: float
    delay_ms: float
    merge: Merge


class Played(NamedTuple):
    """One episode: how it ended, and the changes from action to action, in half ranges."""

    success: bool
    steps: int
    starved: int
    at_boundaries: list[float]
    inside: list[float]


class Paced:
    """A simulator that is driven by the clock, as if time passed in it."""

    def __init__(self, backend: Backend, hz: float) -> None:
        self._backend = backend
        self._spec = replace(backend.spec, paced=True, control_hz=hz)

    @property
    def spec(self) -> BackendSpec:
        """The simulator's, paced at another rate."""
        return self._spec

    def connect(self) -> None:
        """As the simulator."""
        self._backend.connect()

    def reset(self, task: str, seed: int) -> None:
        """As the simulator."""
        self._backend.reset(task, seed)

    def observe(self) -> Observation:
        """As the simulator."""
        return self._backend.observe()

    def apply(self, action: Float32) -> Float32:
        """As the simulator."""
        return self._backend.apply(action)

    def outcome(self) -> Outcome:
        """As the simulator."""
        return self._backend.outcome()

    def hold_action(self) -> Float32:
        """As the simulator."""
        return self._backend.hold_action()

    def stop(self) -> None:
        """As the simulator."""
        self._backend.stop()

    def close(self) -> None:
        """As the simulator."""
        self._backend.close()


class Slow:
    """A policy whose answers take `delay_s`, for robots of another rate."""

    def __init__(self, policy: Policy, hz: float, delay_s: float) -> None:
        self._policy, self._delay_s = policy, delay_s
        self.spec: PolicySpec = replace(policy.spec, control_hz=hz)
        self.version = policy.version
        self.tokens: Callable[[str], NDArray[np.int64]] = policy.tokens

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Float32, Float32]:
        """As the policy, and late."""
        due_s = time.monotonic() + self._delay_s
        answer = self._policy.infer(inputs)
        time.sleep(max(0.0, due_s - time.monotonic()))
        return answer


def lane(
    connection: Connection,
    deployment: Deployment,
    bundle: Path,
    cell: Cell,
    episodes: list[tuple[str, int]],
    directory: Path,
) -> None:
    """Runs episodes one after another; sends a list of `Played` and the `Ticks`."""
    directory.mkdir()
    backend = Paced(make_backend(deployment.backend), cell.hz)
    live = FixedLive(Slow(Policy.load(bundle, threads=1), cell.hz, cell.delay_ms / 1e3))
    bridge = replace(deployment.bridge, merge=cell.merge, delay_steps=0)
    log = EpisodeLog(directory / "episodes")
    server = PolicyServer(
        resolve_endpoint("ipc", directory),
        live,
        log,
        FixedList(episodes),
        explore=False,
        horizon_steps=bridge.horizon_steps,
        config=ServeConfig(),
    )
    over = threading.Event()
    thread = threading.Thread(target=server.run, args=(over.is_set,), name="server")
    connection.send("ready")
    connection.recv()
    thread.start()
    try:
        with PolicyClient(server.endpoint, client="bench", timeout_s=bridge.request_timeout_s) as client:
            summary = drive(
                backend, client, bridge, stopped=lambda: False, report=lambda _report, _assignment: None, warn=print
            )
        rows = [row for row in log.index.after(0, limit=10**9) if row.status != "aborted"]
        half_range = (np.array(backend.spec.action.high) - np.array(backend.spec.action.low)) / 2
        connection.send(([played(read_episode(log.index.path(row)), half_range) for row in rows], summary.ticks))
    finally:
        over.set()
        thread.join()
        log.close()


def played(episode: Episode, half_range: NDArray[np.float64]) -> Played:
    """What the log says of an episode. Changes to or from a starved tick are of neither kind."""
    decisions = [decision for decision in episode.decisions if len(decision.sent)]
    sent = np.concatenate([decision.sent for decision in decisions]) / half_range
    rules = [np.zeros(len(d.sent), np.uint8) if d.rules is None else d.rules for d in decisions]
    starved = np.concatenate(rules) & STARVED > 0
    change = np.linalg.norm(np.diff(sent, axis=0), axis=1)
    moving = ~(starved[1:] | starved[:-1])
    first = np.zeros(len(sent), bool)
    first[np.cumsum([len(decision.sent) for decision in decisions])[:-1]] = True
    return Played(
        success=episode.success,
        steps=len(sent),
        starved=int(starved.sum()),
        at_boundaries=change[first[1:] & moving].tolist(),
        inside=change[~first[1:] & moving].tolist(),
    )


def bench_control(deployment: Deployment, directory: Path, *, quick: bool = False) -> Result:
    """All cells; the policy is `trainer.policy`, or an untrained one where the deployment names none."""
    cells = [
        Cell(hz, delay_ms, merge)
        for hz in (QUICK_RATES_HZ if quick else RATES_HZ)
        for delay_ms in (QUICK_DELAYS_MS if quick else DELAYS_MS)
        for merge in MERGES
    ]
    each, lanes = (1, 1) if quick else (EPISODES, LANES)
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory) as place:
        if deployment.trainer.policy:
            bundle = find_bundle(deployment.trainer.policy)
        else:
            _, (bundle,) = untrained_run(deployment, Path(place), versions=1)
        policy = Policy.load(bundle)
        cells = [cell for cell in cells if cell.merge != "prefix" or policy.spec.prefix_steps]
        tasks = list(make_backend(deployment.backend).spec.instructions)[:TASKS]
        goals = [(task, FIRST_SEED + i) for i in range(each) for task in tasks]
        found = {}
        for number, cell in enumerate(cells):
            targets = [
                partial(
                    lane,
                    deployment=deployment,
                    bundle=bundle,
                    cell=cell,
                    episodes=goals[i::lanes],
                    directory=Path(place) / f"{number}-{i}",
                )
                for i in range(min(lanes, len(goals)))
            ]
            longest_s = (deployment.bridge.horizon_steps + 10) * (1 / cell.hz + cell.delay_ms / 1e3)
            results = together(targets, longest_s * len(goals) / lanes)
            found[cell] = _joined(results, len(goals))
    return _result(found, deployment, policy, each)


def _joined(results: list[tuple[list[Played], Ticks]], wanted: int) -> tuple[list[Played], Ticks]:
    ticks = Ticks()
    for _, own in results:
        ticks.add(own)
    episodes = [episode for own, _ in results for episode in own]
    if len(episodes) != wanted:
        raise BenchError(f"control: {len(episodes)} of {wanted} episodes came to their end; the errors are above")
    return episodes, ticks


def _result(found: dict[Cell, tuple[list[Played], Ticks]], deployment: Deployment, policy: Policy, each: int) -> Result:
    rows: list[tuple[str | float, ...]] = []
    for cell, (episodes, ticks) in found.items():
        boundary = _mean([change for episode in episodes for change in episode.at_boundaries])
        inside = _mean([change for episode in episodes for change in episode.inside])
        rows.append(
            (
                cell.hz,
                cell.delay_ms,
                cell.merge or "none",
                _success(episodes),
                _mean([episode.steps for episode in episodes if episode.success]) or "-",
                sum(episode.starved for episode in episodes),
                100 * ticks.wait_s / max(ticks.work_s + ticks.sleep_s, 1e-9),
                ticks.overruns,
                boundary,
                inside,
            )
        )
    waiting = _success([e for cell, (episodes, _) in found.items() if cell.merge is None for e in episodes])
    goals = [
        Goal(
            "starved ticks of asynchronous chunks",
            sum(episode.starved for cell, (episodes, _) in found.items() if cell.merge for episode in episodes),
            0,
        )
    ]
    for merge in dict.fromkeys(cell.merge for cell in found if cell.merge):
        own = _success([e for cell, (episodes, _) in found.items() if cell.merge == merge for e in episodes])
        goals.append(Goal(f"success lost by {merge}, all rows", waiting - own, MAX_LOSS))
    trained = f"policy {policy.version[:12]}" if deployment.trainer.policy else "the policy is untrained"
    return Result(
        bench="control",
        title="a policy that takes its time",
        columns=(
            "Hz",
            "delay ms",
            "merge",
            "success",
            "steps",
            "starved",
            "stands still %",
            "overruns",
            "jump at takeover",
            "jump inside",
        ),
        rows=rows,
        goals=goals,
        notes=[
            f"{deployment.name}: {each} goals of each task, from seed {FIRST_SEED}; {trained}; chunks of "
            f"{policy.spec.horizon}, the next asked for after {deployment.bridge.play_steps or 'half of them'}",
            "stands still: time in which the loop waits for a chunk, the first of each episode included; the simulator "
            "stands still with it, so that costs no success here",
            "jump: mean change from one action to the next, Euclidean, in half ranges of the action",
        ],
    )


def _success(episodes: list[Played]) -> float:
    return _mean([float(episode.success) for episode in episodes])


def _mean(values: list[float] | list[int]) -> float:
    return float(np.mean(values)) if values else 0.0
