"""The rules of the conformance suite that call the backend. Each returns what it found or raises `Verdict`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np

from bridge.backend import Backend, BackendError, Float32, Observation, Outcome, Status
from bridge.conformance_bench import Bench, Verdict, bad_action_vector
from bridge.messages import WireError, check_observation, observation_tensors

NO_TASK = "no such task"
CHANGED = 0.01  # share of an element's range by which `apply` may round
STILL = 0.2  # share of a full motion that holding may drift in the same time
STILL_STEPS = 5
RAMP = 0.01  # share of the range that a robot is moved in one period on its way to a limit
BEYOND = 0.1  # share of the range by which an action leaves the limits
UNPLUGGED_S = 2.0  # within which a robot that is gone must be noticed


@runtime_checkable
class CanBeUnplugged(Protocol):
    """A backend that can play its own device's loss, for the last rule: an emulator, or a transport that can be cut."""

    def unplug_for_test(self) -> None:
        """Cut the device off, as if its cable had been pulled."""
        ...


def stop_and_close_before_connect(bench: Bench) -> str:
    """Both are what a program calls when something went wrong, perhaps before anything was opened."""
    other = bench.make()
    _never_raises(other.stop, "stop() before connect()")
    _never_raises(other.close, "close() before connect()")
    return "both do nothing"


def calls_before_connect(bench: Bench) -> str:
    """Out of order is an error for people, not a crash."""
    other = bench.make()
    try:
        return _out_of_order(bench, other, "before connect()")
    finally:
        with suppress(Exception):
            other.close()


def calls_after_close(bench: Bench) -> str:
    """The same of a backend that was closed."""
    return _out_of_order(bench, bench.backend, "after close()")


def connect(bench: Bench) -> str:
    """Open it."""
    started_s = time.monotonic()
    bench.backend.connect()
    return f"took {time.monotonic() - started_s:.2g} s"


def spec_after_connect(bench: Bench) -> str:
    """The policy was chosen by the spec from before."""
    before, after = bench.make().spec, bench.spec
    if before != after:
        changed = [name for name in before.__struct_fields__ if getattr(before, name) != getattr(after, name)]
        raise Verdict("failed", f"connect() changes {', '.join(changed)}", "say before connect() what is true after it")
    return "as before"


def reset(bench: Bench) -> str:
    """Every task, one episode each."""
    started_s = time.monotonic()
    for task in bench.spec.instructions:
        try:
            bench.backend.reset(task, 0)
        except BackendError as error:
            raise Verdict("failed", f"task {task!r}: {error}", "offer only tasks that can be started") from error
    bench.start()
    took_s = (time.monotonic() - started_s) / (len(bench.spec.instructions) + 1)
    return f"{len(bench.spec.instructions)} tasks, {took_s:.2g} s each"


def unknown_task(bench: Bench) -> str:
    """A task that is not in the spec."""
    _refuses(lambda: bench.backend.reset(NO_TASK, 0), f"reset({NO_TASK!r}, 0)")
    bench.start()
    return "is refused"


def observe(bench: Bench) -> str:
    """Names, shapes, dtypes as the spec says, and finite; it is the check of the wire."""
    seen = bench.observe()
    if not isinstance(seen, Observation):
        raise Verdict("failed", f"gives {type(seen).__name__}", "return a bridge.backend.Observation")
    tensors = observation_tensors(seen)
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray):
            raise Verdict("failed", f"{name} is {type(array).__name__}", "return numpy arrays")
    try:
        check_observation(tensors, bench.spec)
    except WireError as error:
        raise Verdict("failed", str(error), "return what `spec` promises, or mend `spec`") from error
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in tensors.items())


def pictures(bench: Bench) -> str:
    """A camera with its cap on, or one that was never drawn, gives one value everywhere."""
    images = bench.observe().images
    blank = [name for name, image in images.items() if image.min() == image.max()]
    if blank:
        raise Verdict("warned", f"one value everywhere: {', '.join(blank)}", "look at that camera's picture")
    return f"{len(images)} cameras see something" if images else "no camera"


