"""`fieldtune backend check`: what it says, what it exits with, and that a robot is not moved without --moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.conformance import RULES
from fieldtune.cli import run

ARM = """
import msgspec, numpy as np, pathlib
from bridge.backends.point import Point, PointOptions

class Arm(Point):
    def __init__(self, log, takes_nan=False):
        super().__init__(PointOptions())
        self._spec = msgspec.structs.replace(self._spec, paced=True, control_hz=500.0)
        self.log, self.takes_nan = pathlib.Path(log), takes_nan
    def reset(self, task, seed):
        super().reset(task, seed)
        self.log.write_text("moved")
    def apply(self, action):
        return super().apply(np.nan_to_num(action)[:2] if self.takes_nan else action)
"""


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A robot of the user's own, as `checked_arm:Arm`; the file that it writes to when it moves."""
    (tmp_path / "checked_arm.py").write_text(ARM)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "moved"


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    report = json.loads(capsys.readouterr().out)
    return {row["name"]: row for row in report["checks"]}


def test_a_good_backend_by_name_and_by_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("name: mine\nbackend: {name: point}\n")
    for given in ("point", str(config)):
        assert run(["backend", "check", given, "--json", "--set", "backend.options.size_px=48"]) == 0
        found = rows(capsys)
        assert list(found) == [rule.name for rule in RULES]
        assert "image/top uint8[48, 48, 3]" in found["observe"]["found"]


def test_the_table_has_every_row_and_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backend", "check", "point"]) == 0
    printed = capsys.readouterr().out
    assert "stop and close before" in printed
    assert f"point: {len(RULES) - 1} passed, 1 skipped" in printed


def test_a_robot_stays_where_it_is_unless_it_may_move(arm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["backend", "check", "checked_arm:Arm", "--json", "--set", f"backend.options.log={arm}"]
    assert run(line) == 0
    assert not arm.exists()
    assert rows(capsys)["apply"]["state"] == "skipped"
    assert run([*line, "--moves"]) == 0
    assert arm.read_text() == "moved"
    assert rows(capsys)["apply"]["state"] == "passed"


def test_a_fault_fails_the_command(arm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", f"backend.options.log={arm}", "--set", "backend.options.takes_nan=true"]
    assert run(["backend", "check", "checked_arm:Arm", "--moves", "--json", *options]) == 1
    failed = {name for name, row in rows(capsys).items() if row["state"] == "failed"}
    assert failed == {"bad actions"}


def test_what_is_no_backend_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backend", "check", "checked_nothing:Arm"]) == 2
    assert "cannot be imported" in capsys.readouterr().err
    assert run(["backend", "check", "pont"]) == 2
    assert run(["backend", "check", "point", "--set", "backend.options.sizepx=1"]) == 2
    assert "sizepx" in capsys.readouterr().err


def test_the_page_has_every_rule_in_its_order_and_which_of_them_move() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "backends.md").read_text()
    page = page.partition("### The rules")[2].partition("### ")[0]
    written = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    table = [(cells[0], cells[-1] == "yes") for cells in written]
    assert table == [(rule.name, rule.moves) for rule in RULES]
