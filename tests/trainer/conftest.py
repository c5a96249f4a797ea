"""What the tests of training share: one run that is ready to be trained."""

from __future__ import annotations

import pytest

from runtime.rundir import RunDir


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on the toy backend with demonstrations and a live SFT version. Copy it."""
    from ppo_robot import prepare

    return prepare(tmp_path_factory.mktemp("prepared"))
