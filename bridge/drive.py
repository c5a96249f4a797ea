"""A bridge worker: keeps one backend at work for a runtime, through restarts of the runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bridge.backend import Backend
from bridge.client import PolicyClient, RefusedError, SilentError, retry_hello
from bridge.config import BridgeConfig
from bridge.control import EpisodeReport, run_episode
from bridge.messages import Assignment, NextEpisode, NoEpisode, WireError

# Refusals after which a new session can go on; anything else would be refused again.
RECOVERABLE = ("session", "episode", "replayed", "internal")
MAX_FAILURES = 10  # in a row, before the worker leaves with the error: something is wrong that waiting does not mend


@dataclass(slots=True)
class DriveSummary:
    """What a worker did until it left."""

    episodes: int = 0
    successes: int = 0
    steps: int = 0
    dropped_episodes: int = 0
    drive_s: float = 0.0
    infer_wait_s: float = 0.0


def drive(
    backend: Backend,
    client: PolicyClient,
    config: BridgeConfig,
    *,
    stopped: Callable[[], bool],
    report: Callable[[EpisodeReport, Assignment], None],
    warn: Callable[[str], None],
    episodes: int | None = None,
) -> DriveSummary:
    """Run episodes as the runtime assigns them until it has no more, `stopped`, or `episodes` are done.

    When the runtime falls silent or refuses in mid-episode the backend is stopped, the episode is given up (the runtime
    keeps it as aborted) and the worker says hello again for at most `give_up_after_s`; then `SilentError` is raised.
    """
    summary = DriveSummary()
    session = ""
    failures = 0
    backend.connect()
    try:
        while not stopped() and (episodes is None or summary.episodes < episodes):
            if not session:
                welcome = retry_hello(client, backend.spec, give_up_after_s=config.give_up_after_s, stopped=stopped)
                if welcome is None:
                    break
                session = welcome.session
            try:
                answer, _ = client.ask(NextEpisode(session=session))
                if isinstance(answer, NoEpisode):
                    if answer.finished:
                        break
                    time.sleep(min(answer.retry_s, 5.0))
                    continue
                if not isinstance(answer, Assignment):
                    raise WireError("kind", f"NextEpisode was answered by {type(answer).__name__}")
                started_s = time.monotonic()
                result = run_episode(backend, client, session, answer, stopped)
            except (SilentError, WireError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.refused.code == "storage":
                    # The runtime cannot log (a full disk, say) but serves on; so does the robot.
                    summary.dropped_episodes += 1
                    warn(str(error))
                    continue
                failures += 1
                final = isinstance(error, RefusedError) and error.refused.code not in RECOVERABLE
                if final or failures > MAX_FAILURES:
                    raise
                summary.dropped_episodes += 1
                warn(f"{error}; the episode is given up, saying hello again ({failures}/{MAX_FAILURES})")
                session = ""
                continue
            if result is None:
                break
            failures = 0
            summary.episodes += 1
            summary.successes += result.status == "success"
            summary.steps += result.steps
            summary.drive_s += time.monotonic() - started_s
            summary.infer_wait_s += result.infer_wait_s
            report(result, answer)
    finally:
        backend.stop()
        backend.close()
    return summary
