"""The value network. It is separate from the policy, with an optimiser of its own, and never leaves the trainer.

Where the backend offers privileged state (a simulator) it sees that, the proprioception and the task; elsewhere a small
convolution looks at the images instead of the privileged state. It is an MLP either way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from runtime.bundle import PolicySpec
from trainer.batch import Batch, Float64, Observations
from trainer.finite import finite_norm
from trainer.shapes import filled_up, image_parts, minibatches
from trainer.vla import committed

WIDTH = 256
IMAGE_SIDE_PX = 32  # what the image critic works at: where things are, not how they look
MINIBATCH = 512
MIN_MINIBATCH = 64
MAX_GRAD_NORM = 1.0


class Critic(nn.Module):
    """V(o): the expected discounted return of a decision and those after it.

    Inputs are normalised by mean and standard deviation of the first batch (`set_statistics`), kept with the weights.
    Where the policy is told which actions are committed while it thinks, so is the critic: they decide what comes as
    much as what is seen.
    """

    def __init__(self, spec: PolicySpec, privileged: int, tasks: int) -> None:
        """`privileged` elements of privileged state (0: look at the images of `spec`), `tasks` tasks."""
        super().__init__()
        self._privileged = privileged
        self._tasks = tasks
        vector = len(spec.state.names) + privileged
        self.register_buffer("mean", torch.zeros(vector))
        self.register_buffer("std", torch.ones(vector))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.mean: Tensor
        self.std: Tensor
        self.ready: Tensor
        self._cameras = () if privileged else tuple(camera.name for camera in spec.cameras)
        self.encoders = nn.ModuleList(_encoder() for _ in self._cameras)
        self._prefix_steps = spec.prefix_steps
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        self.register_buffer("center", (high + low) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)
        self.center: Tensor
        self.half_range: Tensor
        told = spec.prefix_steps * (len(spec.action.names) + 1)
        seen = vector + tasks + told + len(self.encoders) * 32 * (IMAGE_SIDE_PX // 8) ** 2
        # The normalisation makes a few passes over a batch do what many did not, also for episodes never fitted.
        self.head = nn.Sequential(
            *(nn.Linear(seen, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU()),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, observations: Observations) -> Tensor:
        """Values float32 `[B]`."""
        vector = (self._vector(observations) - self.mean) / self.std
        parts = [vector, nn.functional.one_hot(observations.task, self._tasks).float()]
        if self._prefix_steps:
            assert observations.prefix is not None and observations.prefix_mask is not None
            parts.append(committed(observations.prefix, observations.prefix_mask, self.center, self.half_range))
        for name, encoder in zip(self._cameras, self.encoders, strict=True):
            parts.append(encoder(image_parts(_shrunk, observations.images[name])))
        values: Tensor = self.head(torch.cat(parts, dim=1))
        return values.squeeze(1)

    def set_statistics(self, observations: Observations) -> None:
        """Take mean and standard deviation of the inputs from these observations, the first time only."""
        if bool(self.ready):
            return
        vector = self._vector(observations)
        self.mean.copy_(vector.mean(dim=0))
        # An element that never moved says nothing; dividing by its noise would make the first change enormous.
        std = vector.std(dim=0, unbiased=False)
        self.std.copy_(torch.where(std > 1e-4, std, torch.ones_like(std)))
        self.ready.fill_(True)

    def _vector(self, observations: Observations) -> Tensor:
        if not self._privileged:
            return observations.state
        assert observations.privileged is not None, "the backend promised privileged state and did not send it"
        return torch.cat([observations.state, observations.privileged], dim=1)


def values(critic: Critic, observations: Observations) -> Float64:
    """V of every observation, float64 `[N]`, without gradients."""
    parts: list[Tensor] = []
    with torch.no_grad():
        for rows in torch.split(filled_up(torch.arange(len(observations))), 2 * MINIBATCH):
            parts.append(critic(observations.rows(rows)))
    return torch.cat(parts)[: len(observations)].double().numpy()


def fit(
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    target: Float64,
    *,
    epochs: int,
    rng: np.random.Generator,
    stopped: Callable[[], bool],
) -> float:
    """Regress V towards `target` `[N]` on all decisions of the batch; returns the mean squared error of the last pass.

    Returns early, with NaN, when `stopped`. Raises `NotFiniteError`.
    """
    goal = torch.from_numpy(target.astype(np.float32))
    # Small batches are split too, so that a pass over them is more than one step.
    size = min(MINIBATCH, max(MIN_MINIBATCH, len(batch) // 4))
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for rows in minibatches(torch.from_numpy(rng.permutation(len(batch))), size):
            if stopped():
                return float("nan")
            error = critic(batch.observations.rows(rows)) - goal.index_select(0, rows)
            loss = error.square().mean()
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            finite_norm(nn.utils.clip_grad_norm_(critic.parameters(), MAX_GRAD_NORM), {"value loss": loss})
            optimiser.step()
            losses.append(float(loss.detach()))
    return float(np.mean(losses)) if losses else float("nan")


def explained_variance(value: Float64, target: Float64) -> float:
    """1 - Var(target - value) / Var(target): 1 is perfect, 0 no better than a constant; 0 for a constant target."""
    variance = float(np.var(target))
    return 1.0 - float(np.var(target - value)) / variance if variance > 1e-12 else 0.0


def _shrunk(image: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 `[B, 3, 32, 32]` from -0.5 to 0.5."""
    pixels = image.permute(0, 3, 1, 2).float() / 255.0 - 0.5
    return nn.functional.interpolate(pixels, size=(IMAGE_SIDE_PX, IMAGE_SIDE_PX), mode="area")


def _encoder() -> nn.Module:
    """RGB at 32 px -> 32 x 4 x 4 features."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Flatten(),
    )
