"""Which action is due at which step, and the report on what was played."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.chunks import Chunks, Plan, StepReport
from bridge.messages import Played

H = 8


def passed(actions: Any) -> Any:
    return actions, np.zeros(len(actions), np.uint8)


def plan(number: int, observed: int, first: int | None = None, h: int = H) -> Plan:
    """Chunk n has the actions 100 n, 100 n + 1, ..."""
    actions = (100 * number + np.arange(h, dtype=np.float32))[:, None]
    return Plan(number, observed, 0.0, observed if first is None else first, actions)


def played(chunks: Chunks, steps: range) -> list[float | None]:
    due = [chunks.due(step) for step in steps]
    return [None if action is None else float(action[0][0]) for action in due]


def test_a_chunk_is_played_from_its_first_action_and_then_nothing_is_due() -> None:
    chunks = Chunks(passed)
    assert chunks.due(0) is None and chunks.plan is None
    chunks.put(plan(1, 0, h=3))
    assert played(chunks, range(5)) == [100, 101, 102, None, None]
    assert chunks.index(4) == 4 and len(chunks.left(4)) == 0


def test_a_late_chunk_is_played_from_where_it_belongs() -> None:
    chunks = Chunks(passed)
    chunks.put(plan(1, 0))
    assert played(chunks, range(5)) == [100, 101, 102, 103, 104]
    chunks.put(plan(2, 2))  # seen at step 2, here at step 5
    assert played(chunks, range(5, 8)) == [203, 204, 205]
    assert chunks.plan is not None and chunks.plan.decision == 2 and chunks.index(5) == 3


def test_a_chunk_that_is_later_than_its_end_is_never_played() -> None:
    chunks = Chunks(passed)
    chunks.put(plan(1, 0, h=3))
    assert played(chunks, range(6)) == [100, 101, 102, None, None, None]
    chunks.put(plan(2, 1, h=3))
    assert played(chunks, range(6, 8)) == [None, None]
    assert chunks.plan is not None and chunks.plan.decision == 1


def test_committed_actions_are_played_before_the_chunk_takes_over() -> None:
    chunks = Chunks(passed)
    chunks.put(plan(1, 0))
    assert played(chunks, range(3)) == [100, 101, 102]
    assert chunks.left(3)[:2, 0].tolist() == [103, 104]
    chunks.put(plan(2, 3, first=5))  # two were committed, and it is here at once
    assert played(chunks, range(3, 7)) == [103, 104, 202, 203]


def test_blending_moves_the_weight_from_the_old_chunk_to_the_new_one() -> None:
    chunks = Chunks(passed, blend_steps=3)
    chunks.put(plan(1, 0))
    played(chunks, range(4))
    chunks.put(plan(2, 2))
    old, new = np.array([104, 105, 106]), np.array([202, 203, 204])
    weight = np.array([0.25, 0.5, 0.75])
    assert played(chunks, range(4, 8)) == [*((1 - weight) * old + weight * new).tolist(), 205]


def test_there_is_nothing_to_blend_with_where_the_old_chunk_has_ended() -> None:
    chunks = Chunks(passed, blend_steps=3)
    chunks.put(plan(1, 0, h=5))
    played(chunks, range(4))
    chunks.put(plan(2, 4))
    # One old action is left for step 4.
    assert played(chunks, range(4, 6)) == [(104 + 200) / 2, 201]


def test_what_may_be_sent_is_asked_for_when_a_chunk_takes_over_and_only_its_rest() -> None:
    asked = []

    def halved(actions: Any) -> Any:
        asked.append(actions[:, 0].tolist())
        return actions[:2] / 2, np.array([1, 0], np.uint8)

    chunks = Chunks(halved)
    chunks.put(plan(1, 0, h=4))
    assert asked == []
    assert [chunks.due(step) for step in (0, 0)] == [(50, 1), (50, 1)]
    assert chunks.due(1) == (50.5, 0) and chunks.due(2) is None  # the stage has cut it
    chunks.put(plan(2, 1, h=4))
    assert chunks.due(2) == (100.5, 1)
    assert asked == [[100, 101, 102, 103], [201, 202, 203]]


def test_what_is_dropped_is_not_played() -> None:
    chunks = Chunks(passed)
    chunks.put(plan(1, 0))
    played(chunks, range(2))
    chunks.put(plan(2, 2, first=4))
    chunks.drop()
    assert played(chunks, range(2, 6)) == [None] * 4
    chunks.put(plan(3, 6))
    assert played(chunks, range(6, 8)) == [300, 301]


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(0, 12)), min_size=1, max_size=20))
def test_an_action_is_always_the_one_for_its_step(asked: list[tuple[int, int]]) -> None:
    """Whatever is asked for when, and however late it comes: action i of a chunk is played i steps after its sight."""
    chunks, observed, step = Chunks(passed), 0, 0
    chunks.put(plan(1, 0))
    for number, (after, delay) in enumerate(asked, start=2):
        observed = max(observed + after, step)
        while step < observed + delay:
            check(chunks, step)
            step += 1
        chunks.put(plan(number, observed))
        check(chunks, step)
    for later in range(step, step + H + 1):
        check(chunks, later)


def check(chunks: Chunks, step: int) -> None:
    due = chunks.due(step)
    if due is not None:
        assert chunks.plan is not None
        assert due[0][0] == 100 * chunks.plan.decision + chunks.index(step)
        assert chunks.index(step) == step - chunks.plan.observed_step


def test_a_report_joins_steps_to_slices_and_begins_anew() -> None:
    report = StepReport()
    assert report.take() == ((), {})
    for decision, index in [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]:
        report.add(decision, index, np.array([decision, index], np.float32), float(index), 0)
    slices, tensors = report.take()
    assert slices == (Played(1, 2, 2), Played(2, 1, 3))
    assert tensors["sent"].tolist() == [[1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert tensors["reward"].tolist() == [2, 3, 1, 2, 3] and "rules" not in tensors
    report.add(2, 4, np.zeros(2, np.float32), 0.0, 64)
    slices, tensors = report.take()
    assert slices == (Played(2, 4, 1),) and tensors["rules"].tolist() == [64]


@pytest.mark.parametrize("steps", [1, 5])
def test_sent_actions_are_those_that_were_added(steps: int) -> None:
    report = StepReport()
    for i in range(steps):
        report.add(1, i, np.full(3, i, np.float32), 0.5, i % 2)
    _, tensors = report.take()
    assert tensors["sent"].shape == (steps, 3) and tensors["sent"].dtype == np.float32
    assert tensors["reward"].dtype == np.float32
    if steps > 1:
        assert tensors["rules"].tolist() == [i % 2 for i in range(steps)]
