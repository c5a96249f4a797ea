"""Supervised fine-tuning: the VLA learns to do what the demonstrations did, and becomes the run's first version.

The loss is the negative log-likelihood of the executed actions under the policy's Gaussian with its standard deviation
held fixed. Up to a factor and a constant that is the masked mean squared error in units of half the action range, which
is what is computed. Sigma stays as configured: fitted to so few demonstrations it would shrink to their noise, and
exploration starts from it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.backend import BackendSpec, all_instructions
from bridge.errors import FieldtuneError
from runtime.bundle import FORMAT, PolicySpec
from runtime.durable import atomic_directory, write_atomic
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.policy import encode
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import SFTConfig, TrainerConfig
from trainer.demos import demo_rows
from trainer.export import Exporter
from trainer.samples import CloningSamples, cloning_samples, concatenate, random_shift
from trainer.tokens import build_tokenizer
from trainer.vla import VLA

CHECKPOINT_EVERY_S = 15.0
METRICS_EVERY_STEPS = 25
WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0
PROBE_SAMPLES = 8
LIBRARIES = ("torch", "onnxruntime", "numpy", "tokenizers", "fieldtune")


class SFTError(FieldtuneError):
    """Supervised fine-tuning cannot be done; the message says why and what to do."""


@dataclass(slots=True)
class Dataset:
    """The samples as tensors, and a batch of them: see `CloningSamples` for shapes and dtypes."""

    images: dict[str, Tensor]
    state: Tensor
    tokens: Tensor
    target: Tensor
    mask: Tensor

    def batch(self, index: Tensor, shift_px: int, generator: torch.Generator) -> Dataset:
        """The samples at `index` `[B]`, their images shifted at random."""
        return Dataset(
            {name: random_shift(x.index_select(0, index), shift_px, generator) for name, x in self.images.items()},
            self.state.index_select(0, index),
            self.tokens.index_select(0, index),
            self.target.index_select(0, index),
            self.mask.index_select(0, index),
        )


def run_sft(
    run: RunDir,
    spec: BackendSpec,
    config: TrainerConfig,
    seed: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> str | None:
    """Train on the demonstrations of the run, export a bundle, make it the live version; returns its id.

    Equal demonstrations, settings and seed give equal weights on equal hardware. A checkpoint is written every 15 s:
    after a stop or a kill the same call goes on from there, unless settings or demonstrations have changed, then it
    starts anew. `progress(step, steps)` is called after each gradient step; if `stopped()` the state is kept and None
    returned. Raises `SFTError` if the run has no demonstrations of a task.
    """
    tasks = config.tasks or tuple(spec.instructions)
    index = EpisodeIndex(run.demos)
    rows = {task: demo_rows(index, task, config.demos) for task in tasks}
    for task, own in rows.items():
        if not own:
            raise SFTError(f"{run.demos} has no demonstration of {task!r}; run `fieldtune demos` first")
    policy = policy_spec(run.path.name, spec, config)
    tokenizer = build_tokenizer(all_instructions(spec), config.vla.vocabulary, config.vla.max_tokens)
    samples = concatenate(
        [
            cloning_samples(
                episode,
                config.vla.horizon_steps,
                encode(tokenizer, episode.start.instruction, config.vla.max_tokens),
            )
            for own in rows.values()
            for episode in (read_episode(index.path(row)) for row in own)
        ]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vla = VLA(config.vla, policy)
        vla.set_state_statistics(torch.from_numpy(samples.state.mean(0)), torch.from_numpy(samples.state.std(0)))
        training = Training(vla, policy, _dataset(samples), config.sft, seed, _fingerprint(policy, config, seed, rows))
        loss = training.run(run.sft, progress, stopped)
    finally:
        torch.set_num_threads(before)
    if loss is None:
        return None
    made = {
        "command": "sft",
        "demonstrations": {task: len(own) for task, own in rows.items()},
        "samples": len(samples),
        "seed": seed,
        "loss": loss,
        "settings": msgspec.to_builtins(config.sft),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    version = Exporter(vla, tokenizer, _probe(samples)).publish(run.policies, parent="", made=made)
    registry = Registry(run.registry)
    registry.add(version, parent="", made=made)
    registry.set_live(version, why="sft")
    return version


def policy_spec(name: str, spec: BackendSpec, config: TrainerConfig) -> PolicySpec:
    """The spec of a policy made for this backend: all its cameras, its state, its actions, its rate."""
    return PolicySpec(
        format=FORMAT,
        name=name,
        cameras=spec.cameras,
        state=spec.state,
        action=spec.action,
        control_hz=spec.control_hz,
        horizon=config.vla.horizon_steps,
        tokens=config.vla.max_tokens,
    )


def cloning_error(mean: Tensor, target: Tensor, mask: Tensor, half_range: Tensor) -> Tensor:
    """Mean over executed actions of the squared error in units of half the range.

    `mean`, `target` `[B, h, d]`, `mask` `[B, h]`, `half_range` `[d]`.
    """
    error = ((mean - target) / half_range).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def learning_rate(step: int, config: SFTConfig) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


class Training:
    """The gradient steps, and what must survive a kill: weights, optimiser, step."""

    def __init__(
        self, vla: VLA, policy: PolicySpec, data: Dataset, config: SFTConfig, seed: int, fingerprint: str
    ) -> None:
        self.vla = vla
        self.data = data
        self.config = config
        self.seed = seed
        self.fingerprint = fingerprint
        self.step = 0
        self.loss = math.nan  # mean over the last reported steps
        self.loss_sum, self.loss_count = 0.0, 0  # of the steps since then
        low, high = torch.tensor(policy.action.low), torch.tensor(policy.action.high)
        self.half_range = (high - low) / 2
        matrices = [p for p in vla.parameters() if p.ndim >= 2]
        others = [p for p in vla.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            fused=True,
        )
        # Twice as fast where the processor multiplies bfloat16; elsewhere it is emulated and slower.
        self.bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def run(self, directory: Path, progress: Callable[[int, int], None], stopped: Callable[[], bool]) -> float | None:
        """Train to the end and return the last reported loss, or None if `stopped`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._load(directory)
        metrics = directory / "metrics.jsonl"
        _cut_metrics(metrics, self.step)
        saved_s = reported_s = time.monotonic()
        reported_step = self.step
        with metrics.open("a", encoding="utf-8") as lines:
            while self.step < self.config.steps:
                if stopped():
                    self._save(directory)
                    return None
                self.loss_sum += self._gradient_step()
                self.loss_count += 1
                if self.step % METRICS_EVERY_STEPS == 0 or self.step == self.config.steps:
                    self.loss = self.loss_sum / self.loss_count
                    if not math.isfinite(self.loss):
                        raise SFTError(f"the loss is {self.loss} at step {self.step}; lower trainer.sft.lr")
                    now_s = time.monotonic()
                    line = {
                        "step": self.step,
                        "loss": self.loss,
                        "lr": learning_rate(self.step - 1, self.config),
                        "samples_per_s": (self.step - reported_step) * self.config.batch / (now_s - reported_s),
                    }
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()
                    self.loss_sum, self.loss_count = 0.0, 0
                    reported_s, reported_step = now_s, self.step
                progress(self.step, self.config.steps)
                if time.monotonic() - saved_s > CHECKPOINT_EVERY_S:
                    self._save(directory)
                    saved_s = time.monotonic()
        self._save(directory)
        return self.loss

    def _gradient_step(self) -> float:
        """One step on the batch that belongs to this step; returns its loss."""
        config, n = self.config, len(self.data.state)
        per_epoch = max(1, n // config.batch)
        epoch, part = divmod(self.step, per_epoch)
        # Everything random is a function of seed and step, so that a resumed run needs no generator's state.
        order = torch.randperm(n, generator=_generator(self.seed, 0, epoch))
        index = order[part * config.batch : (part + 1) * config.batch]
        batch = self.data.batch(index, config.shift_px, _generator(self.seed, 1, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            mean, _ = self.vla(batch.images, batch.state, batch.tokens)
        loss = cloning_error(mean.float(), batch.target, batch.mask, self.half_range)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.vla.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _save(self, directory: Path) -> None:
        """Write a checkpoint, a directory named by its step; only then remove the one before."""
        target = directory / f"checkpoint-{self.step:08d}"
        if target.exists():
            return
        state = {
            "step": self.step,
            "loss": self.loss,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "fingerprint": self.fingerprint,
        }
        with atomic_directory(target) as files:
            save_file(self.vla.state_dict(), files / "weights.safetensors")
            torch.save(self.optimizer.state_dict(), files / "optimizer.pt")
            (files / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for old in _checkpoints(directory)[:-1]:
            shutil.rmtree(old)

    def _load(self, directory: Path) -> None:
        """Go on from the newest checkpoint, if there is one of these settings; remove those of others."""
        for path in reversed(_checkpoints(directory)):
            state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state["fingerprint"] != self.fingerprint:
                shutil.rmtree(path)
                continue
            self.vla.load_state_dict(load_file(path / "weights.safetensors"))
            self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
            self.step, self.loss = state["step"], state["loss"]
            self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
            return


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*"))


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """A generator of its own for each purpose and number; `SeedSequence` keeps neighbours independent."""
    (state,) = np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what was reported after the checkpoint: those steps are done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break  # torn by a kill; nothing follows it
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())


def _dataset(samples: CloningSamples) -> Dataset:
    return Dataset(
        {name: torch.from_numpy(images) for name, images in samples.images.items()},
        torch.from_numpy(samples.state),
        torch.from_numpy(samples.tokens),
        torch.from_numpy(samples.target),
        torch.from_numpy(samples.mask),
    )


def _fingerprint(policy: PolicySpec, config: TrainerConfig, seed: int, rows: dict[str, list[EpisodeRow]]) -> str:
    """Hash of all that decides what the training does."""
    episodes = sorted(row.episode for own in rows.values() for row in own)
    return hashlib.sha256(msgspec.json.encode([policy, config.sft, config.vla, seed, episodes])).hexdigest()


def _probe(samples: CloningSamples) -> dict[str, np.ndarray[Any, Any]]:
    """A few observations from all over the demonstrations, for the bundle's probe."""
    index = np.linspace(0, len(samples) - 1, PROBE_SAMPLES).astype(np.int64)
    return {
        **{f"image/{name}": images[index] for name, images in samples.images.items()},
        "state": samples.state[index],
        "tokens": samples.tokens[index],
    }
