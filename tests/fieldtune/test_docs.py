"""The documentation says what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import msgspec

from bridge import messages
from fieldtune.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def test_configuration_page_is_what_the_settings_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text() == module.page(), "run docs/generate_configuration.py"


def test_protocol_page_names_every_message_field_and_code() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    for kind in [*messages.Request.__args__, *messages.Reply.__args__]:
        assert f"`{kind.__struct_config__.tag}`" in page, kind
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name}"
    for code in messages.Code.__args__:
        assert f"| `{code}` |" in page, code
    for dtype in messages.DTYPES:
        assert dtype in page


def test_readme_names_only_commands_that_exist_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    known = {name.split()[0] for name in COMMANDS}
    for command in re.findall(r"^\s*(?:\$ )?fieldtune ([a-z]+)", readme, re.MULTILINE):
        assert command in known, command
    for path in re.findall(r"\]\(((?:docs|configs)/[^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
