"""What the tests of whole runs share: one run whose policy has been fine-tuned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fine_tuning import FINE_TUNING


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `point` with demonstrations and a fine-tuned policy. Copy it."""
    directory = tmp_path_factory.mktemp("fine_tuned")
    settings = [word for setting in (f"runs={directory}", *FINE_TUNING) for word in ("--set", setting)]
    for command in ("demos", "sft"):
        line = [sys.executable, "-m", "fieldtune", command, "point", *settings]
        subprocess.run(line, check=True, timeout=200, stdin=subprocess.DEVNULL)
    return directory / "point"
