"""Supervised learning of demonstrations: the data, the loss, the gradient steps and their checkpoints.

The loss is the negative log-likelihood of the executed actions under the policy's Gaussian with its standard deviation
held fixed. Up to a factor and a constant that is the masked mean squared error in units of half the action range, which
is what is computed. Sigma stays as configured: fitted to so few demonstrations it would shrink to their noise, and
exploration starts from it.

A policy that can be told what is committed (`trainer.vla.prefix_steps`) is told it with random delays, and imitates the
actions after it: `trainer.samples.random_prefix`.

Where samples carry a privileged state (pretraining in a simulator only), a linear head that is not exported predicts it
from what the policy's own head reads. It makes the features say where things are, which demonstrations alone teach
slowly.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridge.errors import FieldtuneError
from runtime.bundle import PolicySpec
from runtime.durable import HOUR_S, atomic_directory, remove_leftovers, write_atomic
from trainer.config import SFTConfig
from trainer.samples import CloningSamples, random_prefix, random_shift, random_wording
from trainer.vla import VLA

CHECKPOINT_EVERY_S = 15.0
METRICS_EVERY_STEPS = 25
WARMUP_SHARE = 0.05
MAX_GRAD_NORM = 1.0


class SFTError(FieldtuneError):
    """Supervised learning cannot be done; the message says why and what to do."""


@dataclass(slots=True)
class Dataset:
    """N samples as tensors: see `CloningSamples` for shapes and dtypes."""

    images: dict[str, Tensor]
    state: Tensor
    tokens: Tensor
    target: Tensor
    mask: Tensor
    privileged: Tensor
    """float32 `[N, m]`: what the auxiliary head predicts, mean 0 and standard deviation 1; m = 0 without one."""

    def __len__(self) -> int:
        return len(self.state)

    def batch(self, index: Tensor, config: SFTConfig, generator: torch.Generator) -> Dataset:
        """The samples at `index` `[B]`, shifted and told at random: `tokens` is `[B, L]`, one wording of each."""
        images = {name: x.index_select(0, index) for name, x in self.images.items()}
        return Dataset(
            {name: random_shift(x, config.shift_px, generator) for name, x in images.items()},
            self.state.index_select(0, index),
            random_wording(self.tokens.index_select(0, index), config.word_dropout, generator),
            self.target.index_select(0, index),
            self.mask.index_select(0, index),
            self.privileged.index_select(0, index),
        )


def gather(parts: Iterable[tuple[CloningSamples, np.ndarray[Any, Any] | None]], count: int) -> Dataset:
    """One dataset of all parts, at most `count` samples in all, each with its privileged state `[n, m]` or None.

    Filled part by part, so that the images, which are gigabytes for some thousand demonstrations, are in memory once.
    Raises `ValueError` if there are none.
    """
    stores: list[np.ndarray[Any, Any]] = []
    names: tuple[str, ...] = ()
    end = 0
    for samples, privileged in parts:
        extra = np.zeros((len(samples), 0), np.float32) if privileged is None else privileged
        arrays = [*samples.images.values(), samples.state, samples.tokens, samples.target, samples.mask, extra]
        if not stores:
            names = tuple(samples.images)
            stores = [np.empty((count, *array.shape[1:]), array.dtype) for array in arrays]
        for store, array in zip(stores, arrays, strict=True):
            store[end : end + len(samples)] = array
        end += len(samples)
    if not end:
        raise ValueError("there are no samples")
    *images, state, tokens, target, mask, extra_state = (torch.from_numpy(store[:end]) for store in stores)
    if extra_state.shape[1]:
        std = extra_state.std(0, unbiased=False)
        extra_state = (extra_state - extra_state.mean(0)) / torch.where(std > 1e-4, std, torch.ones_like(std))
    return Dataset(dict(zip(names, images, strict=True)), state, tokens, target, mask, extra_state)


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
        predicted = data.privileged.shape[1]
        self.auxiliary = nn.Linear(vla.config.width, predicted) if predicted and config.auxiliary else None
        self.config = config
        self.seed = seed
        self.fingerprint = fingerprint
        self.step = 0
        self.order = torch.empty(0, dtype=torch.int64)  # of the samples in this epoch
        self.loss = math.nan  # mean over the last reported steps
        self.loss_sum, self.loss_count = 0.0, 0  # of the steps since then
        low, high = torch.tensor(policy.action.low), torch.tensor(policy.action.high)
        self.half_range = (high - low) / 2
        self.parameters = [*vla.parameters(), *(self.auxiliary.parameters() if self.auxiliary else ())]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
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
        config, n = self.config, len(self.data)
        per_epoch = max(1, n // config.batch)
        epoch, part = divmod(self.step, per_epoch)
        # Everything random is a function of seed and step, so that a resumed run needs no generator's state.
        if part == 0 or len(self.order) != n:
            self.order = torch.randperm(n, generator=_generator(self.seed, 0, epoch))
        index = self.order[part * config.batch : (part + 1) * config.batch]
        batch = self.data.batch(index, config, _generator(self.seed, 1, self.step))
        delays = _generator(self.seed, 2, self.step)
        *told, mask = random_prefix(batch.target, batch.mask, self.vla.spec.prefix_steps, delays)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            features = self.vla.features(batch.images, batch.state, batch.tokens, *told)
            mean, _ = self.vla.chunk(features)
            predicted = self.auxiliary(features) if self.auxiliary else None
        loss = cloning_error(mean.float(), batch.target, mask, self.half_range)
        if predicted is not None:
            loss = loss + config.auxiliary * (predicted.float() - batch.privileged).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
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
            if self.auxiliary:
                save_file(self.auxiliary.state_dict(), files / "auxiliary.safetensors")
            torch.save(self.optimizer.state_dict(), files / "optimizer.pt")
            (files / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for old in _checkpoints(directory)[:-1]:
            shutil.rmtree(old)

    def _load(self, directory: Path) -> None:
        """Go on from the newest checkpoint, if there is one of these settings; remove those of others."""
        remove_leftovers(directory, HOUR_S)
        for path in reversed(_checkpoints(directory)):
            state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state["fingerprint"] != self.fingerprint:
                shutil.rmtree(path)
                continue
            self.vla.load_state_dict(load_file(path / "weights.safetensors"))
            if self.auxiliary:
                self.auxiliary.load_state_dict(load_file(path / "auxiliary.safetensors"))
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
