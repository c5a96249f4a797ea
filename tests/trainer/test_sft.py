"""Supervised fine-tuning: it learns the demonstrations, resumes exactly, and leaves a version that can be served."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.numpy import load_file

from bridge.backend import Observation, instruction_of
from bridge.backends import make_backend
from bridge.backends.point import Point, PointOptions
from bridge.config import BackendConfig, ConfigError
from runtime.bundle import read_bundle
from runtime.index import EpisodeIndex
from runtime.policy import Policy
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import DemosConfig, SFTConfig, TrainerConfig, VLAConfig
from trainer.demos import collect_demos, demo_rows
from trainer.samples import cloning_samples, random_wording
from trainer.sft import run_sft
from trainer.supervised import SFTError, cloning_error, learning_rate

SPEC = make_backend(BackendConfig("point", {"size_px": 16})).spec
CONFIG = TrainerConfig(
    demos=DemosConfig(per_task=32),
    vla=VLAConfig(horizon_steps=4, channels=(16, 32), width=64, text_width=16, max_tokens=16, vocabulary=300),
    sft=SFTConfig(steps=260, batch=48, lr=5e-3, shift_px=1),
)


class Worded(Point):
    """`point` with these wordings of its task."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__(PointOptions(size_px=16))
        self._spec = replace(self._spec, instructions={"reach": texts})


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demos")
    backend = make_backend(BackendConfig("point", {"size_px": 16}))
    collect_demos(lambda: backend, directory, DemosConfig(per_task=40, workers=1), (), 60, lambda done, total: None)
    return directory


def new_run(path: Path, demos: Path) -> RunDir:
    path.mkdir()
    (path / "demos").symlink_to(demos)
    return RunDir(path)


def train(
    run: RunDir, config: TrainerConfig = CONFIG, stop_at: int | None = None, start: Path | None = None
) -> str | None:
    at = 0

    def progress(step: int, steps: int) -> None:
        nonlocal at
        assert at < step <= steps == config.sft.steps
        at = step

    return run_sft(run, SPEC, config, 0, progress, lambda: at == stop_at, start)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, demos: Path) -> tuple[RunDir, str]:
    run = new_run(tmp_path_factory.mktemp("sft") / "point", demos)
    version = train(run)
    assert version is not None
    return run, version


def weights(run: RunDir, version: str) -> dict[str, np.ndarray]:
    return load_file(run.policies / version / "weights.safetensors")


def test_the_version_is_live_and_does_what_the_demonstrations_did(finished: tuple[RunDir, str], demos: Path) -> None:
    run, version = finished
    rows = Registry(run.registry).list()
    assert [(row.version, row.number, row.live, row.parent) for row in rows] == [(version, 1, True, "")]
    made = rows[0].made
    assert (made["command"], made["demonstrations"], made["seed"]) == ("sft", {"reach": 32}, 0)
    assert made["libraries"]["numpy"] == np.__version__
    policy = Policy.load(run.policies / version)
    assert (
        policy.spec.made == made and policy.spec.cameras == SPEC.cameras and policy.spec.control_hz == SPEC.control_hz
    )
    assert all(array.dtype != np.float16 for array in weights(run, version).values())
    # Demonstrations that it did not see: 32 were used, 40 are in the log.
    index = EpisodeIndex(demos)
    unseen = demo_rows(index, "reach", DemosConfig(per_task=40))[32:]
    errors, spread = [], []
    for row in unseen:
        told = policy.tokens("move the dot to the square")
        samples = cloning_samples(read_episode(index.path(row)), 4, told[None])
        mean, log_std = policy.infer(
            {"image/top": samples.images["top"], "state": samples.state, "tokens": samples.tokens[:, 0]}
        )
        executed = samples.mask[..., None] > 0
        errors.append(((mean - samples.target) ** 2 * executed).mean())
        spread.append((samples.target**2 * executed).mean())
        np.testing.assert_allclose(log_std, np.log(CONFIG.vla.sigma), atol=1e-6)
    assert np.mean(errors) < 0.7 * np.mean(spread)


