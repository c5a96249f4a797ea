"""What the two sides of a remote backend say to each other: the methods of `Backend`, one message each.

Frames, tensors and refusals are those of `bridge.messages`. A `Refused` of code `internal` is an error of the backend
itself, with its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from numpy.typing import NDArray

from bridge.backend import BackendSpec, Observation, Status
from bridge.messages import Arrays, Message, Refused, check_observation, decode_frames

REMOTE_PROTOCOL = 1
MAX_NAME = 100

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]


# --- from the near side (the control loop) to the far side (the robot) ----------------------------------------------


class Describe(Message, frozen=True, tag="describe"):
    """Ask for the spec. Anybody may, whoever owns the robot; nothing is connected."""

    protocol: int


class Claim(Message, frozen=True, tag="claim"):
    """Become the owner and connect the backend. `session` is a random name that the near side gives itself."""

    protocol: int
    session: Name
    client: Name


class Owned(Message, frozen=True, kw_only=True):
    """What only the owner may say."""

    session: Name


class Beat(Owned, frozen=True, tag="beat"):
    """The owner's sign of life; not answered."""


class Reset(Owned, frozen=True, tag="reset"):
    """`Backend.reset`."""

    task: str
    seed: int


class Observe(Owned, frozen=True, tag="observe"):
    """`Backend.observe`."""


class Apply(Owned, frozen=True, tag="apply"):
    """`Backend.apply`; tensor `action` float32 `[d]`."""


class GetOutcome(Owned, frozen=True, tag="get_outcome"):
    """`Backend.outcome`."""


class GetHold(Owned, frozen=True, tag="get_hold"):
    """`Backend.hold_action`."""


class GetExpert(Owned, frozen=True, tag="get_expert"):
    """`HasExpert.expert_action`."""


class Stop(Owned, frozen=True, tag="stop"):
    """`Backend.stop`. A call with a smaller request id that arrives after it is refused."""


class Bye(Owned, frozen=True, tag="bye"):
    """`Backend.stop` and `Backend.close`; the robot is free for another owner."""


# --- from the far side ------------------------------------------------------------------------------------------------


class Described(Message, frozen=True, tag="described"):
    """Answer to `Describe` and `Claim`. An owner that is silent for `silence_s` is one no longer."""

    spec: BackendSpec
    expert: bool
    silence_s: float


class Done(Message, frozen=True, tag="done"):
    """Carried out; nothing to tell."""


class Observed(Message, frozen=True, tag="observed"):
    """Tensors: `image/<camera>` uint8 `[H, W, 3]`, `state` float32 `[n]`, `privileged` float32 `[m]`."""


class Action(Message, frozen=True, tag="action"):
    """Tensor `action` float32 `[d]`: the one really sent, the hold action or the expert's."""


class Standing(Message, frozen=True, tag="standing"):
    """`Outcome`."""

    status: Status
    reward: float


FarRequest = Describe | Claim | Beat | Reset | Observe | Apply | GetOutcome | GetHold | GetExpert | Stop | Bye
FarReply = Described | Done | Observed | Action | Standing | Refused

_request_decoder: msgspec.msgpack.Decoder[FarRequest] = msgspec.msgpack.Decoder(FarRequest)
_reply_decoder: msgspec.msgpack.Decoder[FarReply] = msgspec.msgpack.Decoder(FarReply)


def decode_far_request(frames: Sequence[Any]) -> tuple[FarRequest, dict[str, NDArray[Any]]]:
    """Read what the near side sent; raises `WireError`."""
    return decode_frames(frames, _request_decoder)


def decode_far_reply(frames: Sequence[Any]) -> tuple[FarReply, dict[str, NDArray[Any]]]:
    """Read what the far side sent; raises `WireError`."""
    return decode_frames(frames, _reply_decoder)


def observation_from(tensors: Arrays, spec: BackendSpec) -> Observation:
    """The observation that `observation_tensors` took apart; raises `WireError` where it is not one of this spec."""
    check_observation(tensors, spec)
    images = {camera.name: tensors[f"image/{camera.name}"] for camera in spec.cameras}
    return Observation(images, tensors["state"], tensors.get("privileged"))
