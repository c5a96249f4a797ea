"""Writes MCAP files that Foxglove opens: one an episode, every message JSON with a schema in the file.

    /camera/NAME   foxglove.CompressedImage   PNG, at each decision and at the end
    /state         fieldtune.State            one number for each element, its unit in the schema
    /action        fieldtune.Action           what was sent at each step, the same way
    /reward        fieldtune.Reward           the backend's
    /decision      fieldtune.Decision         number, policy version, log-prob of what was executed of it
    /episode       fieldtune.Episode          once, at the end: task, how it ended, ...

The time of a message is the episode's start plus its step at the control rate.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from mcap.writer import Writer

from bridge.backend import Observation
from fieldtune import __version__
from fieldtune.data.png import encode_png
from runtime.durable import write_atomic
from runtime.episode import Episode
from runtime.episode_file import EPISODE_ID
from runtime.index import EpisodeRow

NS = 1_000_000_000
SUFFIX = ".mcap"
# The fields that schemas/jsonschema/CompressedImage.json of github.com/foxglove/foxglove-sdk requires.
COMPRESSED_IMAGE = {
    "title": "foxglove.CompressedImage",
    "type": "object",
    "properties": {
        "timestamp": {
            "title": "time",
            "type": "object",
            "properties": {"sec": {"type": "integer"}, "nsec": {"type": "integer"}},
        },
        "frame_id": {"type": "string"},
        "data": {"type": "string", "contentEncoding": "base64"},
        "format": {"type": "string"},
    },
    "required": ["timestamp", "frame_id", "data", "format"],
}
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


class McapExport:
    """`DIRECTORY/EPISODE.mcap`. Methods raise `OSError`."""

    def __init__(self, directory: Path) -> None:
        """Make the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def has(self, episode: str) -> bool:
        """Whether an episode has its file."""
        return self._path(episode).exists()

    def add(self, row: EpisodeRow, episode: Episode) -> bool:
        """Write an episode's file."""
        write_atomic(self._path(row.episode), mcap_of(row, episode))
        return True

    def finish(self) -> None:
        """Every file is whole already."""

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, episode: str) -> Path:
        assert EPISODE_ID.fullmatch(episode)
        return self._directory / (episode + SUFFIX)


def mcap_of(row: EpisodeRow, episode: Episode) -> bytes:
    """An episode as the content of an MCAP file; the row says how it counts."""
    spec = episode.start.spec
    buffer = io.BytesIO()
    file = _File(Writer(buffer), int(episode.start.started_unix_s * NS), NS / spec.control_hz)
    summary: dict[str, Any] = {
        "episode": row.episode,
        "task": row.task,
        "instruction": episode.start.instruction,
        "status": row.status,
        "success": row.status == "success",
        "reason": row.reason,
        "steps": row.steps,
        "seed": row.seed,
        "source": row.source,
        "client": row.client,
        "backend": spec.name,
    }
    for camera in spec.cameras:
        file.channel(f"/camera/{camera.name}", COMPRESSED_IMAGE)
    file.channel("/state", _numbers("fieldtune.State", spec.state.names, spec.state.units))
    file.channel("/action", _numbers("fieldtune.Action", spec.action.names, spec.action.units))
    file.channel("/reward", _schema("fieldtune.Reward", {"reward": {"type": "number"}}))
    decision_schema = {
        "decision": {"type": "integer"},
        "version": {"type": "string"},
        "log_prob": {"type": ["number", "null"], "description": "of the actions that were executed, nats"},
    }
    file.channel("/decision", _schema("fieldtune.Decision", decision_schema))
    properties = {name: {"type": TYPES[type(value)]} for name, value in summary.items()}
    file.channel("/episode", _schema("fieldtune.Episode", properties))

    def observe(observation: Observation, step: int) -> None:
        for camera in spec.cameras:
            file.image(camera.name, encode_png(observation.images[camera.name]), step)
        file.write("/state", dict(zip(spec.state.names, observation.state.tolist(), strict=True)), step)

    for decision in episode.decisions:
        observe(decision.observation, decision.step)
        made = {
            "decision": decision.number,
            "version": decision.version,
            "log_prob": decision.executed_log_prob,
        }
        file.write("/decision", made, decision.step)
        first = decision.step + decision.start
        for step, (sent, reward) in enumerate(zip(decision.sent, decision.reward, strict=True), first):
            file.write("/action", dict(zip(spec.action.names, sent.tolist(), strict=True)), step)
            file.write("/reward", {"reward": float(reward)}, step)
    if episode.final is not None:
        observe(episode.final, episode.steps)
    file.write("/episode", summary, episode.steps)
    file.finish({name: str(value) for name, value in summary.items()})
    return buffer.getvalue()


class _File:
    """Channels by topic, messages by step."""

    def __init__(self, writer: Writer, start_ns: int, step_ns: float) -> None:
        self._writer, self._start_ns, self._step_ns = writer, start_ns, step_ns
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        writer.start(profile="", library=f"fieldtune {__version__}")

    def channel(self, topic: str, schema: dict[str, Any]) -> None:
        name = schema["title"]
        if name not in self._schemas:
            self._schemas[name] = self._writer.register_schema(name, "jsonschema", msgspec.json.encode(schema))
        self._channels[topic] = self._writer.register_channel(topic, "json", self._schemas[name])

    def write(self, topic: str, message: dict[str, Any], step: int) -> None:
        at = self._at_ns(step)
        self._writer.add_message(self._channels[topic], at, msgspec.json.encode(message), at)

    def image(self, camera: str, png: bytes, step: int) -> None:
        at = self._at_ns(step)
        time = {"sec": at // NS, "nsec": at % NS}
        message = {"timestamp": time, "frame_id": camera, "data": base64.b64encode(png).decode(), "format": "png"}
        self.write(f"/camera/{camera}", message, step)

    def finish(self, metadata: dict[str, str]) -> None:
        self._writer.add_metadata("episode", metadata)
        self._writer.finish()  # type: ignore[no-untyped-call]

    def _at_ns(self, step: int) -> int:
        return self._start_ns + round(step * self._step_ns)


def _numbers(title: str, names: Sequence[str], units: Sequence[str]) -> dict[str, Any]:
    elements = zip(names, units, strict=True)
    return _schema(title, {name: {"type": "number", "description": f"unit: {unit}"} for name, unit in elements})


def _schema(title: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "type": "object", "properties": properties}
