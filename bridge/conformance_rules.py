"""The rules of the conformance suite about what a backend sees and sends.

Each returns what it found or raises `Verdict`; its docstring says why it is a rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, get_args

import numpy as np

from bridge.backend import BackendError, Float32, Observation, Outcome, Status
from bridge.conformance_bench import Bench, Verdict, bad_action_vector, refuses
from bridge.messages import WireError, check_observation, observation_tensors

CHANGED = 0.01  # share of an element's range by which `apply` may round
STILL = 0.2  # share of a full motion that holding may drift in the same time
STILL_STEPS = 5
RAMP = 0.01  # share of the range that a robot is moved in one period on its way to a limit
BEYOND = 0.1  # share of the range by which an action leaves the limits


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
    if not bench.spec.paced:
        bench.step(bench.gentle_action())
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
        bench.step(bench.gentle_action())
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

    moved, ways = np.zeros(len(bench.spec.state.names)), []
    for limit in (bench.low, bench.high):
        bench.start(seed=1)
        with suppress(Verdict):
            ways.append(travel(limit.copy))
            moved = np.maximum(moved, ways[-1])
    if not moved.any():
        raise Verdict("skipped", "the state does not show motion")
    bench.start(seed=1)
    settling = travel(bench.hold)
    if all(np.array_equal(way, settling) for way in ways):
        raise Verdict("skipped", "the state goes the same way whatever is applied, as in a recording")
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
        refuses(partial(bench.step, action), f"apply() of an action with {what}")
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
        bench.note_end()
    needed_s = float(np.percentile(times_s, 99)) + bench.observe_p99_s
    return _in_time(bench, times_s, needed_s, "apply() sends and returns at once; the loop does the waiting")


def _in_time(bench: Bench, times_s: list[float], needed_s: float, mend: str) -> str:
    period_ms = 1e3 / bench.spec.control_hz
    p50_ms, p99_ms = (1e3 * float(np.percentile(times_s, q)) for q in (50, 99))
    found = f"p50 {p50_ms:.3g} ms, p99 {p99_ms:.3g} ms; a period is {period_ms:.3g} ms"
    if bench.spec.paced and 1e3 * needed_s > period_ms:
        raise Verdict("warned", f"{found}: too slow for {bench.spec.control_hz:g} Hz", f"{mend}; or lower control_hz")
    return found
