"""Every message on the wire, and the only code that turns bytes into arrays.

A message is a list of ZeroMQ frames: a msgpack header (one of the Structs below, told apart by `kind`) and one raw
frame for each tensor in the header's `tensors` table. Nothing is ever unpickled. A frame becomes an array only after
its dtype, shape and byte count agree with the table, so a sender cannot make the receiver allocate or read beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.backend import BackendSpec, Observation
from bridge.errors import FieldtuneError

PROTOCOL = 5
MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 32
MAX_DIMS = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024
# The only dtypes that travel, by their array-interface name; no objects, strings, datetimes or structured types.
DTYPES = {name: np.dtype(name) for name in ("|u1", "|i1", "|b1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")}

Arrays = Mapping[str, NDArray[Any]]
Code = Literal[
    "protocol", "malformed", "spec", "session", "episode", "replayed", "bundle", "version", "storage", "internal"
]

Command = Literal["stop", "reset", "pause", "resume", "end", "success", "failure"]
Ending = Literal["", "end", "success", "failure"]
Label = Literal["success", "failure", "discard"]
"""What somebody says of an episode that has ended. discard: nothing is to be learned from it."""
Governing = Literal["promote", "reject", "pin", "unpin", "rollback"]
RobotState = Literal["idle", "resetting", "driving", "paused", "holding", "stopping", "stopped"]
"""resetting: it may move, whatever was ordered but a stop. stopping: it is to be stopped, and has not confirmed it."""
RULES = ("range", "rate", "first_jump", "workspace", "chunk_age", "hold", "starved")
"""The rules of the safety stage (`bridge.safety`); bit i of a step in the tensor `rules` stands for rule i."""


class WireError(FieldtuneError):
    """A message that cannot be read; `field` names the part of it that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class TensorInfo(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One row of the tensor table: the frames follow in the same order."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Played(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A slice of a chunk that was played: `steps` actions of the chunk of `decision`, from index `start` on."""

    decision: int
    start: int
    steps: int


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all messages carry. A reply has the `request` id of what it answers; ids of one session only grow."""

    request: int = 0
    tensors: tuple[TensorInfo, ...] = ()


# --- from a client to the runtime ---------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First message. A bridge brings the spec of its backend; a tool or the trainer brings none."""

    protocol: int
    client: str
    spec: BackendSpec | None = None


class NextEpisode(Message, frozen=True, tag="next_episode"):
    """Ask what to do next. An episode of this session that is still open is closed as aborted first."""

    session: str


class Infer(Message, frozen=True, tag="infer"):
    """Ask for a chunk. Tensors: `image/<camera>` uint8 `[H, W, 3]`, `state` float32 `[n]`, `privileged` float32 `[m]`.

    `step` is the number of environment steps executed in this episode before this observation. `played` tells what they
    were since the last report, in order; two more tensors come with it: `sent` float32 `[k, d]`, the actions really
    sent, and `reward` float32 `[k]`, k being the steps of all slices. A third, `rules` uint8 `[k]`, comes where the
    safety stage changed one of them (bits of `RULES`). Action i of a chunk is for the environment step i after its
    observation. A slice goes on beyond its chunk only with hold actions (rule `starved`).

    `prefix` float32 `[c, d]` are the actions that will be played, come what may, while this request is answered; the
    chunk begins with them. Only for a policy that takes them (`Welcome.prefix_steps`).
    """

    session: str
    episode: str
    step: int
    played: tuple[Played, ...] = ()


class EndEpisode(Message, frozen=True, tag="end_episode"):
    """Close the episode. Reports the last steps as `Infer` does.

    The tensors of the last observation come along: a truncated return bootstraps from it. `reason` is empty, or says
    that the operator ended it. An `aborted` episode brings no observation and says in `reason` what went wrong; it may
    be closed while a chunk is awaited.
    """

    session: str
    episode: str
    status: Literal["success", "failure", "timeout", "unjudged", "aborted"]
    steps: int
    played: tuple[Played, ...] = ()
    reason: str = ""


class Watch(Message, frozen=True, tag="watch"):
    """A bridge's sign of life, several times a second over a connection of its own; answered at once by `Orders`.

    `bridge` names this process for as long as it lives; `why` says why it is stopped or holds, `paused` whether its
    last orders were to pause. A session whose bridge says that it is stopped has its open episode closed as aborted.
    """

    bridge: str
    client: str
    session: str
    state: RobotState
    why: str = ""
    paused: bool = False


class Operate(Message, frozen=True, tag="operate"):
    """The operator's word to all robots of the runtime, or to `robot`; needs no hello. `robot` names a client, for
    all robots of that name, or one of them, `CLIENT (BRIDGE)` with the first eight characters of its `Watch.bridge`.

    `stop` and `reset` are always for all. `end`, `success` and `failure` are for the episode that is open now; with
    `episode` only for that one, so that a word that comes late does not end the next.
    """

    command: Command
    why: str = ""
    robot: str = ""
    episode: str = ""


class Judge(Message, frozen=True, tag="judge"):
    """Say how an episode went that has ended, now or again; needs no hello. `who` is kept with the label."""

    episode: str
    label: Label
    who: str


class GetStatus(Message, frozen=True, tag="get_status"):
    """Ask for the runtime's counters; needs no hello."""


class Announce(Message, frozen=True, tag="announce"):
    """Ask the runtime to load, check and serve the bundle in a directory that it can read."""

    path: str


class Govern(Message, frozen=True, tag="govern"):
    """Decide on versions by hand (docs/deploying.md): make one live, end a canary, keep the live version or let it go,
    go back to an earlier one (the one before, without a `version`).

    `version` may be a prefix; `who` is kept with the decision.
    """

    command: Governing
    who: str
    version: str = ""


# --- from the runtime to a client ---------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The session is open; chunks are `[horizon, d]`, of which the first `prefix_steps` may be committed already."""

    session: str
    version: str
    horizon: int
    prefix_steps: int = 0


class Assignment(Message, frozen=True, tag="assignment"):
    """Run this episode for at most `horizon_steps` environment steps."""

    episode: str
    task: str
    seed: int
    horizon_steps: int


class NoEpisode(Message, frozen=True, tag="no_episode"):
    """Nothing to run now: ask again after `retry_s`, or leave if `finished`."""

    finished: bool
    retry_s: float = 1.0


class Chunk(Message, frozen=True, tag="chunk"):
    """One decision. Tensor `actions` float32 `[h, d]`, every one from the policy `version`."""

    episode: str
    decision: int
    version: str


class EpisodeStored(Message, frozen=True, tag="episode_stored"):
    """The episode is on disk and indexed; it will be delivered to the trainer exactly once."""

    episode: str


class Orders(Message, frozen=True, tag="orders"):
    """What a bridge has to obey: the answer to `Watch`, and sent unasked (`request` 0) when the operator speaks.

    `stopped` is why all robots are stopped; empty if they are not. `reset` lifts a stop. `resume` tells a robot that
    waits for its scene that it is ready. `end` is how the episode `episode` is to end now; empty if it goes on.
    """

    stopped: str = ""
    reset: bool = False
    paused: bool = False
    resume: bool = False
    episode: str = ""
    end: Ending = ""


class Operated(Message, frozen=True, tag="operated"):
    """The robots that were told, by client."""

    robots: tuple[str, ...]


class Judged(Message, frozen=True, tag="judged"):
    """The label is on disk; `status` is what the episode counts as now."""

    episode: str
    status: str


class StatusReply(Message, frozen=True, tag="status"):
    """The runtime's counters and latencies; the keys are those of `runtime.status.Status`."""

    status: dict[str, Any]


class Serving(Message, frozen=True, tag="serving"):
    """Answer to `Announce` and `Govern`: this version is live now."""

    version: str
    previous: str


class Refused(Message, frozen=True, tag="refused"):
    """A request that was not carried out. `code` is for programs, `field` and `message` for people."""

    code: Code
    field: str
    message: str


Request = Hello | NextEpisode | Infer | EndEpisode | Watch | Operate | Judge | GetStatus | Announce | Govern
Reply = (
    Welcome
    | Assignment
    | NoEpisode
    | Chunk
    | EpisodeStored
    | Orders
    | Operated
    | Judged
    | StatusReply
    | Serving
    | Refused
)

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Message, arrays: Arrays | None = None) -> list[Any]:
    """Frames of a message; the arrays travel as they lie in memory, so they must not change until they are sent."""
    if not arrays:
        return [_encoder.encode(message)]
    table, frames = [], []
    for name, array in arrays.items():
        if array.dtype.str not in DTYPES:
            raise WireError(
                f"tensors.{name}.dtype", f"{array.dtype} does not travel; expected one of {', '.join(DTYPES)}"
            )
        array = np.asarray(array, order="C")
        table.append(TensorInfo(name, array.dtype.str, array.shape))
        frames.append(array.data if array.size else b"")
    return [_encoder.encode(msgspec.structs.replace(message, tensors=tuple(table))), *frames]


