"""The policy server: one ROUTER socket, sessions, episodes in and out of the log. Inference is on its own thread.

The socket thread never computes and never waits for the disk: it decodes, checks, queues and answers. Chunks, stored
episodes and swaps come back to it through one inbox, so all session state belongs to this thread alone.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import msgspec
import zmq
from numpy.typing import NDArray
from zmq.auth.thread import ThreadAuthenticator

from bridge.backend import instruction_of
from bridge.config import ConfigError
from bridge.endpoint import claim_ipc, is_local
from bridge.keys import secure_server
from bridge.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Announce,
    Assignment,
    Chunk,
    Code,
    EndEpisode,
    EpisodeStored,
    GetStatus,
    Hello,
    Infer,
    Message,
    NextEpisode,
    NoEpisode,
    Refused,
    Request,
    Rollback,
    Serving,
    StatusReply,
    Welcome,
    WireError,
    check_observation,
    decode_request,
    encode,
)
from runtime.bundle import BundleError
from runtime.config import ServeConfig
from runtime.episode import FORMAT, DecisionRecord, End, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.inference import Decided, InferenceThread, Infers, Pending
from runtime.policy import InstructionError, compare_specs
from runtime.records import tensor_records
from runtime.registry import RegistryError
from runtime.schedule import Schedule
from runtime.sessions import OpenEpisode, RefusalError, Session, Sessions, take_report
from runtime.status import Counters, EpisodeBrief, Status

POLL_MS = 100
RECEIVE_HWM = 16  # messages waiting per client; a client has one request under way, so more is a client gone wrong


class LivePolicy(Protocol):
    """What the server needs of `runtime.swap.Live`."""

    def __call__(self) -> Infers:
        """The policy that serves now."""
        ...

    @property
    def previous(self) -> str:
        """What a rollback would bring back."""
        ...

    def announce(self, path: Path) -> str:
        """Check and flip to a new bundle."""
        ...

    def rollback(self, version: str) -> str:
        """Flip back."""
        ...


class PolicyServer:
    """Serves one live policy to any number of bridges, tools and trainers. `run` blocks until `stopped`."""

    def __init__(
        self,
        endpoint: str,
        live: LivePolicy,
        log: EpisodeLog,
        schedule: Schedule,
        *,
        explore: bool,
        horizon_steps: int,
        config: ServeConfig,
    ) -> None:
        """Bind the socket. Raises `ConfigError` for an address that is taken, or open to others without keys."""
        if not is_local(endpoint) and config.keys is None:
            raise ConfigError(
                f"$.runtime.serve.endpoint: {endpoint} can be reached from other computers; give `keys` "
                "(fieldtune keys makes them) or listen on ipc or tcp://127.0.0.1"
            )
        self._live, self._log, self._schedule = live, log, schedule
        self._explore, self._horizon_steps, self._config = explore, horizon_steps, config
        self._sessions = Sessions()
        self._counters = Counters()
        self._started_s = time.monotonic()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_send, self._wake_receive = socket.socketpair()
        self._wake_send.setblocking(False)
        self._inference = InferenceThread(
            live, config.max_batch, lambda decided: self._post(lambda: self._decided(decided))
        )
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._lock = claim_ipc(endpoint) if endpoint.startswith("ipc://") else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 200
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.router_mandatory = True
        self._socket.router_handover = True
        self._socket.rcvhwm = RECEIVE_HWM
        try:
            if config.keys is not None:
                self._authenticator = secure_server(self._context, self._socket, Path(config.keys))
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._release()
            raise ConfigError(f"$.runtime.serve.endpoint: cannot listen on {endpoint}: {error}") from error
        except ConfigError:
            self._release()
            raise
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped`; then open episodes are closed as aborted by the log's owner."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_receive, zmq.POLLIN)
        self._inference.start()
        try:
            while not stopped():
                ready = dict(poller.poll(POLL_MS))
                if self._wake_receive.fileno() in ready:
                    self._wake_receive.recv(4096)
                self._drain_inbox()
                if self._socket in ready:
                    self._drain_socket()
                self._close_silent()
        finally:
            self._inference.stop()
            self._loader.shutdown(wait=False, cancel_futures=True)
            self._release()

    def _release(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close()
        self._context.destroy(linger=200)
        self._wake_send.close()
        self._wake_receive.close()
        if self._lock is not None:
            self._lock.close()

    # --- in and out -----------------------------------------------------------------------------------------------

    def _post(self, action: Callable[[], None]) -> None:
        """Have the socket thread do something; callable from any thread."""
        self._inbox.put(action)
        try:
            self._wake_send.send(b"\0")
        except BlockingIOError:
            pass  # enough wake-ups are already waiting to be read
        except OSError:
            pass  # the server has been closed in the meantime: nobody waits for this any more

    def _drain_inbox(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except Empty:
                return
            action()

    def _drain_socket(self) -> None:
        # Bounded, so that a flood of requests cannot keep finished chunks from being sent.
        for _ in range(64):
            # Not copied: an image stays in ZeroMQ's memory until the log has written it.
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            self._receive(identity.bytes, [frame.buffer for frame in frames])
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return

    def _receive(self, identity: bytes, frames: list[memoryview]) -> None:
        request = 0
        try:
            message, arrays = decode_request(frames)
            request = message.request
            self._handle(identity, message, arrays)
        except WireError as error:
            self._refuse(identity, request, "malformed", error.field, error.message)
        except RefusalError as error:
            self._refuse(identity, request, error.code, error.where, error.message)

    def _send(self, identity: bytes, message: Message, arrays: dict[str, NDArray[Any]] | None = None) -> None:
        try:
            self._socket.send_multipart([identity, *encode(message, arrays)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._counters.undeliverable += 1

    def _refuse(self, identity: bytes, request: int, code: Code, field: str, message: str) -> None:
        self._counters.refused[code] += 1
        self._send(identity, Refused(request=request, code=code, field=field, message=message))

    # --- requests -------------------------------------------------------------------------------------------------

    def _handle(self, identity: bytes, message: Request, arrays: dict[str, NDArray[Any]]) -> None:
        session = self._sessions.by_identity.get(identity)
        if session is not None:
            if message.request <= session.last_request:
                raise RefusalError("replayed", "request", f"{message.request} is not above {session.last_request}")
            session.last_request = message.request
            session.last_seen_s = time.monotonic()
        match message:
            case Infer():
                self._infer(self._sessions.find(message.session, identity), message, arrays)
            case EndEpisode():
                self._end_episode(self._sessions.find(message.session, identity), message, arrays)
            case NextEpisode():
                self._next_episode(self._sessions.find(message.session, identity), message)
            case Hello():
                self._hello(identity, message)
            case GetStatus():
                self._send(identity, StatusReply(request=message.request, status=msgspec.to_builtins(self.status())))
            case Announce():
                self._swap(identity, message.request, lambda: self._live.announce(Path(message.path)))
            case Rollback():
                self._swap(identity, message.request, lambda: self._live.rollback(message.version))

    def _hello(self, identity: bytes, message: Hello) -> None:
        if message.protocol != PROTOCOL:
            raise RefusalError("protocol", "protocol", f"is {message.protocol}, this runtime speaks {PROTOCOL}")
        old = self._sessions.by_identity.get(identity)
        if old is not None:
            self._close(old, "the client said hello again")
        policy = self._live()
        if message.spec is not None:
            try:
                compare_specs(policy.spec, message.spec)
            except WireError as error:
                raise RefusalError("spec", error.field, error.message) from error
            for task, texts in message.spec.instructions.items() if policy.spec.tokens else ():
                try:
                    for text in texts:
                        policy.tokens(text)
                except InstructionError as error:
                    raise RefusalError("spec", f"spec.instructions.{task}", str(error)) from error
        session = Session(
            session=secrets.token_hex(16),
            identity=identity,
            client=message.client,
            spec=message.spec,
            last_request=message.request,
            last_seen_s=time.monotonic(),
        )
        self._sessions.add(session)
        welcome = Welcome(
            request=message.request, session=session.session, version=policy.version, horizon=policy.spec.horizon
        )
        self._send(identity, welcome)

    def _next_episode(self, session: Session, message: NextEpisode) -> None:
        if session.spec is None:
            raise RefusalError("spec", "spec", "this session said hello without a backend's spec")
        self._abort(session, "the client asked for the next episode")
        assigned = self._schedule.next(tuple(session.spec.instructions))
        if assigned is None:
            self._send(
                session.identity, NoEpisode(request=message.request, finished=self._schedule.finished, retry_s=0.2)
            )
            return
        task, seed = assigned
        session.open = OpenEpisode(
            # Names sort by time; the random part keeps them unique over restarts.
            episode=f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}",
            task=task,
            seed=seed,
            instruction=instruction_of(session.spec, task, seed),
            horizon_steps=self._horizon_steps,
        )
        assignment = Assignment(
            request=message.request,
            episode=session.open.episode,
            task=task,
            seed=seed,
            horizon_steps=self._horizon_steps,
        )
        self._send(session.identity, assignment)

    def _infer(self, session: Session, message: Infer, arrays: dict[str, NDArray[Any]]) -> None:
        opened = _opened(session)
        report = take_report(arrays)
        k = self._check_report(opened, message, report)
        opened.check_infer(message, k)
        assert session.spec is not None
        check_observation(arrays, session.spec)
        self._note_report(opened, message.executed, k, report)
        if not opened.started:
            opened.started = True
            self._log.start(
                EpisodeStart(
                    format=FORMAT,
                    episode=opened.episode,
                    task=opened.task,
                    instruction=opened.instruction,
                    seed=opened.seed,
                    source="policy",
                    explore=self._explore,
                    client=session.client,
                    spec=session.spec,
                    started_unix_s=time.time(),
                )
            )
        opened.decision += 1
        opened.waiting = True
        self._inference.submit(
            Pending(
                identity=session.identity,
                session=session.session,
                request=message.request,
                episode=opened.episode,
                decision=opened.decision,
                step=message.step,
                instruction=opened.instruction,
                tensors=arrays,
                explore=self._explore,
                arrived_s=time.monotonic(),
            )
        )

    def _decided(self, decided: list[Decided]) -> None:
        now_s = time.monotonic()
        for item in decided:
            pending = item.pending
            session = self._sessions.by_id.get(pending.session)
            opened = session.open if session is not None else None
            if session is None or opened is None or opened.episode != pending.episode:
                self._counters.dropped += 1
                continue
            opened.waiting = False
            if item.error:
                opened.decision -= 1
                self._refuse(pending.identity, pending.request, "internal", "inference", item.error)
                continue
            reply = Chunk(
                request=pending.request, episode=pending.episode, decision=pending.decision, version=item.version
            )
            self._send(pending.identity, reply, {"actions": item.actions})
            self._counters.decisions += 1
            self._counters.latencies_s.append(now_s - pending.arrived_s)
            session.decisions += 1
            tensors = {**pending.tensors, "actions": item.actions}
            if item.log_prob is not None:
                tensors["log_prob"] = item.log_prob
            record = DecisionRecord(
                decision=pending.decision, step=pending.step, version=item.version, tensors=tensor_records(tensors)
            )
            self._log.append(pending.episode, record)

    def _check_report(self, opened: OpenEpisode, message: Infer | EndEpisode, report: dict[str, NDArray[Any]]) -> int:
        spec = self._live().spec
        return opened.check_report(message, report, spec.horizon, len(spec.action.names))

    def _note_report(self, opened: OpenEpisode, decision: int, k: int, report: dict[str, NDArray[Any]]) -> None:
        """Only after the whole request was found good: one that is refused changes nothing."""
        if not k:
            return
        opened.steps += k
        opened.reported = decision
        self._log.append(opened.episode, ExecutedRecord(decision=decision, tensors=tensor_records(report)))

    def _end_episode(self, session: Session, message: EndEpisode, arrays: dict[str, NDArray[Any]]) -> None:
        opened = _opened(session)
        report = take_report(arrays)
        k = self._check_report(opened, message, report)
        opened.check_end(message, k)
        assert session.spec is not None
        check_observation(arrays, session.spec)
        self._note_report(opened, message.executed, k, report)
        opened.storing = True

        def stored(error: str | None) -> None:
            self._post(lambda: self._stored(session, opened, message, error))

        record = EndRecord(status=message.status, steps=message.steps, reason="", tensors=tensor_records(arrays))
        self._log.end(opened.episode, record, stored)

    def _stored(self, session: Session, opened: OpenEpisode, message: EndEpisode, error: str | None) -> None:
        """The log has spoken: acknowledge, or say that the episode is lost."""
        if session.open is opened:
            session.open = None
        if error is not None:
            self._schedule.ended(opened.task, opened.seed, "aborted")
            self._counters.episodes["lost"] += 1
            self._refuse(session.identity, message.request, "storage", "episode", f"not stored: {error}")
            return
        self._schedule.ended(opened.task, opened.seed, message.status)
        self._count(opened, message.status)
        session.episodes += 1
        self._send(session.identity, EpisodeStored(request=message.request, episode=message.episode))

    def _swap(self, identity: bytes, request: int, change: Callable[[], str]) -> None:
        """Load on the loader's thread; the answer comes when the new version is live."""

        def load() -> None:
            before = self._live().version
            try:
                version = change()
            except BundleError as error:
                self._post(partial(self._swap_refused, identity, request, error.part, error.message))
                return
            except RegistryError as error:
                self._post(partial(self._swap_refused, identity, request, "version", str(error)))
                return
            except Exception as error:  # noqa: BLE001 - a path or graph of somebody else's; the client is told
                self._post(partial(self._swap_refused, identity, request, "bundle", f"cannot be loaded: {error}"))
                return
            self._post(lambda: self._swapped(identity, request, version, before))

        self._loader.submit(load)

    def _swapped(self, identity: bytes, request: int, version: str, before: str) -> None:
        self._counters.swaps += version != before
        self._send(identity, Serving(request=request, version=version, previous=before))

    def _swap_refused(self, identity: bytes, request: int, part: str, message: str) -> None:
        self._counters.refused_swaps += 1
        self._refuse(identity, request, "bundle", part, message)

    # --- ends -----------------------------------------------------------------------------------------------------

    def _close_silent(self) -> None:
        limit_s = time.monotonic() - self._config.session_timeout_s
        for session in [s for s in self._sessions.by_id.values() if s.last_seen_s < limit_s]:
            self._close(session, f"silent for {self._config.session_timeout_s:g} s")

    def _close(self, session: Session, reason: str) -> None:
        self._abort(session, reason)
        self._sessions.remove(session)

    def _abort(self, session: Session, reason: str) -> None:
        opened, session.open = session.open, None
        if opened is None or opened.storing:
            return
        self._schedule.ended(opened.task, opened.seed, "aborted")
        if opened.started:
            self._count(opened, "aborted")
            record = EndRecord(status="aborted", steps=opened.steps, reason=reason, tensors={})
            self._log.end(opened.episode, record, lambda _error: None)

    def _count(self, opened: OpenEpisode, status: End) -> None:
        ended_s = time.monotonic() - self._started_s
        self._counters.add_episode(EpisodeBrief(opened.task, status, opened.steps, self._live().version, ended_s))

    def status(self) -> Status:
        """The counters now."""
        counters, uptime_s = self._counters, time.monotonic() - self._started_s
        return Status(
            version=self._live().version,
            previous=self._live.previous,
            uptime_s=uptime_s,
            sessions=len(self._sessions.by_id),
            decisions=counters.decisions,
            batches=self._inference.batches,
            episodes=dict(counters.episodes),
            swaps=counters.swaps,
            refused_swaps=counters.refused_swaps,
            refused=dict(counters.refused),
            undeliverable=counters.undeliverable,
            dropped=counters.dropped,
            latency_ms=counters.latency_ms(),
            inference_share=self._inference.busy_s / uptime_s if uptime_s else 0.0,
            log=msgspec.to_builtins(self._log.stats()),
            recent=tuple(counters.recent),
            episodes_per_min=counters.episodes_per_min(uptime_s),
            shares=self._schedule.shares,
            finished=self._schedule.finished,
        )


def _opened(session: Session) -> OpenEpisode:
    if session.open is None:
        raise RefusalError("episode", "episode", "no episode is open in this session; ask for the next one")
    return session.open
