"""The wire: what is sent comes back, and nothing that is wrong gets past the decoder or breaks it."""

import tracemalloc
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, Observation, VectorSpec
from bridge.messages import (
    DTYPES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Announce,
    Assignment,
    Chunk,
    EndEpisode,
    EpisodeStored,
    GetStatus,
    Govern,
    Hello,
    Infer,
    Judge,
    Judged,
    Message,
    NextEpisode,
    NoEpisode,
    Operate,
    Operated,
    Orders,
    Played,
    Refused,
    Reply,
    Request,
    Serving,
    StatusReply,
    TensorInfo,
    Watch,
    Welcome,
    WireError,
    check_observation,
    decode_reply,
    decode_request,
    encode,
    observation_tensors,
    tensor_from_bytes,
)

SPEC = BackendSpec(
    name="fake",
    cameras=(CameraSpec("eye", 4, 5),),
    state=VectorSpec(("x", "y"), ("m", "m")),
    action=ActionSpec(("a", "b"), ("1", "1"), (-1.0, -1.0), (1.0, 1.0), "delta"),
    control_hz=10.0,
    instructions={"t": "go"},
    privileged=VectorSpec(("g",), ("m",)),
)

REQUESTS: list[Request] = [
    Hello(request=1, protocol=1, client="c", spec=SPEC),
    Hello(request=2, protocol=1, client="tool"),
    NextEpisode(request=3, session="s"),
    Infer(request=4, session="s", episode="e", step=0),
    Infer(request=5, session="s", episode="e", step=8, played=(Played(1, 0, 8),)),
    EndEpisode(
        request=6, session="s", episode="e", status="timeout", steps=200, played=(Played(1, 3, 1), Played(2, 0, 4))
    ),
    GetStatus(request=7),
    Announce(request=8, path="/some/where"),
    Govern(request=9, command="promote", who="me", version="3fa9"),
    Govern(command="rollback", who="test", request=9, version="abcd"),
    Watch(request=10, bridge="b", client="c", session="", state="holding", why="silent"),
    Operate(request=11, command="stop", why="a hand"),
    Judge(request=12, episode="e", label="discard", who="ada"),
]
REPLIES: list[Reply] = [
    Welcome(request=1, session="s", version="v", horizon=8),
    Assignment(request=2, episode="e", task="t", seed=7, horizon_steps=200),
    NoEpisode(request=3, finished=True),
    Chunk(request=4, episode="e", decision=3, version="v"),
    EpisodeStored(request=5, episode="e"),
    StatusReply(request=6, status={"decisions": 3, "latency_ms": {"p50": 0.5}}),
    Serving(request=7, version="v", previous="u"),
    Refused(request=8, code="spec", field="spec.control_hz", message="is 3"),
    Orders(stopped="a hand", reset=True, paused=True, episode="e", end="failure"),
    Operated(request=9, robots=("c",)),
    Judged(request=10, episode="e", status="aborted"),
]

arrays_strategy = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.sampled_from(list(DTYPES.values())).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    max_size=5,
)


def as_bytes(frames: list[Any]) -> list[bytes]:
    """What a socket would deliver."""
    return [bytes(memoryview(frame).cast("B")) if memoryview(frame).nbytes else b"" for frame in frames]


def header(kind: str = "get_status", **fields: Any) -> bytes:
    return msgspec.msgpack.encode({"kind": kind, **fields})


def refused_field(frames: list[Any]) -> str:
    with pytest.raises(WireError) as caught:
        decode_request(frames)
    return caught.value.field


def test_every_message_kind_is_covered_here() -> None:
    assert {type(m) for m in REQUESTS} == set(get_args(Request))
    assert {type(m) for m in REPLIES} == set(get_args(Reply))


@given(message=st.sampled_from(REQUESTS), arrays=arrays_strategy)
def test_requests_round_trip(message: Request, arrays: dict[str, Any]) -> None:
    decoded, tensors = decode_request(as_bytes(encode(message, arrays)))
    check_same(message, arrays, decoded, tensors)


