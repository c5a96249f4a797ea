"""Attempts of a backend's scripted expert, in this process or in several workers with a backend each.

Either way a generator asks `pick` for the next job whenever a worker has nothing to do, and yields what became of each
job, in the order in which they end. `pick` is told the task that this worker drove last, and may answer None: nothing
now. The generator is at its end once nobody has a job. Only its caller decides and stores.

A worker is sent a `Job` and answers with an `Attempt`, or with `Failed` and its end, as msgpack. A whole episode is one
message: one that is cut short is not seen.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import msgspec
import numpy as np
from msgspec import Struct

from bridge.backend import Backend, Float32, HasExpert, Observation, instruction_of
from bridge.errors import FieldtuneError
from bridge.messages import observation_tensors
from bridge.pacing import Pacer
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.records import tensor_records
from runtime.spawn import Spawned, end, spawn
from runtime.supervisor import how_it_ended

EXPERT_VERSION = "expert"
DEMOS_CLIENT = "demos"
ATTEMPT_TIMEOUT_S = 180.0
"""Besides its steps at the control rate; the first attempt of a worker starts its simulator."""
STOP_S = 5.0
LOOK_S = 0.1


class DemosError(FieldtuneError):
    """Demonstrations that cannot be had; the message says why and what to do."""


class Job(Struct, frozen=True):
    """What to attempt."""

    task: str
    seed: int


class Demonstration(Struct, frozen=True):
    """A whole episode that succeeded, a decision for every step, as it is logged."""

    start: EpisodeStart
    records: list[DecisionRecord | ExecutedRecord]
    end: EndRecord


class Attempt(Struct, frozen=True, tag=True):
    """What became of a job; without a demonstration it did not succeed."""

    task: str
    seed: int
    demonstration: Demonstration | None


class Failed(Struct, frozen=True, tag=True):
    """A worker cannot go on."""

    why: str


Pick = Callable[[str], Job | None]
Stopped = Callable[[], bool]

_answers: msgspec.msgpack.Decoder[Attempt | Failed] = msgspec.msgpack.Decoder(Attempt | Failed)


def attempts_here(backend: Backend, horizon_steps: int, pick: Pick, stopped: Stopped) -> Generator[Attempt, None, None]:
    """Drive `backend`, which is connected and closed here. `stopped` ends an attempt after any step."""
    assert isinstance(backend, HasExpert)
    task = ""
    try:
        backend.connect()
        while (job := pick(task)) is not None:
            attempt = _attempt(backend, backend.expert_action, job, horizon_steps, stopped)
            if attempt is None:
                return
            task = job.task
            yield attempt
    finally:
        backend.stop()
        backend.close()


def attempts_in_workers(
    make: Callable[[], Backend], workers: int, horizon_steps: int, timeout_s: float, pick: Pick, stopped: Stopped
) -> Generator[Attempt, None, None]:
    """The same by `workers` processes, each with what `make` (which can be pickled) makes.

    Raises `DemosError` for a worker that fails, dies, or does not answer within `timeout_s`. No process is left when
    the generator is closed or at its end.
    """
    running: list[_Worker] = []
    try:
        for _ in range(workers):
            running.append(_Worker(spawn(work, make, horizon_steps), timeout_s))
        while True:
            for worker in running:
                if worker.job is None:
                    worker.give(pick(worker.task))
            busy = {worker.connection: worker for worker in running if worker.job is not None}
            if not busy:
                return
            ready = wait(list(busy), LOOK_S)
            if stopped():
                return
            for worker in [worker for connection, worker in busy.items() if connection in ready]:
                attempt = worker.answer()
                # Before the caller stores, which takes a moment.
                worker.give(pick(worker.task))
                yield attempt
            for worker in running:
                worker.check()
    finally:
        end([worker.spawned for worker in running], STOP_S)


def work(connection: Connection, make: Callable[[], Backend], horizon_steps: int) -> None:
    """What a worker does until its connection is closed."""
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def pick(_task: str) -> Job | None:
        try:
            return msgspec.msgpack.decode(connection.recv_bytes(), type=Job)
        except (EOFError, ConnectionError):
            return None

    def send(answer: Attempt | Failed) -> None:
        with suppress(ConnectionError):
            connection.send_bytes(msgspec.msgpack.encode(answer))

    try:
        # During an attempt nothing is sent to a worker: its connection is readable only once it is closed.
        for attempt in attempts_here(make(), horizon_steps, pick, connection.poll):
            send(attempt)
    except FieldtuneError as error:
        send(Failed(str(error)))


@dataclass(slots=True)
class _Worker:
    """A worker as its parent sees it."""

    spawned: Spawned
    timeout_s: float
    job: Job | None = None
    task: str = ""
    """Of its last job."""
    _deadline_s: float = 0.0

    @property
    def connection(self) -> Connection:
        return self.spawned[1]

    def give(self, job: Job | None) -> None:
        """Have it do `job`; one that has died is noticed when its answer is read."""
        self.job = job
        if job is not None:
            self.task = job.task
            self._deadline_s = time.monotonic() + self.timeout_s
            with suppress(ConnectionError):
                self.connection.send_bytes(msgspec.msgpack.encode(job))

    def answer(self) -> Attempt:
        """Read its answer. Raises `DemosError` if there is none."""
        try:
            answer = _answers.decode(self.connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            process = self.spawned[0]
            process.join(STOP_S)
            if process.exitcode is None:
                raise self._error("closed its connection") from error
            hint = "its error is above" if process.exitcode >= 0 else "fewer need less memory (trainer.demos.workers)"
            raise self._error(f"{how_it_ended(process.exitcode)}; {hint}") from error
        if isinstance(answer, Failed):
            raise self._error(f"failed: {answer.why}")
        return answer

    def check(self) -> None:
        """Raises `DemosError` if its answer is overdue."""
        if self.job is not None and time.monotonic() > self._deadline_s and not self.connection.poll():
            raise self._error(f"did not answer within {self.timeout_s:g} s; does the backend hang?")

    def _error(self, what: str) -> DemosError:
        assert self.job is not None
        return DemosError(f"the worker that demonstrated {self.job.task} with seed {self.job.seed} {what}")


def _attempt(
    backend: Backend, expert: Callable[[], Float32], job: Job, horizon_steps: int, stopped: Stopped
) -> Attempt | None:
    """One episode of the expert; None if it was stopped."""
    start = EpisodeStart(
        format=FORMAT,
        episode=uuid.uuid4().hex,
        task=job.task,
        instruction=instruction_of(backend.spec, job.task, job.seed),
        seed=job.seed,
        source="expert",
        explore=False,
        client=DEMOS_CLIENT,
        spec=backend.spec,
        started_unix_s=time.time(),
    )
    records: list[DecisionRecord | ExecutedRecord] = []
    backend.reset(job.task, job.seed)
    pacer = Pacer(1.0 / backend.spec.control_hz) if backend.spec.paced else None
    if pacer:
        pacer.start()
    for step in range(horizon_steps):
        if stopped():
            return None
        tensors = observation_tensors(_owned(backend.observe()))
        action = np.asarray(expert(), np.float32)
        sent = np.array(backend.apply(action), np.float32)
        outcome = backend.outcome()
        tensors["actions"] = action[None].copy()
        records.append(
            DecisionRecord(decision=step + 1, step=step, version=EXPERT_VERSION, tensors=tensor_records(tensors))
        )
        executed = {"sent": sent[None], "reward": np.array([outcome.reward], np.float32)}
        records.append(ExecutedRecord(decision=step + 1, tensors=tensor_records(executed)))
        if outcome.status == "success":
            final = tensor_records(observation_tensors(_owned(backend.observe())))
            last = EndRecord(status="success", steps=step + 1, reason="", tensors=final)
            return Attempt(job.task, job.seed, Demonstration(start, records, last))
        if outcome.status != "running":
            break
        if pacer:
            pacer.wait()
    return Attempt(job.task, job.seed, None)


def _owned(observation: Observation) -> Observation:
    """A copy: the records refer to the arrays until they are written, the backend may reuse its own."""
    return Observation(
        {name: image.copy() for name, image in observation.images.items()},
        observation.state.copy(),
        None if observation.privileged is None else observation.privileged.copy(),
    )
