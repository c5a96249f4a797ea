"""The synchronous control loop: observe, report the last chunk and ask for the next, play it, until the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bridge.backend import Backend, Float32, Status
from bridge.client import PolicyClient
from bridge.messages import (
    Assignment,
    Chunk,
    EndEpisode,
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
    stopped: Callable[[], bool],
    play_steps: int | None = None,
) -> EpisodeReport | None:
    """Drive one episode to its end; None if `stopped` came first (the runtime then keeps it as aborted).

    Of each chunk the first `play_steps` actions are played (None: all), then the next chunk is asked for.
    Every action executed is one of a chunk that came for the observation before it; nothing is played from an earlier
    episode. Raises what `PolicyClient` raises; the backend has been stopped by then.
    """
    spec = backend.spec
    pacer = Pacer(1.0 / spec.control_hz) if spec.paced else None
    steps, decisions, infer_wait_s = 0, 0, 0.0
    last, report = 0, dict[str, Float32]()  # number of the last decision, and what became of it
    versions: dict[str, None] = {}
    status: Status = "running"
    try:
        backend.reset(assignment.task, assignment.seed)
        if pacer:
            pacer.start()
        while status == "running":
            if stopped():
                backend.stop()
                return None
            tensors = {**observation_tensors(backend.observe()), **report}
            asked_s = time.monotonic()
            infer = Infer(session=session, episode=assignment.episode, step=steps, executed=last)
            chunk, arrays = client.request(infer, Chunk, tensors)
            infer_wait_s += time.monotonic() - asked_s
            actions = checked_actions(chunk, arrays, assignment.episode, len(spec.action.names))
            versions[chunk.version] = None
            decisions += 1
            sent, rewards, status = _play(backend, actions[:play_steps][: assignment.horizon_steps - steps], pacer)
            steps += len(sent)
            if status == "running" and steps >= assignment.horizon_steps:
                status = "timeout"
            last, report = chunk.decision, {"sent": np.stack(sent), "reward": np.array(rewards, np.float32)}
        final = {**observation_tensors(backend.observe()), **report}
        end: Literal["success", "failure", "timeout"] = status
        # Posted: the disk may take its time, the robot goes on.
        end_request = client.post(
            EndEpisode(session=session, episode=assignment.episode, status=end, steps=steps, executed=last), final
        )
    except BaseException:
        backend.stop()
        raise
    if spec.paced:
        backend.stop()
    return EpisodeReport(
        status, steps, decisions, infer_wait_s, pacer.overruns if pacer else 0, tuple(versions), end_request
    )


def _play(backend: Backend, actions: Float32, pacer: Pacer | None) -> tuple[list[Float32], list[float], Status]:
    """Execute actions `[k, d]` until they are used up or the episode ends."""
    sent: list[Float32] = []
    rewards: list[float] = []
    status: Status = "running"
    for action in actions:
        sent.append(np.asarray(backend.apply(action), np.float32))
        outcome = backend.outcome()
        rewards.append(outcome.reward)
        status = outcome.status
        if pacer:
            pacer.wait()
        if status != "running":
            break
    return sent, rewards, status


def checked_actions(chunk: Chunk, arrays: dict[str, Float32], episode: str, d: int) -> Float32:
    """The actions `[h, d]` of a chunk for this episode; a robot never moves on anything else. Raises `WireError`."""
    actions = arrays.get("actions")
    if chunk.episode != episode:
        raise WireError("episode", f"the chunk is for episode {chunk.episode!r}, this is {episode!r}")
    if actions is None or actions.ndim != 2 or actions.shape[1] != d or not len(actions) or actions.dtype != np.float32:
        raise WireError("tensors.actions", f"expected float32 [h, {d}]")
    if not np.isfinite(actions).all():
        raise WireError("tensors.actions", "holds a value that is not finite")
    return actions
