"""The small reference VLA: camera images, proprioception and an instruction -> a Gaussian over an action chunk.

    tokens  -> embedding -> mean over what is not padding -> text vector
    images  -> a wide first convolution of stride 4, then convolutions of stride 2, each of these scaled and shifted by
               the text vector (FiLM, 1709.07871) -> flattened, so that where something is stays known
    state   -> (state - mean) / std
    all three -> MLP -> mean of the chunk;  the standard deviation depends on neither image nor state
    committed actions (2512.05964), where the spec has any -> added to what the MLP's first layer gives

Both outputs are in units of the action: mean = center + half_range * network, log_std = log_sigma + log(half_range).
There is no tanh on the mean: it would flatten the gradient where the experts are, at the limits, and the Gaussian stays
exact without it. What exceeds the limits is clipped by whoever applies the action.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from bridge.errors import FieldtuneError
from runtime.bundle import PolicySpec
from trainer.config import VLAConfig
from trainer.shapes import image_parts

PADDING = 0
MAX_STATE = 10.0
"""State is clipped at this many standard deviations: a sensor that jumps may not lead the network far astray."""
STEM_KERNEL, STEM_STRIDE = 8, 4
"""The first convolution, in pixels."""
MAX_SIDE = 8
"""Feature maps that are larger are averaged down, which keeps the first layer of the MLP small for large images."""
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

Inputs = tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None, Tensor | None]
"""The arguments of `VLA.forward`."""


class VLAError(FieldtuneError):
    """The network cannot be built or used as asked; the message says what does not fit."""


class VLA(nn.Module):
    """The policy pi(chunk | images, state, instruction): Gaussians, correlated along the chunk as the spec says.

    Each camera has an encoder of its own, made for the size that the camera sends: the graph does not resize.
    `log_sigma` `[d]` is the learnable log standard deviation in half ranges of the action. State statistics are NaN,
    and so is every output, until `set_state_statistics` or a loaded version has given them.
    """

    state_mean: Tensor
    state_std: Tensor
    center: Tensor
    half_range: Tensor

    def __init__(self, config: VLAConfig, spec: PolicySpec) -> None:
        """A network for the cameras, state and actions of `spec`. Raises `VLAError` where config and spec disagree."""
        super().__init__()
        wanted = config.horizon_steps, config.max_tokens, config.prefix_steps
        if (spec.horizon, spec.tokens, spec.prefix_steps) != wanted:
            raise VLAError(
                f"the policy's spec has horizon {spec.horizon}, {spec.tokens} tokens and prefix_steps "
                f"{spec.prefix_steps}, trainer.vla asks for horizon_steps {config.horizon_steps}, max_tokens "
                f"{config.max_tokens} and prefix_steps {config.prefix_steps}; they must agree"
            )
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        if not bool(torch.isfinite(high - low).all() and (high > low).all()):
            raise VLAError("spec.action: every action needs finite limits with low < high")
        self.config = config
        self.spec = spec
        dims, state = len(spec.action.names), len(spec.state.names)
        # The spec is where limits come from, so they are no weights; statistics were measured, so they are.
        self.register_buffer("center", (high + low) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)
        self.register_buffer("state_mean", torch.full((state,), math.nan))
        self.register_buffer("state_std", torch.full((state,), math.nan))
        self.embedding = nn.Embedding(config.vocabulary, config.text_width, padding_idx=PADDING)
        encoders = [
            ImageEncoder(camera.height, camera.width, config.channels, config.text_width) for camera in spec.cameras
        ]
        self.encoders = nn.ModuleList(encoders)
        seen = state + config.text_width + sum(encoder.size for encoder in encoders)
        self.fusion = nn.Sequential(
            nn.Linear(seen, config.width), nn.ReLU(), nn.Linear(config.width, config.width), nn.ReLU()
        )
        self.head = nn.Linear(config.width, config.horizon_steps * dims)
        # A fresh policy starts near the middle of the action's range, whatever it sees.
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.log_sigma = nn.Parameter(torch.full((dims,), math.log(config.sigma)))
        if spec.prefix_steps:
            # It begins as if nothing were told, so that a base that never was can be gone on from.
            self.prefix = nn.Linear(spec.prefix_steps * (dims + 1), config.width, bias=False)
            nn.init.zeros_(self.prefix.weight)

    def forward(
        self,
        images: dict[str, Tensor],
        state: Tensor,
        tokens: Tensor,
        prefix: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the chunk, float32 `[B, h, d]` each, in units of the action.

        `images` uint8 `[B, H, W, 3]` by camera, `state` float32 `[B, n]`, `tokens` int64 `[B, L]`, padded with 0. Where
        the spec has `prefix_steps` p: the committed actions `prefix` float32 `[B, p, d]`, in units of the action, and
        `prefix_mask` float32 `[B, p]`, 1 for each; 0 in both behind them. None stands for none in every row.
        """
        return self.chunk(self.features(images, state, tokens, prefix, prefix_mask))

    def chunk(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation from `features` `[B, width]`; shapes as in `forward`."""
        network = self.head(features).unflatten(1, (self.spec.horizon, len(self.spec.action.names)))
        mean = self.center + self.half_range * network
        log_std = (self.log_sigma + self.half_range.log()).expand_as(mean)
        return mean, log_std

    def features(
        self,
        images: dict[str, Tensor],
        state: Tensor,
        tokens: Tensor,
        prefix: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, `[B, width]`; inputs as in `forward`. For auxiliary heads that are not exported."""
        words = (tokens != PADDING).unsqueeze(-1).float()
        text = (self.embedding(tokens) * words).sum(1) / words.sum(1).clamp(min=1.0)
        parts = [text]
        if self.state_mean.numel():
            parts.append(((state - self.state_mean) / self.state_std).clamp(-MAX_STATE, MAX_STATE))
        for camera, encoder in zip(self.spec.cameras, self.encoders, strict=True):
            parts.append(image_parts(encoder, images[camera.name], text))
        wide = self.fusion[0](torch.cat(parts, dim=1))
        # The rest is small; in bfloat16 it would make most of the error of the log-prob.
        with torch.autocast("cpu", enabled=False):
            wide = wide.float()
            if prefix is not None and prefix_mask is not None:
                wide = wide + self.prefix(committed(prefix, prefix_mask, self.center, self.half_range))
            seen: Tensor = self.fusion[1:](wide)
        return seen

    @property
    def sigma(self) -> float:
        """Mean standard deviation of the actions, in half ranges."""
        return float(self.log_sigma.detach().exp().mean())

    @torch.no_grad()
    def set_state_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and standard deviation `[n]` of the state, measured on demonstrations.

        Raises `VLAError` if they have another shape or are not finite.
        """
        if mean.shape != self.state_mean.shape or std.shape != self.state_std.shape:
            raise VLAError(
                f"state statistics of shapes {list(mean.shape)} and {list(std.shape)}, expected "
                f"{list(self.state_mean.shape)} ({', '.join(self.spec.state.names)})"
            )
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise VLAError("state statistics must be finite; is a demonstration damaged?")
        self.state_mean.copy_(mean)
        # An element that never moved says nothing; divided by its noise the first change would be enormous.
        self.state_std.copy_(torch.where(std > 1e-4, std, torch.ones_like(std)))


def committed(prefix: Tensor, mask: Tensor, center: Tensor, half_range: Tensor) -> Tensor:
    """What is committed, as a network reads it, `[B, p (d + 1)]`: the actions in half ranges from the middle of their
    range, 0 where there is none, and the mask; shapes as in `VLA.forward`, `center` and `half_range` `[d]`.
    """
    normalised = (prefix - center) / half_range * mask.unsqueeze(-1)
    return torch.cat([normalised.flatten(1), mask], dim=1)


class ImageEncoder(nn.Module):
    """One camera: uint8 `[B, H, W, 3]` and a text vector `[B, t]` -> features `[B, size]`.

    The first convolution goes down by 4 at once and is not modulated: at full resolution it is memory traffic, not
    arithmetic, that costs.
    """

    def __init__(self, height: int, width: int, channels: tuple[int, ...], text_width: int) -> None:
        """`channels` of the convolutions. Raises `VLAError` if the image is too small for the first."""
        super().__init__()
        if not channels or min(height, width) < STEM_STRIDE:
            raise VLAError(
                f"images of {height}x{width} and trainer.vla.channels {list(channels)}: at least {STEM_STRIDE} pixels "
                "a side and one entry are needed"
            )
        self.stem = nn.Conv2d(3, channels[0], STEM_KERNEL, stride=STEM_STRIDE, padding=(STEM_KERNEL - STEM_STRIDE) // 2)
        self.channels = channels[1:]
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        self.film = nn.Linear(text_width, 2 * sum(self.channels))
        rows, columns = (_reduced(side, len(self.channels)) for side in (height, width))
        self.pool = -(-max(rows, columns) // MAX_SIDE)
        self.size = channels[-1] * -(-rows // self.pool) * -(-columns // self.pool)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Features `[B, size]`."""
        # The permuted NHWC image is what torch calls channels_last: its faster layout, without a copy.
        x = torch.relu(self.stem(image.permute(0, 3, 1, 2).float() / 255.0 - 0.5))
        film = self.film(text).unsqueeze(-1).unsqueeze(-1)
        start = 0
        for convolution, channels in zip(self.convolutions, self.channels, strict=True):
            # Slices, because split and chunk become sequences in ONNX, which onnxruntime does not optimise.
            scale, shift = film[:, start : start + channels], film[:, start + channels : start + 2 * channels]
            x = torch.relu(convolution(x) * (1.0 + scale) + shift)
            start += 2 * channels
        if self.pool > 1:
            x = nn.functional.avg_pool2d(x, self.pool, ceil_mode=True)
        return x.permute(0, 2, 3, 1).flatten(1)


def _reduced(side: int, halvings: int) -> int:
    """The side of the last feature map of an image of this side."""
    side //= STEM_STRIDE
    for _ in range(halvings):
        side = -(-side // 2)
    return side


def log_prob(
    actions: Tensor, mean: Tensor, log_std: Tensor, noise_correlation: float, first: Tensor | None = None
) -> Tensor:
    """Log-density `[B, h]` of each action given the one before it, summed over its elements; tensors `[B, h, d]`.

    The same formula as `runtime.policy.log_prob`, with gradients to `mean` and `log_std`. An action where `first` bool
    `[B, h]` is set counts by itself, whatever came before it; None: the first of each chunk.
    """
    if first is None:
        first = torch.arange(actions.shape[1]).expand(actions.shape[:2]) == 0
    z = (actions - mean) * torch.exp(-log_std)
    before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1)
    innovation = math.sqrt(1 - noise_correlation**2)
    xi = torch.where(first.unsqueeze(-1), z, (z - noise_correlation * before) / innovation)
    by_action = (-0.5 * xi.square() - log_std - _LOG_SQRT_2PI).sum(-1)
    return by_action - actions.shape[-1] * math.log(innovation) * ~first
