"""The runtime's counters, for `fieldtune status` and the live table."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from bridge.messages import MAX_HEADER_BYTES


class EpisodeBrief(Struct, frozen=True):
    """One finished episode, for the screen."""

    task: str
    status: str
    steps: int
    version: str
    ended_s: float
    """Seconds since the runtime started."""


class Status(Struct, frozen=True, kw_only=True):
    """What `GetStatus` answers."""

    version: str
    previous: str
    uptime_s: float
    sessions: int
    decisions: int
    batches: int
    episodes: dict[str, int]
    """Ended episodes by status."""
    swaps: int
    """Changes of the live version: asked for, or by rule."""
    refused_swaps: int
    refused: dict[str, int]
    """Refused requests by code."""
    undeliverable: int
    """Replies to clients that were gone."""
    dropped: int
    """Chunks whose episode was over before they were ready."""
    latency_ms: dict[str, float]
    """From a request's arrival to its reply, over the last decisions: p50, p99, max."""
    inference_share: float
    """Share of the uptime in which the inference thread computed."""
    inference_cpu_s: float
    """Processor seconds that it took for that."""
    log: dict[str, Any]
    """`runtime.episodes.LogStats`."""
    recent: tuple[EpisodeBrief, ...]
    """The last episodes."""
    episodes_per_min: float
    """Episodes that ended in the last minute."""
    shares: dict[str, float]
    """Share of each task in the episodes that are assigned now; empty for a fixed list of episodes."""
    finished: bool
    """No episode will be assigned any more."""
    robots: dict[str, str] = {}
    """What each bridge does, a `RobotState` of `bridge.messages`, and why."""
    stopped: str = ""
    """Why all robots are stopped; empty if they are not."""
    interventions: dict[str, int] = {}
    """Steps of ended episodes that each rule of the safety stage changed."""
    staging: dict[str, Any] = {}
    """How the versions that are not live stand (`runtime.staging`); empty where every version goes live at once."""


ROOM_BYTES = MAX_HEADER_BYTES - 1000  # for a status; the rest is the reply's own
_encoder = msgspec.msgpack.Encoder()


def fitting(status: Status) -> Status:
    """The status so that it fits into a header: with fewer of the last episodes, and if that is not enough without the
    reasons of the robots.
    """
    while status.recent and len(_encoder.encode(status)) > ROOM_BYTES:
        status = msgspec.structs.replace(status, recent=status.recent[len(status.recent) // 2 + 1 :])
    if len(_encoder.encode(status)) > ROOM_BYTES:
        states = {name: state.partition(":")[0] for name, state in status.robots.items()}
        status = msgspec.structs.replace(status, robots=states)
    return status


WINDOW = 1000  # decisions
RECENT = 100  # episodes; they travel in a header, which is small


@dataclass(slots=True)
class Counters:
    """What the server counts as it goes."""

    started_s: float = field(default_factory=time.monotonic)
    decisions: int = 0
    refused_swaps: int = 0
    dropped: int = 0
    interventions: Counter[str] = field(default_factory=Counter)
    episodes: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    recent: deque[EpisodeBrief] = field(default_factory=lambda: deque(maxlen=RECENT))
    ended_s: deque[float] = field(default_factory=deque)

    @property
    def uptime_s(self) -> float:
        """Seconds since the server was made."""
        return time.monotonic() - self.started_s

    def add_episode(self, episode: EpisodeBrief) -> None:
        """Count an episode that has ended."""
        self.episodes[episode.status] += 1
        self.recent.append(episode)
        self.ended_s.append(episode.ended_s)

    def episodes_per_min(self) -> float:
        """Episodes that ended in the last minute, or at that rate while the runtime is younger."""
        uptime_s = self.uptime_s
        while self.ended_s and self.ended_s[0] < uptime_s - 60.0:
            self.ended_s.popleft()
        return len(self.ended_s) * 60.0 / min(60.0, uptime_s) if uptime_s else 0.0

    def latency_ms(self) -> dict[str, float]:
        """p50, p99 and max of the last decisions; empty before the first."""
        if not self.latencies_s:
            return {}
        ms = np.array(self.latencies_s) * 1e3
        return {"p50": float(np.median(ms)), "p99": float(np.quantile(ms, 0.99)), "max": float(ms.max())}
