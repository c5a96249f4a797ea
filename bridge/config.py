"""Reading YAML into Structs, with errors that name the place, the value and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta, Struct

from bridge.errors import FieldtuneError

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class ConfigError(FieldtuneError):
    """The configuration is wrong; the message says where, what and what was expected."""


class BackendConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Which backend: a name from `bridge.backends` or `module:Class`, and the keyword arguments of its constructor."""

    name: str
    """One that ships (docs/backends.md), or `module:Class` of a module that can be imported."""
    options: dict[str, Any] = {}
    """The keyword arguments; docs/backends.md has those of each that ships."""


class SafetyConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The stage between chunk and backend; always on (docs/safety.md). Limits by name of an element of the action, in
    its unit. They tighten those of the backend's spec; one that would loosen them is an error."""

    low: dict[str, float] = {}
    """Lowest value to be sent, not below the spec's."""
    high: dict[str, float] = {}
    """Highest value to be sent, not above the spec's."""
    max_step: dict[str, Positive] = {}
    """Largest change from one action to the next."""
    max_rate: dict[str, Positive] = {}
    """The same per second, not above the spec's `max_rate`. A robot whose spec has none moves through at most its whole
    range in a second (absolute actions)."""
    first_jump: Annotated[float, Meta(gt=0, le=1)] = 0.25
    """Share of its range that a robot's first target may be away from where it is; beyond it the robot holds."""
    workspace_low: tuple[float, float, float] | None = None
    """Corner of the box that the tip must not leave, m; needs a backend with `tip_after`."""
    workspace_high: tuple[float, float, float] | None = None
    """The opposite corner, m."""
    chunk_age_s: Annotated[float, Meta(gt=0, le=10)] = 2.0
    """A robot plays no action of a chunk whose observation is older; it asks for the next chunk."""
    hold_after_s: Annotated[float, Meta(gt=0, le=10)] = 0.5
    """A robot whose runtime or control loop is silent for longer is held."""
    stop_after_s: Annotated[float, Meta(gt=0, le=60)] = 2.0
    """And stopped after this long; it goes on only after a reset by the operator."""

    def __post_init__(self) -> None:
        if self.stop_after_s <= self.hold_after_s:
            raise ValueError(f"stop_after_s {self.stop_after_s:g} must be above hold_after_s {self.hold_after_s:g}")
        if (self.workspace_low is None) != (self.workspace_high is None):
            raise ValueError("workspace_low and workspace_high belong together; one of them is missing")


class BridgeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The side of the robot or simulator."""

    workers: Annotated[int, Meta(ge=0)] = 1
    """Processes that each drive one backend; a robot has one. 0: `fieldtune up` starts none, because `fieldtune drive`
    runs on the robot's computer."""
    niceness: Annotated[int, Meta(ge=0, le=19)] = 0
    """Added to the niceness of the workers that `fieldtune up` starts. Simulators that share the cores with a trainer
    should stand back (8): they are several, it is one. A robot's bridge must not."""
    endpoint: str | None = None
    """Where the runtime is, if that is not `runtime.serve.endpoint` as written (a robot on another computer)."""
    keys: str | None = None
    """This client's directory made by `fieldtune keys`; needed when the runtime has keys."""
    horizon_steps: Count = 200
    """Environment steps after which an episode is cut off; counted as a time-out."""
    merge: Literal["switch", "blend", "prefix"] | None = None
    """How a chunk that was asked for while another played takes over from it (docs/control.md). With null the next one
    is asked for when the last has been played, and the robot waits for it."""
    play_steps: Count | None = None
    """Actions of a chunk, from its observation on, after which the next is asked for. null: all of them, or half of
    them with `merge`."""
    delay_steps: Annotated[int, Meta(ge=0)] = 0
    """With `merge`, for simulators, whose time stands still while the policy thinks: a chunk counts as arrived so many
    environment steps after it was asked for, drawn anew for each from 0 to this. A robot's delay is what it is."""
    wait_for_scene: bool = False
    """For scenes that a person puts back: before each episode the robot waits, paused, until somebody resumes it. What
    comes next stands in its state (docs/safety.md)."""
    request_timeout_s: Positive = 10.0
    """A reply that takes longer makes the bridge hold the robot, drop the episode and say hello again."""
    give_up_after_s: Positive = 60.0
    """How long the bridge looks for a runtime that does not answer before it exits with an error."""
    safety: SafetyConfig = SafetyConfig()
    """see `bridge.safety`"""

    def __post_init__(self) -> None:
        if self.delay_steps and self.merge is None:
            raise ValueError("delay_steps needs merge: without it the robot waits for each chunk")


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2 numbers: PyYAML alone reads `1e-4` as a string. A key that is given twice is an
    error, as YAML has it: PyYAML alone takes the last one and drops the others without a word.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    "while reading a mapping", node.start_mark, f"found the key `{key.value}` twice", key.start_mark
                )
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes whatever `_Loader` would take for a number, and writes equal values out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _read(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except ValueError as error:  # `2024-13-45` looks like a date and is none
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def dump_yaml(value: Any) -> str:
    """`value` as YAML that `load_yaml` reads back as it was. Raises `yaml.YAMLError` for anything but plain values."""
    # Plain ASCII, the rest escaped: YAML's reader takes some other characters for the end of a line.
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120))


