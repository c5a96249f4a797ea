"""Staged versions: a candidate passes the gate, drives a share of the episodes, and goes live if that bears it out.

    candidate --gate--> canary --sequential test--> live --the next one--> retired
        \\___________________\\__________________________ rejected

Which version drives an episode is drawn when it is assigned and stays so to its end. What came of the episodes is read
from the episode log by a thread of its own, so what was decided can be worked out again from the log: after a restart
the canary stands where it stood. The live version is watched for drift by the same thread, and rolled back by rule.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bridge.messages import Governing
from runtime.bundle import BundleError
from runtime.canary import Canary
from runtime.config import DeployConfig
from runtime.ended import EndedEpisodes
from runtime.gate import GateReport, gate_episodes, judge
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.live_watch import LiveWatch
from runtime.policy import Policy
from runtime.reading import EpisodeError, read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.swap import Live
from runtime.trial import Trial, tells_of_one

POLL_S = 0.25


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
        self._trial: Trial | None = None
        self._at_gate = ""
        self._unsettled = False
        self._live_watch, self._live_since_unix_s = LiveWatch(config), 0.0
        self._goes_back = True
        self._pinned_by = self._registry.pinned()
        self._standing: dict[str, Any] = {}
        self._for_trial: deque[EpisodeRow] = deque()
        self._failure: tuple[str, str] | None = None
        version = live().version
        if self._registry.stage(version) != "live":
            self._enter_live(version, "it was live when the runtime started", "rule")
        since = self._registry.stages(version)[-1].evidence
        self._live_since_unix_s = float(since["since_unix_s"])
        # An index that was made anew counts from the beginning.
        after_seq = min(int(since["since_seq"]), self._newest_seq())
        self._ended = EndedEpisodes(self._index, self._resume(after_seq))
        self._note()

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

    @property
    def swaps(self) -> int:
        """Changes of the live version, by rule or by hand."""
        return self._live.swaps

    def arm_for(self, client: str) -> str:
        """The candidate for its share of the episodes, drawn at random; turns would fall in step with the tasks."""
        trial = self._trial
        return trial.policy.version if trial and self._random.random() < self._config.canary.share else ""

    def policy_of(self, arm: str) -> Policy:
        """The candidate in its own episodes while its canary runs, else the live policy."""
        trial = self._trial
        return trial.policy if trial and trial.policy.version == arm else self._live()

    def failed(self, version: str, why: str) -> None:
        """A candidate that gives no action is rejected at the next look: an episode that has not begun is in no log."""
        trial = self._trial
        if trial and trial.policy.version == version:
            self._failure = version, why

    def announce(self, path: Path) -> str:
        """A new candidate: through the gate, and into a canary. Gives the live version, which stays."""
        policy = self._live.load(path)
        with self._changing:
            trial = self._trial
            if policy.version == self._live().version or (trial and trial.policy.version == policy.version):
                return self._live().version
            self._registry.enter(policy.version, "candidate", why="announced")
            self._at_gate = policy.version
        # Not under the lock: a gate that takes long must not hold up a rollback by rule.
        live = self._live()
        report = self._judged(policy, live)
        figures = msgspec.to_builtins(report)
        with self._changing, self._settled_later():
            self._at_gate = ""
            if self._live().version == policy.version:
                pass  # somebody has promoted it meanwhile
            elif self._pinned_by:
                self._reject(policy.version, f"the live version is pinned by {self._pinned_by}", "rule", figures)
            elif report.refused:
                self._reject(policy.version, f"gate: {'; '.join(report.refused)}", "rule", figures)
            elif self._live() is not live:
                self._reject(policy.version, "the live version changed while it was judged", "rule", figures)
            else:
                self._end_trial(f"superseded by {policy.version[:12]}", "rule", needed=policy.version)
                self._begin_trial(policy, figures)
            self._note()
        return self._live().version

    def rollback(self, version: str = "", *, why: str, who: str) -> str:
        """Make an earlier version live again; a canary that runs ends."""
        with self._changing, self._settled_later():
            before = self._live().version
            after = self._live.rollback(version, why=why)
            if after != before:
                self._watch_anew()
                self._end_trial("the live version was rolled back", who)
                self._registry.enter(before, "rejected", why=why, who=who)
                self._enter_live(after, why, who)
                self._note()
        return after

    def govern(self, command: Governing, version: str, who: str) -> str:
        """Promote, reject, pin or unpin by hand. Raises `BundleError` where there is nothing to be decided."""
        with self._changing, self._settled_later():
            match command:
                case "rollback":
                    self.rollback(version, why=f"rolled back by {who}", who=who)
                case "pin" | "unpin":
                    self._registry.pin(who, pinned=command == "pin")
                    self._pinned_by = self._registry.pinned()
                    if command == "pin":
                        self._end_trial(f"the live version was pinned by {who}", who)
                case "reject":
                    candidate = self._candidate()
                    if not candidate.startswith(version):
                        raise BundleError("version", f"the canary is {candidate[:12]} now, not {version[:12]}")
                    self._end_trial(f"by {who}", who, must=True)
                case "promote":
                    wanted = self._registry.get(version).version if version else self._candidate()
                    policy = self.policy_of(wanted)
                    if policy.version != wanted:
                        policy = self._live.load(self._run.policies / wanted)
                    if wanted != self._live().version:
                        self._promote(policy, f"by {who}", who)
            self._note()
        return self._live().version

    def standing(self) -> dict[str, Any]:
        """The canary with its evidence, alarms, and who has pinned the live version, as of the last look."""
        return self._standing

    # --- changes --------------------------------------------------------------------------------------------------

    def _resume(self, after_seq: int) -> int:
        """A canary that ran goes on. A candidate that was at the gate may be why the runtime ended: it is rejected.
        Gives the row behind which the log is to be read again, at most `after_seq`.
        """
        live = self._live().version
        last = {change.version: change for change in self._registry.stages()}
        for version, change in last.items():
            if change.stage == "canary" and change.evidence["live"] == live:
                try:
                    policy = self._live.installed(version)
                except BundleError as error:
                    self._reject(version, str(error), "rule", {})
                    continue
                self._trial = self._new_trial(policy, change.evidence["since_unix_s"])
                after_seq = min(after_seq, change.evidence["since_seq"])
                self._warn(f"canary {version[:12]} goes on")
            elif change.stage in ("candidate", "canary"):
                self._reject(version, "the runtime was stopped while it was judged", "rule", {})
            elif change.stage == "live" and version != live:
                self._registry.enter(version, "retired", why=f"{live[:12]} was made live while nothing was staged")
        return after_seq

    def _judged(self, policy: Policy, live: Policy) -> GateReport:
        try:
            episodes = gate_episodes(self._run, self._config.gate.decisions)
            return judge(policy, live, episodes, self._config.gate)
        except Exception as error:  # noqa: BLE001 - whatever a foreign graph or a log raises: it must not stay a candidate
            return GateReport(refused=(f"it cannot be judged: {error}",), decisions=0)

    def _begin_trial(self, policy: Policy, gate: dict[str, Any]) -> None:
        trial = self._new_trial(policy, time.time())
        evidence = {
            "live": trial.test.live,
            "since_seq": self._newest_seq(),
            "since_unix_s": trial.since_unix_s,
            "gate": gate,
        }
        self._registry.enter(policy.version, "canary", why="passed the gate", evidence=evidence)
        self._trial = trial
        self._warn(f"canary {policy.version[:12]} drives {self._config.canary.share:.0%} of the episodes")

    def _new_trial(self, policy: Policy, since_unix_s: float) -> Trial:
        test = Canary(policy.version, self._live().version, self._horizon_steps, self._config.canary)
        return Trial(policy, test, since_unix_s)

    def _end_trial(self, why: str, who: str, *, must: bool = False, needed: str = "") -> None:
        """`needed` is a version whose bundle has to stay."""
        trial = self._trial
        if trial is not None:
            self._reject(trial.policy.version, why, who, msgspec.to_builtins(trial.test.evidence()), needed)
        elif must:
            raise BundleError("version", "no canary runs now")

    def _reject(self, version: str, why: str, who: str, evidence: dict[str, Any], needed: str = "") -> None:
        self._registry.enter(version, "rejected", why=why, who=who, evidence=evidence)
        # Only now: what the registry has on trial, and memory has not, would never end.
        if self._trial and self._trial.policy.version == version:
            self._trial = None
        self._live.prune(self._trial.policy.version if self._trial else needed)
        self._warn(f"version {version[:12]} is rejected: {why}")

    def _promote(self, policy: Policy, why: str, who: str) -> None:
        before, trial = self._live().version, self._trial
        evidence = msgspec.to_builtins(trial.test.evidence()) if trial and trial.policy is policy else {}
        self._live.make_live(policy, f"promoted {why}")
        self._watch_anew()
        if trial is not None and trial.policy is policy:
            self._trial = None
        self._end_trial(f"{policy.version[:12]} was promoted in its place", who)
        self._registry.enter(before, "retired", why=f"replaced by {policy.version[:12]}", who=who)
        self._enter_live(policy.version, why, who, evidence)
        self._warn(f"version {policy.version[:12]} is live: {why}")

    def _enter_live(self, version: str, why: str, who: str, evidence: dict[str, Any] | None = None) -> None:
        self._watch_anew()
        since = {"since_seq": self._newest_seq(), "since_unix_s": self._live_since_unix_s}
        self._registry.enter(version, "live", why=why, who=who, evidence={**(evidence or {}), **since})

    def _watch_anew(self) -> None:
        """Right behind the flip, before what can fail: the alarms of one version must not roll back another."""
        self._live_since_unix_s, self._live_watch = time.time(), LiveWatch(self._config)
        self._goes_back = True

    @contextmanager
    def _settled_later(self) -> Iterator[None]:
        """What fails half-way, on a full disk say, is settled at a later look."""
        try:
            yield
        except Exception:
            self._unsettled = True
            raise

    def _settle(self) -> None:
        """Make the registry say what is the case, where it could not be written."""
        live, trial = self._live().version, self._trial
        if self._registry.stage(live) != "live":
            self._enter_live(live, "it is live; that could not be noted at once", "rule")
        if trial and trial.test.live != live:
            self._end_trial("the live version was changed", "rule")
        elif trial and trial.test.decision != "go on":
            self._conclude(trial)
        running = {self._live().version, self._at_gate, self._trial.policy.version if self._trial else ""}
        for version, change in {change.version: change for change in self._registry.stages()}.items():
            if change.stage in ("candidate", "canary") and version not in running:
                self._reject(version, "it is not on trial any more; that could not be noted at once", "rule", {})
            elif change.stage == "live" and version not in running:
                self._registry.enter(version, "retired", why=f"{self._live().version[:12]} is live")
        self._unsettled = False

    def _candidate(self) -> str:
        if self._trial is None:
            raise BundleError("version", "no canary runs now; say which version")
        return self._trial.policy.version

    # --- what the log says ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        failing = ""
        while not self._stop.wait(POLL_S):
            try:
                self.look()
                failing = ""
            except Exception as error:  # noqa: BLE001 - robots drive on, so somebody has to go on watching
                if failing != (failing := str(error)):
                    self._warn(f"staging: {error}")

    def look(self) -> None:
        """Take in what has ended since."""
        with self._settled_later():
            self._end_or_settle()
            taken = self._take_new() + self._take_for_trial()
            if taken:
                with self._changing:
                    self._note()

    def _end_or_settle(self) -> None:
        failure, self._failure = self._failure, None
        with self._changing:
            if self._unsettled:
                self._settle()
                self._note()
            if failure and self._trial and self._trial.policy.version == failure[0]:
                self._end_trial(f"it could not decide: {failure[1]}", "rule")
                self._note()

    def _take_new(self) -> int:
        """Rows of the log into the watch on the live version and into the queue of the canary; how many."""
        taken = 0
        for row in self._ended.before(self._open_since()):
            taken += 1
            if tells_of_one(row):
                self._for_trial.append(row)
                with self._changing:
                    self._check_drift(row)
            if self._stop.is_set():
                break
        return taken

    def _take_for_trial(self) -> int:
        """What the canary waits for, as far as it is judged; how many."""
        taken = 0
        while self._for_trial and not self._stop.is_set():
            with self._changing:
                judged = self._as_judged(self._for_trial[0])
                if judged is None:
                    break
                self._for_trial.popleft()
                taken += 1
                # Its label may have discarded it.
                if self._trial and self._trial.counts(judged):
                    self._trial.add(judged)
                    self._conclude(self._trial)
        return taken

    def _as_judged(self, row: EpisodeRow) -> EpisodeRow | None:
        """The row with its label; None for one that a canary needs and nobody has judged yet. Those behind it wait for
        the canary, since people may label failures first; the watch on the live version waits for nobody.
        """
        if row.status != "unjudged" or self._trial is None or not self._trial.counts(row):
            return row
        found = self._index.get(row.episode)
        return found if found is not None and found.status != "unjudged" else None

    def _conclude(self, trial: Trial) -> None:
        count = len(trial.test.outcomes)
        match trial.test.decision:
            case "promote":
                self._promote(trial.policy, f"canary of {count} episodes", "rule")
            case "rollback":
                self._end_trial(f"canary: worse after {count} episodes", "rule")
            case "undecided":
                self._end_trial(f"canary: no better after {count} episodes", "rule")

    def _check_drift(self, row: EpisodeRow) -> None:
        of_live = row.versions == (self._live().version,) and row.started_unix_s >= self._live_since_unix_s
        if row.deleted or not of_live:
            return
        try:
            # Without labels: they would be known here only after a restart.
            episode = read_episode(self._index.path(row))
        except EpisodeError:
            return  # retention has just deleted it
        for drift in self._live_watch.add(episode):
            self._warn(f"drift: {drift.statistic} {drift.direction}, from {drift.record:.3g} to {drift.recent:.3g}")
        # All of its alarms, not only the new ones: it may have been pinned when they came.
        if (why := self._live_watch.why_roll_back()) and self.previous and self._goes_back and not self._pinned_by:
            try:
                self.rollback(why=why, who="rule")
            except BundleError as error:
                self._goes_back = False
                self._warn(f"{why}, but the version before it cannot come back: {error}; go back to another by hand")

    def _note(self) -> None:
        """What the status says; made here, because the thread that answers must not compute."""
        trial = self._trial
        self._standing = {
            "candidate": trial.policy.version if trial else "",
            "evidence": msgspec.to_builtins(trial.test.evidence()) if trial else {},
            "drifts": msgspec.to_builtins(self._live_watch.drifts),
            "drift": self._live_watch.evidence(),
            "pinned": self._pinned_by,
        }

    def _newest_seq(self) -> int:
        newest = self._index.list(limit=1)
        return newest[0].seq if newest else 0


def end_all_trials(registry: Registry) -> None:
    """Where versions are not staged any more: no canary runs, and nobody is to wait for its end."""
    for version, change in {change.version: change for change in registry.stages()}.items():
        if change.stage in ("candidate", "canary"):
            registry.enter(version, "rejected", why="versions are not staged any more")
