"""What `fieldtune status` says of staged versions."""

from typing import Any

import msgspec

from fieldtune.commands.status import staging_rows
from runtime.canary_test import Canary
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
    assert staging_rows(standing(canary))[:2] == [
        ("canary", "cccccccccccc   0 episodes, success -"),
        ("", "live version: 0 episodes, success -"),
    ]
    for i in range(4):
        canary.add("c" * 64, True, 10)
        canary.add("d" * 64, i < 2, 20)
    rows = staging_rows(standing(canary))
    assert rows[0] == ("canary", "cccccccccccc   4 episodes, success 1.00")
    assert rows[1] == ("", "live version: 4 episodes, success 0.50")
    low, high = canary.evidence().success_difference
    assert rows[2] == ("", f"difference {low:+.2f} to {high:+.2f} (95 %)")
    assert rows[3][1].startswith(f"better {canary.evidence().better:.3g}, not worse ")
    assert rows[4] == ("", f"of 40; worse {canary.evidence().worse:.3g} of 20")


def test_alarms_and_who_has_pinned() -> None:
    drift = Drift("success", "fell", 130, 0.9, 0.55)
    assert staging_rows(standing(drifts=(drift,), pinned="Ada")) == [
        ("alarm", "success fell from 0.9 to 0.55"),
        ("pinned", "by Ada"),
    ]


def test_nothing_where_nothing_is_staged() -> None:
    assert staging_rows({}) == staging_rows(standing()) == []
