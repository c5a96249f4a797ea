"""The far side of a remote backend: serves one backend object to one owner at a time.

Two threads. The one that calls `run` touches the backend, and nobody else does: drivers and OpenGL contexts often want
that. The other one, the door, owns the socket: it checks, refuses, hears signs of life and notices their absence while
a call is under way. A stop that comes then is also told the backend at once, from a third thread, as `Backend.stop`
allows; a reset may take its time. It is told again until its turn comes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
from msgspec.structs import replace

from bridge.backend import Backend, BackendError, Float32, HasExpert
from bridge.listener import Bell, Listener
from bridge.messages import Arrays, Code, Message, Refused, WireError, encode, observation_tensors
from bridge.remote.messages import (
    REMOTE_PROTOCOL,
    Action,
    Apply,
    Beat,
    Bye,
    Claim,
    Describe,
    Described,
    Done,
    FarRequest,
    GetExpert,
    GetHold,
    GetOutcome,
    Observe,
    Observed,
    Reset,
    Standing,
    Stop,
    decode_far_request,
)
from bridge.remote.ownership import Ownership, OwnershipError

RECEIVE_HWM = 64  # an owner has one call under way, beats and perhaps a stop
LOOK_S = 0.1  # how often the calling thread asks whether it should stop
LOOKS_A_SILENCE = 10  # how often the door looks whether the owner is silent, within the time that it may be


@dataclass(slots=True, frozen=True)
class _Job:
    """What the backend's thread has to do, and for whom."""

    identity: bytes
    message: FarRequest
    arrays: Arrays


@dataclass(slots=True, frozen=True)
class _DeadMan:
    """The owner has fallen silent."""

    client: str


@dataclass(slots=True, frozen=True)
class _Answer:
    """What has become of a job."""

    job: _Job
    message: Message
    arrays: Arrays | None = None


