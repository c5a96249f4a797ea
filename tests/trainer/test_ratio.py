import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from ppo_robot import BACKEND, CONFIG, Robot
from vla_samples import INSTRUCTIONS, TOLD_SPEC, observations, tokenizer, told_vla

from bridge.backend import Observation
from bridge.backends import make_backend
from bridge.config import BridgeConfig
from bridge.drive import drive as drive_bridge
from bridge.messages import observation_tensors
from runtime.bundle import PARTS, read_bundle, write_bundle
from runtime.episode import FORMAT, Decision, Episode, EpisodeStart
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex
from runtime.inference import Pending, decide
from runtime.policy import Policy
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.batch import Batch, build_batch
from trainer.export import Exporter, load_weights
from trainer.ratio import Behaviours, RatioError, check_ratio, probe_difference
from trainer.vla import VLA

torch.set_num_threads(1)
SPEC = make_backend(BACKEND).spec


def setup(run: RunDir) -> tuple[VLA, str, Behaviours]:
    version = Registry(run.registry).live()
    assert version is not None
    bundle = read_bundle(run.policies / version)
    vla = VLA(CONFIG.vla, bundle.spec)
    load_weights(vla, bundle)
    behaviours = Behaviours(run.policies, vla, 3)
    behaviours.set_history([version])
    return vla, version, behaviours


def batch_of(run: RunDir, behaviours: Behaviours) -> Batch:
    index = EpisodeIndex(run.episodes)
    policy = Policy.load(run.policies / str(Registry(run.registry).live()))
    return build_batch(
        [read_episode(index.path(row)) for row in index.after(0)],
        policy.spec,
        tuple(SPEC.instructions),
        CONFIG.ppo,
        tokens=policy.tokens,
        age=behaviours.age,
        max_age=2,
    )


def check(run: RunDir, behaviours: Behaviours) -> float:
    return check_ratio(batch_of(run, behaviours), behaviours, np.random.default_rng(0))


def drive(run: RunDir, **how: object) -> None:
    robot = Robot(run)
    robot.run(4, **how)  # type: ignore[arg-type]
    robot.close()


def test_runtime_and_trainer_agree(run: RunDir) -> None:
    _, _, behaviours = setup(run)
    drive(run)
    assert check(run, behaviours) < 1e-3


@pytest.mark.parametrize("play_steps", [None, 3])
def test_correlated_noise_agrees_through_the_real_server(
    run: RunDir, serve: Callable[..., Any], play_steps: int | None
) -> None:
    white = read_bundle(run.policies / str(Registry(run.registry).live()))
    parts = {name: (white.path / name).read_bytes() for name in PARTS if name != "policy.yaml"}
    version = write_bundle(run.policies, replace(white.spec, noise_correlation=0.8), parts)
    assert version != white.version
    Registry(run.registry).add(version, parent=white.version, made={})
    Registry(run.registry).set_live(version, why="test")
    policy = Policy.load(run.policies / version)
    serving = serve(policy=policy, log=EpisodeLog(run.episodes), horizon_steps=37)
    drive_bridge(
        make_backend(BACKEND),
        serving.client(),
        BridgeConfig(play_steps=play_steps),
        stopped=lambda: False,
        report=lambda _report, _assignment: None,
        warn=pytest.fail,
        episodes=6,
    )
    serving.stop()
    vla, _, behaviours = setup(run)
    batch = batch_of(run, behaviours)
    assert set(batch.executed.sum(dim=1).tolist()) > {play_steps or 4}, "every chunk was played to its end"
    assert check_ratio(batch, behaviours, np.random.default_rng(0)) < 1e-3
    # Were the noise taken for white, the gap would be far above what is tolerated.
    vla.spec = white.spec
    behaviours.remember(version, vla)
    with pytest.raises(RatioError):
        check_ratio(batch, behaviours, np.random.default_rng(0))


