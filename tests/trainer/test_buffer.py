import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.buffer import DemoBuffer, thin
from trainer.config import BufferConfig
from trainer.samples import CloningSamples

Offers = list[tuple[str, int]]


def samples(value: int, count: int = 3) -> CloningSamples:
    return CloningSamples(
        images={"top": np.full((count, 4, 4, 3), value % 256, np.uint8)},
        state=np.arange(count, dtype=np.float32)[:, None] + 10 * value,
        tokens=np.zeros((count, 1, 2), np.int64),
        target=np.full((count, 2, 2), value, np.float32),
        mask=np.ones((count, 2), np.float32),
    )


def filled(config: BufferConfig, seeds: list[int], offers: Offers) -> DemoBuffer:
    buffer = DemoBuffer(config, ("a", "b"))
    for i, steps in enumerate(seeds):
        buffer.seed("a", f"seed{i}", steps, ("expert",), samples(steps))
    for i, (task, steps) in enumerate(offers):
        buffer.offer(task, f"own{i}", steps, (f"v{i}",), lambda steps=steps: samples(steps))
    return buffer


def ids(buffer: DemoBuffer, task: str = "a") -> list[str]:
    return [entry.episode for entry in buffer.entries(task)]


def test_admits_what_is_at_most_as_long_as_the_quantile_of_the_recent_successes() -> None:
    config = BufferConfig(per_task=10, quantile=0.5, window=4)
    buffer = filled(config, [], [("a", 20), ("a", 30), ("a", 10), ("a", 20), ("a", 21)])
    # Medians with the newest counted: 20, 25, 20, 20, and of the last four (30, 10, 20, 21) 20.5.
    assert ids(buffer) == ["own0", "own2", "own3"]


def test_the_window_forgets() -> None:
    config = BufferConfig(per_task=10, quantile=0.5, window=2)
    buffer = filled(config, [], [("a", 5), ("a", 50), ("a", 60), ("a", 55)])
    assert ids(buffer) == ["own0", "own3"]


def test_the_slowest_leaves_and_demonstrations_only_for_something_shorter() -> None:
    config = BufferConfig(per_task=2, quantile=1.0, window=50)
    buffer = filled(config, [30, 40], [("a", 40), ("a", 41)])
    assert ids(buffer) == ["seed0", "seed1"]
    assert buffer.offer("a", "fast", 39, ("v",), lambda: samples(1))
    assert ids(buffer) == ["seed0", "fast"]
    assert buffer.offer("a", "equal", 39, ("v",), lambda: samples(2))  # the newer of two equal own ones stays
    assert ids(buffer) == ["seed0", "equal"]
    assert buffer.mean_steps == 34.5
    assert buffer.own_episodes() == ["equal"]


def test_more_demonstrations_than_room_keeps_the_shortest() -> None:
    buffer = DemoBuffer(BufferConfig(per_task=2), ("a",))
    kept = [buffer.seed("a", str(steps), steps, (), samples(steps)) for steps in (50, 40, 60, 30)]
    assert kept == [True, True, False, True]
    assert ids(buffer) == ["40", "30"]


def test_an_episode_is_never_in_it_twice() -> None:
    buffer = filled(BufferConfig(per_task=5, quantile=1.0), [], [("a", 10)])
    assert not buffer.offer("a", "own0", 10, ("v",), lambda: samples(1))
    assert buffer.episodes == 1


def test_samples_are_read_only_for_what_may_be_admitted() -> None:
    buffer = filled(BufferConfig(per_task=5, quantile=0.0), [], [("a", 10)])

    def never() -> CloningSamples:
        raise AssertionError("read in vain")

    assert not buffer.offer("a", "slow", 11, ("v",), never)


