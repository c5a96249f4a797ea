"""A bridge worker: keeps one backend at work for a runtime, through restarts of the runtime."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from bridge.backend import Backend, BackendError, instruction_of
from bridge.client import PolicyClient, RefusedError, SilentError, retry_hello
from bridge.config import BridgeConfig, ConfigError
from bridge.control import EpisodeLoop, EpisodeReport
from bridge.device import LOOK_S
from bridge.guard import Guard, StoppedError
from bridge.messages import Assignment, EpisodeStored, NextEpisode, NoEpisode, Welcome, WireError
from bridge.pacing import Ticks
from bridge.watch import Watcher

# Refusals after which a new session can go on; anything else would be refused again.
RECOVERABLE = ("session", "episode", "replayed", "internal")
MAX_FAILURES = 10  # in a row, before the worker leaves with the error: something is wrong that waiting does not mend
MAX_FAULTS = 3  # in a row of a robot's backend, before it stays stopped until it is reset
FAULT_PAUSE_S = 1.0  # before it is tried again


@dataclass(slots=True)
class DriveSummary:
    """What a worker did until it left."""

    episodes: int = 0
    successes: int = 0
    steps: int = 0
    dropped_episodes: int = 0
    drive_s: float = 0.0
    ticks: Ticks = field(default_factory=Ticks)


def drive(
    backend: Backend,
    client: PolicyClient,
    config: BridgeConfig,
    *,
    stopped: Callable[[], bool],
    report: Callable[[EpisodeReport, Assignment], None],
    warn: Callable[[str], None],
    episodes: int | None = None,
    guard: Guard | None = None,
) -> DriveSummary:
    """Run episodes as the runtime assigns them until it has no more, `stopped`, or `episodes` are done.

    When the runtime falls silent or refuses in mid-episode the backend is stopped, the episode is given up (the runtime
    keeps it as aborted) and the worker says hello again for at most `give_up_after_s`; then `SilentError` is raised,
    but not while the robot is stopped.
    A robot that was stopped takes no episode until the operator has reset it. One whose backend fails gives the episode
    up and tries the next one, from the second failure in a row on with the backend connected anew; after `MAX_FAULTS`
    it is stopped. What fails in a simulator, or in the first `connect`, is raised.

    `guard` is given by whoever hears the operator at this computer. Raises `ConfigError` for safety limits that are
    missing or loosened.
    """
    guard = guard or Guard(backend, config.safety, warn=warn)
    watcher = Watcher(guard, client.endpoint, client=client.client, keys=client.keys)
    summary = DriveSummary()
    welcome: Welcome | None = None
    told_by_s = 0.0
    failures = faults = 0
    connected = True
    unstored: deque[tuple[EpisodeReport, Assignment]] = deque()

    def settle(most: int) -> None:
        """Wait until at most so many episodes are not acknowledged; count and report those that are."""
        while len(unstored) > most:
            result, assignment = unstored[0]
            try:
                client.collect(result.end_request, EpisodeStored)
            except RefusedError as error:
                # The runtime cannot log (a full disk, say) but serves on; so does the robot.
                summary.dropped_episodes += 1
                warn(str(error))
            else:
                summary.episodes += 1
                summary.successes += result.status == "success"
                summary.steps += result.steps
                summary.ticks.add(result.ticks)
                report(result, assignment)
            unstored.popleft()

    def give_up_unstored() -> None:
        summary.dropped_episodes += len(unstored)
        unstored.clear()

    backend.connect()
    started_s = time.monotonic()
    watcher.start()
    try:
        while not stopped() and (episodes is None or summary.episodes + len(unstored) < episodes):
            if welcome is None:
                watcher.told.clear()
                try:
                    welcome = retry_hello(client, backend.spec, give_up_after_s=config.give_up_after_s, stopped=stopped)
                except SilentError as error:
                    if not guard.stopped:
                        raise
                    # Started anew by whoever looks after it, a robot that is stopped would forget that.
                    warn(f"{error}; the robot is stopped, so this goes on")
                    continue
                if welcome is None:
                    break
                if config.merge == "prefix" and not welcome.prefix_steps:
                    raise ConfigError(
                        "$.bridge.merge: `prefix` is for a policy that can be told what is committed, and this one "
                        "cannot; train one with trainer.vla.prefix_steps, or use `switch` or `blend`"
                    )
                watcher.session = welcome.session
                told_by_s = time.monotonic() + client.timeout_s
            driving = False
            try:
                if not watcher.told.wait(LOOK_S):
                    # Whether the robot is paused is in a runtime's first orders; it must not go home before.
                    if time.monotonic() > told_by_s:
                        raise SilentError(f"{client.endpoint}: no orders in time")
                    continue
                if guard.stopped or guard.paused:
                    settle(0)
                    time.sleep(LOOK_S)
                    continue
                if guard.reconnect:
                    connected = guard.reconnect = False
                if not connected:
                    guard.call(backend.close)
                    guard.call(backend.connect)
                    connected = True
                answer, _ = client.ask(NextEpisode(session=welcome.session))
                if isinstance(answer, NoEpisode):
                    settle(0)
                    if answer.finished:
                        break
                    time.sleep(min(answer.retry_s, 5.0))
                    continue
                if not isinstance(answer, Assignment):
                    raise WireError("kind", f"NextEpisode was answered by {type(answer).__name__}")
                if answer.task not in backend.spec.instructions:
                    raise WireError("task", f"{answer.task!r} is none of {', '.join(backend.spec.instructions)}")
                if config.wait_for_scene and guard.ready_for != answer.task:
                    settle(0)  # whoever puts the scene back wants to know how the last one went
                    text = instruction_of(backend.spec, answer.task, answer.seed)
                    warn(f"next is {answer.task} ({text}); p or resume once the scene is ready")
                    if not guard.wait_for_scene(answer.task, text, stopped):
                        break
                driving = True
                result = EpisodeLoop(backend, client, welcome, answer, guard, stopped, config).run()
                driving = False
                if result is None:
                    break
                unstored.append((result, answer))
                settle(1)
            except StoppedError:
                # The guard has said why. The runtime closes the episode when it hears of the stop.
                summary.dropped_episodes += 1
                continue
            except BackendError as error:
                summary.dropped_episodes += driving
                guard.ready_for = ""  # somebody may have to reach in
                if guard.stopped or (driving and guard.halted):
                    continue  # it was stopped in the middle of a call
                if not backend.spec.paced:
                    raise
                faults += 1
                # The first time it may have been a moment's trouble; an arm whose device is closed may fall.
                connected = connected and faults == 1
                if faults > MAX_FAULTS:
                    faults = 0
                    guard.stop(str(error))
                else:
                    warn(f"{error}; the episode is given up, trying again ({faults}/{MAX_FAULTS})")
                    time.sleep(FAULT_PAUSE_S)
                continue
            except (SilentError, WireError, RefusedError) as error:
                failures += not guard.stopped  # a stop is why the runtime refuses, and may be why it is silent
                final = isinstance(error, RefusedError) and error.refused.code not in RECOVERABLE
                if final or failures > MAX_FAILURES:
                    raise
                if isinstance(error, RefusedError):
                    # The connection is good, so what was posted on it is still answered.
                    with suppress(SilentError, WireError):
                        settle(0)
                give_up_unstored()
                summary.dropped_episodes += driving
                warn(f"{error}; the episode is given up, saying hello again ({failures}/{MAX_FAILURES})")
                welcome = None
                continue
            failures = faults = 0
        try:
            settle(0)
        except (SilentError, WireError) as error:
            give_up_unstored()
            warn(f"{error}; the last episode may not be stored")
    finally:
        summary.drive_s = time.monotonic() - started_s
        watcher.close()
        guard.leave()
    return summary