def decode_request(frames: Sequence[Any]) -> tuple[Request, dict[str, NDArray[Any]]]:
    """Read what a client sent; see `decode_frames`."""
    return decode_frames(frames, _request_decoder)


def decode_reply(frames: Sequence[Any]) -> tuple[Reply, dict[str, NDArray[Any]]]:
    """Read what the runtime sent; see `decode_frames`."""
    return decode_frames(frames, _reply_decoder)


def decode_frames(frames: Sequence[Any], decoder: msgspec.msgpack.Decoder[Any]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Message and arrays (read-only views of the frames). Raises `WireError` naming the field that is wrong."""
    if not frames:
        raise WireError("header", "the message has no frames")
    if memoryview(frames[0]).nbytes > MAX_HEADER_BYTES:
        raise WireError("header", f"longer than {MAX_HEADER_BYTES} bytes")
    try:
        message = decoder.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("header", str(error)) from error
    table = message.tensors
    if len(table) > MAX_TENSORS:
        raise WireError("tensors", f"{len(table)} tensors, at most {MAX_TENSORS} are allowed")
    if len(table) != len(frames) - 1:
        raise WireError("tensors", f"the table has {len(table)} rows but {len(frames) - 1} frames follow")
    arrays: dict[str, NDArray[Any]] = {}
    for info, frame in zip(table, frames[1:], strict=True):
        if info.name in arrays:
            raise WireError(f"tensors.{info.name}", "given twice")
        arrays[info.name] = tensor_from_bytes(info, frame)
    return message, arrays


def tensor_from_bytes(info: TensorInfo, data: Any) -> NDArray[Any]:
    """A read-only view of `data` as the array that `info` describes; raises `WireError` where they disagree."""
    shape = info.shape
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise WireError(
            f"tensors.{info.name}.dtype", f"{info.dtype!r} is not allowed; expected one of {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_DIMS or (shape and min(shape) < 0):
        raise WireError(f"tensors.{info.name}.shape", f"{shape[:8]} is not a shape of at most {MAX_DIMS} dimensions")
    nbytes = len(data) if type(data) is bytes else memoryview(data).nbytes
    needed = math.prod(shape) * dtype.itemsize
    # An empty array may not name huge sizes either: numpy has its own limits on those, and other errors.
    largest = needed or math.prod([max(size, 1) for size in shape]) * dtype.itemsize
    if largest > MAX_FRAME_BYTES:
        raise WireError(f"tensors.{info.name}.shape", f"{shape} of {info.dtype} is more than {MAX_FRAME_BYTES} bytes")
    if needed != nbytes:
        raise WireError(
            f"tensors.{info.name}", f"shape {shape} of {info.dtype} needs {needed} bytes, the frame has {nbytes}"
        )
    array: NDArray[Any] = np.ndarray(shape, dtype, data)
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def observation_tensors(observation: Observation) -> dict[str, NDArray[Any]]:
    """The tensors of an observation, under the names that `Infer` and `EndEpisode` use."""
    tensors: dict[str, NDArray[Any]] = {f"image/{name}": image for name, image in observation.images.items()}
    tensors["state"] = observation.state
    if observation.privileged is not None:
        tensors["privileged"] = observation.privileged
    return tensors


def expected_tensors(spec: BackendSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of an observation from a backend with this spec."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        f"image/{camera.name}": ("|u1", (camera.height, camera.width, 3)) for camera in spec.cameras
    }
    expected["state"] = ("<f4", (len(spec.state.names),))
    if spec.privileged is not None:
        expected["privileged"] = ("<f4", (len(spec.privileged.names),))
    return expected


def check_observation(tensors: Arrays, spec: BackendSpec) -> None:
    """Raise `WireError` naming the first tensor that is missing, unknown, of the wrong shape or not finite."""
    expected = expected_tensors(spec)
    for name in tensors:
        if name not in expected:
            raise WireError(f"tensors.{name}", f"not part of the spec; expected {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise WireError(f"tensors.{name}", "missing from the observation")
        array = tensors[name]
        if array.dtype.str != dtype or array.shape != shape:
            raise WireError(
                f"tensors.{name}", f"is {array.dtype.str}{list(array.shape)}, expected {dtype}{list(shape)}"
            )
        if dtype == "<f4" and not np.isfinite(array).all():
            raise WireError(f"tensors.{name}", "holds a value that is not finite")
