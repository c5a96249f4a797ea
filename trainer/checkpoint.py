"""The trainer's whole state in one file, replaced atomically: it is the old one or the new one, never a mixture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from bridge.errors import FieldtuneError
from runtime.durable import write_atomic

FORMAT = 1
START_AGAIN = (
    "to start again from the live version; the episodes that it was made from are not learned from again, and the "
    "metrics so far are put aside"
)
"""What moving the checkpoint away is good for, and what it does."""


class CheckpointError(FieldtuneError):
    """The checkpoint cannot be used; the message says why and what to do."""


class TrainerState(Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything of the trainer that is not a tensor."""

    iteration: int
    """Iterations that are finished."""
    version: str
    """The version that the weights in the checkpoint were published as; it may not be live yet."""
    cursor: int
    """Sequence number of the last episode taken from the index."""
    labels: int = 0
    """Number of the last label taken from it."""
    env_steps: int
    """Environment steps learned from."""
    elapsed_s: float
    """Seconds of training, pauses not counted."""
    after_warmup: int
    """Iterations in which the policy learned."""
    buffer: dict[str, Any]
    weight: dict[str, Any]
    rng: str
    """State of the numpy generator as JSON text: it holds integers of 128 bits."""


class Checkpoint(Struct, kw_only=True):
    """The state and its tensors, as `state_dict` gives them."""

    state: TrainerState
    actor: dict[str, Any]
    actor_optimiser: dict[str, Any]
    critic: dict[str, Any]
    critic_optimiser: dict[str, Any]
    generator: torch.Tensor
    """State of the torch generator."""


_TENSORS = ("actor", "actor_optimiser", "critic", "critic_optimiser", "generator")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint at `path`; durable on return."""
    content: dict[str, Any] = {name: getattr(checkpoint, name) for name in _TENSORS}
    content["format"] = FORMAT
    content["state"] = msgspec.json.encode(checkpoint.state).decode()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, None if there is none. Raises `CheckpointError` if it cannot be read."""
    if not path.exists():
        return None
    advice = f"move it away {START_AGAIN}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch does not say what a damaged file can raise
        raise CheckpointError(f"{path}: is damaged ({error}); {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a trainer checkpoint of format {FORMAT}; {advice}")
    missing = [name for name in (*_TENSORS, "state") if name not in content]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; {advice}")
    try:
        state = msgspec.json.decode(content["state"], type=TrainerState)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: its state cannot be read ({error}); {advice}") from error
    return Checkpoint(state=state, **{name: content[name] for name in _TENSORS})
