"""The control loop of one episode: at each tick send what is due, and in time ask for what comes next.

It reaches the backend through `bridge.guard` only, which checks what is sent and can stop it at any time. Without
`bridge.merge` a chunk is played to its end, then the loop waits for the next. With it the next is asked for while the
chunk plays, and a tick for which nothing has come sends the hold action.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bridge.backend import Backend, BackendError, Float32, Status
from bridge.chunks import BLEND_STEPS, Chunks, Plan, StepReport
from bridge.client import PolicyClient, RefusedError, SilentError
from bridge.config import BridgeConfig
from bridge.errors import FieldtuneError
from bridge.guard import Guard
from bridge.messages import (
    Arrays,
    Assignment,
    Chunk,
    EndEpisode,
    Ending,
    EpisodeStored,
    Infer,
    Welcome,
    WireError,
    check_observation,
    observation_tensors,
)
from bridge.pacing import Pacer, Ticks
from bridge.safety import HELD, STARVED

PAUSED_S = 0.02  # between two looks at a paused simulator
TELL_S = 2.0  # for the runtime to hear why an episode is given up
RECENT_DELAYS = 10  # chunks whose delays say for how many steps to commit
End = Literal["success", "failure", "timeout", "unjudged"]
ENDINGS: dict[Ending, tuple[End, str]] = {
    # Cut off without a verdict: what is learned from it is what a time-out teaches.
    "end": ("timeout", "ended by the operator"),
    "success": ("success", "marked by the operator"),
    "failure": ("failure", "marked by the operator"),
}


@dataclass(slots=True)
class EpisodeReport:
    """What one episode came to, for the screen."""

    status: End
    steps: int
    decisions: int
    ticks: Ticks
    versions: tuple[str, ...]
    end_request: int
    """`PolicyClient.collect` gives the answer to this posted request: whether the episode is stored."""


@dataclass(slots=True)
class _Asked:
    """A request for a chunk that is under way."""

    request: int
    step: int
    observed_s: float
    committed: int
    """Steps from its observation that what plays now goes on for in any case."""
    delay_steps: int
    """On a simulator, steps after which it counts as arrived."""
    stale: bool = False
    """The robot was held meanwhile, without that being a step: nobody knows what it is for any more."""


class EpisodeLoop:
    """Drives one episode. Every action executed is one of a chunk of this episode, at the index that its environment
    step has from the chunk's observation on, or the guard's in its place.
    """

    def __init__(
        self,
        backend: Backend,
        client: PolicyClient,
        welcome: Welcome,
        assignment: Assignment,
        guard: Guard,
        stopped: Callable[[], bool],
        config: BridgeConfig,
    ) -> None:
        self.backend, self.client, self.guard, self.stopped = backend, client, guard, stopped
        self.welcome, self.assignment = welcome, assignment
        spec = backend.spec
        self.ticks = Ticks()
        self.pacer = Pacer(1.0 / spec.control_hz, self.ticks) if spec.paced else None
        self.merge = config.merge
        half = max(1, welcome.horizon // 2)
        self.play_steps = min(config.play_steps or (half if self.merge else welcome.horizon), welcome.horizon)
        self.delay_steps = 0 if spec.paced else config.delay_steps
        self.random = np.random.default_rng([abs(assignment.seed), self.delay_steps])
        self.delays: deque[int] = deque(maxlen=RECENT_DELAYS)
        self.chunks = Chunks(guard.check, BLEND_STEPS if self.merge == "blend" else 0)
        self.report = StepReport()
        self.asked: _Asked | None = None
        self.step = 0
        self.decisions = 0
        self.still = True  # the robot does not move on: time may be taken to think
        self.versions: dict[str, None] = {}

    def run(self) -> EpisodeReport | None:
        """To the end; None if `stopped` came first (the runtime then keeps it as aborted, as it does what ends in an
        error, with the reason where it can still be told).

        Raises what `PolicyClient` and the backend raise, also a `BackendError` for an observation that is not as its
        spec says, and `StoppedError`; the backend has been stopped by then.
        """
        guard, assignment = self.guard, self.assignment
        status: Status | End = "running"
        reason = ""
        try:
            guard.begin(
                assignment.episode, lambda: self.backend.reset(assignment.task, assignment.seed), leaving=self.stopped
            )
            if self.pacer:
                self.pacer.start()
            while status == "running":
                self._wait_while_paused()
                if self.stopped():
                    self._give_up("the bridge was told to leave")
                    return None
                if guard.ending and self.step:
                    status, reason = ENDINGS[guard.ending]
                    break
                self._think()
                status = self._act()
                if status == "running" and guard.ending:
                    status, reason = ENDINGS[guard.ending]
                if status == "running" and self.step >= assignment.horizon_steps:
                    status = "timeout"
            if status == "timeout" and not self.backend.spec.judges:
                status = "unjudged"
            end_request, status = self._end(status, reason)
        except BaseException as error:
            # A runtime that is silent cannot hear why, and of a stop it hears from the guarding thread.
            known = isinstance(error, SilentError) or guard.halted
            why = str(error) if isinstance(error, FieldtuneError) else f"{type(error).__name__}: {error}"
            if isinstance(error, BackendError) and self.backend.spec.paced:
                why = f"stopped by its own fault: {why}"  # what a policy does to a robot is that policy's failure
            self._give_up("" if known else why)
            raise
        return EpisodeReport(status, self.step, self.decisions, self.ticks, tuple(self.versions), end_request)

    # --- what to do -----------------------------------------------------------------------------------------------

    def _think(self) -> None:
        """Ask for a chunk if it is time, and take what has come. What is not due after this has to be waited for."""
        while True:
            if self.asked is None and self._time_to_ask():
                self._ask()
            if self.asked is None or not self._has_come(self.asked):
                return
            self._take(self.asked)

    def _time_to_ask(self) -> bool:
        if self.chunks.due(self.step) is None:
            return True
        if self.merge is None or self.chunks.index(self.step) < self.play_steps:
            return False
        # What is left of the episode may be covered already.
        return self.step + len(self.chunks.left(self.step)) < self.assignment.horizon_steps

    def _has_come(self, asked: _Asked) -> bool:
        """Whether the chunk may be taken: it is here, or the loop may stand still until it is."""
        if self.merge is None or self.still:
            return True
        if self.pacer is None:
            return self.step - asked.step >= asked.delay_steps
        return self.client.ready(asked.request)

    def _ask(self) -> None:
        observed_s = self.guard.clock()
        tensors = self._observe()
        left = self.chunks.left(self.step)
        delay_steps = 0 if self.still else int(self.random.integers(self.delay_steps + 1))
        committed = 0
        if self.merge == "prefix":
            expected = delay_steps if self.pacer is None else max(self.delays, default=0)
            committed = min(expected, self.welcome.prefix_steps, len(left))
        played, report = self.report.take()
        infer = Infer(session=self.welcome.session, episode=self.assignment.episode, step=self.step, played=played)
        self.guard.waiting()
        prefix = {"prefix": left[:committed]} if committed else {}
        request = self.client.post(infer, {**tensors, **report, **prefix})
        self.decisions += 1
        self.asked = _Asked(request, self.step, observed_s, committed, delay_steps)

    def _observe(self) -> Arrays:
        observation = self.guard.observe()
        try:
            tensors = observation_tensors(observation)
            check_observation(tensors, self.backend.spec)
        except (WireError, AttributeError, TypeError, ValueError) as error:
            raise BackendError(f"what {self.backend.spec.name} observes is not as its spec says: {error}") from error
        return tensors

    def _take(self, asked: _Asked) -> None:
        """Take a chunk, waiting for it where that is allowed."""
        self.asked = None
        started_s = time.monotonic()
        chunk, arrays = self.client.collect(asked.request, Chunk)
        self.ticks.wait_s += time.monotonic() - started_s
        self.guard.heard()
        actions = checked_actions(chunk, arrays, self.assignment.episode, len(self.backend.spec.action.names))
        self.versions[chunk.version] = None
        if asked.stale:
            return
        if self.merge is None:
            actions = actions[: self.play_steps]
        elif self.pacer:
            # While the robot stands still no steps are counted; the next request will take about as long.
            waited = math.ceil((self.guard.clock() - asked.observed_s) / self.pacer.period_s)
            self.delays.append(waited if self.still else self.step - asked.step)
        first_step = max(self.step, asked.step + asked.committed)
        self.chunks.put(Plan(chunk.decision, asked.step, asked.observed_s, first_step, actions))

    def _act(self) -> Status:
        """Send the action that is due for this environment step, or the hold action."""
        guard, chunks = self.guard, self.chunks
        due = chunks.due(self.step)
        plan = chunks.plan
        assert plan is not None, "the first chunk is waited for"
        if due is None:
            self.ticks.starved += 1
            sent, rules = guard.hold(), STARVED
        else:
            action, rules = due
            cut = guard.cut(plan.observed_s)
            if cut:
                chunks.drop()
                if self.merge is None and chunks.index(self.step):
                    return "running"  # something of it was played, so the next may be asked for at once
                if self.asked is not None and self.asked.committed:
                    self.asked.stale = True  # what it was told to be committed was not played
                sent, rules = guard.hold(), cut
            elif rules & HELD:
                sent = guard.hold()
            else:
                sent, rule = guard.apply(action)
                rules |= rule
            self.ticks.held += bool(rules & HELD)
        self.still = False
        outcome = guard.outcome()
        self.report.add(plan.decision, chunks.index(self.step), sent, outcome.reward, rules)
        self.step += 1
        self.ticks.ticks += 1
        if self.pacer:
            self.pacer.wait()
        return outcome.status

    def _wait_while_paused(self) -> None:
        """A robot that is paused holds at its control rate; a simulator only waits."""
        guard = self.guard
        while guard.paused and not self.stopped() and not (self.step and guard.ending):
            # Time goes by that is no step, so what was planned is for another place by now.
            self.chunks.drop()
            self.still = True
            if self.asked is not None:
                self.asked.stale = True
            if self.pacer:
                guard.hold()
                self.pacer.wait()
            else:
                guard.check_running()
                time.sleep(PAUSED_S)

    # --- ends -----------------------------------------------------------------------------------------------------

    def _end(self, status: End, reason: str) -> tuple[int, End]:
        """Report the end; the id of the request, and how it ended. It is posted: the disk may take its time, the robot
        goes on.
        """
        final = self._observe()
        said = self.guard.rest(stop=self.backend.spec.paced, ended=self.assignment.episode)
        if said in ("success", "failure") and status in ("timeout", "unjudged"):
            status, reason = ENDINGS[said]  # since the loop has looked last
        if self.asked is not None:
            # The runtime is still at it; what it sends will not be played.
            with suppress(RefusedError):
                self.client.collect(self.asked.request, Chunk)
            self.asked = None
        played, report = self.report.take()
        message = EndEpisode(
            session=self.welcome.session,
            episode=self.assignment.episode,
            status=status,
            steps=self.step,
            played=played,
            reason=reason,
        )
        return self.client.post(message, {**final, **report}), status

    def _give_up(self, reason: str) -> None:
        """Stop the robot; then tell the runtime why, and what was executed until then."""
        self.guard.rest(stop=True)
        if self.asked is not None:
            self.client.forget(self.asked.request)
        if not reason or not self.decisions:
            return
        played, report = self.report.take()
        message = EndEpisode(
            session=self.welcome.session,
            episode=self.assignment.episode,
            status="aborted",
            steps=self.step,
            played=played,
            reason=reason,
        )
        # It is kept as aborted in any case, with less to say about it.
        with suppress(FieldtuneError):
            self.client.request(message, EpisodeStored, report, timeout_s=TELL_S)


def checked_actions(chunk: Chunk, arrays: dict[str, Float32], episode: str, d: int) -> Float32:
    """The actions `[h, d]` of a chunk for this episode; a robot never moves on anything else. Raises `WireError`.

    That they are finite is for the safety stage to check.
    """
    actions = arrays.get("actions")
    if chunk.episode != episode:
        raise WireError("episode", f"the chunk is for episode {chunk.episode!r}, this is {episode!r}")
    if actions is None or actions.ndim != 2 or actions.shape[1] != d or not len(actions) or actions.dtype != np.float32:
        raise WireError("tensors.actions", f"expected float32 [h, {d}]")
    return actions
