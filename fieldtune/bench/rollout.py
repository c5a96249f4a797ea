"""What the road over the wire costs: environment steps/s of the real loop against calling the same parts directly.

The loop: a server process with its episode log, and `bridge.workers` worker processes that each drive one backend, all
on as many cores as there are workers. Direct: one process on one core that resets, renders, runs onnxruntime and
samples with the same code, without wire, log and second process. A core of the loop is its sum divided by its cores.

A second table says where a step's processor time goes. Workers measure it around each call of their backend, the server
around each inference; what is left of both processes is the wire and the log.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bridge.backend import instruction_of
from bridge.backends import make_backend
from bridge.client import PolicyClient
from bridge.drive import drive
from bridge.messages import GetStatus, StatusReply, observation_tensors
from fieldtune.bench import common
from fieldtune.bench.common import Goal, Result, cpu_s, live_of, process, together, untrained_run
from fieldtune.bench.spent import Spent, Timed
from fieldtune.deployment import Deployment, require_workers
from runtime.inference import Pending, decide
from runtime.policy import Policy
from runtime.rundir import RunDir

SECONDS = 15.0
QUICK_SECONDS = 1.0
LIMIT = 0.8


def direct(connection: Connection, deployment: Deployment, bundle: Path, core: int, seconds: float) -> None:
    """Episodes without wire or log on one core; sends a `Spent`."""
    os.sched_setaffinity(0, {core})
    backend = Timed(make_backend(deployment.backend))
    policy = Policy.load(bundle, threads=1)
    tasks = list(backend.spec.instructions)
    horizon_steps = deployment.bridge.horizon_steps
    backend.connect()
    connection.send("ready")
    connection.recv()
    episodes = 0
    try:
        while not backend.enough(seconds):
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
                with backend.timed("inference"):
                    actions = decide(policy, [pending])[0].actions[: deployment.bridge.play_steps]
                for action in actions[: horizon_steps - step]:
                    backend.apply(action)
                    status = backend.outcome().status
                    step += 1
                    if status != "running":
                        break
            backend.observe()
            episodes += 1
        connection.send(backend.whole())
    finally:
        backend.stop()
        backend.close()


def work(
    connection: Connection, deployment: Deployment, endpoint: str, number: int, cores: set[int], seconds: float
) -> None:
    """A bridge worker as `fieldtune drive` runs it; sends what `direct` sends, and all the steps that it made."""
    os.sched_setaffinity(0, cores)
    backend = Timed(make_backend(deployment.backend))
    connection.send("ready")
    connection.recv()
    with PolicyClient(endpoint, client=f"bench-{number}") as client:
        drive(
            backend,
            client,
            deployment.bridge,
            stopped=partial(backend.enough, seconds),
            report=lambda _report, _assignment: None,
            warn=print,
        )
    connection.send((backend.whole(), backend.steps))


def bench_rollout(deployment: Deployment, directory: Path, *, quick: bool = False) -> tuple[Result, Result]:
    """Environment steps/s of the loop and of the direct calls, with an untrained policy of the deployment's size; and
    where the processor time of both goes.
    """
    seconds = QUICK_SECONDS if quick else SECONDS
    require_workers(deployment, "this measurement")
    workers = deployment.bridge.workers
    cores = sorted(os.sched_getaffinity(0))[:workers]
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory) as place:
        run, bundles = untrained_run(deployment, Path(place), versions=1)

        def direct_on(*some: int) -> list[Spent]:
            return together(
                [
                    partial(direct, deployment=deployment, bundle=bundles[0], core=core, seconds=seconds)
                    for core in some
                ],
                seconds,
            )

        alone = direct_on(cores[0])
        beside = direct_on(*cores)
        loop, server = _run_loop(deployment, run, set(cores), seconds)
        # What else the machine does may change meanwhile: before and after are averaged.
        beside += direct_on(*cores)
        alone += direct_on(cores[0])
    one = float(np.mean([spent.rate for spent in alone]))
    filled = float(np.mean([spent.rate for spent in beside]))
    looped = sum(spent.rate for spent in loop) / len(cores)
    rows: list[tuple[str | float, ...]] = [
        ("direct, one process", 1, one, one, _us(alone, "cpu_s"), 0.0, _steps(alone)),
        ("direct, one a core", len(cores), filled * len(cores), filled, _us(beside, "cpu_s"), 0.0, _steps(beside)),
        ("loop", len(cores), looped * len(cores), looped, _us(loop, "cpu_s"), server.cpu_us, _steps(loop)),
    ]
    ratio = Result(
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
    return ratio, shares(deployment.name, beside, loop, server)


def shares(name: str, beside: list[Spent], loop: list[Spent], server: ServerSpent) -> Result:
    """Processor time of a step by part: of the direct calls, one process a core, and of the loop."""
    whole = _us(loop, "cpu_s") + server.cpu_us
    named = {"physics": "physics_s", "reset": "reset_s", "render": "render_s"}
    parts = [(part, _us(beside, field), _us(loop, field)) for part, field in named.items()]
    parts.append(("inference", _us(beside, "inference_s"), server.inference_us))
    rest = _us(beside, "cpu_s") - sum(us for _, us, _ in parts)
    worker_rest = _us(loop, "cpu_s") - sum(us for part, _, us in parts if part in named)
    parts.append(("wire and log, worker", rest, worker_rest))
    parts.append(("wire and log, server", 0.0, server.cpu_us - server.inference_us))
    parts.append(("all", _us(beside, "cpu_s"), whole))
    return Result(
        "rollout",
        f"{name}: where the processor time of a step goes",
        ("part", "direct us a step", "loop us a step", "share of loop"),
        [(part, direct_us, loop_us, loop_us / whole) for part, direct_us, loop_us in parts],
        [],
        [
            "physics: apply and outcome; render: observe; inference: batching, onnxruntime and sampling",
            f"direct takes {_us(beside, 'cpu_s') / whole:.2f} of the loop's processor time: the ratio of the rates if "
            "no core were ever idle; what else the machine does touches this less than it does the rates",
            f"{server.decisions} decisions in {server.batches} batches; what direct has under wire is its own loop",
        ],
    )


class ServerSpent(NamedTuple):
    """The server's processor time for each environment step, in microseconds, and what it did."""

    cpu_us: float
    inference_us: float
    decisions: int
    batches: int


