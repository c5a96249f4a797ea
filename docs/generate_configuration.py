"""Writes docs/configuration.md from the settings' own sentences, so that there is one place for each fact.

Run `python docs/generate_configuration.py` after a change of a settings Struct; a test compares the two.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from fieldtune.deployment import Deployment

HEAD = """# Configuration

One YAML file is one deployment. It is given by path, or by name for those that ship with fieldtune (`configs/`).
A key that is not in the tables below is an error, and so is a value of the wrong type: the message has the path, the
value and what was expected, and the exit code is 2. `--set path.to.key=value` on the command line overrides one key and
is checked in the same way.

This page is generated from the sources by `docs/generate_configuration.py`.
"""


PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}


def sentences(struct: type[Struct]) -> dict[str, str]:
    """Field -> the string below it."""
    tree = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[node.target.id] = text
    return found


def words(kind: Any) -> str:
    """A type as somebody who writes YAML would say it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([words(inner[0]), *bounds(inner[1])])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys("null" if part is NoneType else words(part) for part in inner))
    if origin is tuple:
        if inner[-1] is not ...:
            return f"[{', '.join(map(words, inner))}]"
        return f"list of {words(inner[0])}"
    if origin is dict:
        return f"mapping to {words(inner[1])}"
    return PLAIN.get(kind, "mapping")


def bounds(meta: Meta) -> list[str]:
    """What a number or text must keep to."""
    named = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{text} {getattr(meta, key):g}" for key, text in named.items() if getattr(meta, key) is not None]
    return [*found, f"matching `{meta.pattern}`"] if meta.pattern else found


def section(struct: type[Struct], path: str) -> list[str]:
    """The table of one Struct, then those of the Structs inside it."""
    lines = [f"## `{path}`" if path else "## Top level", "", inspect.getdoc(struct) or "", ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    inner: list[tuple[type[Struct], str]] = []
    types = get_type_hints(struct, include_extras=True)
    said = sentences(struct)
    for field in msgspec.structs.fields(struct):
        kind = types[field.name]
        key = f"{path}.{field.name}" if path else field.name
        text = said[field.name]
        if isinstance(kind, type) and issubclass(kind, Struct):
            inner.append((kind, key))
            lines.append(f"| `{field.name}` | section | | {text or f'see `{key}`'} |")
            continue
        value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        default = "required" if field.required else f"`{msgspec.json.encode(value).decode()}`"
        lines.append(f"| `{field.name}` | {words(kind)} | {default} | {text} |")
    lines.append("")
    for kind, key in inner:
        lines += section(kind, key)
    return lines


def page() -> str:
    """The whole page."""
    return HEAD + "\n" + "\n".join(section(Deployment, "")).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
