"""The episodes in progress: assigned, decided chunk by chunk, logged, ended.

One lock guards all of it and is held by whoever calls. What another thread has finished comes back through `finish`,
which takes the lock.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bridge.backend import instruction_of
from bridge.messages import (
    Assignment,
    Chunk,
    EndEpisode,
    EpisodeStored,
    Infer,
    NextEpisode,
    NoEpisode,
    WireError,
    check_observation,
)
from runtime.bundle import PolicySpec
from runtime.episode import FORMAT, DecisionRecord, End, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.inference import Decided, InferenceThread, Infers, Pending
from runtime.records import tensor_records
from runtime.router import Router
from runtime.schedule import Schedule
from runtime.sessions import Arrays, OpenEpisode, RefusalError, Session, Sessions, take_report
from runtime.status import Counters, EpisodeBrief

M = TypeVar("M", Infer, EndEpisode)


class Arms(Protocol):
    """Which version drives what: see `runtime.swap.Live` and `runtime.staging.Staging`."""

    def __call__(self) -> Infers:
        """The live policy."""
        ...

    def arm_for(self, client: str) -> str:
        """The arm of this client's next episode: a version, or empty for whatever is live."""
        ...

    def policy_of(self, arm: str) -> Infers:
        """The policy that now decides in an episode of that arm."""
        ...

    def failed(self, version: str, why: str) -> None:
        """A decision of that version could not be made. Must return at once."""
        ...


