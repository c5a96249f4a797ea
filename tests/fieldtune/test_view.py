"""`fieldtune episodes view`: what Rerun is told, and what a user without it is told."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import log_of, observation, sent

from fieldtune.cli import run


@pytest.fixture
def episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fieldtune.data.rerun_view", raising=False)
    Path("mine.yaml").write_text("name: mine\nbackend: {name: point}\n")
    log_of(tmp_path / "runs/mine/episodes", 1)
    return "e0"


def test_the_viewer_is_given_the_episode(episode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, list[tuple[float | None, Any]]] = {}
    now: list[float | None] = [None]
    stand_in: Any = types.ModuleType("rerun")
    stand_in.init = lambda application, spawn: logged.setdefault("spawned", [(None, spawn)])
    stand_in.set_time = lambda timeline, duration: now.__setitem__(0, duration)
    stand_in.log = lambda path, value, static=False: logged.setdefault(path, []).append((now[0], value))
    stand_in.Image = stand_in.Scalars = stand_in.TextDocument = stand_in.TextLog = lambda value: value
    monkeypatch.setitem(sys.modules, "rerun", stand_in)
    assert run(["episodes", "view", "mine.yaml", episode]) == 0
    assert logged["spawned"] == [(None, True)]
    assert [at for at, _ in logged["camera/eye"]] == [0.0, 0.4, 0.8, 1.1]
    for step, (_, image) in zip((0, 4, 8, 11), logged["camera/eye"], strict=True):
        np.testing.assert_array_equal(image, observation(step)["image/eye"])
    assert [at for at, _ in logged["action/a"]] == [step / 10 for step in range(11)]
    np.testing.assert_array_equal([value for _, value in logged["action/b"]], [sent(step)[1] for step in range(11)])
    assert "success after 11 steps" in logged["episode"][0][1]
    # As it counts: what somebody has said of it since is above what the robot said.
    assert run(["episodes", "label", "mine.yaml", episode, "failure"]) == 0
    assert run(["episodes", "view", "mine.yaml", episode]) == 0
    assert "failure after 11 steps" in logged["episode"][1][1]


def test_without_rerun_the_extra_is_named(
    episode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert run(["episodes", "view", "mine.yaml", episode]) == 1
    assert "fieldtune[viz]" in capsys.readouterr().err
