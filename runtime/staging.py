"""Staged versions: a candidate passes the gate, drives a share of the episodes, and goes live if that bears it out.

    candidate --gate--> canary --sequential test--> live --the next one--> retired
        \\___________________\\__________________________ rejected

Which version drives an episode is drawn when it is assigned and stays so to its end. What came of the episodes is read
from the episode log by a thread of its own, so what was decided can be worked out again from the log: after a restart
the canary stands where it stood. The live version is watched for drift by the same thread, and rolled back by rule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bridge.errors import FieldtuneError
from bridge.messages import Governing
from runtime.bundle import BundleError
from runtime.canary_test import Canary
from runtime.config import DeployConfig
from runtime.drift import Drift, DriftMonitor, episode_statistics, statistic_names
from runtime.episode import Episode
from runtime.gate import gate_episodes, judge
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.policy import Policy
from runtime.reading import EpisodeError, read_row
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.swap import Live

POLL_S = 0.25
INTERVENTIONS = "interventions"


@dataclass(slots=True)
class _Trial:
    """A canary that runs: from the episode after `since_seq` on."""

    policy: Policy
    test: Canary
    since_seq: int


class Staging:
    """Around the live policy, for the server: decides which version drives an episode, and which one is live."""

    def __init__(
        self, run: RunDir, live: Live, config: DeployConfig, *, horizon_steps: int, warn: Callable[[str], None]
    ) -> None:
        """Take up what the registry says. Nothing is decided before `start`."""
        self._run, self._live, self._config, self._warn = run, live, config, warn
        self._horizon_steps = horizon_steps
        self._registry, self._index = Registry(run.registry), EpisodeIndex(run.episodes)
        self._random = np.random.default_rng()
        self._changing = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="staging", daemon=True)
        self._open_since: Callable[[], float] = lambda: np.inf
        self._trial: _Trial | None = None
        self._monitor: DriftMonitor | None = None
        self._drifts: list[Drift] = []
        version = live().version
        if self._registry.stage(version) != "live":
            self._enter_live(version, "it was live before versions were staged", "rule")
        self._live_since = int(self._registry.stages(version)[-1].evidence.get("since_seq", 0))
        self._resume()
        self._cursor = self._live_since if self._trial is None else min(self._live_since, self._trial.since_seq)
        self._waiting: list[EpisodeRow] = []

    def start(self, open_since: Callable[[], float]) -> None:
        """Begin to read the log; `open_since` says when the oldest episode in progress began."""
        self._open_since = open_since
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- for the server -------------------------------------------------------------------------------------------

    def __call__(self) -> Policy:
        """The live policy."""
        return self._live()

    @property
    def previous(self) -> str:
        """What a rollback would bring back."""
        return self._live.previous

    def arm_for(self, client: str) -> str:
        """The candidate for its share of the episodes, drawn at random; turns would fall in step with the tasks."""
        trial = self._trial
        return trial.policy.version if trial and self._random.random() < self._config.canary.share else ""

    def policy_of(self, arm: str) -> Policy:
        """The candidate in its own episodes while its canary runs, else the live policy."""
        trial = self._trial
        return trial.policy if trial and trial.policy.version == arm else self._live()

    def announce(self, path: Path) -> str:
        """A new candidate: through the gate, and into a canary. Gives the live version, which stays."""
        policy = self._live.load(path)
        with self._changing:
            if policy.version == self._live().version:
                return policy.version
            self._registry.enter(policy.version, "candidate", why="announced")
            pinned = self._registry.pinned()
            report = judge(policy, self._live(), gate_episodes(self._run), self._config.gate)
            figures = msgspec.to_builtins(report)
            if pinned:
                self._reject(policy.version, f"the live version is pinned by {pinned}", "rule", figures)
            elif report.refused:
                self._reject(policy.version, f"gate: {'; '.join(report.refused)}", "rule", figures)
            else:
                self._end_trial(f"superseded by {policy.version[:12]}", "rule")
                self._begin_trial(policy, figures)
        return self._live().version

    def rollback(self, version: str = "", *, why: str = "rollback", who: str = "operator") -> str:
        """Make an earlier version live again; a canary that runs ends."""
        with self._changing:
            before = self._live().version
            after = self._live.rollback(version, why=why)
            if after != before:
                self._end_trial("the live version was rolled back", who)
                self._registry.enter(before, "rejected", why=why, who=who)
                self._enter_live(after, why, who)
        return after

    def govern(self, command: Governing, version: str, who: str) -> str:
        """Promote, reject, pin or unpin by hand. Raises `BundleError` where there is nothing to be decided."""
        with self._changing:
            match command:
                case "pin" | "unpin":
                    self._registry.pin(who, pinned=command == "pin")
                    if command == "pin":
                        self._end_trial(f"the live version was pinned by {who}", who)
                case "reject":
                    self._end_trial(f"by {who}", who, must=True)
                case "promote":
                    wanted = self._registry.get(version).version if version else self._candidate()
                    policy = self.policy_of(wanted)
                    if policy.version != wanted:
                        policy = self._live.load(self._run.policies / wanted)
                    self._promote(policy, f"by {who}", who)
        return self._live().version

    def standing(self) -> dict[str, Any]:
        """The canary with its evidence, alarms, and who has pinned the live version."""
        trial, monitor = self._trial, self._monitor
        return {
            "candidate": trial.policy.version if trial else "",
            "evidence": msgspec.to_builtins(trial.test.evidence()) if trial else {},
            "drifts": msgspec.to_builtins(self._drifts),
            "drift": monitor.evidence() if monitor else {},
            "pinned": self._registry.pinned(),
        }

    # --- changes --------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """A canary that ran goes on; a candidate that was at the gate is put through it again."""
        live = self._live().version
        last = {change.version: change for change in self._registry.stages()}
        for version, change in last.items():
            if change.stage == "canary" and change.evidence.get("live") == live:
                self._begin_trial(Policy.load(self._run.policies / version), {}, since_seq=change.evidence["since_seq"])
            elif change.stage in ("candidate", "canary"):
                self._registry.enter(version, "rejected", why="the runtime was stopped while it was judged")

    def _begin_trial(self, policy: Policy, gate: dict[str, Any], since_seq: int | None = None) -> None:
        live = self._live().version
        if since_seq is None:
            since_seq = self._newest_seq()
            evidence = {"live": live, "since_seq": since_seq, "gate": gate}
            self._registry.enter(policy.version, "canary", why="passed the gate", evidence=evidence)
        self._trial = _Trial(policy, Canary(policy.version, live, self._horizon_steps, self._config.canary), since_seq)
        self._warn(f"canary {policy.version[:12]} drives {self._config.canary.share:.0%} of the episodes")

    def _end_trial(self, why: str, who: str, *, must: bool = False) -> None:
        trial, self._trial = self._trial, None
        if trial is not None:
            self._reject(trial.policy.version, why, who, msgspec.to_builtins(trial.test.evidence()))
        elif must:
            raise BundleError("version", "no canary runs now")

    def _reject(self, version: str, why: str, who: str, evidence: dict[str, Any]) -> None:
        self._registry.enter(version, "rejected", why=why, who=who, evidence=evidence)
        self._warn(f"version {version[:12]} is rejected: {why}")

    def _promote(self, policy: Policy, why: str, who: str) -> None:
        before, trial = self._live().version, self._trial
        evidence = msgspec.to_builtins(trial.test.evidence()) if trial and trial.policy is policy else {}
        self._live.make_live(policy, f"promoted {why}")
        if trial is not None and trial.policy is not policy:
            self._end_trial(f"{policy.version[:12]} was promoted in its place", who)
        self._trial = None
        self._registry.enter(before, "retired", why=f"replaced by {policy.version[:12]}", who=who)
        self._enter_live(policy.version, why, who, evidence)
        self._warn(f"version {policy.version[:12]} is live: {why}")

    def _enter_live(self, version: str, why: str, who: str, evidence: dict[str, Any] | None = None) -> None:
        self._live_since, self._monitor, self._drifts = self._newest_seq(), None, []
        self._registry.enter(
            version, "live", why=why, who=who, evidence={**(evidence or {}), "since_seq": self._live_since}
        )

    def _candidate(self) -> str:
        if self._trial is None:
            raise BundleError("version", "no canary runs now; say which version")
        return self._trial.policy.version

    # --- what the log says ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.look()
            except FieldtuneError as error:
                self._warn(f"staging: {error}")

    def look(self) -> None:
        """Take in what has ended since, in the order in which it began.

        Short episodes end before long ones that began earlier; taken as they come, successes would be seen first.
        """
        open_since = self._open_since()
        new = self._index.after(self._cursor)
        if new:
            self._cursor = new[-1].seq
        rows = sorted([*self._waiting, *new], key=lambda row: row.started_unix_s)
        self._waiting = [row for row in rows if row.started_unix_s >= open_since]
        for row in rows:
            if row.started_unix_s < open_since:
                with self._changing:
                    self._take(row)

    def _take(self, row: EpisodeRow) -> None:
        # A stop is most often the policy's doing; what else breaks off says nothing of it.
        stopped = row.status == "aborted" and row.reason.startswith("stopped")
        if row.source != "policy" or len(row.versions) != 1 or (row.status == "aborted" and not stopped):
            return
        if row.status == "unjudged":
            return
        (version,) = row.versions
        trial = self._trial
        if trial and row.seq > trial.since_seq and version in (trial.test.candidate, trial.test.live):
            steps = self._horizon_steps if stopped else min(row.steps, self._horizon_steps)
            trial.test.add(version, row.status == "success", steps)
            self._conclude(trial)
        if version == self._live().version and row.seq > self._live_since and not row.deleted:
            self._check_drift(row)

    def _conclude(self, trial: _Trial) -> None:
        count = len(trial.test.outcomes)
        match trial.test.decision:
            case "promote":
                self._promote(trial.policy, f"canary of {count} episodes", "rule")
            case "rollback":
                self._end_trial(f"canary: worse after {count} episodes", "rule")
            case "undecided":
                self._end_trial(f"canary: no better after {count} episodes", "rule")

    def _check_drift(self, row: EpisodeRow) -> None:
        try:
            episode = read_row(self._index, row)
        except EpisodeError:
            return  # retention has just deleted it
        if self._monitor is None:
            names = (*statistic_names(episode.start.spec), INTERVENTIONS)
            self._monitor = DriftMonitor(names, self._config.drift)
        found = {**episode_statistics(episode), INTERVENTIONS: intervention_share(episode)}
        drifts = self._monitor.add(found)
        self._drifts += drifts
        for drift in drifts:
            self._warn(f"drift: {drift.statistic} {drift.direction}, from {drift.record:.3g} to {drift.recent:.3g}")
        worse = [d for d in drifts if d.statistic in self._config.roll_back_on and d.direction == _worse(d.statistic)]
        if worse and self.previous and not self._registry.pinned():
            self.rollback(why=f"{worse[0].statistic} {worse[0].direction}", who="rule")

    def _newest_seq(self) -> int:
        newest = self._index.list(limit=1)
        return newest[0].seq if newest else 0


def intervention_share(episode: Episode) -> float:
    """Share of the steps that the safety stage changed."""
    changed = sum(int(np.count_nonzero(d.rules)) for d in episode.decisions if d.rules is not None)
    return changed / max(1, episode.steps)


def _worse(statistic: str) -> str:
    return "fell" if statistic == "success" else "rose"