def test_a_demonstration_is_learned_with_all_wordings_that_mean_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunDir(tmp_path / "run"), replace(CONFIG, demos=DemosConfig(2), sft=SFTConfig(steps=1, batch=64))
    told = ("move the dot", "to the square go")
    collect_demos(lambda: Worded(told), run.demos, config.demos, (), 60, lambda done, total: None)
    seeds = [row.seed for row in demo_rows(EpisodeIndex(run.demos), "reach", config.demos)]
    assert {instruction_of(Worded(told).spec, "reach", seed) for seed in seeds} == set(told)
    # One of the two is no wording of the task any more: it may mean something else, so it stays alone.
    now = ("go to the square", "move the dot", "move")
    seen: list[torch.Tensor] = []

    def spy(tokens: torch.Tensor, dropout: float, generator: torch.Generator) -> torch.Tensor:
        seen.append(tokens)
        return random_wording(tokens, dropout, generator)

    monkeypatch.setattr("trainer.supervised.random_wording", spy)
    version = run_sft(run, Worded(now).spec, config, 0, lambda step, steps: None)
    assert version is not None
    tokens = Policy.load(run.policies / version).tokens
    expected = {
        tuple(tokens(text).tobytes() for text in now),
        (tokens(told[1]).tobytes(), bytes(tokens("").nbytes), bytes(tokens("").nbytes)),
    }
    assert {tuple(row.tobytes() for row in sample.numpy()) for sample in seen[0]} == expected