def fresh_arrays(bench: Bench) -> str:
    """The loop keeps observations until they are sent and logged, so a backend must not write into them again."""
    first = observation_tensors(bench.observe())
    kept = {name: array.copy() for name, array in first.items()}
    if bench.may_move:
        bench.step(bench.gentle_action() if not bench.spec.paced else bench.hold())
    second = observation_tensors(bench.observe())
    reused = [name for name in first if np.shares_memory(first[name], second[name])]
    reused += [name for name in first if name not in reused and not np.array_equal(first[name], kept[name])]
    if reused:
        raise Verdict("failed", f"{', '.join(reused)} changes after it was handed out", "return a copy")
    return "handed out once"


def equal_seeds(bench: Bench) -> str:
    """Evaluation compares versions on equal starts."""
    bench.start(seed=1)
    first = bench.tensors()
    for _ in range(3):
        bench.step(bench.gentle_action() if not bench.spec.paced else bench.hold())
    bench.start(seed=1)
    second = bench.tensors()
    other = [
        f"{name} by up to {np.abs(first[name].astype(float) - second[name]).max():.3g}"
        for name in first
        if not np.array_equal(first[name], second[name])
    ]
    if other and not bench.spec.paced:
        raise Verdict("failed", f"starts differ: {', '.join(other)}", "draw everything from the seed, in reset()")
    return f"starts differ, as a robot's may: {', '.join(other)}" if other else "give equal starts"


def hold_action(bench: Bench) -> str:
    """What goes out when there is nothing else."""
    bench.observe()
    try:
        action = bench.backend.hold_action()
    except BackendError as error:
        if bench.may_move:
            raise
        raise Verdict("skipped", f"it has none outside an episode: {error}", "give --moves") from error
    wrong = bad_action_vector(action, bench.low, bench.high)
    if wrong:
        raise Verdict("failed", wrong, "return a float32 action inside `spec.action`")
    return "inside the limits"


def hold_keeps_still(bench: Bench) -> str:
    """Compared with how far full motion comes in as many steps, since units differ."""
    if bench.spec.paced:
        raise Verdict("skipped", "not measured on a robot", "watch it: it must stand still")

    def travel(action: Callable[[], Float32]) -> Any:
        before = bench.tensors()["state"].astype(float)
        for _ in range(STILL_STEPS):
            bench.step(action())
            if bench.ended:
                raise Verdict("skipped", f"episodes end within {2 * STILL_STEPS} steps")
        return np.abs(bench.tensors()["state"] - before)

    moved = np.zeros(len(bench.spec.state.names))
    for limit in (bench.low, bench.high):
        bench.start(seed=1)
        with suppress(Verdict):
            moved = np.maximum(moved, travel(limit.copy))
    if not moved.any():
        raise Verdict("skipped", "the state does not show motion")
    bench.start(seed=1)
    travel(bench.hold)  # to settle
    drift = travel(bench.hold)
    bad = drift > STILL * moved + 1e-3 * moved.max()
    if bad.any():
        i = int(np.argmax(np.where(bad, drift, 0.0)))
        raise Verdict(
            "failed",
            f"{bench.spec.state.names[i]} drifts by {drift[i]:.3g} in {STILL_STEPS} steps of holding; full motion "
            f"gives {moved[i]:.3g}",
            "give the action that keeps it where it is; where there is none, do not run this under a dead-man",
        )
    return f"drifts by at most {drift.max():.3g} in {STILL_STEPS} steps"


def apply(bench: Bench) -> str:
    """Inside the limits: what was sent comes back, and the caller's array stays as it was."""
    given = bench.gentle_action()
    kept = given.copy()
    sent = bench.step(given)
    wrong = bad_action_vector(sent, bench.low, bench.high)
    if wrong:
        raise Verdict("failed", wrong, "return the action that was really sent, float32, after your own limits")
    if not np.array_equal(given, kept):
        raise Verdict("failed", "writes into the action it is given", "work on a copy")
    change = float((np.abs(sent - given) / (bench.high - bench.low)).max())
    if change > CHANGED:
        raise Verdict(
            "warned",
            f"an action inside the limits comes back changed by {change:.0%} of the range",
            "right if that is what was sent (a rate limit, say); cloning learns from it",
        )
    return "gives back what was sent"


