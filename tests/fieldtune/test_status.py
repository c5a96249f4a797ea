"""What `fieldtune status` says of staged versions."""

from typing import Any

import msgspec

from fieldtune.commands.status import staging_rows
from runtime.canary import Canary
from runtime.drift import Drift


def standing(canary: Canary | None = None, drifts: tuple[Drift, ...] = (), pinned: str = "") -> dict[str, Any]:
    """As `runtime.staging` gives it."""
    return {
        "candidate": canary.candidate if canary else "",
        "evidence": msgspec.to_builtins(canary.evidence()) if canary else {},
        "drifts": msgspec.to_builtins(drifts),
        "drift": {},
        "pinned": pinned,
    }


def test_a_canary_with_its_evidence() -> None:
    canary = Canary("c" * 64, "d" * 64, 40)
    assert staging_rows(standing(canary))[0][1].startswith("cccccccccccc   0 episodes beside 0, success ")
    for i in range(4):
        canary.add("c" * 64, True, 10)
        canary.add("d" * 64, i < 2, 20)
    found = canary.evidence()
    (low, high), against = found.success_difference, f"better {found.better:.2g}, not_worse {found.not_worse:.2g}"
    assert staging_rows(standing(canary)) == [
        ("canary", f"cccccccccccc   4 episodes beside 4, success {low:+.2f} to {high:+.2f}"),
        ("evidence", f"{against}, faster {found.faster:.2g} of 40; worse {found.worse:.2g} of 20"),
    ]


def test_alarms_and_who_has_pinned() -> None:
    drift = Drift("success", "fell", 130, 0.9, 0.55)
    assert staging_rows(standing(drifts=(drift,), pinned="Ada")) == [
        ("drift", "success fell, 0.9 to 0.55"),
        ("pinned", "by Ada"),
    ]


def test_nothing_where_nothing_is_staged() -> None:
    assert staging_rows({}) == staging_rows(standing()) == []
