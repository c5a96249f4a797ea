"""A small VLA, its tokenizer and observations, for the tests of network and export."""

from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bridge.backend import ActionSpec, CameraSpec, VectorSpec
from runtime.bundle import FORMAT, PolicySpec
from runtime.policy import encode
from trainer.config import VLAConfig
from trainer.export import ARGUMENTS, probe_prefixes
from trainer.tokens import build_tokenizer
from trainer.vla import VLA

INSTRUCTIONS = ("open the drawer", "close the drawer")
CONFIG = VLAConfig(horizon_steps=3, channels=(6, 8), width=16, text_width=8, max_tokens=8, vocabulary=300, sigma=0.2)
SPEC = PolicySpec(
    format=FORMAT,
    name="small",
    # Out of order and of different sizes, so that a mix-up shows.
    cameras=(CameraSpec("wrist", 12, 20), CameraSpec("corner", 16, 16)),
    state=VectorSpec(("x", "y", "grip"), ("m", "m", "1")),
    action=ActionSpec(("a", "b"), ("1", "m"), (-1.0, 0.0), (1.0, 10.0), "delta"),
    control_hz=10.0,
    horizon=3,
    tokens=8,
)


# The same, told up to two committed actions.
TOLD_CONFIG = replace(CONFIG, prefix_steps=2)
TOLD_SPEC = replace(SPEC, prefix_steps=2)


def told_vla(seed: int = 0) -> VLA:
    """`small_vla` with a prefix, and weights of it that make it visible in the output."""
    vla = small_vla(TOLD_SPEC, TOLD_CONFIG, seed)
    torch.nn.init.normal_(vla.prefix.weight, generator=torch.Generator().manual_seed(seed))
    return vla


def small_vla(spec: PolicySpec = SPEC, config: VLAConfig = CONFIG, seed: int = 0) -> VLA:
    """A VLA with statistics, and a head that makes what it sees visible in its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vla = VLA(config, spec)
        torch.nn.init.normal_(vla.head.weight, std=0.3)
    n = len(spec.state.names)
    vla.set_state_statistics(torch.arange(n).float(), 1 + torch.arange(n).float())
    return vla


def tokenizer() -> Tokenizer:
    """The tokenizer of `INSTRUCTIONS`."""
    return build_tokenizer(INSTRUCTIONS, CONFIG.vocabulary, CONFIG.max_tokens)


def observations(batch: int, spec: PolicySpec = SPEC, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random observations under the names of the graph's inputs, `[batch, ...]`."""
    rng = np.random.default_rng(seed)
    words = tokenizer()
    arrays: dict[str, NDArray[Any]] = {
        f"image/{camera.name}": rng.integers(0, 256, (batch, camera.height, camera.width, 3)).astype(np.uint8)
        for camera in spec.cameras
    }
    arrays["state"] = rng.normal(0, 2, (batch, len(spec.state.names))).astype(np.float32)
    arrays["tokens"] = np.stack([encode(words, INSTRUCTIONS[i % 2], CONFIG.max_tokens) for i in range(batch)])
    if spec.prefix_steps:
        actions = rng.uniform(spec.action.low, spec.action.high, (batch, spec.horizon, len(spec.action.names)))
        arrays |= probe_prefixes(actions.astype(np.float32), spec.prefix_steps)
    return arrays


def arguments(arrays: dict[str, NDArray[Any]]) -> list[Any]:
    """The same as arguments of the VLA."""
    images = {n.removeprefix("image/"): torch.from_numpy(a) for n, a in arrays.items() if n.startswith("image/")}
    return [images, *(torch.from_numpy(arrays[name]) for name in ARGUMENTS if name in arrays)]
