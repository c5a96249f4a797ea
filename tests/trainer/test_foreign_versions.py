"""A version that cannot be trained further is live for a while: the trainer waits, and goes on from the next one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace
from ppo_robot import CONFIG, TrainingScene, nothing
from tokenizers import Tokenizer

from runtime.bundle import PARTS, read_bundle, write_bundle
from runtime.rundir import RunDir
from trainer.export import Exporter, become
from trainer.tokens import build_tokenizer
from trainer.vla import VLA

torch.set_num_threads(1)


class Scene(TrainingScene):
    """Versions of somebody else's come into the run."""

    def add(self, kind: str) -> str:
        """Make a version that is not the trainer's, as `fieldtune policies add` does."""
        bundle = read_bundle(self.run.policies / str(self.registry.live()))
        vla = VLA(replace(CONFIG.vla, width=32) if kind == "network" else CONFIG.vla, bundle.spec)
        vla.set_state_statistics(torch.zeros(2), torch.ones(2))
        tokenizer = Tokenizer.from_str(bundle.tokenizer)
        if kind == "tokenizer":
            tokenizer = build_tokenizer(["go to the green square at once"], CONFIG.vla.vocabulary, 16)
            become(vla, bundle)
        version = Exporter(vla, tokenizer, bundle.probe_inputs).publish(
            self.run.policies, parent="", made={"command": "import"}
        )
        self.registry.add(version, parent="", made={"command": "import"})
        return version


@pytest.fixture
def scene(run: RunDir) -> Iterator[Scene]:
    made = Scene(run)
    yield made
    made.robot.close()


@pytest.mark.parametrize("kind", ["network", "tokenizer"])
@pytest.mark.parametrize("restarts", [False, True])
def test_it_waits_until_another_is_live(scene: Scene, kind: str, restarts: bool) -> None:
    scene.robot.run(4)
    own = scene.iterate()["version"]
    assert scene.registry.live() == own
    scene.robot.run(4)
    foreign = scene.add(kind)
    scene.registry.set_live(foreign, why="test")
    scene.robot.run(8)
    if restarts:
        scene.start()
        assert scene.trainer.version == own
    # There is enough to learn from; but what would come of it replaces what somebody has made live.
    line = scene.iterate(nothing, nothing, lambda: scene.registry.set_live(own, why="test"))
    assert scene.registry.get(line["version"]).parent == own and scene.registry.live() == line["version"]
    stale = sum(row.decisions for row in scene.trainer._index.after(8, 8))
    assert line["episodes"] == 4 and line["dropped_stale"] == stale > 0 and line["ratio_error"] < 0.02
    (said,) = [text for text in scene.said if foreign[:12] in text]
    assert "cannot be trained further" in said and (
        "tokenizer" in said if kind == "tokenizer" else "trainer.vla" in said
    )


def test_the_same_tokenizer_in_other_words_is_no_other(scene: Scene) -> None:
    scene.robot.run(4)
    scene.iterate()
    live = read_bundle(scene.run.policies / str(scene.registry.live()))
    parts = {name: (live.path / name).read_bytes() for name in PARTS if name != "policy.yaml"}
    parts["tokenizer.json"] = json.dumps(json.loads(live.tokenizer), indent=2).encode()
    other = write_bundle(scene.run.policies, live.spec, parts)
    assert other != live.version
    scene.registry.add(other, parent="", made={"command": "import"})
    scene.registry.set_live(other, why="test")
    scene.robot.run(4)
    line = scene.iterate()
    assert scene.registry.get(line["version"]).parent == other and line["ratio_error"] < 0.02