def load_yaml(path: Path) -> Any:
    """The content of one YAML file, read by the safe loader."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    try:
        return _read(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error


def parse(data: Any, kind: type[T], source: str, overrides: Sequence[str] = ()) -> T:
    """`data` as `kind`; `overrides` are `path.to.key=value` strings, their values read as YAML.

    Raises `ConfigError` naming the path in the file, the value found there and what was expected.
    """
    for override in overrides:
        data = _override(data, override)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), data, kind)}") from error


def _override(data: Any, override: str) -> Any:
    path, separator, value = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: expected path.to.key=value")
    try:
        parsed = _read(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    root = dict(data) if isinstance(data, dict) else {}
    node = root
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, dict) else {}
        node = node[key]
    node[keys[-1]] = parsed
    return root


def _explain(message: str, data: Any, kind: type[Any]) -> str:
    """msgspec's message with the path first, the offending value, and the nearest known key for a misspelt one."""
    text, _, path = message.partition(" - at `")
    path = path.rstrip("`") or "$"
    if path.startswith("key` in `"):
        text, path = f"{text} as a key; a key such as 1, on or no needs quotes", path.removeprefix("key` in `")
    unknown = re.search(r"unknown field `(.+?)`", text)
    if unknown:
        key = unknown.group(1)
        known = _fields_at(kind, path)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"{path}.{key}: unknown key{hint} (known: {', '.join(known)})" if known else f"{path}.{key}: unknown key"
    value = _value_at(data, path)
    found = "" if value is _MISSING or "missing required" in text else f" (found {value!r})"
    return f"{path}: {text}{found}"


_MISSING = object()


def _steps(path: str) -> list[str]:
    return [step for step in re.split(r"[.\[\]]+", path.removeprefix("$")) if step]


def _value_at(data: Any, path: str) -> Any:
    for step in _steps(path):
        if isinstance(data, dict) and step in data:
            data = data[step]
        elif isinstance(data, list) and step.isdigit() and int(step) < len(data):
            data = data[int(step)]
        else:
            return _MISSING
    return data


def _fields_at(kind: Any, path: str) -> list[str]:
    """Names of the fields of the Struct that lies at `path` below `kind`; empty where none can be told."""
    for step in _steps(path):
        if not (isinstance(kind, type) and issubclass(kind, Struct)):
            return []
        types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        kind = types.get(step)
        options = [t for t in getattr(kind, "__args__", ()) if isinstance(t, type) and issubclass(t, Struct)]
        kind = options[0] if options else kind
    if isinstance(kind, type) and issubclass(kind, Struct):
        return [field.encode_name for field in msgspec.structs.fields(kind)]
    return []
