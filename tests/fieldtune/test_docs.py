"""The documentation says what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bridge import messages
from bridge.backends import BACKENDS, make_backend
from fieldtune.cli import COMMANDS, run
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


def test_every_backend_has_a_section_and_a_configuration() -> None:
    page = (ROOT / "docs" / "backends.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| [^|]* \| ([^|]*) \|", page, re.MULTILINE))
    assert sorted(rows) == sorted(BACKENDS)
    for backend, cell in rows.items():
        assert f"\n## {backend}\n" in page
        configs = re.findall(r"`(\w+)`", cell)
        assert configs and all(load_deployment(name).backend.name == backend for name in configs)


class SdkArm:
    """What the README's robot is made of: joints that go where they are sent."""

    def __init__(self, port: str) -> None:
        assert port == "/dev/ttyACM0"
        self._positions = np.zeros(4)

    def move_home(self) -> None:
        self._positions = np.zeros(4)

    def positions(self) -> Any:
        return self._positions.copy()

    def command(self, action: Any) -> Any:
        self._positions = action.astype(np.float64)
        return action

    def block_in_gripper(self) -> bool:
        return bool(self._positions[1] < -1)

    def hold(self) -> None:
        pass

    def disconnect(self) -> None:
        pass


class SdkCamera:
    """Noise."""

    def __init__(self, width: int, height: int) -> None:
        self._shape = (height, width, 3)

    def read(self) -> Any:
        return np.random.default_rng(0).integers(0, 255, self._shape, np.uint8)


def test_the_robot_of_the_readme_passes_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, config = (
        re.search(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) for kind in ("python", "yaml")
    )
    assert code is not None and config is not None
    assert len(code.group(1).splitlines()) <= 45
    (tmp_path / "my_arm.py").write_text(code.group(1).replace("control_hz=20.0", "control_hz=200.0"))
    (tmp_path / "my_arm.yaml").write_text(config.group(1))
    sdk = types.ModuleType("my_sdk")
    vars(sdk).update(Arm=SdkArm, Camera=SdkCamera)
    monkeypatch.setitem(sys.modules, "my_sdk", sdk)
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "my_arm.yaml")
    assert run(["backend", "check", path, "--moves", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    states = {name: row["state"] for name, row in rows.items()}
    assert {name for name, state in states.items() if state == "skipped"} == {"hold keeps still", "unplugged"}
    warned = {name for name, state in states.items() if state == "warned"}
    assert all("too slow for" in rows[name]["found"] for name in warned), rows
    backend = make_backend(load_deployment(path).backend)
    backend.connect()
    assert backend.apply(np.full(4, 2.0, np.float32)).tolist() == [1.5] * 4
