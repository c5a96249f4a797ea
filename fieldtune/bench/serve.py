"""What the server adds to ZeroMQ: a chunk from the whole server against an echo of the same bytes.

Both sides in one run: each client asks the server for an episode of chunks exactly as a bridge does, then sends the
same observation bytes as often to a bare ROUTER that returns them, then to one that returns a frame of a chunk's size.
All clients move from one to the next together, so the three never load each other. Only the policy is missing: it gives
zeros at once.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, Float32, VectorSpec
from bridge.client import PolicyClient
from bridge.messages import Assignment, Chunk, EndEpisode, EpisodeStored, Infer, NextEpisode, encode
from fieldtune.bench import common
from fieldtune.bench.common import BenchError, FixedLive, Goal, Result, milliseconds, process, whole_chunk
from runtime.bundle import FORMAT, PolicySpec
from runtime.spawn import SPAWN

HORIZON = 8
DECISIONS = 25  # in an episode: one block of requests
CLIENTS = (1, 4, 16)
BLOCKS = {1: 40, 4: 16, 16: 6}  # rounds of server, echo, echo; the first is warm-up
CLIENTS_PER_PROCESS = 4
SIDES = ("server", "echo", "small echo")
WAIT_S = 60.0
P50_LIMIT, P99_LIMIT = 1.5, 3.0

SPEC = BackendSpec(
    name="bench",
    cameras=(CameraSpec("front", 224, 224), CameraSpec("wrist", 224, 224)),
    state=VectorSpec(tuple(f"joint{i}" for i in range(8)), ("rad",) * 8),
    action=ActionSpec(tuple(f"joint{i}" for i in range(7)), ("rad",) * 7, (-1.0,) * 7, (1.0,) * 7, "absolute"),
    control_hz=50.0,
    instructions={"task": "do the task"},
)


@dataclass
class NullPolicy:
    """Gives zeros at once; all else is the server's."""

    spec: PolicySpec
    version: str = "0" * 64
    _ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(16, np.int64))

    def tokens(self, instruction: str) -> NDArray[np.int64]:
        """Sixteen zeros."""
        return self._ids

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Float32, Float32]:
        """Zeros `[B, h, d]`, twice."""
        zeros = np.zeros((len(inputs["state"]), self.spec.horizon, len(self.spec.action.names)), np.float32)
        return zeros, zeros


def null_live() -> FixedLive:
    """The null policy for `SPEC`."""
    spec = PolicySpec(
        format=FORMAT,
        name="null",
        cameras=SPEC.cameras,
        state=SPEC.state,
        action=SPEC.action,
        control_hz=SPEC.control_hz,
        horizon=HORIZON,
        tokens=16,
    )
    return FixedLive(NullPolicy(spec))


def observation() -> dict[str, NDArray[Any]]:
    """Two images of noise, uint8 `[224, 224, 3]`, and the state float32 `[8]`."""
    rng = np.random.default_rng(0)
    images = {f"image/{c.name}": rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in SPEC.cameras}
    return {**images, "state": np.zeros(len(SPEC.state.names), np.float32)}


def echo(connection: Connection, endpoint: str, small: bool) -> None:
    """A bare ROUTER that returns what it receives, or instead one frame of a chunk's size."""
    stop = common.stop_when_closed(connection)
    chunk = bytes(HORIZON * len(SPEC.action.names) * 4)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = 100
        router.bind(endpoint)
        connection.send(router.get_string(zmq.LAST_ENDPOINT))
        while not stop.is_set():
            try:
                frames = router.recv_multipart()
            except zmq.Again:
                continue
            router.send_multipart([frames[0], chunk] if small else frames)
    context.destroy(linger=0)


def clients(connection: Connection, endpoints: tuple[str, str, str], count: int, blocks: int, barrier: Any) -> None:
    """`count` clients, a thread each; sends seconds `[count * (blocks - 1) * DECISIONS]` for each of `SIDES`."""
    connection.send("ready")
    found: list[tuple[list[float], ...]] = []
    failed: list[BaseException] = []

    def one() -> None:
        try:
            found.append(_one_client(endpoints, blocks, partial(barrier.wait, WAIT_S)))
        except BaseException as error:
            failed.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sides = [[seconds for times in found for seconds in times[i]] for i in range(len(SIDES))]
    connection.send(str(failed[0]) if failed else sides)


