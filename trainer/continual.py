"""The loop: pull episodes, check, learn, publish, announce; for as long as the robot works, through any crash.

The trainer never stands in the robot's way. It reads finished episodes from the log while new ones arrive; those that
come in during an update are learned from in the next one, a version late. An iteration ends in this order:

    bundle on disk -> registry -> metrics line, curves -> checkpoint -> announce

The checkpoint decides. Before it, a crash leaves a bundle that nothing refers to, and the iteration is done again from
the old cursor; after it, the episodes are taken and the announcement is made up for at the next start. So no episode is
learned from twice and none is passed over.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bridge.backend import BackendSpec
from bridge.errors import FieldtuneError
from runtime.bundle import read_bundle
from runtime.durable import claim
from runtime.episode import Episode
from runtime.index import EpisodeRow
from runtime.policy import encode
from runtime.reading import EpisodeError, read_row
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer import metrics
from trainer.batch import Batch, BatchError, build_batch, executed_decisions
from trainer.buffer import DemoBuffer
from trainer.checkpoint import (
    START_AGAIN,
    Checkpoint,
    CheckpointError,
    TrainerState,
    load_checkpoint,
    save_checkpoint,
)
from trainer.chunked_ppo import Update, adapted_lr, advantages, next_values, update
from trainer.config import TrainerConfig
from trainer.critic import Critic, explained_variance, fit, values
from trainer.environment import cpu_time
from trainer.experience import Experience
from trainer.export import load_weights
from trainer.intake import Intake
from trainer.ratio import check_ratio
from trainer.tensorboard import Curves, require_tensorboard
from trainer.versions import Versions
from trainer.vla import VLA
from trainer.weight import Weight, WeightSchedule


class TrainingError(FieldtuneError):
    """Training cannot start; the message says what is missing."""


def train(
    run: RunDir,
    spec: BackendSpec,
    config: TrainerConfig,
    seed: int,
    *,
    announce: Callable[[Path], None],
    stop: threading.Event,
    report: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
) -> str:
    """Train until `config.stop` or `stop`; returns the last version.

    Goes on from the checkpoint in `run.trainer`, or from the registry's live version if there is none. `announce` makes
    the runtime serve a bundle and raises if it does not; `report` gets each line of the metrics; `warn` is told of what
    a person should know. Raises `ClaimedError` where another process trains this run, `TrainingError`,
    `CheckpointError`, `BundleError`, `RatioError`, `NotFiniteError`.
    """
    if config.tensorboard:
        require_tensorboard()
    torch.set_num_threads(config.threads)
    run.trainer.mkdir(parents=True, exist_ok=True)
    # Two trainers would learn from the same episodes and overwrite each other's checkpoint.
    with claim(run.trainer):
        trainer = ContinualTrainer(run, spec, config, seed, announce=announce, stop=stop, warn=warn)
        while not trainer.finished():
            rows = trainer.collect()
            if rows is None:
                trainer.save()
                break
            line = trainer.iterate(rows)
            if line is not None:
                report(line)
        return trainer.version


class ContinualTrainer:
    """The state of training and one method for each part of an iteration: `collect`, then `iterate`."""

    def __init__(
        self,
        run: RunDir,
        spec: BackendSpec,
        config: TrainerConfig,
        seed: int,
        *,
        announce: Callable[[Path], None],
        stop: threading.Event,
        warn: Callable[[str], None],
    ) -> None:
        """Resume from the checkpoint, or start from the live version; announce a version that is not live yet."""
        self._run, self._config = run, config
        self._stop, self._warn = stop, warn
        self._tasks = config.post_trained(spec)
        # Behind those that are improved, so that a task has one index in batch and buffer.
        rehearsed = tuple(task for task in config.trained(spec) if task not in self._tasks)
        held = self._tasks + rehearsed
        self._checkpoint_path = run.trainer / "checkpoint.pt"
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

        checkpoint = load_checkpoint(self._checkpoint_path)
        start = checkpoint.state.version if checkpoint else Registry(run.registry).live()
        if start is None:
            raise TrainingError(f"{run.registry} has no live version to start from; run `fieldtune sft` first")
        bundle = read_bundle(run.policies / start)
        self._vla = VLA(config.vla, bundle.spec)
        load_weights(self._vla, bundle)
        self._versions = Versions(
            run,
            self._vla,
            bundle,
            max_staleness_versions=config.max_staleness_versions,
            announce=announce,
            warn=warn,
        )
        self._tokens = partial(encode, Tokenizer.from_str(bundle.tokenizer), max_tokens=bundle.spec.tokens)
        self._experience = Experience(run, spec, bundle.spec.horizon, self._tokens)
        self._index = self._experience.own
        self._critic = Critic(bundle.spec, len(spec.privileged.names) if spec.privileged else 0, len(self._tasks))
        self._actor_optimiser = self._new_actor_optimiser()
        self._critic_optimiser = torch.optim.Adam(self._critic.parameters(), lr=config.ppo.critic_lr)
        self._buffer = DemoBuffer(config.buffer, held)
        self._weight = WeightSchedule(config.weight, config.ppo.target_kl, self._tasks)
        self._state = TrainerState(
            iteration=0,
            version=start,
            cursor=0,
            env_steps=0,
            elapsed_s=0.0,
            after_warmup=0,
            buffer={},
            weight={},
            rng="",
        )
        self._frozen = self._versions.first() if config.weight.anchor == "sft" else None
        if checkpoint:
            self._restore(checkpoint)
        self._versions.behaviours.remember(start, self._vla)
        if not checkpoint:
            if not self._experience.seed(self._buffer, held, config.demos):
                warn(f"{run.demos} has no demonstrations: the buffer starts empty")
            self._start_again(start)
            self._versions.set_exploration(config.ppo)
        newest = self._index.list(limit=1)
        if newest and newest[0].seq < self._state.cursor:
            self._state.cursor = newest[0].seq
            warn(f"the index of the episodes was made anew; the {newest[0].seq} that it has count as learned from")
        self._intake = Intake(
            self._index,
            self._versions,
            config,
            self._tasks,
            cursor=self._state.cursor,
            labels=self._state.labels,
            stop=stop,
            warn=warn,
        )
        self._passed_over = 0  # decisions that the next line is to count as stale
        self._cpu_time = cpu_time()
        self._started_s = time.monotonic()
        metrics.cut(run.metrics, self._state.iteration)
        self._curves = Curves(run, self._state.iteration) if config.tensorboard else None
        self._follow_live()

    @property
    def version(self) -> str:
        """The version of the weights that the trainer now has."""
        return self._versions.current

    def finished(self) -> bool:
        """Whether a limit of `config.stop` is reached, or a stop was asked for."""
        limits, state = self._config.stop, self._state
        return (
            self._stop.is_set()
            or (limits.minutes is not None and self._elapsed_s() >= limits.minutes * 60)
            or (limits.env_steps is not None and state.env_steps >= limits.env_steps)
            or (limits.iterations is not None and state.iteration >= limits.iterations)
        )

    @property
    def buffer(self) -> DemoBuffer:
        """The demonstration buffer."""
        return self._buffer

    def collect(self) -> list[EpisodeRow] | None:
        """Wait for enough exploring episodes: all rows since the cursor, or None when training is `finished`."""
        return self._intake.wait(self.finished, self._follow_live)

    # --- one iteration ------------------------------------------------------------------------------------------------

    def iterate(self, rows: list[EpisodeRow]) -> dict[str, Any] | None:
        """Learn from these rows, publish and announce; returns the metrics line.

        None if a stop came in between, then the iteration is done again after a restart; and where no decision is young
        enough, then the rows are taken.
        """
        began_s = time.monotonic()
        episodes, counts = self._take(rows)
        if not episodes:
            raise TrainingError("none of the episodes collected could be read; see the warnings above")
        batch = build_batch(
            episodes,
            self._vla.spec,
            self._tasks,
            self._config.ppo,
            tokens=self._tokens,
            age=self._versions.age,
            max_age=self._versions.max_staleness_versions,
        )
        if not batch.fresh.any():
            self._pass_over(rows, len(batch) + counts["dropped_stale"])
            return None
        ratio_error = check_ratio(batch, self._versions.behaviours, self._rng)
        warming_up = self._state.iteration < self._config.ppo.critic_warmup_iterations
        advantage, value_loss, variance = self._learn_value(batch, warming_up)
        weight = self._weight.weight(0 if warming_up else self._state.after_warmup + 1)
        result = None if warming_up else self._learn_policy(batch, advantage, weight)
        if self._stop.is_set() and (warming_up or result is None):
            return None
        self._state.iteration += 1
        self._state.cursor, self._state.labels = self._intake.take(rows)
        self._state.env_steps += sum(episode.steps for episode in episodes)
        if result is not None:
            self._state.after_warmup += 1
            self._weight.add_kl(result.kl)
            for group in self._actor_optimiser.param_groups:
                group["lr"] = adapted_lr(group["lr"], result.kl, self._config.ppo)
        line = {
            "iteration": self._state.iteration,
            "unix_s": time.time(),
            "minutes": self._elapsed_s() / 60,
            "env_steps": self._state.env_steps,
            "version": self.version,
            "warmup": warming_up,
            **metrics.results(episodes, self._tasks),
            "buffer_episodes": self._buffer.episodes,
            "buffer_steps": self._buffer.mean_steps,
            "buffer_steps_by_task": {task: self._buffer.mean_steps_of(task) for task in self._tasks},
            "weight": weight.mean,
            "weight_by_task": weight.by_task,
            "weight_inputs": weight.inputs(),
            **metrics.losses(result),
            "value_loss": value_loss,
            "explained_variance": variance,
            "lr": self._actor_optimiser.param_groups[0]["lr"],
            "sigma": self._vla.sigma,
            "ratio_error": ratio_error,
            "staleness_versions": float(batch.age[batch.fresh].mean()),
            "staleness_versions_max": int(batch.age[batch.fresh].max()),
            **counts,
            "dropped_stale": counts["dropped_stale"] + int((~batch.fresh).sum()) + self._passed_over,
            "collect_wait_s": self._intake.waited_s,
            "learn_s": time.monotonic() - began_s,
            "cpu_idle_share": self._cpu_idle_share(),
        }
        # Each retry of what cannot be kept would leave a version that never is live.
        metrics.require_finite(line)
        if result is not None:
            self._versions.add(
                {
                    "command": "train",
                    "iteration": self._state.iteration,
                    "env_steps": self._state.env_steps,
                    "episodes_seq": [min(row.seq for row in rows), max(row.seq for row in rows)],
                }
            )
        line |= {"version": self.version, "learn_s": time.monotonic() - began_s}
        metrics.append_line(self._run.metrics, line)
        if self._curves:
            self._curves.add(line)
        self._passed_over = 0
        self._save_and_hold()
        self._follow_live()
        return line

    def _pass_over(self, rows: list[EpisodeRow], decisions: int) -> None:
        """Take rows that nothing can be learned from: a version may have decided last without being played."""
        self._warn(f"none of {decisions} decisions is young enough to learn from; they are passed over")
        self._state.cursor, self._state.labels = self._intake.take(rows)
        self._passed_over += decisions
        self._save_and_hold()

    def _save_and_hold(self) -> None:
        self.save()
        self._index.hold(self._state.cursor, self._state.labels, self._buffer.own_episodes())

    def _take(self, rows: list[EpisodeRow]) -> tuple[list[Episode], dict[str, int]]:
        """Read the episodes, tell buffer and weight of them, and give the newest ones that PPO can learn from."""
        found = self._intake.sort(rows)
        for row in rows:
            if row.seq in found.taken and row.status != "success":
                self._buffer.discard(row.episode)
        episodes: list[Episode] = []
        counts = {
            "aborted": sum(row.status == "aborted" for row in rows),
            "unreadable": 0,
            "dropped_stale": found.stale_decisions,
        }
        for row in found.exploring:
            try:
                episode = read_row(self._index, row)
                executed_decisions(episode, self._vla.spec)
            except (EpisodeError, BatchError) as error:
                self._warn(f"{error}; it is left out")
                counts["unreadable"] += 1
                continue
            if row.seq not in found.taken:
                self._weight.add_results(row.task, [episode.success])
            if episode.success:
                samples = partial(self._experience.samples, episode)
                self._buffer.offer(row.task, row.episode, row.steps, row.versions, samples)
            if row.seq in found.learnable:
                episodes.append(episode)
        return episodes, counts

    def _learn_value(self, batch: Batch, warming_up: bool) -> tuple[NDArray[np.float64], float, float]:
        """Advantages and explained variance by the value network as it was, then fit it to the lambda-returns."""
        ppo = self._config.ppo
        self._critic.set_statistics(batch.observations)
        value = values(self._critic, batch.observations)
        following = next_values(value, values(self._critic, batch.finals), batch.last, batch.episode)
        parts = (batch.reward, batch.discount, batch.terminated, batch.last, value, following)
        advantage = advantages(*parts, ppo.lam)
        variance = explained_variance(value, advantages(*parts, 1.0) + value)
        # On the first batch the network is as it was drawn; what it explains is chance.
        if self._state.iteration > 0:
            self._weight.add_explained_variance(variance)
        loss = fit(
            self._critic,
            self._critic_optimiser,
            batch,
            advantage + value,
            epochs=ppo.critic_warmup_epochs if warming_up else ppo.critic_epochs,
            rng=self._rng,
            stopped=self._stop.is_set,
        )
        return advantage, loss, variance

    def _learn_policy(self, batch: Batch, advantage: NDArray[np.float64], weight: Weight) -> Update | None:
        return update(
            self._vla,
            self._actor_optimiser,
            batch,
            advantage,
            self._buffer,
            # What is only rehearsed is only cloned.
            np.array([weight.by_task.get(task, 0.0) for task in self._buffer.tasks], np.float32),
            self._config.ppo,
            cloning_scale=self._config.weight.cloning_scale,
            frozen=self._frozen,
            sft=self._config.sft,
            rng=self._rng,
            generator=self._generator,
            stopped=self._stop.is_set,
        )

    def _follow_live(self) -> None:
        if self._versions.follow_live():
            self._actor_optimiser = self._new_actor_optimiser()

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint."""
        self._state.version = self.version
        self._state.elapsed_s = self._elapsed_s()
        self._started_s = time.monotonic()
        self._state.buffer = self._buffer.state()
        self._state.weight = self._weight.state()
        self._state.rng = json.dumps(self._rng.bit_generator.state)
        checkpoint = Checkpoint(
            state=self._state,
            actor=self._vla.state_dict(),
            actor_optimiser=self._actor_optimiser.state_dict(),
            critic=self._critic.state_dict(),
            critic_optimiser=self._critic_optimiser.state_dict(),
            generator=self._generator.get_state(),
        )
        save_checkpoint(self._checkpoint_path, checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._state = checkpoint.state
        try:
            self._vla.load_state_dict(checkpoint.actor)
            self._critic.load_state_dict(checkpoint.critic)
            self._actor_optimiser.load_state_dict(checkpoint.actor_optimiser)
            self._critic_optimiser.load_state_dict(checkpoint.critic_optimiser)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self._checkpoint_path}: does not fit this deployment ({error}); it was made with other tasks, "
                "cameras, trainer.vla or trainer.ppo.learn_sigma; choose another `name`, or move it away "
                f"{START_AGAIN}"
            ) from error
        # The critic's learning rate of the configuration counts, not that which the checkpoint was made with.
        for group in self._critic_optimiser.param_groups:
            group["lr"] = self._config.ppo.critic_lr
        self._rng.bit_generator.state = json.loads(self._state.rng)
        self._generator.set_state(checkpoint.generator)
        self._weight.restore(self._state.weight)
        self._experience.restore(self._buffer, self._state.buffer, self._warn)

    def _start_again(self, start: str) -> None:
        """Without a checkpoint: put aside what an earlier training of this run has written, and pass over the episodes
        if the version `start` was made from some of them.
        """
        aside = metrics.put_aside(self._run)
        lineage = Registry(self._run.registry).lineage(start)
        learned = any(row.made.get("command") == "train" for row in lineage)
        if learned:
            newest, labels = self._index.list(limit=1), self._index.labels_after(0)
            self._state.cursor = newest[0].seq if newest else 0
            self._state.labels = labels[-1].number if labels else 0
        if aside or learned:
            passed = f"; the {self._state.cursor} episodes so far count as learned from" if learned else ""
            kept = f"; what it wrote so far is in {' and '.join(map(str, aside))}" if aside else ""
            self._warn(f"training has no checkpoint and starts again from version {start[:12]}{passed}{kept}")

    def _new_actor_optimiser(self) -> torch.optim.Adam:
        self._vla.log_sigma.requires_grad_(self._config.ppo.learn_sigma)
        parameters = [parameter for parameter in self._vla.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=self._config.ppo.lr, eps=1e-5)

    def _cpu_idle_share(self) -> float | None:
        """Share of the time since the last call in which this computer's cores had nothing to do."""
        before, self._cpu_time = self._cpu_time, cpu_time()
        return self._cpu_time.idle_share_since(before) if before and self._cpu_time else None

    def _elapsed_s(self) -> float:
        return self._state.elapsed_s + time.monotonic() - self._started_s