def _steps(results: list[Spent]) -> float:
    return sum(spent.steps for spent in results)


def _us(results: list[Spent], part: str) -> float:
    """Microseconds of a step."""
    return float(sum(getattr(spent, part) for spent in results)) / _steps(results) * 1e6


def _run_loop(deployment: Deployment, run: RunDir, cores: set[int], seconds: float) -> tuple[list[Spent], ServerSpent]:
    """What the workers used for their whole episodes, and the server for all steps, those of the warm-up included."""
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-") as sockets:
        tasks = deployment.trainer.trained(make_backend(deployment.backend).spec)
        arguments = (live_of(run), f"ipc://{sockets}/policy.sock", run.episodes, tasks, deployment.bridge.horizon_steps)
        with process(common.serve, *arguments) as (pid, endpoint), PolicyClient(endpoint, client="bench") as client:
            # Each thread has its own mask; those that run now are all that there will be.
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)
            targets = [
                partial(work, deployment=deployment, endpoint=endpoint, number=i, cores=cores, seconds=seconds)
                for i in range(deployment.bridge.workers)
            ]
            before_s = cpu_s(pid)
            results = together(targets, seconds)
            used_s = cpu_s(pid) - before_s
            status = client.request(GetStatus(), StatusReply)[0].status
    steps = sum(steps for _, steps in results)
    server = ServerSpent(
        used_s / steps * 1e6, status["inference_cpu_s"] / steps * 1e6, status["decisions"], status["batches"]
    )
    return [spent for spent, _ in results], server
