"""The policy server: what arrives, who may ask, swaps, status. `runtime.rollouts` has the episodes.

Inference is on its own thread. The one that receives never computes and never waits for the disk: it decodes, checks,
queues and answers. A chunk, a stored episode and a swap are answered by the thread that has finished it. All of them
hold one lock, which guards the sessions and the socket, for as long as that takes and no longer.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

from bridge.messages import (
    PROTOCOL,
    Announce,
    Code,
    EndEpisode,
    GetStatus,
    Govern,
    Governing,
    Hello,
    Infer,
    Judge,
    Judged,
    NextEpisode,
    NoEpisode,
    Operate,
    Request,
    Serving,
    StatusReply,
    Watch,
    Welcome,
    WireError,
    decode_request,
)
from runtime.bundle import BundleError
from runtime.config import ServeConfig
from runtime.database import DatabaseError
from runtime.episodes import EpisodeLog
from runtime.operator import Operator
from runtime.policy import InstructionError, compare_specs
from runtime.registry import RegistryError
from runtime.rollouts import Arms, Rollouts
from runtime.router import Router
from runtime.schedule import Schedule
from runtime.sessions import RefusalError, Session, Sessions
from runtime.status import Counters, Status, fitting

POLL_MS = 100
MOST_NAME_BYTES = 200  # of a client or a person
MOST_WHY_BYTES = 500
AT_ONCE = 64  # messages taken while the lock is held: a flood of requests must not keep finished chunks from leaving


class LivePolicy(Arms, Protocol):
    """What the server needs of `runtime.swap.Live`, or of `runtime.staging.Staging` around it."""

    @property
    def previous(self) -> str:
        """What a rollback would bring back."""
        ...

    @property
    def swaps(self) -> int:
        """Changes of the live version, whoever made them."""
        ...

    def announce(self, path: Path) -> str:
        """Check and flip to a new bundle."""
        ...

    def govern(self, command: Governing, version: str, who: str) -> str:
        """What somebody has decided; gives the version that is live then."""
        ...

    def standing(self) -> dict[str, Any]:
        """How the versions that are not live stand, for the status."""
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
        self._live, self._log, self._schedule, self._config = live, log, schedule, config
        self._sessions = Sessions()
        self._counters = Counters()
        self._lock = threading.RLock()
        self._closed = False
        self._router = Router(endpoint, config.keys)
        self._rollouts = Rollouts(
            live,
            log,
            schedule,
            self._sessions,
            self._router,
            self._counters,
            explore=explore,
            horizon_steps=horizon_steps,
            max_batch=config.max_batch,
            finish=self._finish,
        )
        self._operator = Operator(self._sessions, self._router, self._rollouts.abort)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        # What people decide must not wait until a gate has judged, and nobody must wait for the disk.
        self._governor = ThreadPoolExecutor(1, thread_name_prefix="governor")
        self.endpoint = self._router.endpoint

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped`; then open episodes are closed as aborted by the log's owner."""
        self._rollouts.inference.start()
        try:
            while not stopped():
                if not self._rollouts.inference.alive:
                    raise RuntimeError("the inference thread has died; its traceback is above")
                if self._log.writer_died:
                    raise RuntimeError("the episode log's writer has died; its traceback is above")
                with self._lock:
                    waiting = self._take_messages()
                    self._close_silent()
                if not waiting:
                    self._router.wait(POLL_MS)
        finally:
            self._rollouts.inference.stop()
            for executor in (self._loader, self._governor):
                executor.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                self._closed = True
                self._router.close()

    # --- in and out -----------------------------------------------------------------------------------------------

    def _finish(self, action: Callable[[], None]) -> None:
        """Have another thread tell what it has finished. Once the server is closed nobody waits for it any more."""
        with self._lock:
            if not self._closed:
                action()

    def _take_messages(self) -> bool:
        """Handle what has arrived; whether there is more."""
        for _ in range(AT_ONCE):
            if not self._router.waiting:
                return False
            self._receive(*self._router.receive())
        return True

    def _receive(self, identity: bytes, frames: list[memoryview]) -> None:
        request = 0
        try:
            message, arrays = decode_request(frames)
            request = message.request
            self._handle(identity, message, arrays)
        except WireError as error:
            self._router.refuse(identity, request, "malformed", error.field, error.message)
        except RefusalError as error:
            self._router.refuse(identity, request, error.code, error.where, error.message)

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
                self._rollouts.infer(self._sessions.find(message.session, identity), message, arrays)
            case EndEpisode():
                self._rollouts.end_episode(self._sessions.find(message.session, identity), message, arrays)
            case NextEpisode():
                session = self._sessions.find(message.session, identity)
                if self._operator.stopped or self._operator.holds(session):
                    self._router.send(identity, NoEpisode(request=message.request, finished=False, retry_s=0.2))
                else:
                    self._rollouts.next_episode(session, message)
            case Watch():
                _check_client(message.client)
                why = shortened(message.why, MOST_WHY_BYTES)
                self._operator.watch(identity, msgspec.structs.replace(message, why=why))
            case Operate():
                why = shortened(message.why, MOST_WHY_BYTES)
                self._operator.operate(identity, msgspec.structs.replace(message, why=why))
            case Judge():
                self._governor.submit(self._judge, identity, message)
            case Hello():
                self._hello(identity, message)
            case GetStatus():
                self._router.send(
                    identity, StatusReply(request=message.request, status=msgspec.to_builtins(fitting(self.status())))
                )
            case Announce():
                self._swap(self._loader, identity, message.request, lambda: self._live.announce(Path(message.path)))
            case Govern():
                command, version = message.command, message.version
                who = shortened(message.who, MOST_NAME_BYTES)
                self._swap(self._governor, identity, message.request, lambda: self._live.govern(command, version, who))

    def _hello(self, identity: bytes, message: Hello) -> None:
        if message.protocol != PROTOCOL:
            raise RefusalError("protocol", "protocol", f"is {message.protocol}, this runtime speaks {PROTOCOL}")
        _check_client(message.client)
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
            request=message.request,
            session=session.session,
            version=policy.version,
            horizon=policy.spec.horizon,
            prefix_steps=policy.spec.prefix_steps,
        )
        self._router.send(identity, welcome)

    def _swap(self, executor: ThreadPoolExecutor, identity: bytes, request: int, change: Callable[[], str]) -> None:
        """Load on a thread of the executor; the answer comes when the new version is live."""

        def load() -> None:
            before = self._live().version
            try:
                version = change()
            except BundleError as error:
                self._finish(partial(self._swap_refused, identity, request, "bundle", error.part, error.message))
                return
            except RegistryError as error:
                self._finish(partial(self._swap_refused, identity, request, "version", "version", str(error)))
                return
            except Exception as error:  # noqa: BLE001 - a path or graph of somebody else's; the client is told
                why = f"cannot be loaded: {error}"
                self._finish(partial(self._swap_refused, identity, request, "bundle", "bundle", why))
                return
            self._finish(lambda: self._swapped(identity, request, version, before))

        executor.submit(load)

    def _swapped(self, identity: bytes, request: int, version: str, before: str) -> None:
        self._router.send(identity, Serving(request=request, version=version, previous=before))

    def _swap_refused(self, identity: bytes, request: int, code: Code, field: str, message: str) -> None:
        self._counters.refused_swaps += 1
        self._router.refuse(identity, request, code, field, message)

    def _judge(self, identity: bytes, message: Judge) -> None:
        """On the governor's thread."""
        refuse = partial(self._router.refuse, identity, message.request)
        try:
            if self._log.index.get(message.episode) is None:
                self._finish(partial(refuse, "episode", "episode", f"no episode {message.episode} is stored here"))
                return
            row = self._log.index.label(message.episode, message.label, shortened(message.who, MOST_NAME_BYTES))
        except (DatabaseError, OSError) as error:
            self._finish(partial(refuse, "storage", "", str(error)))
            return
        reply = Judged(request=message.request, episode=row.episode, status=row.status)
        self._finish(partial(self._router.send, identity, reply))

    # --- ends -----------------------------------------------------------------------------------------------------

    def _close_silent(self) -> None:
        limit_s = time.monotonic() - self._config.session_timeout_s
        for session in [s for s in self._sessions.by_id.values() if s.last_seen_s < limit_s]:
            self._close(session, f"silent for {self._config.session_timeout_s:g} s")
        self._operator.forget_before(limit_s)

    def _close(self, session: Session, reason: str) -> None:
        self._rollouts.abort(session, reason)
        self._sessions.remove(session)

    def status(self) -> Status:
        """The counters now."""
        counters, inference, uptime_s = self._counters, self._rollouts.inference, self._counters.uptime_s
        return Status(
            version=self._live().version,
            previous=self._live.previous,
            uptime_s=uptime_s,
            sessions=len(self._sessions.by_id),
            decisions=counters.decisions,
            batches=inference.batches,
            episodes=dict(counters.episodes),
            swaps=self._live.swaps,
            refused_swaps=counters.refused_swaps,
            refused=dict(self._router.refused),
            undeliverable=self._router.undeliverable,
            dropped=counters.dropped,
            latency_ms=counters.latency_ms(),
            inference_share=inference.busy_s / uptime_s if uptime_s else 0.0,
            inference_cpu_s=inference.cpu_s,
            log=msgspec.to_builtins(self._log.stats()),
            recent=tuple(counters.recent),
            episodes_per_min=counters.episodes_per_min(),
            shares=self._schedule.shares,
            finished=self._schedule.finished,
            robots=self._operator.robots(),
            stopped=self._operator.stopped,
            interventions=dict(counters.interventions),
            staging=self._live.standing(),
        )

    def oldest_open_unix_s(self) -> float:
        """When the oldest episode in progress began, of a robot that is not paused; infinite if there is none."""
        with self._lock:
            driving = [session for session in self._sessions.by_id.values() if not self._operator.waits(session)]
            opened = [session.open for session in driving if session.open is not None and session.open.started]
            return min((episode.started_unix_s for episode in opened), default=math.inf)


def shortened(text: str, most_bytes: int) -> str:
    """The text, cut after so many bytes of UTF-8: it goes into headers, which are small."""
    return text.encode()[:most_bytes].decode(errors="ignore")


def _check_client(client: str) -> None:
    """Raise `WireError` for a name that is too long; cut off, it might be that of another robot."""
    if len(client.encode()) > MOST_NAME_BYTES:
        raise WireError("client", f"{shortened(client, 50)!r}... is longer than {MOST_NAME_BYTES} bytes")