def beyond_the_limits(bench: Bench) -> str:
    """Too large an action is clipped, and what comes back says so."""
    low, high = bench.low, bench.high
    beyond = BEYOND * (high - low)
    if bench.spec.paced and bench.spec.action.kind == "absolute":
        answers = [_ramp_beyond(bench)]
    else:
        answers = [bench.step((limit + sign * beyond).astype(np.float32)) for limit, sign in ((high, 1), (low, -1))]
    for sent in answers:
        wrong = bad_action_vector(sent, low, high)
        if wrong:
            raise Verdict("failed", wrong, "clip to `spec.action`, and return what was sent, not what was asked for")
    return "come back clipped"


def _ramp_beyond(bench: Bench) -> Any:
    """Bring the one element that is nearest to a limit there, slowly, then ask for more, and bring it back."""
    low, high = bench.low, bench.high
    span, at = high - low, bench.hold()
    room = np.minimum(high - at, at - low) / span
    i = int(np.argmin(room))
    up = high[i] - at[i] < at[i] - low[i]
    limit, past = (high[i], high[i] + BEYOND * span[i]) if up else (low[i], low[i] - BEYOND * span[i])
    way = np.linspace(at[i], limit, max(2, math.ceil(float(room[i]) / RAMP)))
    answer: Any = None
    for target in (*way, past, *way[::-1]):
        action = at.copy()
        action[i] = target
        sent = bench.step(action)
        answer = sent if target == past else answer
    return answer


def bad_actions(bench: Bench) -> str:
    """What no robot may be sent."""
    good = bench.hold()
    nan, infinite = good.copy(), good.copy()
    nan[0], infinite[-1] = np.nan, np.inf
    for what, action in (("NaN", nan), ("infinity", infinite), ("one element too many", np.append(good, good[:1]))):
        _refuses(lambda action=action: bench.step(action), f"apply() of an action with {what}")  # type: ignore[misc]
    bench.step(good)
    return "are refused, and it goes on"


def outcome(bench: Bench) -> str:
    """Status and reward after a step."""
    bench.step(bench.hold())
    found = bench.backend.outcome()
    if not isinstance(found, Outcome):
        raise Verdict("failed", f"gives {type(found).__name__}", "return a bridge.backend.Outcome")
    if found.status not in get_args(Status):
        raise Verdict("failed", f"status is {found.status!r}", f"one of {', '.join(get_args(Status))}")
    number = isinstance(found.reward, int | float) and not isinstance(found.reward, bool)
    if not number or not math.isfinite(found.reward):
        raise Verdict("failed", f"reward is {found.reward!r}", "a finite Python float; 0.0 where there is none")
    return f"{found.status}, reward {found.reward:.3g}"


def time_of_observe(bench: Bench) -> str:
    """Cameras are the usual reason for a loop that is late."""
    times_s = []
    for _ in range(bench.samples):
        bench.observe()  # so that a new episode is not in the time
        started_s = time.perf_counter()
        bench.backend.observe()
        times_s.append(time.perf_counter() - started_s)
    bench.observe_p99_s = float(np.percentile(times_s, 99))
    return _in_time(bench, times_s, bench.observe_p99_s, "read cameras in a thread of their own, and take the newest")


def time_of_apply(bench: Bench) -> str:
    """Of holding where it is; with `observe` it must fit into a period."""
    times_s = []
    for _ in range(bench.samples):
        bench.step(bench.hold())
        if bench.ended:
            bench.start()
        action = bench.hold()
        started_s = time.perf_counter()
        bench.backend.apply(action)
        times_s.append(time.perf_counter() - started_s)
    needed_s = float(np.percentile(times_s, 99)) + bench.observe_p99_s
    return _in_time(bench, times_s, needed_s, "apply() sends and returns at once; the loop does the waiting")


