"""A run with a live version, what is staged in it, and a log that the test writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from server_samples import until

from bridge.backend import Backend
from bridge.messages import RULES
from runtime.canary import CanaryRule
from runtime.config import DeployConfig
from runtime.drift import DriftRule
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.records import tensor_records
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.staging import Staging
from runtime.swap import Live

HORIZON_STEPS = 20
CONFIG = DeployConfig(
    mode="staged",
    canary=CanaryRule(max_episodes=200),
    # A false alarm within 20 episodes at every second run: quick, and certain where all of a sudden all is different.
    drift=DriftRule(record_episodes=20, false_alarm=0.5, window_episodes=20),
)


class Scene:
    """A run, what is staged in it, and a log that the test writes."""

    def __init__(self, run: RunDir, point: Backend, tiny_bundle: Callable[..., str]) -> None:
        self.run, self._spec, self._bundle = run, point.spec, tiny_bundle
        self.registry, self.log = Registry(run.registry), EpisodeLog(run.episodes)
        self.said: list[str] = []
        self.count = 0
        self.first = tiny_bundle(run.policies, 0.1)
        self.registry.add(self.first, parent="", made={})
        self.registry.set_live(self.first, why="sft")
        self.staging = self.start()

    def bundle(self, value: float) -> str:
        return self._bundle(self.run.path / "new", value, parent=self.first)

    def start(self, config: DeployConfig = CONFIG) -> Staging:
        """The runtime as it comes up, without its thread."""
        live = Live(self.run, threads=1, keep_versions=20)
        self.staging = Staging(self.run, live, config, horizon_steps=HORIZON_STEPS, warn=self.said.append)
        return self.staging

    def announce(self, value: float) -> str:
        version = self.bundle(value)
        self.staging.announce(self.run.path / "new" / version)
        return version

    def write(
        self,
        *versions: str,
        status: Any = "success",
        steps: int = 2,
        reason: str = "",
        started_unix_s: float | None = None,
        rules: str = "",
        source: Any = "policy",
    ) -> str:
        """One episode that has ended, with a decision of each version."""
        self.count += 1
        episode = f"{self.count:032x}"
        start = EpisodeStart(
            format=FORMAT, episode=episode, task="reach", instruction="go", seed=self.count, source=source,
            explore=True, client="robot", spec=self._spec, started_unix_s=started_unix_s or time.time(),
        )  # fmt: skip
        seen = {
            "image/top": np.zeros((8, 8, 3), np.uint8),
            "state": np.full(2, 0.5, np.float32),
            "privileged": np.zeros(4, np.float32),
        }
        self.log.start(start)
        for i, version in enumerate(versions):
            chunk = {"actions": np.full((4, 2), 0.2, np.float32), "log_prob": np.zeros(4, np.float32)}
            decision = DecisionRecord(
                decision=i + 1, step=i * steps, version=version, tensors=tensor_records({**seen, **chunk})
            )
            sent = {"sent": np.full((steps, 2), 0.2, np.float32), "reward": np.zeros(steps, np.float32)}
            if rules:
                sent["rules"] = np.full(steps, 1 << RULES.index(rules), np.uint8)
            self.log.append(episode, decision)
            self.log.append(episode, ExecutedRecord(decision=i + 1, tensors=tensor_records(sent)))
        last = {} if status == "aborted" else tensor_records(seen)
        record = EndRecord(status=status, steps=steps * len(versions), reason=reason, tensors=last)
        self.log.end(episode, record, lambda _error: None)
        return episode

    def look(self) -> dict[str, Any]:
        """Have the staging see all that was written."""
        until(lambda: self.log.index.count() == self.count, "the episodes to be stored")
        self.staging.look()
        return self.staging.standing()

    def run_canary(self, candidate: str, candidate_succeeds: Any, live_succeeds: Any, pairs: int = 100) -> None:
        """Both by turns until a decision; the two say whether episode i succeeds."""
        live = self.staging().version
        for i in range(pairs):
            for version, succeeds in ((candidate, candidate_succeeds), (live, live_succeeds)):
                self.write(version, status="success" if succeeds(i) else "timeout")
            if i % 10 == 9 and not self.look()["candidate"]:
                return
        self.look()

    def seen(self) -> tuple[int, int]:
        """How many episodes of the candidate and of the live version the canary has."""
        evidence = self.look()["evidence"]
        return evidence["candidate_episodes"], evidence["live_episodes"]

    def stages(self, version: str) -> list[str]:
        return [change.stage for change in self.registry.stages(version)]

    def why(self, version: str) -> tuple[str, str]:
        change = self.registry.stages(version)[-1]
        return change.why, change.who


def always(_i: int) -> bool:
    return True


def never(_i: int) -> bool:
    return False


def second_live(scene: Scene) -> str:
    version = scene.announce(0.11)
    scene.staging.govern("promote", "", "Ada")
    return version
