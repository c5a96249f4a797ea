"""The conformance suite: what every backend must do, checked on the backend itself.

`check_backend` runs the rules of `RULES` in order. A rule that a failed one makes meaningless is skipped, so that one
fault is one failed check. What a robot does when a rule moves it: see docs/backends.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from bridge import conformance_order as order
from bridge import conformance_rules as rules
from bridge.backend import Backend, BackendSpec
from bridge.conformance_bench import Bench, Verdict
from bridge.conformance_spec import limit_faults, name_faults, rate_faults, type_faults

CheckState = Literal["passed", "warned", "failed", "skipped"]


class Check(Struct, frozen=True):
    """One row: what was checked, how it stands, what was found, and what to do where that is needed."""

    name: str
    state: CheckState
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Rule:
    """One check. `run` returns what it found, or raises `Verdict`; `moves` says that a robot may move while it runs.

    `needs` are the names of earlier rules without which this one says nothing.
    """

    name: str
    run: Callable[[Bench], str]
    needs: tuple[str, ...] = ()
    moves: bool = False


def _of_spec(faults: Callable[[BackendSpec], Iterator[str]], good: str) -> Callable[[Bench], str]:
    """A rule that passes where the spec has none of these faults."""

    def run(bench: Bench) -> str:
        found = list(faults(bench.spec))
        if found:
            raise Verdict("failed", "; ".join(found), "mend `spec`: the policy is compared with it field by field")
        return good

    return run


_SPEC = ("spec types", "spec names and units", "spec limits", "spec rate and tasks")
_SEEN = ("observe",)
_HELD = ("observe", "hold action")
_MOVED = ("observe", "hold action", "apply")

RULES = (
    Rule("spec types", _of_spec(type_faults, "can be sent")),
    Rule("spec names and units", _of_spec(name_faults, "each element has a name and a unit"), _SPEC[:1]),
    Rule("spec limits", _of_spec(limit_faults, "finite, low below high"), _SPEC[:1]),
    Rule("spec rate and tasks", _of_spec(rate_faults, "a rate, and tasks with their texts"), _SPEC[:1]),
    Rule("stop and close before connect", order.stop_and_close_before_connect, _SPEC),
    Rule("calls before connect", order.calls_before_connect, _SPEC),
    Rule("connect", order.connect, _SPEC),
    Rule("spec after connect", order.spec_after_connect, ("connect",)),
    Rule("reset", order.reset, ("connect",), moves=True),
    Rule("unknown task", order.unknown_task, ("reset",), moves=True),
    Rule("observe", rules.observe, ("connect", "reset")),
    Rule("pictures", rules.pictures, _SEEN),
    Rule("fresh arrays", rules.fresh_arrays, _SEEN),
    Rule("hold action", rules.hold_action, _SEEN),
    Rule("equal seeds", rules.equal_seeds, _HELD, moves=True),
    Rule("hold keeps still", rules.hold_keeps_still, _HELD, moves=True),
    Rule("apply", rules.apply, _HELD, moves=True),
    Rule("beyond the limits", rules.beyond_the_limits, _MOVED, moves=True),
    Rule("bad actions", rules.bad_actions, _MOVED, moves=True),
    Rule("outcome", rules.outcome, _MOVED, moves=True),
    Rule("time of observe", rules.time_of_observe, _SEEN),
    Rule("time of apply", rules.time_of_apply, _MOVED, moves=True),
    Rule("stop", order.stop, ("connect",)),
    Rule("reset after stop", order.reset_after_stop, ("stop", "reset", "observe"), moves=True),
    Rule("close", order.close, ("connect",)),
    Rule("stop after close", order.stop_after_close, ("stop", "close")),
    Rule("calls after close", order.calls_after_close, ("close",)),
    Rule("unplugged", order.unplugged, (*_HELD, "close"), moves=True),
)


def check_backend(
    make: Callable[[], Backend],
    *,
    moves: bool = False,
    samples: int = 50,
    report: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Every rule on a backend that `make` makes anew each time; `report` gets each row as it comes.

    A simulator is always moved. A robot (`spec.paced`) is moved only with `moves`; otherwise it is connected, looked
    at, stopped and closed. `samples` calls are timed. Raises what `make` raises; the backend is closed in any case.
    """
    backend = make()
    bench = Bench(make, backend, may_move=moves or not backend.spec.paced, samples=samples)
    checks: list[Check] = []
    useless: set[str] = set()
    try:
        for rule in RULES:
            check, tells = _judge(rule, bench, useless)
            if not tells:
                useless.add(rule.name)
            checks.append(check)
            report(check)
    finally:
        for release in (backend.stop, backend.close):
            # What either raises has been judged above; the other must run all the same.
            with suppress(Exception):
                release()
    return checks


def _judge(rule: Rule, bench: Bench, useless: set[str]) -> tuple[Check, bool]:
    """The row of one rule, and whether rules that need it can be run."""
    lacking = [name for name in rule.needs if name in useless]
    if lacking:
        return Check(rule.name, "skipped", f"says nothing without `{lacking[0]}`"), False
    if rule.moves and not bench.may_move:
        return Check(rule.name, "skipped", "would move the robot", "stand clear and give --moves"), True
    try:
        return Check(rule.name, "passed", rule.run(bench)), True
    except Verdict as verdict:
        return Check(rule.name, verdict.state, verdict.found, verdict.mend), verdict.state == "warned"
    # An author's backend raises whatever it stumbles over, and that is what is to be shown.
    except Exception as error:  # noqa: BLE001
        return Check(rule.name, "failed", f"{type(error).__name__}: {error}", "mend what raises this"), False
