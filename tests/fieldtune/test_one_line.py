"""From a simulator to an arm by `backend:` alone: the quickstart on the emulated SO-101, as real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.backends import make_backend
from bridge.config import load_yaml
from fieldtune.deployment import load_deployment
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from runtime.registry import Registry
from runtime.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
ARM = load_yaml(ROOT / "configs" / "so101_emulated.yaml")["backend"]
BLOCK = f"backend={json.dumps(ARM)}"
SMALL = [
    "bridge.workers=2",
    "bridge.horizon_steps=40",
    "trainer.demos.per_task=2",
    "trainer.sft.steps=3",
    "trainer.episodes_per_iteration=2",
    "trainer.ppo.critic_warmup_iterations=0",
    "page.serve=false",
    "trainer.stop.iterations=1",
    "trainer.evaluate.episodes_per_task=2",
]


def test_nothing_but_the_backend_differs() -> None:
    simulated, arm = load_deployment("quickstart"), load_deployment("quickstart", [BLOCK])
    assert (simulated.bridge, simulated.trainer, simulated.runtime) == (arm.bridge, arm.trainer, arm.runtime)
    spec = make_backend(arm.backend).spec
    assert spec.name == "so101" and spec.paced and spec.action.kind == "delta"
    assert simulated.backend.name == "metaworld"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_quickstart_is_demonstrated_served_and_learned_on_the_emulated_arm(tmp_path: Path) -> None:
    settings = [x for each in (BLOCK, f"runs={tmp_path}", *SMALL) for x in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-m", "fieldtune", "up", "quickstart", *settings],
        capture_output=True,
        text=True,
        timeout=220,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "quickstart")
    assert [row.source for row in EpisodeIndex(run.demos).after(0)] == ["expert"] * 2
    index = EpisodeIndex(run.episodes)
    episodes = [read_episode(index.path(row)) for row in index.after(0) if row.status != "aborted"]
    assert len(episodes) >= 2 and {episode.start.spec.name for episode in episodes} == {"so101"}
    registry = Registry(run.registry)
    live = registry.live()
    assert live is not None and len(registry.lineage(live)) == 2, "it has not learned"