def _in_time(bench: Bench, times_s: list[float], needed_s: float, mend: str) -> str:
    period_ms = 1e3 / bench.spec.control_hz
    p50_ms, p99_ms = (1e3 * float(np.percentile(times_s, q)) for q in (50, 99))
    found = f"p50 {p50_ms:.3g} ms, p99 {p99_ms:.3g} ms; a period is {period_ms:.3g} ms"
    if bench.spec.paced and 1e3 * needed_s > period_ms:
        raise Verdict("warned", f"{found}: too slow for {bench.spec.control_hz:g} Hz", f"{mend}; or lower control_hz")
    return found


def stop(bench: Bench) -> str:
    """Twice: in the middle of an episode where it may be moved."""
    if bench.may_move:
        bench.observe()
    for when in ("stop()", "stop() again"):
        _never_raises(bench.backend.stop, when)
    return "may be called again"


def reset_after_stop(bench: Bench) -> str:
    """Every episode of a robot ends with `stop`, and the next begins."""
    bench.start()
    bench.observe()
    return "goes on"


def close(bench: Bench) -> str:
    """Twice, and `stop` after it."""
    for when in ("close()", "close() again"):
        _never_raises(bench.backend.close, when)
    _never_raises(bench.backend.stop, "stop() after close()")
    return "may be called again, and stop() after it"


def unplugged(bench: Bench) -> str:
    """On a backend of its own: the loss of the device is an error soon, and stop and close still work."""
    other = bench.make()
    if not isinstance(other, CanBeUnplugged):
        raise Verdict("skipped", "there is no method unplug_for_test()", "pull the cable once while it drives")
    other.connect()
    try:
        other.reset(next(iter(bench.spec.instructions)), 0)
        other.observe()
        last = np.array(other.hold_action(), np.float32)
        other.unplug_for_test()
        for what, call in (("observe()", other.observe), ("apply()", lambda: other.apply(last))):
            _notices(call, what)
        try:
            other.stop()
        except BackendError:
            pass  # it may say that it could not reach the robot
    finally:
        other.close()
    return "is noticed; stop() and close() still work"


def _notices(call: Callable[[], Any], what: str) -> None:
    """Raise `Verdict` unless the call raises `BackendError` within `UNPLUGGED_S`."""
    until_s = time.monotonic() + UNPLUGGED_S
    while time.monotonic() < until_s:
        try:
            call()
        except BackendError:
            return
        except Exception as error:
            raise Verdict(
                "failed", f"{what} raises {type(error).__name__}: {error}", "raise BackendError with what to do"
            ) from error
        time.sleep(0.01)
    raise Verdict("failed", f"{what} went on for {UNPLUGGED_S:g} s", "raise BackendError; never give old data as new")


def _out_of_order(bench: Bench, backend: Backend, when: str) -> str:
    """Calls that cannot be answered. Those that may move a robot are left out where it may not be moved."""
    middle = ((bench.low + bench.high) / 2).astype(np.float32)
    calls: list[tuple[str, Callable[[], Any]]] = []
    if bench.may_move:
        # First, so that no `reset` that works all the same has opened an episode.
        calls.append(("apply()", lambda: backend.apply(middle)))
    calls += [("observe()", backend.observe), ("outcome()", backend.outcome), ("hold_action()", backend.hold_action)]
    for name, call in calls:
        try:
            call()
        except BackendError:
            continue
        except Exception as error:
            raise Verdict(
                "failed", f"{name} {when} raises {type(error).__name__}: {error}", "raise BackendError with what to do"
            ) from error
        if name == "apply()":
            raise Verdict("failed", f"apply() {when} says that it sent something", "raise BackendError")
    return "give BackendError, or what they can"


def _refuses(call: Callable[[], Any], what: str) -> None:
    """Raise `Verdict` unless the call raises `BackendError`."""
    try:
        call()
    except BackendError:
        return
    except Exception as error:
        raise Verdict(
            "failed", f"{what} raises {type(error).__name__}: {error}", "raise BackendError with what to do"
        ) from error
    raise Verdict("failed", f"{what} is taken", "raise BackendError before anything is sent")


def _never_raises(call: Callable[[], None], what: str) -> None:
    try:
        call()
    except Exception as error:
        raise Verdict(
            "failed", f"{what} raises {type(error).__name__}: {error}", "make it do nothing there, without an error"
        ) from error
