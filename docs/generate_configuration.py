"""Writes docs/configuration.md from the settings' own sentences, so that there is one place for each fact.

Run `python docs/generate_configuration.py` after a change of a settings Struct; a test compares the two.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_type_hints

import msgspec
from msgspec import Struct

from fieldtune.deployment import Deployment

HEAD = """# Configuration

One YAML file is one deployment. It is given by path, or by name for those that ship with fieldtune (`configs/`).
A key that is not in the tables below is an error, and so is a value of the wrong type: the message has the path, the
value and what was expected, and the exit code is 2. `--set path.to.key=value` on the command line overrides one key and
is checked in the same way.

This page is generated from the sources by `docs/generate_configuration.py`.
"""


def sentences(struct: type[Struct]) -> dict[str, tuple[str, str]]:
    """Field -> (type as written, the string below it)."""
    tree = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return found


def section(struct: type[Struct], path: str) -> list[str]:
    """The table of one Struct, then those of the Structs inside it."""
    lines = [f"## `{path}`" if path else "## Top level", "", inspect.getdoc(struct) or "", ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    inner: list[tuple[type[Struct], str]] = []
    types = get_type_hints(struct)
    said = sentences(struct)
    for field in msgspec.structs.fields(struct):
        kind = types[field.name]
        key = f"{path}.{field.name}" if path else field.name
        written, text = said[field.name]
        if isinstance(kind, type) and issubclass(kind, Struct):
            inner.append((kind, key))
            lines.append(f"| `{field.name}` | section | | {text or f'see `{key}`'} |")
            continue
        default = "required" if field.required else f"`{field.default!r}`"
        if field.default_factory is not msgspec.NODEFAULT:
            default = f"`{field.default_factory()!r}`"
        written = written.replace("|", "or")
        lines.append(f"| `{field.name}` | {written} | {default} | {text} |")
    lines.append("")
    for kind, key in inner:
        lines += section(kind, key)
    return lines


def page() -> str:
    """The whole page."""
    return HEAD + "\n" + "\n".join(section(Deployment, "")).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
