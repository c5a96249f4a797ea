"""Demonstrations: only successes are kept, in the ordinary log, the same ones every time."""

from pathlib import Path

import numpy as np
import pytest

from bridge.backend import BackendError
from bridge.backends import make_backend
from bridge.config import BackendConfig
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from trainer.config import DemosConfig
from trainer.demos import DemosError, DemoSummary, collect_demos, demo_rows

HORIZON = 20  # at half speed some goals are farther away than this


def collect(directory: Path, per_task: int, *, stop_after: int = 10**9, horizon: int = HORIZON) -> DemoSummary:
    calls: list[tuple[int, int]] = []
    backend = make_backend(BackendConfig("point"))
    config = DemosConfig(per_task=per_task, first_seed=3)
    return collect_demos(
        backend,
        directory,
        config,
        (),
        horizon,
        lambda done, total: calls.append((done, total)),
        lambda: len(calls) > stop_after,
    )


def content(directory: Path, per_task: int) -> list[tuple[int, list[list[float]]]]:
    index = EpisodeIndex(directory)
    rows = demo_rows(index, "reach", DemosConfig(per_task=per_task, first_seed=3))
    return [(row.seed, [d.sent[0].tolist() for d in read_episode(index.path(row)).decisions]) for row in rows]


def test_episodes_hold_what_the_expert_did(tmp_path: Path) -> None:
    summary = collect(tmp_path, 6)
    index = EpisodeIndex(tmp_path)
    rows = demo_rows(index, "reach", DemosConfig(per_task=6, first_seed=3))
    assert summary.kept == len(rows) == index.count() == 6
    assert summary.failed == rows[-1].seed - 3 + 1 - 6 > 0  # the horizon makes some fail; they are nowhere on disk
    assert summary.env_steps == sum(row.steps for row in rows)
    assert summary.tasks["reach"].steps_mean == summary.steps_mean == summary.env_steps / 6
    backend = make_backend(BackendConfig("point"))
    for row in rows:
        episode = read_episode(index.path(row))
        assert episode.success and episode.steps == len(episode.decisions) == row.steps <= HORIZON
        assert (episode.start.source, episode.start.explore, episode.start.seed) == ("expert", False, row.seed)
        assert episode.start.instruction == "move the dot to the square" and episode.versions == ["expert"]
        assert episode.final is not None and episode.final.privileged is not None
        backend.connect()
        backend.reset("reach", row.seed)
        for step, decision in enumerate(episode.decisions):
            seen = backend.observe()
            assert decision.step == step and decision.log_prob is None and decision.actions.shape == (1, 2)
            np.testing.assert_array_equal(decision.observation.images["top"], seen.images["top"])
            np.testing.assert_array_equal(decision.observation.state, seen.state)
            np.testing.assert_array_equal(backend.apply(decision.actions[0]), decision.sent[0])
            assert decision.reward.tolist() == [np.float32(backend.outcome().reward)]
        np.testing.assert_array_equal(episode.final.state, backend.observe().state)
        assert backend.outcome().status == "success"


def test_a_stopped_collection_ends_up_the_same(tmp_path: Path) -> None:
    whole = collect(tmp_path / "whole", 5)
    first = collect(tmp_path / "parts", 5, stop_after=3)
    assert 0 < first.kept < 5
    assert collect(tmp_path / "parts", 5) == whole
    assert content(tmp_path / "parts", 5) == content(tmp_path / "whole", 5)
    assert collect(tmp_path / "parts", 5) == whole  # nothing is left to do
    assert EpisodeIndex(tmp_path / "parts").count() == 5
    assert collect(tmp_path / "parts", 7).kept == 7  # more of them later: only the missing ones are collected
    assert content(tmp_path / "parts", 7)[:5] == content(tmp_path / "whole", 5)


def test_an_expert_that_never_succeeds_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DemosError, match="reach: the expert succeeded 0 times in 10 attempts of at most 2 steps"):
        collect(tmp_path, 2, horizon=2)
    assert EpisodeIndex(tmp_path).count() == 0


def test_backends_and_tasks_that_cannot_be_demonstrated(tmp_path: Path) -> None:
    class Mute:
        """The point backend without its expert."""

        def __init__(self) -> None:
            inner = make_backend(BackendConfig("point"))
            self.spec = inner.spec
            for name in ("connect", "reset", "observe", "apply", "outcome", "hold_action", "stop", "close"):
                setattr(self, name, getattr(inner, name))

    config = DemosConfig(per_task=1)
    with pytest.raises(DemosError, match="has no scripted expert"):
        collect_demos(Mute(), tmp_path, config, (), HORIZON, lambda done, total: None)  # type: ignore[arg-type]
    with pytest.raises(DemosError, match=r"no task 'fly' \(known: reach\)"):
        collect_demos(
            make_backend(BackendConfig("point")), tmp_path, config, ("fly",), HORIZON, lambda done, total: None
        )


def test_an_error_of_the_backend_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    backend = make_backend(BackendConfig("point"))
    steps = 0
    apply = backend.apply

    def failing(action: np.ndarray) -> np.ndarray:
        nonlocal steps
        steps += 1
        if steps == 30:
            raise BackendError("the cable fell out")
        return apply(action)

    backend.apply = failing  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="cable"):
        collect_demos(backend, tmp_path, DemosConfig(per_task=5, first_seed=3), (), HORIZON, lambda done, total: None)
    assert collect(tmp_path, 5).kept == 5
