"""The live version against its own record: what of its episodes is watched, and by what it is rolled back."""

from __future__ import annotations

import numpy as np

from bridge.safety import CHUNK_AGE, HOLD, STARVED
from runtime.config import DeployConfig
from runtime.drift import INTERVENTIONS, Drift, DriftMonitor, episode_statistics, statistic_names
from runtime.episode import Episode

LATE = np.uint8(CHUNK_AGE | HOLD | STARVED)


class LiveWatch:
    """Takes the episodes of one version since it went live, in the order in which they began."""

    def __init__(self, config: DeployConfig) -> None:
        self._config = config
        self._monitor: DriftMonitor | None = None
        self.drifts: list[Drift] = []
        """All alarms, oldest first."""

    def add(self, episode: Episode) -> list[Drift]:
        """Take in an episode; gives the alarms that it raises."""
        if self._monitor is None:
            names = (*statistic_names(episode.start.spec), INTERVENTIONS)
            self._monitor = DriftMonitor(names, self._config.drift)
        # Another robot of the run may have a camera more.
        found = {name: value for name, value in _statistics(episode).items() if name in self._monitor.names}
        drifts = self._monitor.add(found)
        self.drifts += drifts
        return drifts

    def why_roll_back(self) -> str:
        """The first alarm by which the version is to be rolled back; empty if there is none."""
        for drift in self.drifts:
            worse = "fell" if drift.statistic == "success" else "rose"
            if drift.statistic in self._config.roll_back_on and drift.direction == worse:
                return f"{drift.statistic} {drift.direction} from {drift.record:.3g} to {drift.recent:.3g}"
        return ""

    def evidence(self) -> dict[str, float]:
        """See `DriftMonitor.evidence`; empty before the first episode."""
        return self._monitor.evidence() if self._monitor else {}


def intervention_share(episode: Episode) -> float:
    """Share of the steps in which the safety stage changed what the policy wanted. That a chunk came late, or that the
    robot was paused, does not count.
    """
    changed = sum(int(np.count_nonzero(d.rules & ~LATE)) for d in episode.decisions if d.rules is not None)
    return changed / max(1, episode.steps)


def _statistics(episode: Episode) -> dict[str, float]:
    """The figures of an episode. One that was stopped is a failure, one that nobody has judged is neither."""
    found = episode_statistics(episode) if episode.status != "aborted" else {"success": 0.0}
    if episode.status == "unjudged":
        del found["success"]
    return {**found, INTERVENTIONS: intervention_share(episode)}