@given(message=st.sampled_from(REPLIES), arrays=arrays_strategy)
def test_replies_round_trip(message: Reply, arrays: dict[str, Any]) -> None:
    decoded, tensors = decode_reply(as_bytes(encode(message, arrays)))
    check_same(message, arrays, decoded, tensors)


def check_same(message: Message, arrays: dict[str, Any], decoded: Message, tensors: dict[str, Any]) -> None:
    assert msgspec.structs.replace(decoded, tensors=()) == message
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()
        assert not tensors[name].flags.writeable


def test_an_array_that_is_not_contiguous_travels_by_value() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::-1, ::2]
    _, tensors = decode_request(as_bytes(encode(GetStatus(), {"x": array})))
    np.testing.assert_array_equal(tensors["x"], array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=[("a", "<f4")]),
        np.zeros(2, dtype=">f4"),
        np.zeros(2, dtype=np.complex64),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes_are_not_sent(array: Any) -> None:
    with pytest.raises(WireError, match=r"tensors\.x\.dtype") as caught:
        encode(GetStatus(), {"x": array})
    assert caught.value.field == "tensors.x.dtype"


@pytest.mark.parametrize("dtype", ["|O", "<U4", "|S4", "<M8[s]", "|V4", ">f4", "<c8", "O", "float32", "f4,f4", ""])
def test_other_dtypes_are_not_received(dtype: str) -> None:
    with pytest.raises(WireError) as caught:
        tensor_from_bytes(TensorInfo("x", dtype, (1,)), b"\0" * 8)
    assert caught.value.field == "tensors.x.dtype"


