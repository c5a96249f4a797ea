"""Batching: requests are joined, every one gets its own answer, and a bad one costs the others nothing."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.backend import Backend
from runtime.inference import Decided, InferenceThread, Pending, batch_inputs, decide, decision_rng
from runtime.policy import log_prob, sample_chunk
from runtime.reading import read_episode

ENOUGH_S = 30.0


def pending(i: int, *, explore: bool = False, state: float | None = None) -> Pending:
    return Pending(
        identity=bytes([i]),
        session=f"s{i}",
        request=100 + i,
        episode=f"{i:024x}",
        decision=i + 1,
        step=0,
        instruction="go",
        tensors={
            "image/top": np.full((8, 8, 3), i, np.uint8),
            "state": np.array([float(i) if state is None else state, 0], np.float32),
            "privileged": np.zeros(4, np.float32),
        },
        explore=explore,
        arrived_s=0.0,
    )


@pytest.fixture
def collect() -> Iterator[Callable[..., tuple[InferenceThread, list[Decided], threading.Event]]]:
    threads: list[InferenceThread] = []

    def start(live: Callable[[], Any], max_batch: int, expect: int) -> Any:
        decided: list[Decided] = []
        done = threading.Event()

        def take(items: list[Decided]) -> None:
            decided.extend(items)
            if len(decided) >= expect:
                done.set()

        threads.append(InferenceThread(lambda arm: live(), max_batch, take))
        threads[-1].start()
        return threads[-1], decided, done

    yield start
    for thread in threads:
        thread.stop()


def test_waiting_requests_are_joined_and_each_gets_its_own_answer(fake_policy: Any, collect: Any) -> None:
    policy = fake_policy()
    policy.gate.clear()
    thread, decided, done = collect(lambda: policy, 4, 10)
    thread.submit(pending(0))
    assert policy.waiting.wait(ENOUGH_S)
    for i in range(1, 10):
        thread.submit(pending(i))
    policy.gate.set()
    assert done.wait(ENOUGH_S)
    assert policy.batches == [1, 4, 4, 1]
    assert thread.batches >= 3
    assert [item.pending.request for item in decided] == list(range(100, 110))
    for i, item in enumerate(decided):
        np.testing.assert_array_equal(item.actions, np.full((4, 2), float(i), np.float32))
        assert item.version == policy.version and not item.log_probs and not item.error


def test_only_the_tensors_that_the_policy_names_go_in(fake_policy: Any) -> None:
    inputs = batch_inputs(fake_policy(), [pending(1), pending(2)])
    assert {name: array.shape for name, array in inputs.items()} == {"image/top": (2, 8, 8, 3), "state": (2, 2)}
    assert inputs["image/top"][1, 0, 0, 0] == 2


def test_the_policy_is_asked_for_once_a_batch(fake_policy: Any, collect: Any) -> None:
    # Every call gives another version: a batch answered by two would show.
    versions: list[Any] = []

    def live() -> Any:
        versions.append(fake_policy(version=str(len(versions)), value=100.0 * len(versions)))
        return versions[-1]

    thread, decided, done = collect(live, 16, 50)
    for i in range(50):
        thread.submit(pending(i))
    assert done.wait(ENOUGH_S)
    assert len(versions) == sum(len(policy.batches) for policy in versions)
    for i, item in enumerate(decided):
        np.testing.assert_array_equal(item.actions, np.full((4, 2), 100.0 * int(item.version) + i, np.float32))


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_sampled_actions_follow_from_the_log_and_the_spec_alone(fake_policy: Any, rho: float) -> None:
    policy = fake_policy(value=0.25, log_std=-1.0)
    policy.spec = replace(policy.spec, noise_correlation=rho)
    (item,) = decide(policy, [pending(3, explore=True)])
    mean, log_std = policy.infer(batch_inputs(policy, [item.pending]))
    again = sample_chunk(mean[0], log_std[0], rho, decision_rng(item.pending.episode, item.pending.decision))
    np.testing.assert_array_equal(item.actions, again)
    np.testing.assert_array_equal(item.log_probs["log_prob"], log_prob(item.actions, mean[0], log_std[0], rho))


def test_a_sample_does_not_depend_on_who_else_is_in_the_batch(fake_policy: Any) -> None:
    alone = decide(fake_policy(), [pending(2, explore=True)])[0]
    together = decide(fake_policy(), [pending(i, explore=True) for i in range(5)])[2]
    np.testing.assert_array_equal(alone.actions, together.actions)


@given(episodes=st.lists(st.integers(0, 2**96 - 1), min_size=2, max_size=2, unique=True), decision=st.integers(1, 1000))
def test_the_noise_of_every_decision_is_its_own(episodes: list[int], decision: int) -> None:
    one, other = (f"{episode:024x}" for episode in episodes)
    draw = decision_rng(one, decision).standard_normal(8)
    philox = np.random.Philox(key=int(one, 16), counter=decision << 64)
    np.testing.assert_array_equal(draw, np.random.Generator(philox).standard_normal(8))
    np.testing.assert_array_equal(draw, decision_rng(one, decision).standard_normal(8))
    assert not np.array_equal(draw, decision_rng(other, decision).standard_normal(8))
    assert not np.array_equal(draw, decision_rng(one, decision + 1).standard_normal(8))


@pytest.mark.parametrize("explore", [True, False])
def test_a_policy_gone_wrong_gives_an_error_and_no_chunk(fake_policy: Any, explore: bool) -> None:
    for policy in (fake_policy(value=np.nan), fake_policy(value=np.inf)):
        (item,) = decide(policy, [pending(1, explore=explore)])
        assert "not finite" in item.error and item.actions.size == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("log_std", [np.nan, np.inf, 1000.0])
def test_a_standard_deviation_gone_wrong_gives_an_error_and_no_chunk(fake_policy: Any, log_std: float) -> None:
    (item,) = decide(fake_policy(log_std=log_std), [pending(1, explore=True)])
    assert item.error and item.actions.size == 0


def test_one_bad_state_costs_only_its_own_client_a_chunk(fake_policy: Any) -> None:
    decided = decide(fake_policy(), [pending(0), pending(1, state=np.nan), pending(2)])
    assert [bool(item.error) for item in decided] == [False, True, False]
    np.testing.assert_array_equal(decided[2].actions, np.full((4, 2), 2.0, np.float32))


def test_a_request_that_makes_the_graph_raise_costs_only_its_own_client_a_chunk(fake_policy: Any) -> None:
    def error(inputs: Any) -> None:
        if (inputs["state"] == 1).any():
            raise RuntimeError("no kernel for this")

    decided = decide(fake_policy(error=error), [pending(i) for i in range(4)])
    assert [item.error for item in decided] == ["", "inference failed: no kernel for this", "", ""]
    for i in (0, 2, 3):
        np.testing.assert_array_equal(decided[i].actions, np.full((4, 2), float(i), np.float32))


def test_outputs_of_the_wrong_shape_are_an_error(fake_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fake_policy()
    one = np.zeros((1, 4, 2), np.float32)
    for outputs in [(one[:, :3], one), (one, one[0]), (one[..., :1], one[..., :1]), (None, None)]:
        monkeypatch.setattr(policy, "infer", lambda inputs, outputs=outputs: outputs)
        (item,) = decide(policy, [pending(0)])
        assert item.error.startswith("inference failed: ")


def test_the_thread_survives_an_exception(fake_policy: Any, collect: Any) -> None:
    def error(inputs: Any) -> None:
        if (inputs["state"][:, 0] == 0).any():
            raise RuntimeError("once")

    policy = fake_policy(error=error)
    thread, decided, done = collect(lambda: policy, 1, 3)
    for i in (0, 1, 2):
        thread.submit(pending(i))
    assert done.wait(ENOUGH_S)
    assert [bool(item.error) for item in decided] == [True, False, False]


def test_stop_finishes_the_batch_at_hand(fake_policy: Any, collect: Any) -> None:
    policy = fake_policy()
    policy.gate.clear()
    thread, decided, _ = collect(lambda: policy, 4, 99)
    thread.submit(pending(0))
    assert policy.waiting.wait(ENOUGH_S)
    thread.submit(pending(1))
    policy.gate.set()
    thread.stop()
    assert len(decided) == 2


def test_a_logged_episode_can_be_drawn_again(serve: Any, point: Backend, fake_policy: Any) -> None:
    policy = fake_policy(value=0.3, log_std=-1.5)
    serving = serve(policy=policy)
    stored = serving.robot(point.spec).run_episode(point.spec, decisions=3)
    path: Path = serving.log.index.path(serving.log.index.get(stored.episode))
    episode = read_episode(path)
    assert len(episode.decisions) == 3
    for number, decision in enumerate(episode.decisions, start=1):
        mean, log_std = policy.infer({"state": decision.observation.state[None]})
        drawn = sample_chunk(mean[0], log_std[0], 0.0, decision_rng(stored.episode, number))
        np.testing.assert_array_equal(decision.actions, drawn)
        np.testing.assert_array_equal(decision.log_prob, log_prob(drawn, mean[0], log_std[0], 0.0))