def told_episode(policy: Policy, number: int) -> Episode:
    """Chunks of 3 that are asked for one and two steps before the end of the one before, and told these actions."""
    name, rows = f"{number:032x}", observations(4, TOLD_SPEC, seed=number)
    cameras = {camera.name: rows[f"image/{camera.name}"] for camera in TOLD_SPEC.cameras}
    seen = [Observation({name: rows[i] for name, rows in cameras.items()}, rows["state"][i]) for i in range(4)]
    decisions: list[Decision] = []
    for i, (step, told, k) in enumerate([(0, 0, 2), (1, 1, 2), (2, 2, 1)]):
        prefix = np.concatenate([decision.sent for decision in decisions])[step:] if told else None
        pending = Pending(
            identity=b"",
            session="",
            request=i,
            episode=name,
            decision=i + 1,
            step=step,
            instruction=INSTRUCTIONS[0],
            tensors={**observation_tensors(seen[i]), **({} if prefix is None else {"prefix": prefix})},
            explore=True,
            arrived_s=0.0,
        )
        (decided,) = decide(policy, [pending])
        assert not decided.error
        decisions.append(
            Decision(
                number=i + 1,
                step=step,
                version=policy.version,
                observation=seen[i],
                actions=decided.actions,
                sent=decided.actions[told : told + k],
                reward=np.zeros(k, np.float32),
                start=told,
                prefix=prefix,
                log_prob=decided.log_probs["log_prob"],
                first_log_prob=decided.log_probs["first_log_prob"],
            )
        )
    start = EpisodeStart(
        format=FORMAT,
        episode=name,
        task="open",
        instruction=INSTRUCTIONS[0],
        seed=0,
        source="policy",
        explore=True,
        client="test",
        spec=SPEC,
        started_unix_s=0.0,
    )
    return Episode(start, decisions, "success", 5, final=seen[3])


def test_slices_of_a_policy_that_is_told_what_is_committed_agree(tmp_path: Path) -> None:
    vla = told_vla()
    vla.spec = replace(TOLD_SPEC, noise_correlation=0.5)
    version = Exporter(vla, tokenizer(), observations(4, TOLD_SPEC)).publish(tmp_path, parent="", made={})
    policy = Policy.load(tmp_path / version)
    behaviours = Behaviours(tmp_path, vla, 3)
    behaviours.set_history([version])
    batch = build_batch(
        [told_episode(policy, number) for number in range(1, 9)],
        policy.spec,
        ("open",),
        CONFIG.ppo,
        tokens=policy.tokens,
        age=behaviours.age,
        max_age=2,
    )
    assert batch.executed[:3].tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert check_ratio(batch, behaviours, np.random.default_rng(0)) < 1e-3
    prefix = batch.observations.prefix
    assert prefix is not None
    prefix += 0.5
    with pytest.raises(RatioError):
        check_ratio(batch, behaviours, np.random.default_rng(0))


def test_another_image_is_preprocessing(run: RunDir) -> None:
    _, _, behaviours = setup(run)
    drive(run, darker=True)
    with pytest.raises(RatioError, match=r"preprocessing.*probe comes out right") as caught:
        check(run, behaviours)
    assert caught.value.broken == "preprocessing"


def test_weights_that_are_not_those_of_the_bundle_are_export(run: RunDir) -> None:
    vla, version, behaviours = setup(run)
    drive(run)
    with torch.no_grad():
        vla.head.bias += 0.05
    behaviours.remember(version, vla)
    with pytest.raises(RatioError, match=r"export.*half the range") as caught:
        check(run, behaviours)
    assert caught.value.broken == "export"


def test_the_stamp_of_another_version_is_lineage(run: RunDir) -> None:
    vla, version, behaviours = setup(run)
    other = copy.deepcopy(vla)
    with torch.no_grad():
        other.head.bias += 0.05
    behaviours.remember(version, vla)
    behaviours.remember("other", other)
    behaviours.set_history([version, "other"])
    drive(run, stamp="other")
    with pytest.raises(RatioError, match=f"are those of version {version[:12]}") as caught:
        check(run, behaviours)
    assert caught.value.broken == "lineage"


def test_a_version_that_never_was_live_is_lineage(run: RunDir) -> None:
    _, _, behaviours = setup(run)
    drive(run, stamp="f" * 64)
    with pytest.raises(RatioError, match="never had live") as caught:
        check(run, behaviours)
    assert caught.value.broken == "lineage"


def test_a_log_prob_that_is_no_number_does_not_pass(run: RunDir) -> None:
    _, _, behaviours = setup(run)
    drive(run)
    batch = batch_of(run, behaviours)
    batch.log_prob[:] = float("nan")
    with pytest.raises(RatioError):
        check_ratio(batch, behaviours, np.random.default_rng(0))


def test_age_counts_changes_of_the_live_version_since(run: RunDir) -> None:
    _, _, behaviours = setup(run)
    behaviours.set_history(["a", "b", "c", "b"])
    assert [behaviours.age(version) for version in "abc"] == [3, 0, 1]


def test_old_weights_are_read_from_the_bundle(run: RunDir) -> None:
    vla, version, behaviours = setup(run)
    for i in range(5):
        behaviours.remember(f"v{i}", vla)
    assert behaviours.recent() == ["v2", "v3", "v4"]
    assert probe_difference(behaviours.policy(version), behaviours.bundle(version)) < 1e-5