class BackendServer:
    """Serves `backend` on `endpoint` until told to stop."""

    def __init__(
        self,
        backend: Backend,
        endpoint: str,
        *,
        keys: str | None = None,
        silence_s: float = 2.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Bind the socket; the backend is connected for each owner anew. `say` gets lines for people, from any thread.

        Raises `ConfigError` for an address that is taken, or open to others without keys.
        """
        self._backend, self._say = backend, say
        self._ownership = Ownership(silence_s)
        self._described = Described(spec=backend.spec, expert=isinstance(backend, HasExpert), silence_s=silence_s)
        self._listener = Listener(endpoint, keys, setting="--bind", receive_hwm=RECEIVE_HWM)
        self._jobs: queue.Queue[_Job | _DeadMan] = queue.Queue()
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._bell = Bell()
        self._closing = threading.Event()
        self._door = threading.Thread(target=self._keep_door, name="door", daemon=True)
        self._connected = False
        self._not_stopped = ""
        """The owner that has fallen silent, until the robot has been stopped since."""
        self._stop_due: _Job | _DeadMan | None = None
        """The last stop that was put into the queue, and the last one whose turn has come."""
        self._stop_begun: _Job | _DeadMan | None = None
        self._beside: threading.Thread | None = None
        self.endpoint = self._listener.endpoint

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped`; then the robot is stopped and the backend closed. Only once."""
        self._door.start()
        try:
            while not stopped():
                if not self._door.is_alive():
                    raise RuntimeError("the thread of the socket has died; its traceback is above")
                try:
                    job = self._jobs.get(timeout=LOOK_S)
                except queue.Empty:
                    if self._not_stopped:
                        self._stop_for_silence(self._not_stopped)
                    continue
                try:
                    answer = self._work(job)
                finally:
                    self._jobs.task_done()
                # Only now: a stop that follows an answer finds no call before it.
                if answer is not None:
                    self._answers.put(answer)
                    self._bell.ring()
        finally:
            try:
                self._disconnect()
            finally:
                self._closing.set()
                self._bell.ring()
                self._door.join()
                self._listener.close()
                self._bell.close()

    # --- the backend's thread ---------------------------------------------------------------------------------------

    def _work(self, job: _Job | _DeadMan) -> _Answer | None:
        if isinstance(job, _DeadMan) or isinstance(job.message, Stop):
            self._stop_begun = job
        if isinstance(job, _DeadMan):
            self._stop_for_silence(job.client)
            return None
        try:
            message, given = self._carry_out(job.message, job.arrays)
            arrays = {name: np.asarray(array, order="C") for name, array in (given or {}).items()}
            encode(message, arrays)  # what a driver gives need not be what can be sent
            return _Answer(job, message, arrays)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is told to the owner
            text = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
            call = type(job.message).__name__
            self._say(f"{call}: {text}")
            return _Answer(job, Refused(code="internal", field=call, message=text))

    def _carry_out(self, message: FarRequest, arrays: Arrays) -> tuple[Message, Arrays | None]:
        """Make one call of the backend; raises what it raises."""
        backend = self._backend
        match message:
            case Claim():
                # The one before may have left without a word.
                self._disconnect()
                self._connected = True  # also where connecting fails half-way: there is something to close
                backend.connect()
                self._say(f"{message.client!r} drives {self._described.spec.name}")
                return self._described, None
            case Reset():
                backend.reset(message.task, message.seed)
            case Observe():
                return Observed(), observation_tensors(backend.observe())
            case Apply():
                # A copy, because what came lies in memory that cannot be written, and a backend may clip in place.
                return _action(backend.apply(np.array(arrays["action"])))
            case GetOutcome():
                outcome = backend.outcome()
                return Standing(status=outcome.status, reward=float(outcome.reward)), None
            case GetHold():
                return _action(backend.hold_action())
            case GetExpert():
                if not isinstance(backend, HasExpert):
                    raise BackendError(f"{self._described.spec.name} has no expert")
                return _action(backend.expert_action())
            case Stop():
                if not self._connected:
                    raise BackendError("the robot is not connected here; this side may have been started again")
                backend.stop()
                self._not_stopped = ""
            case Bye():
                self._disconnect()
                self._say("the client has left; the robot is free")
            case _:
                raise AssertionError(message)
        return Done(), None

    def _stop_for_silence(self, client: str) -> None:
        silence_s = self._ownership.silence_s
        try:
            self._backend.stop()
        except Exception as error:  # noqa: BLE001 - the next owner must find this process alive
            if not self._not_stopped:
                what = f"{type(error).__name__}: {error}"
                self._say(f"{client!r} is silent for {silence_s:g} s, and stop() failed, trying again: {what}")
            self._not_stopped = client
        else:
            self._not_stopped = ""
            self._say(f"{client!r} is silent for {silence_s:g} s: the robot was stopped, and is free")

    def _put_stop(self, job: _Job | _DeadMan) -> None:
        """Have a stop take its turn, and tell the backend of it at once if other calls come before. That is told again
        and again until then: a reset that was about to begin lifts a stop that came before it. Of the door's thread.
        """
        busy = self._jobs.unfinished_tasks
        self._stop_due = job
        self._jobs.put(job)
        if not busy or (self._beside is not None and self._beside.is_alive()):
            return

        def stop() -> None:
            said = False
            while self._stop_begun is not self._stop_due:
                try:
                    self._backend.stop()
                except Exception as error:  # noqa: BLE001 - the stop in its turn tells the owner of what it meets
                    if not said:
                        self._say(f"stop() beside another call: {type(error).__name__}: {error}")
                    said = True
                if self._closing.wait(LOOK_S):
                    return

        self._beside = threading.Thread(target=stop, name="stop", daemon=True)
        self._beside.start()

    def _disconnect(self) -> None:
        """Stop and close the backend if it is connected."""
        if not self._connected:
            return
        try:
            self._backend.stop()
        finally:
            self._backend.close()
            self._connected, self._not_stopped = False, ""

    # --- the door -----------------------------------------------------------------------------------------------------

    def _keep_door(self) -> None:
        poller = zmq.Poller()
        poller.register(self._listener.socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        look_ms = max(1, int(1000 * self._ownership.silence_s / LOOKS_A_SILENCE))
        while not self._closing.is_set():
            events = dict(poller.poll(look_ms))
            if self._bell.fileno() in events:
                self._bell.hear()
            while not self._answers.empty():
                self._give(self._answers.get())
            looked_s = time.monotonic()
            # All that has arrived is heard before anybody is called silent, but a flood must not put that off for ever.
            while self._listener.socket.poll(0) and time.monotonic() - looked_s < self._ownership.silence_s:
                self._receive()
            silent = self._ownership.take_from_silent()
            if silent is not None:
                self._put_stop(_DeadMan(silent.client))

    def _receive(self) -> None:
        """Hear one message: answer it, refuse it, or hand it to the backend's thread."""
        identity, *parts = self._listener.socket.recv_multipart(copy=False)
        try:
            message, arrays = decode_far_request([part.buffer for part in parts])
        except WireError as error:
            self._refuse(identity.bytes, 0, "malformed", error.field, error.message)
            return
        try:
            if not self._admit(message, arrays):
                return
        except WireError as error:
            self._refuse(identity.bytes, message.request, "malformed", error.field, error.message)
        except OwnershipError as error:
            self._refuse(identity.bytes, message.request, error.code, error.field, str(error))
        else:
            if isinstance(message, Describe):
                self._send(identity.bytes, message.request, self._described)
            elif isinstance(message, Stop):
                self._put_stop(_Job(identity.bytes, message, arrays))
            else:
                self._jobs.put(_Job(identity.bytes, message, arrays))

    def _admit(self, message: FarRequest, arrays: Arrays) -> bool:
        """Whether the message is to be answered; raises `OwnershipError` or `WireError` where it is to be refused."""
        match message:
            case Describe() | Claim() if message.protocol != REMOTE_PROTOCOL:
                raise OwnershipError(
                    "protocol",
                    "protocol",
                    f"is {message.protocol}, this side speaks {REMOTE_PROTOCOL}; install the "
                    "same version of fieldtune on both sides",
                )
            case Describe():
                pass
            case Claim():
                self._ownership.claim(message.session, message.client, message.request)
            case Beat():
                self._ownership.hear(message.session)
                return False
            case Stop() if self._ownership.owner is None:
                pass  # from one that was too silent: it wants to know that the robot is stopped
            case Stop() | Bye():
                self._ownership.admit(message.session, message.request, late=True)
            case _:
                self._ownership.admit(message.session, message.request)
                if isinstance(message, Apply) and "action" not in arrays:
                    raise WireError("tensors.action", "missing")
        return True

    def _give(self, answer: _Answer) -> None:
        """Send an answer; an owner that has left, or could not be given the robot, is one no longer."""
        message = answer.job.message
        if isinstance(message, Bye) or (isinstance(message, Claim) and isinstance(answer.message, Refused)):
            self._ownership.release(message.session)
        try:
            self._send(answer.job.identity, message.request, answer.message, answer.arrays)
        except WireError as error:
            self._refuse(answer.job.identity, message.request, "internal", error.field, error.message)

    def _send(self, identity: bytes, request: int, message: Message, arrays: Arrays | None = None) -> None:
        frames: list[Any] = encode(replace(message, request=request), arrays)
        with suppress(zmq.ZMQError):  # it has gone or does not read; its deadline tells it
            # Not copied. The backend may fill the same buffer again at its next observe(), but its owner asks for that
            # only when it has this one, or has given this one up and drops it.
            self._listener.socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=False)

    def _refuse(self, identity: bytes, request: int, code: Code, field: str, message: str) -> None:
        self._send(identity, request, Refused(code=code, field=field, message=message))


def _action(action: Float32) -> tuple[Message, Arrays]:
    return Action(), {"action": np.asarray(action, np.float32)}