class Rollouts:
    """Takes each session through its episodes. Requests that do not fit raise `RefusalError` or `WireError`."""

    def __init__(
        self,
        live: Arms,
        log: EpisodeLog,
        schedule: Schedule,
        sessions: Sessions,
        router: Router,
        counters: Counters,
        *,
        explore: bool,
        horizon_steps: int,
        max_batch: int,
        finish: Callable[[Callable[[], None]], None],
    ) -> None:
        self._live, self._log, self._schedule, self._sessions = live, log, schedule, sessions
        self._router, self._counters = router, counters
        self._explore, self._horizon_steps, self._finish = explore, horizon_steps, finish
        self.inference = InferenceThread(
            live.policy_of, max_batch, lambda decided: finish(lambda: self._decided(decided))
        )

    # --- requests -------------------------------------------------------------------------------------------------

    def next_episode(self, session: Session, message: NextEpisode) -> None:
        """Abort what is open and assign the next episode."""
        if session.spec is None:
            raise RefusalError("spec", "spec", "this session said hello without a backend's spec")
        self.abort(session, "the client asked for the next episode")
        assigned = self._schedule.next(tuple(session.spec.instructions))
        if assigned is None:
            self._router.send(
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
            arm=self._live.arm_for(session.client),
        )
        assignment = Assignment(
            request=message.request,
            episode=session.open.episode,
            task=task,
            seed=seed,
            horizon_steps=self._horizon_steps,
        )
        self._router.send(session.identity, assignment)

    def infer(self, session: Session, message: Infer, arrays: Arrays) -> None:
        """Take the report on what was played and queue the next decision."""
        prefix = {"prefix": arrays.pop("prefix")} if "prefix" in arrays else {}
        if prefix:
            _check_prefix(prefix["prefix"], self._live().spec)
        opened = self._reported(session, message, arrays, OpenEpisode.check_infer)
        assert session.spec is not None
        if not opened.started:
            opened.started, opened.started_unix_s = True, time.time()
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
                    started_unix_s=opened.started_unix_s,
                )
            )
        opened.decision += 1
        opened.observed[opened.decision] = message.step, len(prefix.get("prefix", ()))
        opened.waiting = Pending(
            identity=session.identity,
            session=session.session,
            request=message.request,
            episode=opened.episode,
            decision=opened.decision,
            step=message.step,
            instruction=opened.instruction,
            tensors={**arrays, **prefix},
            explore=self._explore,
            arrived_s=time.monotonic(),
            arm=opened.arm,
        )
        self.inference.submit(opened.waiting)

    def end_episode(self, session: Session, message: EndEpisode, arrays: Arrays) -> None:
        """Take the report on what was played and have the episode stored; that is answered when it is."""
        opened = self._reported(session, message, arrays, OpenEpisode.check_end)
        opened.storing = True
        self._withdraw(opened)

        def stored(error: str | None) -> None:
            self._finish(lambda: self._stored(session, opened, message, error))

        record = EndRecord(
            status=message.status,
            steps=message.steps,
            reason=message.reason,
            tensors=tensor_records(arrays),
            interventions=dict(opened.interventions),
        )
        self._log.end(opened.episode, record, stored)

    def abort(self, session: Session, reason: str) -> None:
        """Keep the open episode, if there is one, as aborted."""
        opened, session.open = session.open, None
        if opened is None or opened.storing:
            return
        self._withdraw(opened)
        self._schedule.ended(opened.task, opened.seed, "aborted")
        if opened.started:
            self._count(opened, "aborted")
            record = EndRecord(
                status="aborted",
                steps=opened.steps,
                reason=reason,
                tensors={},
                interventions=dict(opened.interventions),
            )
            self._log.end(opened.episode, record, lambda _error: None)

    def _withdraw(self, opened: OpenEpisode) -> None:
        """The episode is over: no chunk is computed for it any more. A client that goes from episode to episode must
        not keep the others waiting.
        """
        pending, opened.waiting = opened.waiting, None
        if pending is not None and self.inference.withdraw(pending):
            self._drop(pending)

    def _drop(self, pending: Pending) -> None:
        self._counters.dropped += 1
        if pending.session in self._sessions.by_id:
            # A client that was stopped still waits for it; one that has moved on drops the answer.
            self._router.refuse(
                pending.identity, pending.request, "episode", "episode", "closed before its chunk was ready"
            )

    def _reported(
        self, session: Session, message: M, arrays: Arrays, check: Callable[[OpenEpisode, M, int], None]
    ) -> OpenEpisode:
        """Take the report out of a request's tensors, so that its observation is left; log it once all is found good:
        a request that is refused changes nothing.
        """
        opened = session.open
        if opened is None:
            raise RefusalError("episode", "episode", "no episode is open in this session; ask for the next one")
        report, spec = take_report(arrays), self._live().spec
        k = opened.check_report(message, report, spec.horizon, len(spec.action.names))
        check(opened, message, k)
        assert session.spec is not None
        if isinstance(message, EndEpisode) and message.status == "aborted":
            if arrays:
                raise WireError("tensors", f"has {', '.join(arrays)}; an aborted episode brings no observation")
        else:
            check_observation(arrays, session.spec)
        opened.note_report(message, k)
        if "rules" in report:
            opened.count_interventions(report["rules"])
        end = 0
        for slice_ in message.played:
            rows = slice(end, end := end + slice_.steps)
            tensors = {name: array[rows] for name, array in report.items() if name != "rules" or array[rows].any()}
            record = ExecutedRecord(decision=slice_.decision, start=slice_.start, tensors=tensor_records(tensors))
            self._log.append(opened.episode, record)
        return opened

    # --- what other threads have finished -------------------------------------------------------------------------

    def _decided(self, decided: list[Decided]) -> None:
        now_s = time.monotonic()
        for item in decided:
            pending = item.pending
            session = self._sessions.by_id.get(pending.session)
            opened = session.open if session is not None else None
            if session is None or opened is None or opened.episode != pending.episode or opened.storing:
                self._drop(pending)
                continue
            opened.waiting = None
            if item.error:
                opened.observed.pop(opened.decision)
                opened.decision -= 1
                self._live.failed(item.version, item.error)
                self._router.refuse(pending.identity, pending.request, "internal", "inference", item.error)
                continue
            reply = Chunk(
                request=pending.request, episode=pending.episode, decision=pending.decision, version=item.version
            )
            self._router.send(pending.identity, reply, {"actions": item.actions})
            self._counters.decisions += 1
            self._counters.latencies_s.append(now_s - pending.arrived_s)
            session.decisions += 1
            tensors = {**pending.tensors, "actions": item.actions, **item.log_probs}
            record = DecisionRecord(
                decision=pending.decision, step=pending.step, version=item.version, tensors=tensor_records(tensors)
            )
            self._log.append(pending.episode, record)

    def _stored(self, session: Session, opened: OpenEpisode, message: EndEpisode, error: str | None) -> None:
        """The log has spoken: acknowledge, or say that the episode is lost."""
        if session.open is opened:
            session.open = None
        if error is not None:
            self._schedule.ended(opened.task, opened.seed, "aborted")
            self._counters.episodes["lost"] += 1
            self._router.refuse(session.identity, message.request, "storage", "episode", f"not stored: {error}")
            return
        self._schedule.ended(opened.task, opened.seed, message.status)
        self._count(opened, message.status)
        session.episodes += 1
        self._router.send(session.identity, EpisodeStored(request=message.request, episode=message.episode))

    def _count(self, opened: OpenEpisode, status: End) -> None:
        self._counters.interventions.update(opened.interventions)
        version = self._live.policy_of(opened.arm).version
        brief = EpisodeBrief(opened.task, status, opened.steps, version, self._counters.uptime_s)
        self._counters.add_episode(brief)


def _check_prefix(prefix: NDArray[Any], spec: PolicySpec) -> None:
    """Raise `WireError` unless these are committed actions `[c, d]` that the policy can be told."""
    p, d = spec.prefix_steps, len(spec.action.names)
    if prefix.dtype != np.float32 or prefix.ndim != 2 or not 0 < len(prefix) <= p or prefix.shape[1] != d:
        raise WireError(
            "tensors.prefix", f"is {prefix.dtype}{list(prefix.shape)}, expected float32 [c, {d}] with c of 1 to {p}"
        )
    if not np.isfinite(prefix).all():
        raise WireError("tensors.prefix", "holds a value that is not finite")
