"""What the page shows of one run: asked of its runtime and read from its files, once for all who look."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Generic, TypeVar

import msgspec

from bridge.backend import UInt8
from bridge.errors import FieldtuneError
from fieldtune.commands.common import run_dir
from fieldtune.commands.status import last_metrics, runtime_status
from fieldtune.deployment import Deployment
from fieldtune.page.logged import Logged, read_logged
from fieldtune.page.running import OpenEpisodes
from runtime.index import EpisodeIndex, Tally
from runtime.registry import LiveChange, Registry, StageChange
from runtime.status import Status
from trainer.statistics import Interval, wilson

FRESH_S = 0.7  # younger answers serve everybody
ASK_TIMEOUT_S = 1.0
LAST_EPISODES = 10_000  # that success and steps by version are taken over
VERSIONS_SHOWN = 30
CURVE_POINTS = 400
EPISODES_KEPT = 16  # in memory, without their pictures

T = TypeVar("T")


@dataclass(slots=True)
class VersionLine:
    """One version: where it stands, and how its episodes went. Those that were aborted or not judged do not count."""

    version: str
    number: int
    live: bool
    stage: str
    why: str
    who: str
    since_unix_s: float
    episodes: int
    success: float | None
    success_interval: Interval
    steps: float | None
    """Mean over successes."""
    steps_interval: Interval | None
    """Normal approximation, 95 %; None below two successes."""


class Shared(Generic[T]):
    """A value that is made anew when it is older than `fresh_s` and somebody asks; one at a time, from any thread."""

    def __init__(self, make: Callable[[], T], fresh_s: float = FRESH_S) -> None:
        self._make, self._fresh_s = make, fresh_s
        self._lock = threading.Lock()
        self._made: tuple[float, T] | None = None

    def __call__(self) -> T:
        """The value."""
        with self._lock:
            if self._made is None or time.monotonic() - self._made[0] > self._fresh_s:
                value = self._make()
                self._made = time.monotonic(), value
            return self._made[1]


class RunView:
    """All that is shown of one run. Methods read and wait, so call them from a thread."""

    def __init__(self, deployment: Deployment) -> None:
        """Nothing is read yet; the run need not exist."""
        self.deployment = deployment
        self.run = run_dir(deployment)
        self.index = EpisodeIndex(self.run.episodes)
        self.registry = Registry(self.run.registry)
        self.waiting = Shared(self.index.waiting)
        self.running = OpenEpisodes(self.run.episodes, self.run.evaluations)
        self.status = Shared(self._status)
        self.trainer = Shared(lambda: last_metrics(self.run.metrics))
        self.versions = Shared(self._versions)
        self._curves_of: tuple[int, list[dict[str, Any]]] = (-1, [])
        self.curves = Shared(self._curves, fresh_s=4.0)
        self.logged = lru_cache(EPISODES_KEPT)(self._logged)

    def _status(self) -> Status | None:
        """The runtime's counters; None while it does not answer."""
        try:
            return runtime_status(self.deployment, ASK_TIMEOUT_S)
        except (FieldtuneError, msgspec.ValidationError):  # silent, or no runtime of this version
            return None

    def _versions(self) -> list[VersionLine]:
        """The newest versions that drove or are to drive, the newest first; the live one is among them."""
        rows = self.registry.list()
        latest: dict[str, LiveChange | StageChange] = {change.version: change for change in self.registry.history()}
        latest |= {change.version: change for change in self.registry.stages()}
        tallies = self.index.tallies(LAST_EPISODES)
        shown = rows[-VERSIONS_SHOWN:] + [row for row in rows[:-VERSIONS_SHOWN] if row.live]
        return [
            version_line(
                [tally for tally in tallies if tally.version == row.version],
                version=row.version,
                number=row.number,
                live=row.live,
                change=latest.get(row.version),
                since_unix_s=row.created_unix_s,
            )
            for row in sorted(shown, key=lambda row: -row.number)
        ]

    def _curves(self) -> list[dict[str, Any]]:
        """The trainer's metrics, thinned out to what a plot can show; the same list while the file is the same."""
        path = self.run.metrics
        size = path.stat().st_size if path.exists() else 0
        if size == self._curves_of[0]:
            return self._curves_of[1]
        lines = path.read_bytes().splitlines() if size else []
        keep = {*range(0, len(lines), max(1, math.ceil(len(lines) / CURVE_POINTS))), len(lines) - 1}
        found = []
        for i in sorted(keep) if lines else ():
            try:
                found.append(json.loads(lines[i]))
            except ValueError:
                continue  # it is being written just now
        self._curves_of = size, found
        return found

    def _logged(self, episode: str) -> Logged:
        """An episode of the log. Raises `LookupError` if there is none, `EpisodeError` for a file that is gone."""
        row = self.index.get(episode)
        if row is None:
            raise LookupError(f"no episode {episode}")
        return read_logged(self.index.path(row))

    def picture(self, episode: str, at: int, camera: str) -> UInt8:
        """What decision `at` of an episode saw; raises as `logged` does."""
        found: Logged = self.logged(episode)
        return found.picture(at, camera)


def version_line(
    tallies: Sequence[Tally],
    *,
    version: str,
    number: int,
    live: bool,
    change: LiveChange | StageChange | None,
    since_unix_s: float,
) -> VersionLine:
    """Sum up the episodes of one version."""
    counts = {tally.status: tally for tally in tallies if tally.status not in ("aborted", "unjudged")}
    episodes = sum(tally.episodes for tally in counts.values())
    good = counts.get("success")
    successes = good.episodes if good else 0
    steps = good.steps / successes if good else None
    interval: Interval | None = None
    if good and steps is not None and successes > 1:
        variance = max(0.0, good.steps_squared - successes * steps**2) / (successes - 1)
        half = 1.96 * math.sqrt(variance / successes)
        interval = (steps - half, steps + half)
    return VersionLine(
        version=version,
        number=number,
        live=live,
        stage=change.stage if isinstance(change, StageChange) else "live" if live else "",
        why=change.why if change else "",
        who=change.who if isinstance(change, StageChange) else "",
        since_unix_s=change.unix_s if change else since_unix_s,
        episodes=episodes,
        success=successes / episodes if episodes else None,
        success_interval=wilson(successes, episodes),
        steps=steps,
        steps_interval=interval,
    )


def jpeg(image: UInt8) -> bytes:
    """A picture uint8 `[H, W, 3]` for a browser."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
