"""The gate: each figure against its known answer, and what it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_samples import make_start, record_episode
from msgspec.structs import replace

from bridge.backend import Backend, Observation
from bridge.messages import RULES
from runtime.bundle import PolicySpec
from runtime.config import GateRule
from runtime.episode import Decision, Episode
from runtime.episodes import EpisodeLog
from runtime.gate import gate_episodes, judge
from runtime.index import EpisodeIndex
from runtime.rundir import RunDir

H = 4
S = np.exp(-2.0)


@dataclass
class HandMade:
    """The mean of every element is `means` of the state's first element `[B]`; sigma is `exp(log_std)`."""

    spec: PolicySpec
    means: Callable[[Any], Any]
    log_std: float = -2.0
    version: str = "a" * 64

    def tokens(self, instruction: str) -> Any:
        raise AssertionError("a policy without tokens was asked for them")

    def infer(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        shape = (len(inputs["state"]), H, 2)
        mean = np.broadcast_to(self.means(inputs["state"][:, 0])[:, None, None], shape).astype(np.float32)
        return mean, np.full(shape, self.log_std, np.float32)


@pytest.fixture
def hand_made(point_policy_spec: PolicySpec) -> Callable[..., HandMade]:
    return lambda means, **fields: HandMade(point_policy_spec, means, **fields)


@pytest.fixture
def episodes(point: Backend) -> list[Episode]:
    """Eight decisions in two episodes, the first a success; what was sent is the state's first element."""

    def decision(number: int, x: float) -> Decision:
        seen = Observation(
            {"top": np.zeros((8, 8, 3), np.uint8)}, np.array([x, 0.5], np.float32), np.zeros(4, np.float32)
        )
        chunk = np.full((H, 2), x, np.float32)
        return Decision(number, (number - 1) * H, "v", seen, chunk, np.zeros(H, np.float32), chunk, np.zeros(H))

    xs = np.linspace(-0.7, 0.7, 8)
    return [
        Episode(
            make_start(f"{i:032x}", spec=point.spec),
            [decision(k + 1, x) for k, x in enumerate(xs[4 * i : 4 * i + 4])],
            status="success" if i == 0 else "timeout",
            steps=16,
        )
        for i in range(2)
    ]


def same(x: Any) -> Any:
    return x


def test_every_figure_is_the_known_one(hand_made: Any, episodes: list[Episode]) -> None:
    report = judge(hand_made(lambda x: x + 0.2), hand_made(same), episodes, GateRule())
    assert report.decisions == 8
    assert report.divergence == pytest.approx(0.2)
    assert report.kl == pytest.approx(2 * 0.2**2 / (2 * S**2), rel=1e-5)  # two elements an action
    assert (report.outside, report.live_outside) == (0.0, 0.0)
    assert report.cloning_error == pytest.approx(0.04, rel=1e-5)  # of the successful episode alone
    assert report.live_cloning_error == pytest.approx(0.0, abs=1e-12)
    assert report.refused == ("kl is 2.18, at most 1", "cloning_error is 0.04, at most 0.01")


def test_kl_is_that_of_the_live_version_from_the_candidate(hand_made: Any, episodes: list[Episode]) -> None:
    wider = judge(hand_made(same, log_std=-2.0 + np.log(2)), hand_made(same), episodes, GateRule())
    assert wider.kl == pytest.approx(2 * (np.log(2) + 1 / 8 - 1 / 2), rel=1e-5)
    narrower = judge(hand_made(same, log_std=-2.0 - np.log(2)), hand_made(same), episodes, GateRule())
    assert narrower.kl == pytest.approx(2 * (-np.log(2) + 2 - 1 / 2), rel=1e-5)


def test_figures_are_in_half_ranges_from_the_middle(point_policy_spec: PolicySpec, episodes: list[Episode]) -> None:
    spec = replace(point_policy_spec, action=replace(point_policy_spec.action, low=(0.0, 0.0), high=(4.0, 4.0)))
    report = judge(HandMade(spec, lambda x: x + 4.0), HandMade(spec, lambda x: x + 2.0), episodes, GateRule())
    assert report.divergence == pytest.approx(1.0)
    # Means from 3.3 to 4.7; beyond are those above 4.2.
    assert report.outside == pytest.approx(3 / 8)
    assert report.live_outside == 0.0
    assert any(why.startswith("outside is 0.375, at most 0.1") for why in report.refused)


def test_what_the_safety_stage_put_in_place_of_an_action_is_not_to_be_cloned(
    hand_made: Any, episodes: list[Episode]
) -> None:
    """The hold action went out for the first two; the others began in mid-chunk."""
    for decision in episodes[0].decisions:
        decision.sent = np.concatenate([np.full((2, 2), 9.0), decision.sent[2:]]).astype(np.float32)
        decision.rules = np.array([1 << RULES.index("starved")] * 2 + [0] * 2, np.uint8)
    report = judge(hand_made(same), hand_made(same), episodes, GateRule())
    assert report.cloning_error == pytest.approx(0.0, abs=1e-12)
    for decision in episodes[0].decisions:
        decision.rules, decision.start, decision.sent = None, 2, decision.actions[2:]
    assert judge(hand_made(same), hand_made(same), episodes, GateRule()).cloning_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("means", "why"),
    [
        (lambda x: np.where(x > 0.6, np.nan, x), "an action is not finite"),
        (lambda x: np.full_like(x, np.inf), "an action is not finite"),
        (lambda x: -x, "divergence is"),
        (lambda x: x[::-1], "divergence is"),
        (lambda x: 3 * x, "outside is"),
    ],
    ids=["nan", "inf", "sign-flipped", "shuffled", "too large"],
)
def test_a_poisoned_candidate_is_refused(hand_made: Any, episodes: list[Episode], means: Any, why: str) -> None:
    report = judge(hand_made(means), hand_made(same), episodes, GateRule())
    assert any(reason.startswith(why) for reason in report.refused), report


