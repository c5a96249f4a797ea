"""The real `lerobot` loads, filters and trains on what is exported, and we read what it writes.

It pins other versions than ours, so it lives in an environment of its own, which FIELDTUNE_LEROBOT_PYTHON names:

    python -m venv lerobot && lerobot/bin/pip install 'lerobot==0.4.4' 'numpy<2.3' onnx onnxscript
    FIELDTUNE_LEROBOT_PYTHON=lerobot/bin/python make test
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from data_samples import HORIZON, SPEC, log_of, observation, picture, sent

from bridge.config import dump_yaml
from fieldtune.data.export import Wanted, export
from fieldtune.data.importing import import_demos
from fieldtune.data.lerobot_export import LeRobotExport
from fieldtune.data.lerobot_reading import LeRobotReader
from fieldtune.data.mapping import DatasetConfig, ElementConfig
from runtime.bundle import FORMAT, PolicySpec
from runtime.index import EpisodeIndex
from runtime.make_bundle import make_bundle
from runtime.policy import Policy
from runtime.reading import read_episode

PYTHON = os.environ.get("FIELDTUNE_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="FIELDTUNE_LEROBOT_PYTHON names no Python with lerobot; see this file"),
    pytest.mark.slow,
]
STEPS = 3 * HORIZON - 1
TIMEOUT_S = 170


def lerobot(code: str, *arguments: str, tmp_path: Path) -> Any:
    """What `code` prints as JSON in lerobot's Python. It has no network and keeps its caches in `tmp_path`."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments],
        env={**os.environ, **home}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LOAD = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
root = sys.argv[1]
meta = LeRobotDatasetMetadata("local/x", root=root)
good = [row["episode_index"] for row in meta.episodes if row["success"]]
whole = LeRobotDataset("local/x", root=root)
chunks = {"action": [i / meta.fps for i in range(3)]}
some = LeRobotDataset("local/x", root=root, episodes=good, delta_timestamps=chunks)
item, chunk = whole[5], some[len(some) - 1]
image = lambda frame, key: np.rint(frame[key].numpy() * 255).astype(int).transpose(1, 2, 0).tolist()
print(json.dumps({
    "episodes": whole.num_episodes, "frames": len(whole), "good": good, "some": len(some), "task": item["task"],
    "image": image(item, "observation.images.eye"), "action": item["action"].tolist(),
    "state": item["observation.state"].tolist(),
    "version": item["policy_version"], "observed": bool(item["observed"]), "chunk": chunk["action"].tolist(),
    "pad": chunk["action_is_pad"].tolist(), "episode": int(chunk["episode_index"]),
    "mean": meta.stats["action"]["mean"].tolist(), "status": [row["status"] for row in meta.episodes],
}))
"""

# Three gradient steps of ACT, made small, on the chunks of the successful episodes.
TRAIN = """
import json, sys
import torch
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
root = sys.argv[1]
meta = LeRobotDatasetMetadata("local/x", root=root)
features = dataset_to_policy_features(meta.features)
output = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
config = ACTConfig(
    input_features={k: f for k, f in features.items() if k not in output}, output_features=output,
    chunk_size=4, n_action_steps=4, dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1, use_vae=False,
    pretrained_backbone_weights=None, device="cpu")
data = LeRobotDataset("local/x", root=root, delta_timestamps={"action": [i / meta.fps for i in range(4)]})
policy = ACTPolicy(config)
before, _ = make_act_pre_post_processors(config, dataset_stats=meta.stats)
optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
losses = []
for _, batch in zip(range(3), torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)):
    loss, _ = policy.forward(before(batch))
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "inputs": sorted(config.input_features), "outputs": sorted(output)}))
"""

# An ACT policy, made small and saved; what it gives by LeRobot's own way goes to a file.
SAVE = """
import json, sys
import numpy as np
import torch
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
root, out = sys.argv[1:]
meta = LeRobotDatasetMetadata("local/x", root=root)
features = dataset_to_policy_features(meta.features)
output = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
config = ACTConfig(
    input_features={k: f for k, f in features.items() if k not in output}, output_features=output,
    chunk_size=4, n_action_steps=4, dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1,
    pretrained_backbone_weights=None, device="cpu")
