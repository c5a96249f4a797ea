"""The documentation says what the code says."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bridge import messages
from bridge.backends import make_backend
from fieldtune.cli import COMMANDS
from fieldtune.deployment import load_deployment

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


def test_the_robot_of_the_readme_is_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, config = (
        re.search(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) for kind in ("python", "yaml")
    )
    assert code is not None and config is not None
    (tmp_path / "my_arm.py").write_text(code.group(1))
    (tmp_path / "my_arm.yaml").write_text(config.group(1))
    sdk = types.ModuleType("my_sdk")
    arm = types.SimpleNamespace(
        move_home=lambda: None,
        positions=lambda: np.zeros(4),
        command=lambda action: action,
        block_in_gripper=lambda: True,
        hold=lambda: None,
        disconnect=lambda: None,
    )
    camera = types.SimpleNamespace(read=lambda: np.zeros((96, 96, 3), np.uint8))
    vars(sdk).update(Arm=lambda port: arm, Camera=lambda width, height: camera)
    monkeypatch.setitem(sys.modules, "my_sdk", sdk)
    monkeypatch.syspath_prepend(tmp_path)
    backend = make_backend(load_deployment(str(tmp_path / "my_arm.yaml")).backend)
    backend.connect()
    backend.reset("pick", 0)
    messages.check_observation(messages.observation_tensors(backend.observe()), backend.spec)
    assert backend.apply(np.full(4, 2.0, np.float32)).tolist() == [1.5] * 4
    assert backend.outcome().status == "success"
    assert len(code.group(1).splitlines()) <= 36
