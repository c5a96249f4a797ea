"""`/healthz`: whether the runtime serves and logs as it should."""

from __future__ import annotations

from typing import Any

import msgspec

from runtime.episodes import LogStats
from runtime.status import Status


def health(now: Status | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body: 200 while the runtime answers and has logged all it should, else 503 and why.

    A robot that an operator has stopped is as it should be; it is said, and no more. Anybody may ask, so no text of
    somebody else's (a path, a reason) is in the answer.
    """
    if now is None:
        return 503, {"healthy": False, "why": ["the runtime does not answer"]}
    log = msgspec.convert(now.log, LogStats)
    why = []
    if log.lost:
        why.append(f"{log.lost} episodes lost")
    if log.error:
        why.append("the episode log has had an error; `fieldtune status` says which")
    return (503 if why else 200), {"healthy": not why, "why": why, "stopped": bool(now.stopped)}
