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


def make_intake(index: EpisodeIndex, *, cursor: int = 0, age: int = 0, warnings: list[str] | None = None) -> Intake:
    """One that wants 4 episodes of the task "reach", of versions that are all `age` versions old."""
    versions: Any = SimpleNamespace(age=lambda version: age, max_staleness_versions=2, waiting=False)
    return Intake(
        index,
        cast(Versions, versions),
        msgspec.structs.replace(TrainerConfig(), episodes_per_iteration=4),
        ("reach",),
        cursor=cursor,
        labels=0,
        stop=threading.Event(),
        warn=(warnings if warnings is not None else []).append,
    )


@pytest.mark.parametrize(("age", "warnings"), [(3, 1), (0, 0)])
def test_episodes_that_teach_nothing_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, warnings: int
) -> None:
    monkeypatch.setattr(intake, "STILL_WAITING_S", -1.0)
    monkeypatch.setattr(intake, "POLL_S", 0.0)
    index = EpisodeIndex(tmp_path)
    said: list[str] = []
    waiting = make_intake(index, age=age, warnings=said)
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


def test_a_labelled_episode_stays_until_it_is_known_whether_the_buffer_has_it(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    rows = [msgspec.structs.replace(trial_row("reach", i, True, 10), bytes=1) for i in range(3)]
    index.add(rows)
    index.hold(3, 0, [])
    index.label(rows[1].episode, "success", "Ada")
    once = iter([False, True])
    assert make_intake(index, cursor=3).wait(lambda: next(once), lambda: None) is None
    assert [row.episode for row in index.retire(100)] == [rows[0].episode, rows[2].episode]
    index.hold(3, 1, [])
    assert [row.episode for row in index.retire(100)] == [rows[1].episode]
