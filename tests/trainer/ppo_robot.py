"""A run on the toy backend, and a robot that drives its live policy, without server and sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from bridge.backend import instruction_of
from bridge.backends import make_backend
from bridge.config import BackendConfig
from runtime.episode import DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.policy import Policy, log_prob, sample_chunk
from runtime.records import tensor_records
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import BufferConfig, DemosConfig, PPOConfig, SFTConfig, TrainerConfig, VLAConfig, WeightConfig
from trainer.continual import ContinualTrainer
from trainer.demos import collect_demos
from trainer.sft import run_sft

HORIZON_STEPS = 40
BACKEND = BackendConfig(name="point", options={"size_px": 24})
CONFIG = TrainerConfig(
    episodes_per_iteration=64,
    demos=DemosConfig(per_task=200, workers=1),
    vla=VLAConfig(horizon_steps=4, channels=(16, 32), width=64, text_width=8, max_tokens=16, sigma=0.3),
    sft=SFTConfig(steps=800, batch=64, lr=3e-3, shift_px=0),
    ppo=PPOConfig(
        lr=3e-4,
        epochs=8,
        minibatch=256,
        critic_warmup_iterations=1,
        critic_warmup_epochs=30,
        step_cost=0.02,
    ),
    buffer=BufferConfig(per_task=250),
    weight=WeightConfig(ramp_iterations=1.0, cloning_scale=0.01),
)
SMALL = replace(
    CONFIG,
    episodes_per_iteration=4,
    ppo=replace(CONFIG.ppo, epochs=1, critic_warmup_epochs=1, critic_epochs=1, critic_warmup_iterations=0),
)
"""Iterations that are made at once, and each of which makes a version."""


def prepare(directory: Path) -> RunDir:
    """A run with demonstrations and a live SFT version."""
    run = RunDir(directory / "run")
    run.path.mkdir()
    backend = make_backend(BACKEND)
    collect_demos(lambda: backend, run.demos, CONFIG.demos, (), HORIZON_STEPS, lambda _done, _total: None)
    assert run_sft(run, backend.spec, CONFIG, 0, lambda _done, _total: None) is not None
    return run


def announce(run: RunDir, path: Path) -> None:
    """What the runtime does: check the bundle, then make it live."""
    Registry(run.registry).set_live(Policy.load(path).version, why="announced")


class Robot:
    """Runs episodes with whatever version is live and logs them as the runtime does."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._registry = Registry(run.registry)
        self._log = EpisodeLog(run.episodes)
        self._backend = make_backend(BACKEND)
        self._backend.connect()
        self._policy: Policy | None = None
        self._count = max((int(row.episode, 16) for row in self._log.index.after(0, 10**6)), default=0)

    def run(
        self,
        episodes: int,
        *,
        version: str | None = None,
        stamp: str | None = None,
        darker: bool = False,
        explore: bool = True,
        judged: bool = True,
        first_seed: int | None = None,
        unplayed: str = "",
    ) -> list[int]:
        """Steps of each episode. `version` acts, the live one if not given; `stamp` is a false version in the log;
        `darker` makes a log that does not hold what the policy saw; without `judged` nobody knows how they went. Seeds
        are new ones, or count from `first_seed`. The version `unplayed` makes a last decision that is not executed."""
        acting = version or self._registry.live()
        assert acting is not None
        if self._policy is None or self._policy.version != acting:
            self._policy = Policy.load(self._run.policies / acting)
        first = 10_000 + self._count if first_seed is None else first_seed
        return [
            self._episode(self._policy, stamp or acting, darker, explore, judged, first + i, unplayed)
            for i in range(episodes)
        ]

    def _episode(
        self, policy: Policy, version: str, darker: bool, explore: bool, judged: bool, seed: int, unplayed: str
    ) -> int:
        self._count += 1
        episode = f"{self._count:032x}"
        rng = np.random.default_rng(seed)
        start = self._start(episode, seed, explore)
        instruction = start.instruction
        self._log.start(start)
        self._backend.reset(start.task, seed)
        step, decision, status = 0, 1, "running"
        while status == "running":
            tensors = self._tensors()
            inputs = {name: tensors[name][None] for name in ("image/top", "state")}
            mean, log_std = policy.infer({**inputs, "tokens": policy.tokens(instruction)[None]})
            rho = policy.spec.noise_correlation
            actions = sample_chunk(mean[0], log_std[0], rho, rng) if explore else mean[0]
            tensors["actions"] = actions
            if explore:
                tensors["log_prob"] = log_prob(actions, mean[0], log_std[0], rho)
            if darker:
                tensors["image/top"] = tensors["image/top"] // 2
            self._log.append(
                episode,
                DecisionRecord(decision=decision, step=step, version=version, tensors=tensor_records(tensors)),
            )
            sent, rewards = [], []
            for action in actions:
                sent.append(self._backend.apply(action))
                outcome = self._backend.outcome()
                rewards.append(outcome.reward)
                step += 1
                status = "timeout" if outcome.status == "running" and step == HORIZON_STEPS else outcome.status
                if status != "running":
                    break
            executed = {"sent": np.array(sent, np.float32), "reward": np.array(rewards, np.float32)}
            self._log.append(episode, ExecutedRecord(decision=decision, tensors=tensor_records(executed)))
            decision += 1
        if unplayed:
            last = DecisionRecord(decision=decision, step=step, version=unplayed, tensors=tensor_records(tensors))
            self._log.append(episode, last)
        done = threading.Event()
        end = EndRecord(
            status=status if judged else "unjudged", steps=step, reason="", tensors=tensor_records(self._tensors())
        )
        self._log.end(episode, end, lambda _error: done.set())
        assert done.wait(10.0)
        return step

    def _tensors(self) -> dict[str, np.ndarray]:
        seen = self._backend.observe()
        assert seen.privileged is not None
        return {"image/top": seen.images["top"], "state": seen.state, "privileged": seen.privileged}

    def abort(self) -> None:
        """Log an episode that broke off before its first decision."""
        self._count += 1
        self._log.start(self._start(f"{self._count:032x}", 0, True))
        done = threading.Event()
        record = EndRecord(status="aborted", steps=0, reason="test", tensors={})
        self._log.end(f"{self._count:032x}", record, lambda _error: done.set())
        assert done.wait(10.0)

    def _start(self, episode: str, seed: int, explore: bool) -> EpisodeStart:
        task = next(iter(self._backend.spec.instructions))
        return EpisodeStart(
            format=1,
            episode=episode,
            task=task,
            instruction=instruction_of(self._backend.spec, task, seed),
            seed=seed,
            source="policy",
            explore=explore,
            client="robot",
            spec=self._backend.spec,
            started_unix_s=0.0,
        )

    def close(self) -> None:
        self._log.close()
        self._backend.close()


