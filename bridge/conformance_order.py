"""The rules of the conformance suite about the order of calls, from connect to a pulled cable."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bridge.backend import Backend, BackendError
from bridge.conformance_bench import Bench, Verdict, refuses

NO_TASK = "no such task"
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
    before, after = bench.spec_before, bench.spec
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
    refuses(lambda: bench.backend.reset(NO_TASK, 0), f"reset({NO_TASK!r}, 0)")
    bench.start()
    return "is refused"


def stop(bench: Bench) -> str:
    """Twice; in the middle of an episode where it may be moved."""
    for when in ("stop()", "stop() again"):
        _never_raises(bench.backend.stop, when)
    return "may be called again"


def reset_after_stop(bench: Bench) -> str:
    """Every episode of a robot ends with `stop`, and the next begins."""
    bench.start()
    bench.observe()
    return "goes on"


def close(bench: Bench) -> str:
    """Twice."""
    for when in ("close()", "close() again"):
        _never_raises(bench.backend.close, when)
    return "may be called again"


def stop_after_close(bench: Bench) -> str:
    """A program that ends does not know how far it got."""
    _never_raises(bench.backend.stop, "stop() after close()")
    return "does nothing"


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
        calls: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("observe()", other.observe),
            ("apply()", lambda: other.apply(last)),
        )
        noticed_s = max(_notices(call, what) for what, call in calls)
        with suppress(BackendError):  # it may say that it could not reach the robot
            other.stop()
    finally:
        with suppress(BackendError):
            other.close()
    _never_raises(other.close, "close() after a close() of what is gone")
    found = f"is noticed within {noticed_s:.2g} s; stop() and close() still work"
    if noticed_s > UNPLUGGED_S:
        raise Verdict("warned", found, f"give each call a deadline below {UNPLUGGED_S:g} s")
    return found


def _notices(call: Callable[[], Any], what: str) -> float:
    """How long until the call raises `BackendError`, s. `Verdict` unless one that begins in `UNPLUGGED_S` does."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < UNPLUGGED_S:
        try:
            call()
        except BackendError:
            return time.monotonic() - began_s
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


def _never_raises(call: Callable[[], None], what: str) -> None:
    try:
        call()
    except Exception as error:
        raise Verdict(
            "failed", f"{what} raises {type(error).__name__}: {error}", "make it do nothing there, without an error"
        ) from error
