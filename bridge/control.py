"""The synchronous control loop: observe, report the last chunk and ask for the next, play it, until the end.

It reaches the backend through `bridge.guard` only, which checks what is sent and can stop it at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bridge.backend import Backend, Float32, Status, UInt8
from bridge.client import PolicyClient
from bridge.guard import Guard
from bridge.messages import (
    Assignment,
    Chunk,
    EndEpisode,
    Ending,
    Infer,
    WireError,
    observation_tensors,
)


@dataclass(slots=True)
class Pacer:
    """Sleeps to absolute deadlines on a monotonic clock, so that one slow tick does not shift all later ones."""

    period_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    overruns: int = 0
    _next_s: float = field(default=0.0, init=False)

    def start(self) -> None:
        """The first tick is now."""
        self._next_s = self.clock()

    def wait(self) -> None:
        """Sleep to the next tick. A tick that is already past is an overrun, and the schedule starts anew from now."""
        self._next_s += self.period_s
        late_s = self.clock() - self._next_s
        if late_s > 0:
            self.overruns += 1
            self._next_s += late_s
        else:
            self.sleep(-late_s)


PAUSED_S = 0.02  # between two looks at a paused simulator
End = Literal["success", "failure", "timeout"]
ENDINGS: dict[Ending, tuple[End, str]] = {
    # Cut off without a verdict: what is learned from it is what a time-out teaches.
    "end": ("timeout", "ended by the operator"),
    "success": ("success", "marked by the operator"),
    "failure": ("failure", "marked by the operator"),
}


@dataclass(slots=True)
class EpisodeReport:
    """What one episode came to, for the screen."""

    status: Status
    steps: int
    decisions: int
    infer_wait_s: float
    overruns: int
    versions: tuple[str, ...]
    end_request: int
    """`PolicyClient.collect` gives the answer to this posted request: whether the episode is stored."""


def run_episode(
    backend: Backend,
    client: PolicyClient,
    session: str,
    assignment: Assignment,
    guard: Guard,
    stopped: Callable[[], bool],
    play_steps: int | None = None,
) -> EpisodeReport | None:
    """Drive one episode to its end; None if `stopped` came first (the runtime then keeps it as aborted).

    Of each chunk the first `play_steps` actions are played (None: all), then the next chunk is asked for.
    Every action executed is one of a chunk that came for the observation before it, or the guard's in its place;
    nothing is played from an earlier episode. Raises what `PolicyClient` raises, and `StoppedError`; the backend has
    been stopped by then.
    """
    spec = backend.spec
    pacer = Pacer(1.0 / spec.control_hz) if spec.paced else None
    steps, decisions, infer_wait_s = 0, 0, 0.0
    last, report = 0, dict[str, Float32 | UInt8]()  # number of the last decision, and what became of it
    versions: dict[str, None] = {}
    status: Status = "running"
    reason = ""
    try:
        guard.begin(assignment.episode, lambda: backend.reset(assignment.task, assignment.seed))
        if pacer:
            pacer.start()
        while status == "running":
            _wait_while_paused(guard, pacer, stopped, may_end=steps > 0)
            if stopped():
                guard.rest(stop=True)
                return None
            if guard.ending and steps:
                status, reason = ENDINGS[guard.ending]
                break
            observed_s = guard.clock()
            tensors = {**observation_tensors(guard.observe()), **report}
            asked_s = time.monotonic()
            infer = Infer(session=session, episode=assignment.episode, step=steps, executed=last)
            guard.waiting()
            chunk, arrays = client.request(infer, Chunk, tensors)
            guard.heard()
            infer_wait_s += time.monotonic() - asked_s
            actions = checked_actions(chunk, arrays, assignment.episode, len(spec.action.names))
            versions[chunk.version] = None
            decisions += 1
            actions = actions[:play_steps][: assignment.horizon_steps - steps]
            last = chunk.decision
            report, status = _play(guard, actions, observed_s, pacer)
            steps += len(report["sent"])
            if status == "running" and guard.ending:
                status, reason = ENDINGS[guard.ending]
            if status == "running" and steps >= assignment.horizon_steps:
                status = "timeout"
        final = {**observation_tensors(guard.observe()), **report}
        end: End = status
        # Posted: the disk may take its time, the robot goes on.
        message = EndEpisode(
            session=session, episode=assignment.episode, status=end, steps=steps, executed=last, reason=reason
        )
        end_request = client.post(message, final)
    except BaseException:
        guard.rest(stop=True)
        raise
    guard.rest(stop=spec.paced)
    return EpisodeReport(
        status, steps, decisions, infer_wait_s, pacer.overruns if pacer else 0, tuple(versions), end_request
    )


def _play(
    guard: Guard, actions: Float32, observed_s: float, pacer: Pacer | None
) -> tuple[dict[str, Float32 | UInt8], Status]:
    """Execute actions `[h, d]` until they are used up, the episode ends or the guard cuts the chunk; at least one
    action is sent, the hold action if need be. Returns the tensors that report what was sent, and the status."""
    sent: list[Float32] = []
    rewards: list[float] = []
    status: Status = "running"
    allowed, rules = guard.check(actions)
    for i, action in enumerate(allowed):
        cut = guard.cut(observed_s)
        if cut and i:
            break
        if cut:
            really, rule = guard.hold(), cut
        else:
            really, rule = guard.apply(action)
        if rule:
            rules[i] |= rule
        sent.append(really)
        outcome = guard.outcome()
        rewards.append(outcome.reward)
        status = outcome.status
        if pacer:
            pacer.wait()
        if cut or status != "running":
            break
    report: dict[str, Float32 | UInt8] = {"sent": np.stack(sent), "reward": np.array(rewards, np.float32)}
    rules = rules[: len(sent)]
    if rules.any():
        report["rules"] = rules
    return report, status


def _wait_while_paused(guard: Guard, pacer: Pacer | None, stopped: Callable[[], bool], *, may_end: bool) -> None:
    """A robot that is paused holds at its control rate; a simulator only waits."""
    while guard.paused and not stopped() and not (may_end and guard.ending):
        if pacer:
            guard.hold()
            pacer.wait()
        else:
            guard.check_running()
            time.sleep(PAUSED_S)


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
