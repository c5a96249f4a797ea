"""Mistakes that would show only after demonstrations and fine-tuning are found before them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from bridge.config import ConfigError
from fieldtune.commands import up
from fieldtune.deployment import load_deployment
from runtime.registry import Registry

BLIND = """
from msgspec.structs import replace
from bridge.backends.point import Point, PointOptions

class Blind(Point):
    def __init__(self):
        super().__init__(PointOptions(size_px=16))
        self._spec = replace(self.spec, privileged=None)
"""


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(name: str, *_: Any) -> None:
        raise AssertionError(f"{name} was started")

    monkeypatch.setattr(up, "Child", child)


def made(tmp_path: Path, *settings: str) -> up.Up:
    overrides = (f"runs={tmp_path}", *settings)
    return up.Up(load_deployment("point", overrides), "point", overrides, threading.Event(), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.post_train=[raech]"], r"\$\.trainer\.post_train: 'raech' is not among the tasks \(reach\)"),
        (["trainer.start=base"], r"\$\.trainer\.start: .*base cannot be gone on from: .*made for another deployment"),
        (["trainer.start=nosuch"], "nosuch: no such directory, and no shipped policy of that name"),
        (["trainer.vla.vocabulary=200"], r"\$\.trainer\.vla\.vocabulary: .*at least 257"),
        (["trainer.vla.max_tokens=1"], r"\$\.trainer\.vla\.max_tokens: .*the policy takes 1"),
        (["trainer.vla.channels=[]"], r"\$\.trainer\.vla: no network can be made for point: images of 32x32"),
    ],
)
def test_before_demonstrations(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        up.prepare(made(tmp_path, *settings))


def test_nothing_to_predict_where_the_backend_has_no_privileged_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "blind_point.py").write_text(BLIND)
    blind = ["backend.name=blind_point:Blind", "backend.options={}"]
    with pytest.raises(ConfigError, match=r"\$\.trainer\.sft\.auxiliary: is 1"):
        up.prepare(made(tmp_path, *blind, "trainer.sft.auxiliary=1"))
    with pytest.raises(AssertionError, match="demos was started"):
        up.prepare(made(tmp_path, *blind))


def test_before_a_run_is_gone_on_with(tmp_path: Path) -> None:
    this = made(tmp_path, "trainer.post_train=[raech]")
    this.run.path.mkdir()
    registry = Registry(this.run.registry)
    registry.add("a" * 64, parent="", made={"command": "sft"})
    registry.set_live("a" * 64, why="sft")
    with pytest.raises(ConfigError, match=r"\$\.trainer\.post_train"):
        up.prepare(this)
    assert up.prepare(made(tmp_path))