def test_a_sigma_that_is_not_finite_is_refused(hand_made: Any, episodes: list[Episode]) -> None:
    assert judge(hand_made(same, log_std=np.inf), hand_made(same), episodes, GateRule()).refused


def test_one_that_has_changed_as_much_as_an_update_does_may_pass(hand_made: Any, episodes: list[Episode]) -> None:
    report = judge(hand_made(lambda x: x + 0.05 * x**2), hand_made(same), episodes, GateRule())
    assert report.refused == () and 0 < report.divergence < 0.03 and 0 < report.kl < 0.1


def test_a_live_version_that_errs_itself_is_the_measure_of_cloning(hand_made: Any, episodes: list[Episode]) -> None:
    live, lenient = hand_made(lambda x: x + 0.2), GateRule(max_kl=100.0)
    assert judge(hand_made(lambda x: x + 0.24), live, episodes, lenient).refused == ()  # 0.0576 of 1.5 x 0.04
    found = judge(hand_made(lambda x: x + 0.25), live, episodes, lenient).refused
    assert found == ("cloning_error is 0.0625, at most 0.06",)


def test_decisions_are_spread_over_the_episodes(hand_made: Any, episodes: list[Episode]) -> None:
    seen: list[float] = []

    def noting(x: Any) -> Any:
        seen.extend(x)
        return x

    assert judge(hand_made(noting), hand_made(same), episodes, GateRule(decisions=3)).decisions == 3
    assert len(seen) == 3 and min(seen) < -0.6 and max(seen) > 0.6


def test_without_episodes_there_is_nothing_to_compare(hand_made: Any, tmp_path: Path) -> None:
    report = judge(hand_made(lambda x: -x), hand_made(same), [], GateRule())
    assert (report.refused, report.decisions) == ((), 0)
    assert gate_episodes(RunDir(tmp_path / "run"), 128) == []
    assert not (tmp_path / "run").exists()


def test_demonstrations_stand_in_for_episodes_and_own_ones_come_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for directory, source, count in ((run.demos, "expert", 3), (run.episodes, "policy", 2)):
        log = EpisodeLog(directory)
        answers = [record_episode(log, f"{i:032x}", source=source) for i in range(count)]
        answers += [record_episode(log, f"{99:032x}", source=source, status="aborted")]
        assert [answer.wait() for answer in answers] == [None] * (count + 1)
        log.close()
        found = gate_episodes(run, 128)
        assert [episode.start.source for episode in found] == [source] * count
        assert [episode.start.episode for episode in found] == [f"{i:032x}" for i in range(count)]


def test_only_as_many_decisions_are_held_as_are_needed_and_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    log = EpisodeLog(run.episodes)
    for i in range(3):
        assert record_episode(log, f"{i:032x}", decisions=10).wait() is None
    log.close()
    index = EpisodeIndex(run.episodes)
    path = index.path(index.after(0)[1])
    path.write_bytes(path.read_bytes()[:-40])
    found = gate_episodes(run, 9)
    assert [[decision.number for decision in episode.decisions] for episode in found] == [[1, 5, 10]] * 2