def test_metrics_and_the_last_checkpoint(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    lines = [json.loads(line) for line in (run.sft / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(25, 251, 25), 260]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] == Registry(run.registry).list()[0].made["loss"]
    assert [path.name for path in run.sft.glob("checkpoint-*")] == ["checkpoint-00000260"]


def test_a_stopped_training_ends_with_the_same_weights(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    run = new_run(tmp_path / "point", demos)
    assert train(run, stop_at=60) is None and Registry(run.registry).live() is None
    with (run.sft / "metrics.jsonl").open("a") as file:
        file.write('{"step": 75, "loss": 9}\n{"st')  # what a kill after the checkpoint may leave
    version = train(run)
    expected = weights(*finished)
    assert version is not None
    for name, array in weights(run, version).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    for key in ("step", "loss", "lr"):
        assert [json.loads(line)[key] for line in (run.sft / "metrics.jsonl").read_text().splitlines()] == [
            json.loads(line)[key] for line in (finished[0].sft / "metrics.jsonl").read_text().splitlines()
        ]
    assert version == finished[1]  # so the bundle is the same too, its `made` included
    assert train(run) == version


SCRIPT = """
import sys, time
from pathlib import Path
import msgspec
import trainer.supervised
from trainer.sft import run_sft
from bridge.backends import make_backend
from bridge.config import BackendConfig, ConfigError
from runtime.rundir import RunDir
from trainer.config import TrainerConfig

trainer.supervised.CHECKPOINT_EVERY_S = 0.0
spec = make_backend(BackendConfig("point", {"size_px": 16})).spec

def progress(step, steps):
    if step == 40:
        print("here", flush=True)
        time.sleep(60)

config = msgspec.json.decode(sys.argv[2], type=TrainerConfig)
run_sft(RunDir(Path(sys.argv[1])), spec, config, 0, progress)
"""


def test_a_killed_training_ends_with_the_same_weights(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    run = new_run(tmp_path / "point", demos)
    command = [sys.executable, "-c", SCRIPT, str(run.path), msgspec.json.encode(CONFIG).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert len(list(run.sft.glob("checkpoint-*"))) >= 1
    assert train(run) == finished[1]


def test_other_settings_start_anew(tmp_path: Path, demos: Path) -> None:
    run = new_run(tmp_path / "point", demos)
    short = msgspec.structs.replace(CONFIG, sft=msgspec.structs.replace(CONFIG.sft, steps=30))
    assert train(run, short) is not None
    killed = run.sft / ".checkpoint-00000050.0123456789ab.tmp"
    killed.mkdir()
    os.utime(killed, (0, 0))
    other = msgspec.structs.replace(CONFIG, sft=msgspec.structs.replace(CONFIG.sft, steps=26))
    version = train(run, other)
    assert Registry(run.registry).live() == version
    assert [json.loads(line)["step"] for line in (run.sft / "metrics.jsonl").read_text().splitlines()] == [25, 26]
    assert not killed.exists()


def test_a_run_without_demonstrations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SFTError, match="no demonstration of 'reach'; `fieldtune demos` makes some"):
        train(RunDir(tmp_path))


def first_loss(run: RunDir) -> float:
    return float(json.loads((run.sft / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def test_from_a_base_it_keeps_what_was_learned_and_explores_as_asked(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    base = read_bundle(finished[0].policies / finished[1])
    run = new_run(tmp_path / "tuned", demos)
    config = replace(
        CONFIG,
        demos=DemosConfig(per_task=8),  # whose statistics are others than those of the base
        vla=replace(CONFIG.vla, sigma=0.05, noise_correlation=0.6),
        sft=replace(CONFIG.sft, steps=26),
    )
    version = train(run, config, start=base.path)
    assert version is not None
    tuned = read_bundle(run.policies / version)
    assert tuned.spec.made["start"] == base.version and tuned.spec.parent == ""
    assert tuned.tokenizer == base.tokenizer
    for name in ("state_mean", "state_std"):
        np.testing.assert_array_equal(tuned.weights[name], base.weights[name])
    np.testing.assert_allclose(tuned.weights["log_sigma"], np.log(0.05), atol=1e-6)
    assert tuned.spec.noise_correlation == 0.6 and base.spec.noise_correlation == 0.0
    assert not np.array_equal(tuned.weights["head.weight"], base.weights["head.weight"])

    scratch = new_run(tmp_path / "scratch", demos)
    assert train(scratch, config, stop_at=25) is None
    assert first_loss(run) < 0.5 * first_loss(scratch)
    own = load_file(scratch.sft / "checkpoint-00000025" / "weights.safetensors")["state_mean"]
    assert not np.allclose(own, base.weights["state_mean"], atol=1e-4)


def test_a_policy_that_is_told_what_is_committed_learns_to_go_on_from_it(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    base = read_bundle(finished[0].policies / finished[1])
    config = replace(CONFIG, vla=replace(CONFIG.vla, prefix_steps=2), sft=replace(CONFIG.sft, steps=70))
    run = new_run(tmp_path / "run", demos)
    (tmp_path / "stopped").mkdir()
    stopped = new_run(tmp_path / "stopped" / "run", demos)
    version = train(run, config, start=base.path)
    assert version is not None
    bundle = read_bundle(run.policies / version)
    assert bundle.spec.prefix_steps == 2 and bundle.weights["prefix.weight"].any()
    assert sorted(bundle.probe_inputs["prefix_mask"].sum(axis=1).tolist()) == [0, 0, 1, 1, 1, 1, 2, 2]
    # The delays are drawn again after a stop.
    assert train(stopped, config, start=base.path, stop_at=40) is None
    assert train(stopped, config, start=base.path) == version
    # Told what the demonstration did first it goes on as that did; told the opposite it does not.
    policy = Policy.load(run.policies / version)
    index = EpisodeIndex(demos)
    rows = demo_rows(index, "reach", config.demos)
    parts = [
        cloning_samples(read_episode(index.path(row)), 4, policy.tokens("move the dot to the square")) for row in rows
    ]
    whole = [part.mask.all(axis=1) for part in parts]
    images = np.concatenate([part.images["top"][rows] for part, rows in zip(parts, whole, strict=True)])
    state, tokens, target = (
        np.concatenate([getattr(part, name)[rows] for part, rows in zip(parts, whole, strict=True)])
        for name in ("state", "tokens", "target")
    )
    seen = {"image/top": images, "state": state, "tokens": tokens}

    def error(prefix: np.ndarray) -> float:
        mask = np.ones(prefix.shape[:2], np.float32)
        mean, _ = policy.infer({**seen, "prefix": prefix, "prefix_mask": mask})
        return float(((mean - target)[:, 2:] ** 2).mean())

    assert error(target[:, :2]) < 0.5 * error(-target[:, :2])


def test_another_base_starts_anew_and_one_of_another_network_is_refused(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    base = finished[0].policies / finished[1]
    run = new_run(tmp_path / "run", demos)
    config = replace(CONFIG, sft=replace(CONFIG.sft, steps=26))
    assert train(run, config, stop_at=25) is None  # a checkpoint of a fresh network, which is not to be gone on from
    fresh = first_loss(run)
    assert train(run, config, stop_at=25, start=base) is None
    assert first_loss(run) < 0.5 * fresh
    wide = replace(CONFIG, vla=replace(CONFIG.vla, width=32))
    with pytest.raises(ConfigError, match=r"\$\.trainer\.start: .*trainer\.vla"):
        train(new_run(tmp_path / "wide", demos), wide, start=base)
    with pytest.raises(ConfigError, match=r"\$\.trainer\.start: .*horizon"):
        long = replace(CONFIG, vla=replace(CONFIG.vla, horizon_steps=6))
        train(new_run(tmp_path / "long", demos), long, start=base)


def test_the_auxiliary_head_is_learned_and_resumed_but_not_exported(
    tmp_path: Path, demos: Path, finished: tuple[RunDir, str]
) -> None:
    config = replace(CONFIG, sft=replace(CONFIG.sft, steps=50, auxiliary=1.0))
    run, resumed = new_run(tmp_path / "whole", demos), new_run(tmp_path / "resumed", demos)
    assert train(resumed, config, stop_at=20) is None
    for each in (run, resumed):
        assert train(each, config, stop_at=40) is None
    heads = [load_file(each.sft / "checkpoint-00000040" / "auxiliary.safetensors") for each in (run, resumed)]
    np.testing.assert_array_equal(heads[0]["weight"], heads[1]["weight"])
    assert heads[0]["weight"].shape == (4, CONFIG.vla.width)  # dot and goal, from what the policy's own head reads
    version = train(run, config)
    assert version is not None
    shapes = {name: array.shape for name, array in weights(run, version).items()}
    assert shapes == {name: array.shape for name, array in weights(*finished).items()}
    lines = [json.loads(line) for line in (run.sft / "metrics.jsonl").read_text().splitlines()]
    # Where things are has variance 1 in each element; nothing learned would leave that in the loss.
    assert 0.1 < lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_a_backend_without_privileged_state_has_nothing_to_predict(tmp_path: Path) -> None:
    class Blind(Point):
        def observe(self) -> Observation:
            return dataclasses.replace(super().observe(), privileged=None)

    backend = Blind(PointOptions(size_px=16))
    backend._spec = replace(backend.spec, privileged=None)
    run = RunDir(tmp_path / "run")
    config = replace(CONFIG, demos=DemosConfig(2), sft=SFTConfig(steps=1, batch=8, auxiliary=1.0))
    collect_demos(lambda: backend, run.demos, config.demos, (), 60, lambda done, total: None)
    with pytest.raises(ConfigError, match=r"\$\.trainer\.sft\.auxiliary: is 1, and point has no privileged state"):
        run_sft(run, backend.spec, config, 0, lambda step, steps: None)
    assert Registry(run.registry).live() is None


def test_cloning_error_counts_executed_actions_only_in_half_ranges() -> None:
    mean = torch.zeros(2, 2, 2, requires_grad=True)
    target = torch.tensor([[[1.0, 2.0], [50.0, 50.0]], [[0.0, 4.0], [1.0, 0.0]]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    # In units of half the range (1 and 2): (1, 1), (0, 2), (1, 0); means of squares 1, 2, 0.5.
    loss = cloning_error(mean, target, mask, torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx(3.5 / 3)
    (gradient,) = torch.autograd.grad(loss, mean)
    assert gradient[0, 1].tolist() == [0.0, 0.0] and gradient[0, 0].abs().min() > 0


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = SFTConfig(steps=200, lr=1e-3)
    rates = [learning_rate(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (9, 10) and rates[-1] < 1e-6
    assert rates[105] == pytest.approx(5e-4)
    assert learning_rate(0, SFTConfig(steps=1)) > 0
