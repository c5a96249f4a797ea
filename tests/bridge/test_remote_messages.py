"""The wire of the remote backend, and who owns the robot by it."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.backends.point import Point, PointOptions
from bridge.messages import Refused, WireError, encode, observation_tensors
from bridge.remote.messages import (
    Action,
    Apply,
    Beat,
    Bye,
    Claim,
    Describe,
    Described,
    Done,
    FarReply,
    FarRequest,
    GetExpert,
    GetHold,
    GetOutcome,
    Observe,
    Observed,
    Reset,
    Standing,
    Stop,
    decode_far_reply,
    decode_far_request,
    observation_from,
)
from bridge.remote.ownership import Ownership, OwnershipError

SPEC = Point(PointOptions(size_px=8)).spec
REQUESTS: list[FarRequest] = [
    Describe(request=1, protocol=1),
    Claim(request=2, protocol=1, session="s", client="c"),
    Beat(session="s"),
    Reset(request=3, session="s", task="t", seed=2**63 - 1),
    Observe(request=4, session="s"),
    Apply(request=5, session="s"),
    GetOutcome(request=6, session="s"),
    GetHold(request=7, session="s"),
    GetExpert(request=8, session="s"),
    Stop(request=9, session="s"),
    Bye(request=10, session="s"),
]
REPLIES: list[FarReply] = [
    Described(request=1, spec=SPEC, expert=True, silence_s=2.0),
    Done(request=2),
    Observed(request=3),
    Action(request=4),
    Standing(request=5, status="success", reward=-0.5),
    Refused(request=6, code="internal", field="Apply", message="unplugged"),
]


def as_bytes(frames: list[Any]) -> list[bytes]:
    return [bytes(memoryview(frame).cast("B")) if memoryview(frame).nbytes else b"" for frame in frames]


def test_every_message_travels() -> None:
    assert {type(m) for m in REQUESTS} == set(get_args(FarRequest))
    assert {type(m) for m in REPLIES} == set(get_args(FarReply))
    arrays = {"action": np.array([0.5, -1.0], np.float32)}
    for messages, decode in ((REQUESTS, decode_far_request), (REPLIES, decode_far_reply)):
        for message in messages:
            decoded, tensors = decode(as_bytes(encode(message, arrays)))
            assert msgspec.structs.replace(decoded, tensors=()) == message
            np.testing.assert_array_equal(tensors["action"], arrays["action"])


def observed() -> list[bytes]:
    point = Point(PointOptions(size_px=8))
    point.reset("reach", 0)
    return as_bytes(encode(Observed(request=3), observation_tensors(point.observe())))


@given(
    reply=st.booleans(),
    which=st.integers(0, 10),
    cuts=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 400), st.binary(max_size=4), st.booleans()), min_size=1, max_size=6
    ),
    drop=st.booleans(),
)
def test_corrupted_frames_are_read_as_something_valid_or_refused(
    reply: bool, which: int, cuts: list[tuple[int, int, bytes, bool]], drop: bool
) -> None:
    frames = observed() if reply else as_bytes(encode(REQUESTS[which], {"action": np.zeros(2, np.float32)}))
    for frame, at, patch, insert in cuts:
        data = frames[frame % len(frames)]
        at %= len(data) + 1
        frames[frame % len(frames)] = data[:at] + patch + data[at + (0 if insert else len(patch)) :]
    if drop:
        frames.pop()
    decode: Any = decode_far_reply if reply else decode_far_request
    try:
        message, tensors = decode(frames)
        if isinstance(message, Observed):
            seen = observation_from(tensors, SPEC)
            assert seen.images["top"].shape == (8, 8, 3) and np.isfinite(seen.state).all()
    except WireError as error:
        assert error.field


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    for decode in (decode_far_request, decode_far_reply):
        with pytest.raises(WireError):
            decode(frames)


# --- ownership ------------------------------------------------------------------------------------------------------


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def owned() -> tuple[Ownership, Clock]:
    clock = Clock()
    ownership = Ownership(2.0, clock)
    ownership.claim("s", "arm", 5)
    return ownership, clock


def test_one_owner_at_a_time_for_as_long_as_it_is_heard() -> None:
    ownership, clock = owned()
    clock.now_s += 1.5
    with pytest.raises(OwnershipError, match=r"'arm', heard 1\.5 s ago") as refused:
        ownership.claim("t", "other", 1)
    assert (refused.value.code, refused.value.field) == ("session", "owner")
    ownership.hear("t")  # somebody else's sign of life
    clock.now_s += 0.5
    assert ownership.take_from_silent() is None
    ownership.hear("s")
    clock.now_s += 2.0
    assert ownership.take_from_silent() is None
    ownership.admit("s", 6)
    clock.now_s += 2.1
    silent = ownership.take_from_silent()
    assert silent is not None and silent.client == "arm"
    assert ownership.take_from_silent() is None, "told once"
    with pytest.raises(OwnershipError, match="nobody does"):
        ownership.admit("s", 7)
    ownership.claim("t", "other", 1)
    with pytest.raises(OwnershipError, match="'other' does"):
        ownership.admit("s", 8)
    ownership.release("s")  # it is not its own to give
    assert ownership.owner is not None
    ownership.release("t")
    assert ownership.owner is None


def test_what_was_overtaken_is_refused_unless_it_is_a_stop() -> None:
    ownership, _ = owned()
    for request in (5, 4):
        with pytest.raises(OwnershipError, match="too late") as refused:
            ownership.admit("s", request)
        assert refused.value.code == "replayed"
    ownership.admit("s", 9)
    ownership.admit("s", 3, late=True)
    with pytest.raises(OwnershipError, match="too late"):
        ownership.admit("s", 9)
    ownership.admit("s", 10)
    with pytest.raises(OwnershipError, match="does not own"):
        ownership.admit("t", 11, late=True)