@pytest.mark.parametrize(
    ("shape", "data", "field"),
    [
        ((-1,), b"", "tensors.x.shape"),
        ((2, -3), b"\0" * 24, "tensors.x.shape"),
        ((1, 1, 1, 1, 1), b"\0" * 4, "tensors.x.shape"),
        ((2**62,), b"\0" * 4, "tensors.x.shape"),
        ((2**63, 2**63), b"", "tensors.x.shape"),
        ((0, 2**62), b"", "tensors.x.shape"),
        ((2**40, 0, 2**40), b"", "tensors.x.shape"),
        ((MAX_FRAME_BYTES // 4 + 1,), b"", "tensors.x.shape"),
        ((2,), b"\0" * 7, "tensors.x"),
        ((2,), b"\0" * 9, "tensors.x"),
        ((0,), b"\0" * 4, "tensors.x"),
        ((), b"", "tensors.x"),
    ],
)
def test_shape_and_byte_count_must_agree(shape: tuple[int, ...], data: bytes, field: str) -> None:
    with pytest.raises(WireError) as caught:
        tensor_from_bytes(TensorInfo("x", "<f4", shape), data)
    assert caught.value.field == field


@given(
    dtype=st.sampled_from([*DTYPES, "|O", "<U1", "x"]),
    shape=st.lists(st.integers(-(2**63), 2**64 - 1) | st.integers(0, 3), max_size=6).map(tuple),
    data=st.binary(max_size=64),
)
def test_any_table_row_gives_an_array_or_a_wire_error(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    try:
        array = tensor_from_bytes(TensorInfo("x", dtype, shape), data)
    except WireError:
        return
    assert array.shape == shape
    assert array.nbytes == len(data)


def test_table_and_frames_must_agree() -> None:
    row = ["x", "<f4", [1]]
    assert refused_field([header(tensors=[row])]) == "tensors"
    assert refused_field([header(), b"1234"]) == "tensors"
    assert refused_field([header(tensors=[row]), b"1234", b"1234"]) == "tensors"
    assert refused_field([header(tensors=[row, row]), b"1234", b"1234"]) == "tensors.x"
    many = [[str(i), "|u1", [1]] for i in range(MAX_TENSORS + 1)]
    assert refused_field([header(tensors=many), *[b"1"] * len(many)]) == "tensors"
    decode_request([header(tensors=many[1:]), *[b"1"] * MAX_TENSORS])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        header("no_such_kind"),
        header("welcome"),
        msgspec.msgpack.encode({"request": 1}),
        msgspec.msgpack.encode([1, 2]),
        header(request="1"),
        header(request=1.5),
        header(surprise=1),
        header("infer", session="s", episode="e"),
        header("infer", session=None, episode="e", step=0),
        header("end_episode", session="s", episode="e", status="running", steps=0),
        header("hello", protocol=1, client="c", spec={"name": "x"}),
        header(tensors=[["x", "<f4"]]),
        header(tensors=[["x", "<f4", [1], 0]]),
        header(tensors=[["x", "<f4", ["1"]]]),
        b"\x82\xa4kind\xaaget_status\xa1x" + b"\x91" * 60_000,
        b"\x82\xa4kind\xa2\xff\xfe",
        header() + b"\0",
        header(tensors=[["x" * MAX_HEADER_BYTES, "<f4", [1]]]),
    ],
    ids=lambda frame: repr(frame[:24]),
)
def test_malformed_headers(frame: bytes) -> None:
    assert refused_field([frame]) == "header"


def test_no_frames_at_all() -> None:
    assert refused_field([]) == "header"


@given(frames=st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=300)
def test_arbitrary_bytes_only_ever_raise_wire_error(frames: list[bytes]) -> None:
    for decode in (decode_request, decode_reply):
        try:
            decode(frames)
        except WireError as error:
            assert error.field


@given(data=st.data(), message=st.sampled_from(REQUESTS), arrays=arrays_strategy)
@settings(max_examples=300)
def test_damaged_messages_only_ever_raise_wire_error(data: st.DataObject, message: Request, arrays: Any) -> None:
    frames = as_bytes(encode(message, arrays))
    index = data.draw(st.integers(0, len(frames) - 1))
    damaged = bytearray(frames[index])
    for _ in range(data.draw(st.integers(1, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    frames[index] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        decode_request(frames)
    except WireError as error:
        assert error.field


@pytest.mark.parametrize(
    "frame",
    [
        b"\x82\xa4kind\xaaget_status\xa7tensors\xdd\xff\xff\xff\xff",
        b"\x82\xa4kind\xaaget_status\xa7tensors\xdd\x04\x00\x00\x00" + b"\xc0" * 10,
        b"\x82\xa4kind\xaaget_status\xa7tensors\x91\x93\xa1a\xa3<f4\xdd\x07\xff\xff\xff",
        b"\x82\xa4kind\xa5hello\xa6client\xdb\xff\xff\xff\xffabc",
        b"\xdf\xff\xff\xff\xff",
        header(tensors=[["x", "<f8", [2**20, 7]]]),
    ],
)
def test_numbers_of_the_sender_allocate_nothing(frame: bytes) -> None:
    tracemalloc.start()
    try:
        refused_field([frame, b""] if b"<f8" in frame else [frame])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_observations_are_checked_against_the_spec() -> None:
    good = observation_tensors(
        Observation({"eye": np.zeros((4, 5, 3), np.uint8)}, np.zeros(2, np.float32), np.zeros(1, np.float32))
    )
    check_observation(good, SPEC)

    def field_of(**changes: Any) -> str:
        tensors = {name: array for name, array in {**good, **changes}.items() if array is not None}
        with pytest.raises(WireError) as caught:
            check_observation(tensors, SPEC)
        return caught.value.field

    assert field_of(**{"image/eye": None}) == "tensors.image/eye"
    assert field_of(**{"image/eye": np.zeros((5, 4, 3), np.uint8)}) == "tensors.image/eye"
    assert field_of(**{"image/eye": np.zeros((4, 5, 3), np.float32)}) == "tensors.image/eye"
    assert field_of(**{"image/other": good["image/eye"]}) == "tensors.image/other"
    assert field_of(state=np.zeros(2, np.float64)) == "tensors.state"
    assert field_of(state=np.zeros(3, np.float32)) == "tensors.state"
    assert field_of(state=np.array([0, np.nan], np.float32)) == "tensors.state"
    assert field_of(privileged=np.array([np.inf], np.float32)) == "tensors.privileged"
    assert field_of(privileged=None) == "tensors.privileged"
