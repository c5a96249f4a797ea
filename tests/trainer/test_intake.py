import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from run_logs import trial_row

from runtime.index import EpisodeIndex
from trainer import intake
from trainer.config import TrainerConfig
from trainer.intake import Intake
from trainer.versions import Versions


@pytest.mark.parametrize(("age", "warnings"), [(3, 1), (0, 0)])
def test_episodes_that_teach_nothing_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, warnings: int
) -> None:
    monkeypatch.setattr(intake, "STILL_WAITING_S", -1.0)
    monkeypatch.setattr(intake, "POLL_S", 0.0)
    versions: Any = SimpleNamespace(age=lambda version: age, max_staleness_versions=2, on_trial=False)
    index = EpisodeIndex(tmp_path)
    said: list[str] = []
    config = msgspec.structs.replace(TrainerConfig(), episodes_per_iteration=4)
    waiting = Intake(
        index,
        cast(Versions, versions),
        config,
        ("reach",),
        cursor=0,
        labels=0,
        stop=threading.Event(),
        warn=said.append,
    )
    rounds = iter(range(10))

    def finished() -> bool:
        number = next(rounds, None)
        if number is not None:
            index.add([trial_row("reach", number, True, 10)])
        return number is None

    waiting.wait(finished, lambda: None)
    told = [warning for warning in said if "cannot be learned from" in warning]
    assert len(told) == warnings
    assert all("the last 4 episodes" in warning and "4 are of versions that are too old" in warning for warning in told)