policy = ACTPolicy(config).eval()
policy.save_pretrained(out)
before, after = make_act_pre_post_processors(config, dataset_stats=meta.stats)
batch = torch.utils.data.default_collate([LeRobotDataset("local/x", root=root)[i] for i in (0, 5, 9)])
with torch.no_grad():
    chunk = after(policy.predict_action_chunk(before(batch)))
np.savez(out + "/chunk.npz", chunk=chunk.numpy(), state=batch["observation.state"].numpy(), **{
    key.removeprefix("observation.images."): np.rint(batch[key].numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for key in config.image_features})
print(json.dumps(sorted(config.image_features)))
"""

# What lerobot itself records, appended to what we exported and alone.
APPEND = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root = sys.argv[1]
data = LeRobotDataset("local/x", root=root)
image = lambda key: np.zeros(data.features[key]["shape"], np.uint8)
for i in range(3):
    data.add_frame({
        "observation.images.eye": image("observation.images.eye"),
        "observation.images.wrist": image("observation.images.wrist"),
        "observation.state": np.zeros(3, np.float32), "action": np.zeros(2, np.float32),
        "next.reward": np.zeros(1, np.float32), "next.done": np.array([i == 2]),
        "observed": np.array([True]), "step": np.array([i]), "policy_version": "human", "task": "stay",
    })
data.save_episode()
data.finalize()
again = LeRobotDataset("local/x", root=root)
print(json.dumps({"episodes": again.num_episodes, "frames": len(again), "task": again[len(again) - 1]["task"],
    "version": again[len(again) - 1]["policy_version"], "success": [row["success"] for row in again.meta.episodes]}))
"""

RECORD = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root, videos = sys.argv[1], sys.argv[2] == "video"
features = {
    "observation.images.front": {"dtype": sys.argv[2], "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
    "observation.images.wrist": {"dtype": sys.argv[2], "shape": (64, 64, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x.pos", "y.pos", "z.pos"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["a.pos", "b.pos"]},
}
codec = {"vcodec": "h264"} if videos else {}
data = LeRobotDataset.create("local/y", fps=10, root=root, features=features, use_videos=videos, **codec)
for episode in range(2):
    for i in range(6):
        shade = 40 * i + 10 * episode
        data.add_frame({
            "observation.images.front": np.full((64, 96, 3), shade, np.uint8),
            "observation.images.wrist": np.full((64, 64, 3), shade, np.uint8),
            "observation.state": np.array([i, episode, 1], np.float32),
            "action": np.array([i / 10, 90 * episode], np.float32), "task": "Go!",
        })
    data.save_episode()
data.finalize()
print(json.dumps({}))
"""


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    log = log_of(tmp_path / "log", 4)
    export(EpisodeIndex(log), LeRobotExport(out, "steps"), Wanted(), lambda done, total: None)
    return out


def test_it_loads_and_filters(exported: Path, tmp_path: Path) -> None:
    found = lerobot(LOAD, str(exported), tmp_path=tmp_path)
    assert (found["episodes"], found["frames"]) == (4, 4 * STEPS) and found["task"] == "go"
    assert found["good"] == [0, 2] and found["some"] == 2 * STEPS
    assert found["status"] == ["success", "failure"] * 2
    # Frame 5 of the first episode: the second decision's observation, held for one step.
    np.testing.assert_array_equal(found["image"], observation(4)["image/eye"])
    np.testing.assert_array_equal(np.float32(found["state"]), observation(4)["state"])
    np.testing.assert_array_equal(np.float32(found["action"]), sent(5))
    assert found["version"] == "v2" and found["observed"] is False
    assert found["episode"] == 2 and found["pad"] == [False, True, True]
    np.testing.assert_array_equal(np.float32(found["chunk"]), np.stack([sent(STEPS - 1)] * 3))
    np.testing.assert_allclose(found["mean"], np.mean([sent(step) for step in range(STEPS)], 0), rtol=1e-6)


def test_rows_that_are_decisions_load(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", 2)
    export(EpisodeIndex(log), LeRobotExport(tmp_path / "out", "decisions"), Wanted(), lambda done, total: None)
    code = LOAD.replace("for i in range(3)", "for i in range(1)").replace("whole[5]", "whole[4]")
    found = lerobot(code, str(tmp_path / "out"), tmp_path=tmp_path)
    assert (found["episodes"], found["frames"], found["observed"]) == (2, 6, True)
    np.testing.assert_array_equal(np.float32(found["action"]), np.stack([sent(step) for step in range(4, 8)]))


def test_it_trains(exported: Path, tmp_path: Path) -> None:
    found = lerobot(TRAIN, str(exported), tmp_path=tmp_path)
    assert np.isfinite(found["losses"]).all() and len(found["losses"]) == 3
    assert found["outputs"] == ["action"]
    assert found["inputs"] == ["observation.images.eye", "observation.images.wrist", "observation.state"]


def test_it_appends(exported: Path, tmp_path: Path) -> None:
    found = lerobot(APPEND, str(exported), tmp_path=tmp_path)
    assert (found["episodes"], found["frames"]) == (5, 4 * STEPS + 3)
    assert found["task"] == "stay" and found["version"] == "human"
    assert found["success"] == [True, False, True, False, None]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_it_records_is_imported(kind: str, tmp_path: Path) -> None:
    lerobot(RECORD, str(tmp_path / "y"), kind, tmp_path=tmp_path)
    config = DatasetConfig(
        cameras={"eye": "observation.images.front"},
        state={name: f"observation.state/{name}.pos" for name in "xyz"},
        action={"a": "action/a.pos", "b": ElementConfig("action/b.pos", scale=0.01)},
        tasks={"Go!": "t"},
        resize=True,
    )
    done = import_demos(LeRobotReader(tmp_path / "y"), tmp_path / "demos", SPEC, config, 0, lambda done, total: None)
    assert done.written == 2
    index = EpisodeIndex(tmp_path / "demos")
    second = read_episode(index.path(index.after(0)[1]))
    assert second.steps == 6 and second.start.instruction in ("go", "move") and second.start.source == "expert"
    for i, decision in enumerate(second.decisions):
        np.testing.assert_array_equal(decision.observation.state, np.array([i, 1, 1], np.float32))
        np.testing.assert_allclose(decision.sent, [[i / 10, 0.9]], rtol=1e-6)
        for image in decision.observation.images.values():
            # A video of lerobot's is lossy; shades are 40 apart.
            assert np.abs(image.astype(int) - (40 * i + 10)).max() <= (0 if kind == "image" else 6)
    assert picture(0).shape == second.decisions[0].observation.images["wrist"].shape


def test_act_becomes_a_bundle_as_the_documentation_says(exported: Path, tmp_path: Path) -> None:
    lerobot(SAVE, str(exported), str(tmp_path / "act"), tmp_path=tmp_path)
    text = (Path(__file__).parents[2] / "docs/bundle.md").read_text()
    (script,) = (block.split("```")[0] for block in text.split("```python\n")[1:] if "export_act.py" in block)
    there = f"import os\nos.chdir({str(tmp_path)!r})\n{script}\nprint(0)"
    lerobot(there, str(tmp_path / "act"), str(exported), "0.1", tmp_path=tmp_path)
    spec = PolicySpec(FORMAT, "act", SPEC.cameras, SPEC.state, SPEC.action, SPEC.control_hz, horizon=4, tokens=0)
    (tmp_path / "policy.yaml").write_text(dump_yaml(msgspec.to_builtins(spec)))
    policy = Policy.load(tmp_path / make_bundle(tmp_path / "policy.onnx", tmp_path / "policy.yaml", None, tmp_path))
    with np.load(tmp_path / "act/chunk.npz") as wanted:
        images = {f"image/{camera.name}": wanted[camera.name] for camera in SPEC.cameras}
        mean, log_std = policy.infer({**images, "state": wanted["state"]})
        np.testing.assert_allclose(mean, wanted["chunk"], atol=1e-5)
    np.testing.assert_allclose(log_std, np.log(0.1), rtol=1e-6)