class Turns(threading.Event):
    """Each time that the trainer waits, the next of these happens; it must not wait more often than there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Callable[[], None]] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert self.left, "the trainer waits for nothing"
        self.left.pop(0)()
        return False


def nothing() -> None:
    """A moment passes."""


class TrainingScene:
    """A run, a robot, and a trainer whose versions go live at once."""

    def __init__(self, run: RunDir, config: TrainerConfig = SMALL) -> None:
        self.run, self.config = run, config
        self.registry, self.robot, self.turns = Registry(run.registry), Robot(run), Turns()
        self.said: list[str] = []
        self.trainer = self.start()

    def start(self) -> ContinualTrainer:
        """Start the trainer, or start it anew."""
        spec = make_backend(BACKEND).spec
        self.trainer = ContinualTrainer(
            self.run, spec, self.config, 0, announce=self.announce, stop=self.turns, warn=self.said.append
        )
        return self.trainer

    def announce(self, path: Path) -> None:
        """Make it live."""
        announce(self.run, path)

    def iterate(self, *turns: Callable[[], None]) -> dict[str, Any]:
        """One iteration, for which the trainer has to wait exactly so often."""
        self.turns.left = list(turns)
        rows = self.trainer.collect()
        assert rows is not None and not self.turns.left
        line = self.trainer.iterate(rows)
        assert line is not None
        return line
