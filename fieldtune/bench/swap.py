"""What a swap costs those who are being served: nobody may wait longer for it than one inference.

Clients ask a real server with a real policy at a steady rate while two versions are announced in turn. A request
belongs to a swap if it was under way between the announcement and the first chunk of the new version that any client
got. The longest of those waits is compared with the longest of equally many requests beside swaps.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bridge.backend import BackendSpec
from bridge.client import PolicyClient
from bridge.messages import (
    Announce,
    Assignment,
    Chunk,
    EndEpisode,
    EpisodeStored,
    Infer,
    NextEpisode,
    Serving,
    expected_tensors,
)
from bridge.pacing import Pacer
from fieldtune.bench import common
from fieldtune.bench.common import BenchError, Goal, Result, live_of, milliseconds, process, untrained_run, whole_chunk
from fieldtune.deployment import Deployment
from runtime.bundle import read_bundle
from runtime.spawn import SPAWN

CLIENTS = 4
RATE_HZ = 25.0  # decisions of one client: a robot at 200 Hz with chunks of 8
DECISIONS = 25  # in an episode
SWAPS = 20
PAUSE_S = 0.5
TIMEOUT_S = 30.0


@dataclass(slots=True)
class Asked:
    """One request: when it was asked and answered (monotonic seconds), and by which version."""

    asked_s: float
    answered_s: float
    version: str

    @property
    def wait_s(self) -> float:
        """How long the client waited."""
        return self.answered_s - self.asked_s


def load(connection: Connection, endpoint: str, spec: BackendSpec, horizon: int, count: int) -> None:
    """`count` clients, a thread each, until the other end says stop; sends a list of (asked, answered, version)."""
    stop = threading.Event()
    asked: list[tuple[float, float, str]] = []
    failed: list[str] = []

    def one() -> None:
        try:
            _ask(endpoint, spec, horizon, stop.is_set, asked)
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}")
            raise

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    connection.send("ready")
    connection.recv()
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    connection.send(failed[0] if failed else asked)


def _ask(
    endpoint: str, spec: BackendSpec, horizon: int, stopped: Callable[[], bool], asked: list[tuple[float, float, str]]
) -> None:
    tensors: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (dtype, shape) in expected_tensors(spec).items()}
    sent = {"sent": np.zeros((horizon, len(spec.action.names)), np.float32), "reward": np.zeros(horizon, np.float32)}
    both = {**tensors, **sent}
    pacer = Pacer(1 / RATE_HZ)
    with PolicyClient(endpoint, client="bench", timeout_s=TIMEOUT_S) as client:
        session = client.hello(spec).session
        pacer.start()
        while not stopped():
            assignment, _ = client.request(NextEpisode(session=session), Assignment)
            for i in range(DECISIONS):
                start_s = time.monotonic()
                infer = Infer(
                    session=session, episode=assignment.episode, step=i * horizon, played=whole_chunk(i, horizon)
                )
                chunk, _ = client.request(infer, Chunk, both if i else tensors)
                asked.append((start_s, time.monotonic(), chunk.version))
                pacer.wait()
            end = EndEpisode(
                session=session,
                episode=assignment.episode,
                status="timeout",
                steps=DECISIONS * horizon,
                played=whole_chunk(DECISIONS, horizon),
            )
            client.request(end, EpisodeStored, both)


def bench_swap(deployment: Deployment, directory: Path, *, quick: bool = False) -> Result:
    """Announce to first chunk, and the longest wait in swaps against that of all other requests."""
    from bridge.backends import make_backend

    swaps = 2 if quick else SWAPS
    with (
        tempfile.TemporaryDirectory(prefix="fieldtune-bench-") as sockets,
        tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory) as place,
    ):
        run, bundles = untrained_run(deployment, Path(place), versions=2)
        spec = make_backend(deployment.backend).spec
        horizon = read_bundle(bundles[0]).spec.horizon
        numbers = sum(weight.size for weight in read_bundle(bundles[0]).weights.values())
        arguments = (live_of(run), f"ipc://{sockets}/policy.sock", run.episodes, tuple(spec.instructions))
        with process(common.serve, *arguments, DECISIONS * horizon) as (_, endpoint):
            here, there = SPAWN.Pipe()
            child = SPAWN.Process(target=load, args=(there, endpoint, spec, horizon, CLIENTS), daemon=True)
            child.start()
            there.close()
            if not here.poll(common.START_S):
                raise BenchError("swap: the clients did not start")
            here.recv()
            announced: list[tuple[float, float, str]] = []
            with PolicyClient(endpoint, client="bench", timeout_s=TIMEOUT_S) as client:
                time.sleep(2 * PAUSE_S)
                for i in range(swaps):
                    start_s = time.monotonic()
                    reply, _ = client.request(Announce(path=str(bundles[(i + 1) % 2])), Serving)
                    announced.append((start_s, time.monotonic(), reply.version))
                    time.sleep(PAUSE_S)
            here.send("stop")
            got = here.recv() if here.poll(common.START_S) else "the clients are silent"
            if isinstance(got, str):
                raise BenchError(f"swap: {got}")
            child.join(common.STOP_S)
    return summary([Asked(*row) for row in got], announced, CLIENTS, numbers)


def summary(asked: list[Asked], announced: list[tuple[float, float, str]], clients: int, numbers: int) -> Result:
    """Sort requests into those under way in a swap and the others. `announced`: asked, answered, version."""
    first_chunk_s, inside, stale = [], set(), 0
    for start_s, answered_s, version in announced:
        fresh = [a.answered_s for a in asked if a.version == version and a.answered_s > start_s]
        if not fresh:
            raise BenchError(f"swap: no client got a chunk of version {version[:12]}")
        until_s = min(fresh)
        first_chunk_s.append(until_s - start_s)
        inside |= {i for i, a in enumerate(asked) if a.answered_s >= start_s and a.asked_s <= until_s}
        following = [later for later, _, _ in announced if later > start_s]
        end_s = min(following, default=float("inf"))
        # Asked after the runtime said that the new version is live, yet answered by the one before.
        stale += sum(answered_s < a.asked_s and a.answered_s < end_s and a.version != version for a in asked)
    during = [a.wait_s for i, a in enumerate(asked) if i in inside]
    normal = [a.wait_s for i, a in enumerate(asked) if i not in inside]
    if not normal or not during:
        raise BenchError("swap: no request was beside a swap, or none in one")
    rows: list[tuple[str | float, ...]] = [
        (name, *(milliseconds(waits, q) for q in (0.5, 0.99, 1.0)), len(waits))
        for name, waits in (
            ("a request beside swaps", normal),
            ("a request during swaps", during),
            ("announcement to its answer", [end - start for start, end, _ in announced]),
            ("announcement to first chunk", first_chunk_s),
        )
    ]
    # The longest of few is shorter than the longest of many: beside swaps, that of as many as were in swaps counts.
    longest_ms, expected_ms = milliseconds(during, 1.0), milliseconds(normal, 1.0 - 1.0 / len(during))
    return Result(
        "swap",
        "new weights under load",
        ("what", "p50 ms", "p99 ms", "max ms", "n"),
        rows,
        [
            Goal("longest wait in swaps above that beside", longest_ms - expected_ms, milliseconds(normal, 0.5), "ms"),
            Goal("requests answered by an older version than was said to be live", stale, 0),
        ],
        [
            f"{clients} clients, each {RATE_HZ:g} decisions a second; {numbers / 1e6:.2f} million weights; "
            f"{len(announced)} swaps",
            "the goal is one inference, the median wait beside swaps; the longest wait of as many requests there is "
            f"{expected_ms:.2f} ms; loading shares the cores with serving and clients",
        ],
    )