def test_sampling_takes_every_task_and_every_row() -> None:
    buffer = filled(BufferConfig(per_task=50, quantile=1.0), [1], [("a", 2), ("b", 3)])
    drawn, task = buffer.sample(3000, np.random.default_rng(0))
    assert np.mean(task == 1) == pytest.approx(0.5, abs=0.05)
    rows, counts = np.unique(drawn.state[task == 0, 0], return_counts=True)
    assert rows.tolist() == [10, 11, 12, 20, 21, 22]
    assert counts.min() > 150
    # A row stays together.
    assert (drawn.target[:, 0, 0] == drawn.state[:, 0] // 10).all()
    assert (drawn.images["top"][:, 0, 0, 0] == drawn.target[:, 0, 0]).all()


def test_sampling_an_empty_buffer_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        DemoBuffer(BufferConfig(), ("a",)).sample(1, np.random.default_rng(0))


def test_thin_keeps_every_stride_th_sample() -> None:
    assert thin(samples(0, 10), 4, 6).state[:, 0].tolist() == [2, 6]
    assert len(thin(samples(0, 1), 4, 3)) == 1
    assert len(thin(samples(0, 0), 4, 3)) == 0


offers = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30)), max_size=40)
configs = st.builds(BufferConfig, per_task=st.integers(1, 6), quantile=st.floats(0, 1), window=st.integers(1, 10))


@given(config=configs, seeds=st.lists(st.integers(1, 30), max_size=8), first=offers, then=offers)
def test_bookkeeping(config: BufferConfig, seeds: list[int], first: Offers, then: Offers) -> None:
    buffer = filled(config, seeds, first)
    kept_seeds = sorted(entry.steps for entry in buffer.entries("a") if entry.demonstration)
    assert kept_seeds == sorted(seeds)[: len(kept_seeds)]  # the longest demonstrations leave first
    for task in "ab":
        entries = buffer.entries(task)
        assert len(entries) <= config.per_task
        assert len({entry.episode for entry in entries}) == len(entries)
        assert all(entry.versions for entry in entries)
    lost = sorted(seeds)[len(kept_seeds) :]
    if lost:
        assert len(buffer.entries("a")) == config.per_task
        assert max(entry.steps for entry in buffer.entries("a")) <= min(lost)

    # A buffer restored from its state, through JSON, goes on exactly as this one does.
    steps_of = {entry.episode: entry.steps for task in "ab" for entry in buffer.entries(task)}
    again = DemoBuffer(config, ("a", "b"))
    again.restore(json.loads(json.dumps(buffer.state())), lambda episode, _demonstration: samples(steps_of[episode]))
    for i, (task, steps) in enumerate(then):
        results = [b.offer(task, f"then{i}", steps, ("v",), lambda s=steps: samples(s)) for b in (buffer, again)]
        assert results[0] == results[1]
    assert again.state() == buffer.state()
    if buffer.episodes:
        drawn = [b.sample(5, np.random.default_rng(1))[0].state for b in (buffer, again)]
        assert (drawn[0] == drawn[1]).all()


def test_a_smaller_buffer_is_filled_with_the_best_of_a_larger_one() -> None:
    offers = [("a", 20), ("a", 30), ("a", 10), ("b", 7)]
    whole = filled(BufferConfig(per_task=10, quantile=1.0), [20, 40], offers)
    state = json.loads(json.dumps(whole.state()))
    loaded: list[str] = []
    smaller = DemoBuffer(BufferConfig(per_task=3, quantile=1.0), ("a", "b"))

    def load(episode: str, _demonstration: bool) -> CloningSamples:
        loaded.append(episode)
        return samples(1)

    smaller.restore(state, load)
    # The slowest have gone, and of two equally slow ones the own episode would be next.
    assert ids(smaller) == ["seed0", "own0", "own2"] and ids(smaller, "b") == ["own3"]
    assert loaded == ["seed0", "own0", "own2", "own3"], "what does not stay is not read"
    assert smaller.offer("a", "new", 15, ("v",), lambda: samples(1))
    assert ids(smaller) == ["seed0", "own2", "new"]


def test_without_admission_the_demonstrations_are_all_there_is() -> None:
    offers = [("a", 5), ("b", 5)]
    assert ids(filled(BufferConfig(), [30], offers)) == ["seed0", "own0"]
    buffer = filled(BufferConfig(admit=False), [30], offers)
    assert ids(buffer) == ["seed0"]
    assert buffer.own_episodes() == []


def test_what_was_no_success_is_taken_out() -> None:
    buffer = DemoBuffer(BufferConfig(per_task=3), ("a",))
    for name in ("x", "y"):
        buffer.seed("a", name, 5, ("v",), samples(1))
    buffer.discard("x")
    buffer.discard("nobody")
    assert ids(buffer) == ["y"]
