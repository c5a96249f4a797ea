"""Supervised fine-tuning: the VLA learns to do what the demonstrations did, and becomes the run's first version.

It starts from a fresh network or from another bundle of the reference VLA (`trainer.start`): a base that was pretrained
in the same way on other tasks. See `trainer.supervised` for the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from bridge.backend import BackendSpec, Float32, all_instructions
from bridge.config import ConfigError
from runtime.bundle import FORMAT, Bundle, BundleError, PolicySpec, read_bundle
from runtime.episode import Episode
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.policy import InstructionError, encode
from runtime.reading import read_row
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import TrainerConfig
from trainer.demos import demo_rows
from trainer.environment import installed
from trainer.export import Exporter, become, probe_prefixes
from trainer.samples import CloningSamples, cloning_samples, wordings
from trainer.supervised import Dataset, SFTError, Training, gather
from trainer.tokens import TokenizerError, build_tokenizer
from trainer.vla import VLA, VLAError

PROBE_SAMPLES = 8
LIBRARIES = ("torch", "onnxruntime", "numpy", "tokenizers", "fieldtune")


def run_sft(
    run: RunDir,
    spec: BackendSpec,
    config: TrainerConfig,
    seed: int,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
    start: Path | None = None,
) -> str | None:
    """Train on the demonstrations of the run, export a bundle, make it the live version; returns its id.

    `start` is a bundle to begin from; its tokenizer and state statistics are kept, its sigma and noise correlation are
    not; it may be one that is told nothing of what is committed. Equal demonstrations, settings and seed give equal
    weights on equal hardware. A checkpoint is written every 15 s: after a stop or a kill the same call goes on from
    there, unless settings or demonstrations have changed, then it starts anew. `progress(step, steps)` is called after
    each gradient step; if `stopped()` the state is kept and None returned. Raises `SFTError` if the run has no
    demonstrations of a task, `ConfigError` if settings, backend and `start` do not go together (`new_policy`).
    """
    tasks = config.trained(spec)
    index = EpisodeIndex(run.demos)
    rows = {task: demo_rows(index, task, config.demos) for task in tasks}
    for task, own in rows.items():
        if not own:
            raise SFTError(
                f"{run.demos} has no demonstration of {task!r}; `fieldtune demos` makes some where there is a "
                "scripted expert, `fieldtune demos import DATASET CONFIG` takes those of a LeRobotDataset"
            )
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vla, tokenizer, base = new_policy(run.path.name, spec, config, start)
            tokens = partial(encode, tokenizer, max_tokens=config.vla.max_tokens)

            def parts() -> Iterator[tuple[CloningSamples, Float32 | None]]:
                for own in rows.values():
                    for row in own:
                        episode = read_row(index, row)
                        told = wordings(spec, row.task, episode.start.instruction, tokens)
                        samples = cloning_samples(episode, config.vla.horizon_steps, told)
                        yield samples, _privileged(episode) if config.sft.auxiliary else None

            data = gather(parts(), sum(row.decisions for own in rows.values() for row in own))
            torch.set_num_threads(config.threads)
            if base is None:
                vla.set_state_statistics(data.state.mean(0), data.state.std(0, unbiased=False))
            fingerprint = _fingerprint(vla.spec, spec, config, seed, rows, base)
            training = Training(vla, vla.spec, data, config.sft, seed, fingerprint)
        loss = training.run(run.sft, progress, stopped)
    finally:
        torch.set_num_threads(before)
    if loss is None:
        return None
    made = {
        "command": "sft",
        "start": base.version if base else "",
        "demonstrations": {task: len(own) for task, own in rows.items()},
        "samples": len(data),
        "seed": seed,
        "loss": loss,
        "settings": msgspec.to_builtins(config.sft),
        "libraries": installed(LIBRARIES),
    }
    probe = _probe(data, config.vla.prefix_steps)
    version = Exporter(vla, tokenizer, probe).publish(run.policies, parent="", made=made)
    registry = Registry(run.registry)
    registry.add(version, parent="", made=made)
    registry.set_live(version, why="sft")
    return version


def new_policy(
    name: str, spec: BackendSpec, config: TrainerConfig, start: Path | None
) -> tuple[VLA, Tokenizer, Bundle | None]:
    """The network before its first gradient step, its tokenizer, and the bundle `start` that both are of, if any.

    The state statistics of a fresh one are not set. Raises `ConfigError` naming the setting where settings, backend and
    `start` do not go together, so that a mistake can be found before there are demonstrations.
    """
    if config.sft.auxiliary and spec.privileged is None:
        raise ConfigError(
            f"$.trainer.sft.auxiliary: is {config.sft.auxiliary:g}, and {spec.name} has no privileged state that could "
            "be predicted; it must be 0 here"
        )
    try:
        vla = VLA(config.vla, policy_spec(name, spec, config))
    except VLAError as error:
        raise ConfigError(f"$.trainer.vla: no network can be made for {spec.name}: {error}") from error
    try:
        base = _become_base(vla, start) if start else None
    except BundleError as error:
        raise ConfigError(f"$.trainer.start: {start} cannot be gone on from: {error}") from error
    try:
        if base is None:
            tokenizer = build_tokenizer(all_instructions(spec), config.vla.vocabulary, config.vla.max_tokens)
        else:
            tokenizer = Tokenizer.from_str(base.tokenizer)
            for text in all_instructions(spec):
                encode(tokenizer, text, config.vla.max_tokens)
    except TokenizerError as error:
        raise ConfigError(f"$.trainer.vla.vocabulary: {error}") from error
    except InstructionError as error:
        raise ConfigError(f"$.trainer.vla.max_tokens: {error}") from error
    return vla, tokenizer, base


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
        prefix_steps=config.vla.prefix_steps,
        noise_correlation=config.vla.noise_correlation,
    )


def _become_base(vla: VLA, start: Path) -> Bundle:
    """Give the network weights and statistics of a bundle. Raises `BundleError`."""
    base = read_bundle(start)
    # How it explores is for this deployment to say.
    fresh_spec, fresh_sigma = vla.spec, vla.log_sigma.detach().clone()
    become(vla, base)
    vla.spec = fresh_spec
    with torch.no_grad():
        vla.log_sigma.copy_(fresh_sigma)
    return base


def _privileged(episode: Episode) -> Float32:
    """The privileged state `[n, m]` of a demonstration, one row for each of its samples."""
    rows = [decision.observation.privileged for decision in episode.decisions]
    found = [row for row in rows if row is not None]
    if len(found) != len(rows):
        raise SFTError(
            f"episode {episode.start.episode} has no privileged state; trainer.sft.auxiliary must be 0 for this backend"
        )
    return np.stack(found)


def _fingerprint(
    policy: PolicySpec,
    spec: BackendSpec,
    config: TrainerConfig,
    seed: int,
    rows: dict[str, list[EpisodeRow]],
    base: Bundle | None,
) -> str:
    """Hash of all that decides what the training does."""
    episodes = sorted(row.episode for own in rows.values() for row in own)
    start = base.version if base else ""
    parts = [policy, spec.instructions, config.sft, config.vla, seed, episodes, start]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _probe(data: Dataset, prefix_steps: int) -> dict[str, np.ndarray[Any, Any]]:
    """A few observations from all over the demonstrations, for the bundle's probe."""
    index = torch.linspace(0, len(data) - 1, PROBE_SAMPLES).long()
    return {
        **{f"image/{name}": images[index].numpy() for name, images in data.images.items()},
        "state": data.state[index].numpy(),
        "tokens": data.tokens[index, 0].numpy(),
        **probe_prefixes(data.target[index].numpy(), prefix_steps),
    }
