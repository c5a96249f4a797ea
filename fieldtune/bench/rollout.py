"""What the road over the wire costs: environment steps/s of the real loop against calling the same parts directly.

The loop: a server process with its episode log, and `bridge.workers` worker processes that each drive one backend, all
on as many cores as there are workers. Direct: one process on one core that resets, renders, runs onnxruntime and
samples with the same code, without wire, log and second process. A core of the loop is its sum divided by its cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bridge.backend import instruction_of
from bridge.backends import make_backend
from bridge.client import PolicyClient
from bridge.config import BridgeConfig
from bridge.control import EpisodeReport
from bridge.drive import drive
from bridge.messages import Assignment, observation_tensors
from fieldtune.bench import common
from fieldtune.bench.common import BenchError, Goal, Result, cpu_s, live_of, process, untrained_run
from fieldtune.deployment import Deployment
from runtime.inference import Pending, decide
from runtime.policy import Policy
from runtime.rundir import RunDir
from runtime.spawn import SPAWN

SECONDS = 15.0
QUICK_SECONDS = 1.0
LIMIT = 0.8


def direct(connection: Connection, deployment: Deployment, bundle: Path, core: int, seconds: float) -> None:
    """Episodes without wire or log on one core; sends (steps, wall seconds, processor seconds)."""
    os.sched_setaffinity(0, {core})
    backend = make_backend(deployment.backend)
    policy = Policy.load(bundle, threads=1)
    tasks = list(backend.spec.instructions)
    horizon_steps = deployment.bridge.horizon_steps
    backend.connect()
    connection.send("ready")
    connection.recv()
    steps, episodes, start_s, start_cpu_s = 0, 0, 0.0, 0.0
    try:
        while episodes < 2 or time.monotonic() - start_s < seconds:
            if episodes == 1:  # the first one is warm-up
                steps, start_s, start_cpu_s = 0, time.monotonic(), time.process_time()
            task = tasks[episodes % len(tasks)]
            backend.reset(task, episodes)
            status, step = "running", 0
            while status == "running" and step < horizon_steps:
                pending = Pending(
                    identity=b"",
                    session="",
                    request=0,
                    episode=f"{episodes:024x}",
                    decision=step,
                    step=step,
                    instruction=instruction_of(backend.spec, task, episodes),
                    tensors=observation_tensors(backend.observe()),
                    explore=True,
                    arrived_s=0.0,
                )
                actions = decide(policy, [pending])[0].actions[: deployment.bridge.play_steps]
                for action in actions[: horizon_steps - step]:
                    backend.apply(action)
                    status = backend.outcome().status
                    step += 1
                    if status != "running":
                        break
            backend.observe()
            steps += step
            episodes += 1
        connection.send((steps, time.monotonic() - start_s, time.process_time() - start_cpu_s))
    finally:
        backend.stop()
        backend.close()


def work(
    connection: Connection, deployment: Deployment, endpoint: str, number: int, cores: set[int], seconds: float
) -> None:
    """A bridge worker as `fieldtune drive` runs it; sends what `direct` sends, from its second episode on."""
    os.sched_setaffinity(0, cores)
    ends: list[tuple[float, int, float]] = []

    def report(result: EpisodeReport, _assignment: Assignment) -> None:
        ends.append((time.monotonic(), result.steps, time.process_time()))

    def over() -> bool:
        return len(ends) > 1 and ends[-1][0] - ends[0][0] >= seconds

    backend = make_backend(deployment.backend)
    connection.send("ready")
    connection.recv()
    with PolicyClient(endpoint, client=f"bench-{number}") as client:
        drive(backend, client, BridgeConfig(), stopped=over, report=report, warn=print)
    steps = sum(steps for _, steps, _ in ends[1:])
    connection.send((steps, ends[-1][0] - ends[0][0], ends[-1][2] - ends[0][2]))


def together(targets: list[partial[None]], seconds: float) -> list[tuple[float, ...]]:
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
            _receive(here, common.START_S)
        for _, here in children:
            here.send("go")
        return [_receive(here, 10 * seconds + common.START_S) for _, here in children]
    finally:
        for child, here in children:
            here.close()
            child.join(common.STOP_S)
            if child.is_alive():
                child.kill()


def _call(connection: Connection, target: partial[None]) -> None:
    target(connection)


def _receive(here: Connection, timeout_s: float) -> Any:
    try:
        if here.poll(timeout_s):
            return here.recv()
    except EOFError as error:
        raise BenchError("rollout: a process ended early; its error is above") from error
    raise BenchError(f"rollout: a process was silent for {timeout_s:g} s")


def bench_rollout(deployment: Deployment, directory: Path, *, quick: bool = False) -> Result:
    """Environment steps/s of the loop and of the direct calls, with an untrained policy of the deployment's size."""
    seconds = QUICK_SECONDS if quick else SECONDS
    workers = deployment.bridge.workers
    cores = sorted(os.sched_getaffinity(0))[:workers]
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory) as place:
        run, bundles = untrained_run(deployment, Path(place), versions=1)
        bundle = bundles[0]
        alone = together(
            [partial(direct, deployment=deployment, bundle=bundle, core=cores[0], seconds=seconds)], seconds
        )
        beside = together(
            [partial(direct, deployment=deployment, bundle=bundle, core=core, seconds=seconds) for core in cores],
            seconds,
        )
        loop, server_s = _run_loop(deployment, run, set(cores), seconds)
        again = together(
            [partial(direct, deployment=deployment, bundle=bundle, core=cores[0], seconds=seconds)], seconds
        )
    one = float(np.mean([rate(result) for result in alone + again]))
    filled = sum(map(rate, beside)) / len(cores)
    looped = sum(map(rate, loop)) / len(cores)
    steps = {
        "direct": sum(r[0] for r in alone + again),
        "beside": sum(r[0] for r in beside),
        "loop": sum(r[0] for r in loop),
    }
    rows: list[tuple[str | float, ...]] = [
        ("direct, one process", 1, one, one, _cpu_us(alone + again), 0.0, steps["direct"]),
        ("direct, one a core", len(cores), filled * len(cores), filled, _cpu_us(beside), 0.0, steps["beside"]),
        ("loop", len(cores), looped * len(cores), looped, _cpu_us(loop), server_s / steps["loop"] * 1e6, steps["loop"]),
    ]
    return Result(
        "rollout",
        f"{deployment.name}: environment steps/s through the real loop against direct calls",
        ("way", "cores", "steps/s", "steps/s a core", "cpu us a step", "server cpu us a step", "steps"),
        rows,
        [
            Goal("loop against one direct process, a core", looped / one, LIMIT, "x", at_least=True),
            Goal("loop against as many direct processes, a core", looped / filled, LIMIT, "x", at_least=True),
        ],
        [
            f"{workers} workers and the server share {len(cores)} cores, pinned; an untrained policy, sampled chunks",
            "direct: the same backend, onnxruntime session and sampling; no wire, no log; measured before and after",
            "cpu us a step is that of the processes that drive; the server's, with log and inference, stands beside it",
        ],
    )


def rate(result: tuple[float, ...]) -> float:
    """Environment steps a second of one process: (steps, wall seconds, processor seconds)."""
    return result[0] / result[1]


def _cpu_us(results: list[tuple[float, ...]]) -> float:
    return sum(r[2] for r in results) / sum(r[0] for r in results) * 1e6


def _run_loop(
    deployment: Deployment, run: RunDir, cores: set[int], seconds: float
) -> tuple[list[tuple[float, ...]], float]:
    """Results of the workers, and the server's processor seconds meanwhile."""
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-") as sockets:
        tasks = deployment.trainer.trained(make_backend(deployment.backend).spec)
        arguments = (live_of(run), f"ipc://{sockets}/policy.sock", run.episodes, tasks, deployment.bridge.horizon_steps)
        with process(common.serve, *arguments) as (pid, endpoint):
            # Each thread has its own mask; those that run now are all that there will be.
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)
            targets = [
                partial(work, deployment=deployment, endpoint=endpoint, number=i, cores=cores, seconds=seconds)
                for i in range(deployment.bridge.workers)
            ]
            before_s = cpu_s(pid)
            results = together(targets, seconds)
            # The server also worked while the workers warmed up, so this is a little more than it needed for the steps.
            return results, cpu_s(pid) - before_s
