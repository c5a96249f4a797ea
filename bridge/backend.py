"""The contract between fieldtune and whatever it moves: a simulator, a robot, a recording.

A backend is any object with the attributes of `Backend`; there is nothing to inherit from. Its `spec` says, before
anything is connected, which cameras, state and actions it has and in which units. The runtime compares that spec with
the policy's at hello and refuses by field what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.errors import FieldtuneError

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

Status = Literal["running", "success", "failure", "timeout"]


class CameraSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One camera; its image is uint8 RGB `[height, width, 3]`."""

    name: str
    height: int
    width: int


class VectorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A float32 vector `[n]`: one name and one unit for each element, in order."""

    names: tuple[str, ...]
    units: tuple[str, ...]


class ActionSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One action, float32 `[d]`: names, units and limits of each element, in order.

    `delta` actions are relative to where the robot is now, `absolute` ones are targets.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    kind: Literal["absolute", "delta"]


class BackendSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """All that a policy must agree with. Known before `connect`.

    `instructions` gives each task that the backend can be reset to, and what the policy is told: one text, or several
    wordings of which each episode gets one (see `instruction_of`), the first being the canonical one. Whatever is
    given, the spec holds tuples. `privileged` describes simulator state that only the trainer's critic may see; a real
    robot has none. `paced` is true where time passes by itself (a robot: the loop sleeps to the control rate) and false
    where time advances in `apply` (a simulator). `max_rate` is the largest change of each element of an absolute action
    in a second; without it a robot moves through at most its whole range in a second. `judges` is false where the
    backend cannot tell success and failure: an episode that reaches its horizon then waits for somebody's label. Raises
    `ValueError` for a task without a text.
    """

    name: str
    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    action: ActionSpec
    control_hz: float
    instructions: dict[str, str | tuple[str, ...]]
    privileged: VectorSpec | None = None
    paced: bool = False
    max_rate: tuple[float, ...] | None = None
    judges: bool = True

    def __post_init__(self) -> None:
        held = {task: _texts(task, given) for task, given in self.instructions.items()}
        msgspec.structs.force_setattr(self, "instructions", held)


def instruction_of(spec: BackendSpec, task: str, seed: int) -> str:
    """The text that an episode of this task and seed is told: every wording in its turn, the same one every time."""
    texts = spec.instructions[task]
    return texts[seed % len(texts)]


def all_instructions(spec: BackendSpec) -> list[str]:
    """Every text of every task."""
    return [text for texts in spec.instructions.values() for text in texts]


def _texts(task: str, given: object) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, tuple | list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"instructions[{task!r}] must be a text or a tuple of texts, at least one (found {given!r})")
    return tuple(texts)


@dataclass(slots=True)
class Observation:
    """What the backend sees now: uint8 `[H, W, 3]` by camera, float32 `[n]` state, float32 `[m]` privileged state."""

    images: dict[str, UInt8]
    state: Float32
    privileged: Float32 | None = None


@dataclass(slots=True)
class Outcome:
    """How the episode stands after the last `apply`, and the reward that the backend gave for that step."""

    status: Status
    reward: float


@runtime_checkable
class Backend(Protocol):
    """An environment or a robot. It is called in the order connect, (reset, (observe, apply, outcome)*)*, stop, close,
    by one thread at a time; for a robot `hold_action` and `apply` also by the thread of the dead-man. `stop` may be
    called any number of times and at any time: from another thread too, while another method runs or hangs.
    """

    @property
    def spec(self) -> BackendSpec:
        """The spec; does not need `connect`."""
        ...

    def connect(self) -> None:
        """Open the device or build the simulator. Raises `BackendError` with what to do about it."""
        ...

    def reset(self, task: str, seed: int) -> None:
        """Bring the task to its start; equal (task, seed) give the equal start where the backend can."""
        ...

    def observe(self) -> Observation:
        """Read sensors and cameras now; images are rendered or grabbed here and nowhere else."""
        ...

    def apply(self, action: Float32) -> Float32:
        """Send one action `[d]`; returns the action `[d]` that was really sent, after the backend's own limits."""
        ...

    def outcome(self) -> Outcome:
        """Status and reward after the last `apply`."""
        ...

    def hold_action(self) -> Float32:
        """The action `[d]` that keeps the robot where it is."""
        ...

    def stop(self) -> None:
        """Make the robot safe at once; idempotent."""
        ...

    def close(self) -> None:
        """Release everything; idempotent."""
        ...


@runtime_checkable
class HasExpert(Protocol):
    """A backend that can also demonstrate its tasks."""

    def expert_action(self) -> Float32:
        """The scripted expert's action `[d]` for the present state of the running episode."""
        ...


@runtime_checkable
class HasTip(Protocol):
    """A backend that can say where its tip is, so that a workspace can be kept."""

    def tip_after(self, action: Float32) -> Float32:
        """Where the tip is once the action `[d]` is carried out from the present state: float32 `[3]`, m."""
        ...


class BackendError(FieldtuneError):
    """The backend cannot do what it was asked; the message says what to do."""


class NotSeenError(BackendError):
    """Nothing was seen at this step, as may be in a recording; there is an observation at a later one."""
