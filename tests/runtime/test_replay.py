"""The backend `replay`: what was logged comes back, and only what is repeated ends as it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_samples import (
    SPEC,
    Answer,
    make_decision,
    make_end,
    make_executed,
    make_start,
    observation,
    record_episode,
)
from logged_run import STEPS, Brief, log_run, read_log
from msgspec.structs import replace

from bridge.backend import Backend, BackendError, HasExpert, instruction_of
from bridge.backends import make_backend
from bridge.config import BackendConfig, ConfigError
from bridge.messages import check_observation, observation_tensors
from runtime.episodes import EpisodeLog
from runtime.policy import Policy
from runtime.replay import Replay

TinyBundle = Callable[..., str]


def replay(directory: Path, **options: Any) -> Replay:
    backend = make_backend(BackendConfig("replay", {"directory": str(directory), **options}))
    assert isinstance(backend, Backend) and isinstance(backend, Replay) and not isinstance(backend, HasExpert)
    backend.connect()
    return backend


def test_a_run_is_reproduced_to_the_bit_through_the_real_server_and_another_version_is_not(
    serve: Callable[..., Any], tmp_path: Path, tiny_bundle: TinyBundle
) -> None:
    acted, other = (Policy.load(tmp_path / tiny_bundle(tmp_path, value)) for value in (0.25, 0.3))
    logged = log_run(serve, tmp_path / "log", acted, Brief(), explore=False)
    assert [episode.status for episode in logged] == ["success", "failure", "success"]
    assert [len(decision.sent) for decision in logged[0].decisions] == [4, 2], "a chunk was cut"

    again = log_run(serve, tmp_path / "again", acted, replay(tmp_path / "log"), explore=False)
    for one, two in zip(logged, again, strict=True):
        assert (one.status, one.steps, one.start.instruction) == (two.status, two.steps, two.start.instruction)
        for a, b in zip(one.decisions, two.decisions, strict=True):
            for name in ("actions", "sent", "reward"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            np.testing.assert_array_equal(a.observation.images["top"], b.observation.images["top"])
        assert one.final is not None and two.final is not None
        np.testing.assert_array_equal(one.final.privileged, two.final.privileged)

    instead = log_run(serve, tmp_path / "instead", other, replay(tmp_path / "log"), explore=False)
    # It saw the same, did something else, and what that would have come to is not known.
    assert [(episode.status, episode.steps) for episode in instead] == [("timeout", STEPS)] * 3
    for one, two in zip(logged, instead, strict=True):
        np.testing.assert_array_equal(one.decisions[1].observation.state, two.decisions[1].observation.state)
        assert np.abs(one.decisions[1].actions - two.decisions[1].actions).max() > 0.01


@pytest.fixture
def log(tmp_path: Path) -> EpisodeLog:
    """Three episodes of `t` and one of `u`, two chunks of four steps each; the one between them was aborted."""
    log = EpisodeLog(tmp_path / "log")
    both = replace(SPEC, instructions={"t": ("go", "move"), "u": "stay"})
    for episode, start in {
        "e0": {"instruction": "move"},
        "e1": {"instruction": "go"},
        "e2": {"instruction": "go", "status": "aborted"},
        "e3": {"instruction": "stay", "task": "u", "status": "failure"},
        "e4": {"instruction": "move", "status": "timeout"},
    }.items():
        assert record_episode(log, episode, spec=both, **start).wait() is None
    log.close()
    return log


def play(backend: Replay, change: float = 0.0, steps: int = 8) -> list[str]:
    """Apply what was logged, the third action changed; the statuses after each step."""
    found = []
    for step in range(steps):
        action = np.full(2, 1 + step // 4, np.float32)
        action[1] += change if step == 2 else 0.0
        backend.apply(action)
        found.append(backend.outcome().status)
    return found


def test_a_seed_means_an_episode_and_the_instruction_that_it_was_told(log: EpisodeLog, tmp_path: Path) -> None:
    backend = replay(tmp_path / "log")
    assert backend.spec.instructions == {"t": ("move", "go", "move"), "u": ("stay",)}
    assert backend.spec.name == "replay" and not backend.spec.paced
    ends = []
    for seed in range(6):
        backend.reset("t", seed)
        ends.append((instruction_of(backend.spec, "t", seed), play(backend)[-1]))
    assert ends == [("move", "success"), ("go", "success"), ("move", "timeout")] * 2
    backend.reset("u", 5)
    assert play(backend) == ["running"] * 7 + ["failure"]


def test_episodes_can_be_named_or_only_the_newest_taken(log: EpisodeLog, tmp_path: Path) -> None:
    assert replay(tmp_path / "log", episodes=["e4", "e1"]).spec.instructions == {"t": ("move", "go")}
    assert replay(tmp_path / "log", last=2).spec.instructions == {"u": ("stay",), "t": ("move",)}


def test_observations_and_rewards_are_those_of_the_step(log: EpisodeLog, tmp_path: Path) -> None:
    backend = replay(tmp_path / "log", episodes=["e1"])
    backend.reset("t", 0)
    seen: dict[int, Any] = {}
    for step in range(9):
        if step in (0, 4, 8):
            seen[step] = observation_tensors(backend.observe())
            check_observation(seen[step], backend.spec)
        else:
            with pytest.raises(BackendError, match=f"no observation at step {step}, only at 0, 4, 8; set bridge.play"):
                backend.observe()
        if step < 8:
            backend.apply(np.ones(2, np.float32))
            assert backend.outcome().reward == 1 + step // 4
    for step, value in ((0, 1), (4, 2), (8, 99)):
        for name, array in observation(value).items():
            np.testing.assert_array_equal(seen[step][name], array)
    with pytest.raises(BackendError, match="is over after 8 steps"):
        backend.apply(np.ones(2, np.float32))


@pytest.mark.parametrize(("change", "end"), [(0.0, "success"), (1e-5, "success"), (-0.01, "timeout")])
def test_only_what_is_repeated_ends_as_it_did(log: EpisodeLog, tmp_path: Path, change: float, end: str) -> None:
    backend = replay(tmp_path / "log")
    backend.reset("t", 0)
    assert play(backend, change)[-1] == end
    assert backend.differences == pytest.approx([0, 0, abs(change), 0, 0, 0, 0, 0], abs=1e-7)


def test_what_was_changed_on_its_way_to_the_robot_is_repeated_by_either_action(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "log")
    log.start(make_start("e0"))
    log.append("e0", make_decision(1))
    log.append("e0", make_executed(1, 3, sent=np.full((3, 2), 0.5, np.float32)))
    answer = Answer()
    log.end("e0", make_end(3), answer)
    assert answer.wait() is None
    log.close()
    backend = replay(tmp_path / "log")
    backend.reset("t", 0)
    # 1 was decided and 0.5 sent; a third action is neither, and is returned as it would be sent.
    for action, sent in ((1.0, 0.5), (0.5, 0.5), (-7.0, -1.0)):
        assert backend.apply(np.full(2, action, np.float32)).tolist() == [sent] * 2
    assert backend.differences == [0, 0, 7.5]
    assert backend.outcome().status == "timeout"


def test_it_refuses(log: EpisodeLog, tmp_path: Path) -> None:
    backend = replay(tmp_path / "log")
    for call in (backend.observe, backend.outcome, backend.hold_action):
        with pytest.raises(BackendError, match=r"reset\(\)"):
            call()
    with pytest.raises(BackendError, match="it has t, u"):
        backend.reset("v", 0)
    with pytest.raises(BackendError, match="0 or more"):
        backend.reset("t", -1)
    backend.reset("t", 0)
    for bad in (np.array([np.nan, 0.0]), np.zeros(3)):
        with pytest.raises(BackendError, match="2 finite numbers"):
            backend.apply(bad)
    backend.stop()
    backend.close()
    backend.close()
    (tmp_path / "log" / "done" / "e0.ep").unlink()
    with pytest.raises(BackendError, match="cannot be read"):
        backend.reset("t", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directory": "nowhere"}, "directory: nowhere holds no episode that came to its end"),
        ({"episodes": ["e1", "e9"]}, "episodes[1]: "),
        ({"episodes": ["e2"]}, "episodes[0]: e2 was aborted"),
        ({"last": 0}, "options.last"),
    ],
)
def test_options_are_refused_by_path(log: EpisodeLog, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_backend(BackendConfig("replay", {"directory": str(tmp_path / "log"), **options}))
    assert "$.backend.options" in str(error.value) and message in str(error.value)


def test_episodes_of_another_backend_are_refused(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "log")
    for episode, spec in {"e0": SPEC, "e1": replace(SPEC, control_hz=20.0)}.items():
        assert record_episode(log, episode, spec=spec).wait() is None
    log.close()
    with pytest.raises(ConfigError, match=r"episode e1 had another spec than that of episode e0"):
        replay(tmp_path / "log")
    assert len(read_log(tmp_path / "log")) == 2
