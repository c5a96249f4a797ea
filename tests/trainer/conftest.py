"""What the tests of training share: one run that is ready to be trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runtime.rundir import RunDir

if TYPE_CHECKING:
    from ppo_robot import Robot


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on the toy backend with demonstrations and a live SFT version. Copy it."""
    from ppo_robot import prepare

    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def run(prepared: RunDir, tmp_path: Path) -> RunDir:
    """A copy of it."""
    shutil.copytree(prepared.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def robot(run: RunDir) -> Iterator[Robot]:
    """Drives what is live in `run`."""
    from ppo_robot import Robot

    made = Robot(run)
    yield made
    made.close()
