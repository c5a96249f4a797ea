"""A robot and its runtime as processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scenes import Scene


@pytest.fixture
def scene(tmp_path: Path, tiny_bundle: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Nothing is started yet."""
    monkeypatch.setenv("COLUMNS", "1000")  # what is said is not broken into lines
    made = Scene(tmp_path, tiny_bundle)
    yield made
    made.close()
