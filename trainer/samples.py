"""Episodes as samples for cloning, used by supervised fine-tuning and by self behaviour cloning alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.backend import BackendSpec, Float32, UInt8
from bridge.safety import HELD
from runtime.episode import Episode
from trainer.vla import PADDING


@dataclass(slots=True)
class CloningSamples:
    """N observations, each with the actions that were really sent from its step on.

    `images` uint8 `[N, H, W, 3]` by camera, `state` float32 `[N, n]`, `tokens` int64 `[N, W, L]`: the `wordings` that
    each could have been told (L = 0 where none were given), `target` float32 `[N, h, d]` in units of the action, `mask`
    float32 `[N, h]`: 1 where `target` holds an executed action, 0 (and a zero target) where nothing was executed.
    """

    images: dict[str, UInt8]
    state: Float32
    tokens: NDArray[np.int64]
    target: Float32
    mask: Float32

    def __len__(self) -> int:
        return len(self.state)


def wordings(spec: BackendSpec, task: str, told: str, tokens: Callable[[str], NDArray[np.int64]]) -> NDArray[np.int64]:
    """What an episode of the task may be told as well, int64 `[W, L]`; `tokens` encodes a text as `[L]`.

    All wordings of the task if `told`, which the episode was told, is one of them: they mean the same. Otherwise `told`
    alone, for nobody knows whether it does. Rows of padding, behind the others, make W the same for all tasks; a text
    without a token is one of them.
    """
    known = spec.instructions[task]
    texts = known if told in known else (told,)
    rows = sorted((tokens(text) for text in texts), key=lambda row: not (row != PADDING).any())
    most = max(len(texts) for texts in spec.instructions.values())
    return np.stack(rows + [np.full_like(rows[0], PADDING)] * (most - len(rows)))


def cloning_samples(episode: Episode, horizon: int, tokens: NDArray[np.int64] | None = None) -> CloningSamples:
    """One sample for each decision that was followed by an executed action; `tokens` `[W, L]` are its `wordings`.

    The target of a decision at step t are the actions sent at t, t+1, ..., t+horizon-1, by this decision and by those
    after it: what the robot did, however the chunks were cut. Actions that were sampled but never executed, and steps
    beyond the end of the episode, have mask 0; so have steps in which the robot was held.
    """
    decisions = episode.decisions
    dims = len(episode.start.spec.action.names)
    length = max((decision.step + decision.start + len(decision.sent) for decision in decisions), default=0)
    sent = np.zeros((length + horizon, dims), np.float32)
    executed = np.zeros(length + horizon, np.float32)
    for decision in decisions:
        first = decision.step + decision.start
        steps = slice(first, first + len(decision.sent))
        # To hold because nothing was there to be done is nothing to be imitated.
        executed[steps] = 1.0 if decision.rules is None else decision.rules & HELD == 0
        sent[steps] = decision.sent * executed[steps, None]
    # A decision after the last executed step (the chunk never ran) has nothing to teach.
    used = [d for d in decisions if executed[d.step : d.step + horizon].any()]
    window = np.array([d.step for d in used], np.int64)[:, None] + np.arange(horizon)
    spec = episode.start.spec
    told = np.zeros((1, 0), np.int64) if tokens is None else tokens.astype(np.int64)
    return CloningSamples(
        images={
            camera.name: _stack([d.observation.images[camera.name] for d in used], (camera.height, camera.width, 3))
            for camera in spec.cameras
        },
        state=np.array([d.observation.state for d in used], np.float32).reshape(len(used), len(spec.state.names)),
        tokens=np.broadcast_to(told, (len(used), *told.shape)),
        target=sent[window],
        mask=executed[window],
    )


def random_prefix(
    target: Tensor, mask: Tensor, prefix_steps: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What a policy that can be told p = `prefix_steps` committed actions is told in training, and what it has to do.

    Each sample of `target` `[B, h, d]` and `mask` `[B, h]` gets a delay c of 0 to p at random (training-time action
    conditioning, 2512.05964): the first c actions of the target are told, the others are to be imitated. Of a target
    that ends early at least the last action is left to imitate. Returns the prefix `[B, p, d]`, its mask `[B, p]` and
    the mask `[B, h]` of what is left; without a prefix None, None and `mask`.
    """
    if not prefix_steps:
        return None, None, mask
    known = mask.cumprod(dim=1).sum(dim=1)  # executed without a gap from the first on
    delay = torch.randint(0, prefix_steps + 1, (len(mask),), generator=generator)
    delay = torch.minimum(delay, (known - 1).clamp(min=0))
    told = (torch.arange(mask.shape[1]) < delay[:, None]).to(mask.dtype)
    prefix_mask = told[:, :prefix_steps]
    return target[:, :prefix_steps] * prefix_mask.unsqueeze(-1), prefix_mask, mask * (1 - told)


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image `[B, H, W, C]` moved by up to `pixels` either way in x and y, its border repeated (DrQ, 2004.13649).

    Works on the CPU, in the dtype it is given: moving whole pixels of uint8 needs no float copy of the images.
    """
    if pixels == 0:
        return images
    batch, height, width, channels = images.shape
    source = images.numpy()
    offsets = torch.randint(0, 2 * pixels + 1, (batch, 2), generator=generator).tolist()
    # Plain copies of windows of a padded array: three times as fast as one gather over index tensors.
    padded = np.empty((batch, height + 2 * pixels, width + 2 * pixels, channels), source.dtype)
    inside = slice(pixels, -pixels)
    padded[:, inside, inside] = source
    padded[:, :pixels, inside] = source[:, :1]
    padded[:, -pixels:, inside] = source[:, -1:]
    padded[:, :, :pixels] = padded[:, :, pixels : pixels + 1]
    padded[:, :, -pixels:] = padded[:, :, -pixels - 1 : -pixels]
    shifted = np.empty_like(source)
    for i, (y, x) in enumerate(offsets):
        shifted[i] = padded[i, y : y + height, x : x + width]
    return torch.from_numpy(shifted)


def random_wording(tokens: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """One of the `wordings` int64 `[B, W, L]` of each sample, `[B, L]`, without a random share `dropout` of its tokens.

    Few demonstrations have a wording each; told nothing else, a policy learns them by heart from it, goal and all. A
    wording that would lose all its tokens keeps all. To leave words out (padding in their place) makes a policy rely on
    no single one: word dropout, of averaged embeddings as the VLA's are (Iyyer et al., ACL 2015, P15-1162).
    """
    if not tokens.shape[2]:
        return tokens[:, 0]
    known = (tokens != PADDING).any(dim=2).sum(dim=1).clamp(min=1)  # rows of padding are behind the others
    drawn = (torch.rand(len(tokens), generator=generator) * known).long()
    tokens = tokens[torch.arange(len(tokens)), drawn]
    if not dropout:
        return tokens
    kept = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < dropout, PADDING)
    return torch.where((kept != PADDING).any(dim=1, keepdim=True), kept, tokens)


def _stack(images: list[UInt8], shape: tuple[int, int, int]) -> UInt8:
    return np.stack(images) if images else np.zeros((0, *shape), np.uint8)