def _one_client(
    endpoints: tuple[str, str, str], blocks: int, together: Callable[[], object]
) -> tuple[list[float], ...]:
    tensors = observation()
    sent = {"sent": np.zeros((HORIZON, len(SPEC.action.names)), np.float32), "reward": np.zeros(HORIZON, np.float32)}
    both = {**tensors, **sent}
    frames = [
        bytes(frame)
        for frame in encode(Infer(session="0" * 32, episode="0" * 24, step=0, played=whole_chunk(1, HORIZON)), both)
    ]
    times: tuple[list[float], ...] = ([], [], [])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ExitStack() as stack:
        client = stack.enter_context(PolicyClient(endpoints[0], client="bench", timeout_s=WAIT_S))
        session = client.hello(SPEC).session
        bare = [stack.enter_context(context.socket(zmq.DEALER)) for _ in endpoints[1:]]
        for socket, endpoint in zip(bare, endpoints[1:], strict=True):
            socket.linger = 0
            socket.rcvtimeo = int(WAIT_S * 1e3)
            socket.connect(endpoint)
        for block in range(blocks):
            kept: tuple[list[float], ...] = times if block else ([], [], [])
            together()
            assignment, _ = client.request(NextEpisode(session=session), Assignment)
            for i in range(DECISIONS):
                asked_s = time.monotonic()
                infer = Infer(
                    session=session, episode=assignment.episode, step=i * HORIZON, played=whole_chunk(i, HORIZON)
                )
                client.request(infer, Chunk, both if i else tensors)
                kept[0].append(time.monotonic() - asked_s)
            end = EndEpisode(
                session=session,
                episode=assignment.episode,
                status="timeout",
                steps=DECISIONS * HORIZON,
                played=whole_chunk(DECISIONS, HORIZON),
            )
            client.request(end, EpisodeStored, both)
            for socket, side in zip(bare, kept[1:], strict=True):
                together()
                for _ in range(DECISIONS):
                    asked_s = time.monotonic()
                    socket.send_multipart(frames)
                    socket.recv_multipart()
                    side.append(time.monotonic() - asked_s)
    context.destroy(linger=0)
    return times


def compare(transport: str, count: int, blocks: int, directory: Path) -> list[list[float]]:
    """Seconds of each request of `count` clients to each of `SIDES`, over `ipc` or `tcp`."""
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-") as sockets, ExitStack() as stack:
        names = [f"ipc://{sockets}/{name}.sock" if transport == "ipc" else "tcp://127.0.0.1:*" for name in "abc"]
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory)))
        arguments = (null_live, names[0], log, tuple(SPEC.instructions), DECISIONS * HORIZON)
        _, served = stack.enter_context(process(common.serve, *arguments))
        _, echoed = stack.enter_context(process(echo, names[1], False))
        _, answered = stack.enter_context(process(echo, names[2], True))
        barrier = SPAWN.Barrier(count)
        groups = []
        for first in range(0, count, CLIENTS_PER_PROCESS):
            here, there = SPAWN.Pipe()
            size = min(CLIENTS_PER_PROCESS, count - first)
            child = SPAWN.Process(
                target=clients, args=(there, (served, echoed, answered), size, blocks, barrier), daemon=True
            )
            child.start()
            there.close()
            groups.append((child, here))
        found: list[list[float]] = [[] for _ in SIDES]
        for child, here in groups:
            for expected in (str, list):
                got = here.recv() if here.poll(10 * WAIT_S) else "a client is silent"
                if not isinstance(got, expected):
                    raise BenchError(f"serve: {got}")
            for side, seconds in zip(found, got, strict=True):
                side += seconds
            child.join(common.STOP_S)
    return found


def bench_serve(directory: Path, *, quick: bool = False) -> Result:
    """Latency of a chunk for 1, 4 and 16 clients, ipc and tcp. The log is written below `directory`."""
    rows: list[tuple[str | float, ...]] = []
    goals = []
    plan = [("ipc", 1), ("tcp", 2)] if quick else [(transport, n) for transport in ("ipc", "tcp") for n in CLIENTS]
    for transport, count in plan:
        sides = compare(transport, count, 2 if quick else BLOCKS[count], directory)
        p50, p99 = ([milliseconds(seconds, q) for seconds in sides] for q in (0.5, 0.99))
        for i, side in enumerate(SIDES):
            rows.append((transport, count, side, p50[0] / p50[i], p99[0] / p99[i], p50[i], p99[i], len(sides[i])))
        where = f"{transport}, {count} client{'s' if count > 1 else ''}"
        goals.append(Goal(f"{where}: p50 against echo", p50[0] / p50[1], P50_LIMIT, "x"))
        goals.append(Goal(f"{where}: p99 against echo", p99[0] / p99[1], P99_LIMIT, "x"))
    columns = ("over", "clients", "side", "server p50 / p50", "server p99 / p99", "p50 ms", "p99 ms", "requests")
    size = sum(array.nbytes for array in observation().values())
    return Result(
        "serve",
        "a chunk from the whole server against a bare ZeroMQ echo",
        columns,
        rows,
        goals,
        [
            f"a request has {size / 1e3:.0f} KB: two images of 224 x 224 x 3 and a state; chunks are sampled",
            "echo returns the request's bytes; small echo returns one frame of a chunk's size",
            "clients ask again at once: above one client the figures are those of a server under full load",
            f"every episode is logged and synced ({common.file_system(directory)})",
        ],
    )
