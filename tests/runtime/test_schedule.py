"""Which task and seed a bridge gets, and that an evaluation runs every episode exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.episode import End
from runtime.schedule import WINDOW_EPISODES, FixedList, Training

TASKS = ("a", "b", "c")


def training(seed: int = 0) -> Training:
    return Training(TASKS, 1000, 50, np.random.default_rng(seed))


def test_tasks_come_in_turn_with_seeds_of_the_training_range() -> None:
    schedule = training()
    drawn = [schedule.next(TASKS) for _ in range(300)]
    assert all(episode is not None and 1000 <= episode[1] < 1050 for episode in drawn)
    counts = {task: sum(episode[0] == task for episode in drawn if episode) for task in TASKS}
    assert counts == {"a": 100, "b": 100, "c": 100}
    assert len({episode[1] for episode in drawn if episode}) > 40
    assert not schedule.finished


def test_equal_seeds_give_equal_schedules() -> None:
    one, two, other = training(1), training(1), training(2)
    drawn = [[schedule.next(TASKS) for _ in range(30)] for schedule in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_bridge_gets_only_tasks_that_it_offers() -> None:
    schedule = training()
    assert schedule.next(("b", "z")) is not None
    assert {schedule.next(("b", "z"))[0] for _ in range(5)} == {"b"}
    assert schedule.next(("z",)) is None
    assert schedule.next(()) is None


@pytest.mark.parametrize("end", ["aborted", "unjudged"])
def test_a_training_episode_that_says_nothing_of_success_has_had_its_turn(end: End) -> None:
    schedule, before = training(), training().shares
    drawn = []
    for _ in range(30):
        episode = schedule.next(TASKS)
        assert episode is not None
        drawn.append(episode[0])
        # A task that always breaks off keeps its share and takes no more.
        schedule.ended(*episode, end)
    assert schedule.shares == before
    assert {task: drawn.count(task) for task in TASKS} == {"a": 10, "b": 10, "c": 10}
    for seed in range(20):
        schedule.ended("a", seed, end)
    assert schedule.shares == before


def test_a_solved_task_keeps_three_quarters_of_an_equal_share_and_the_neediest_gets_one_and_a_half_at_most() -> None:
    tasks = tuple("abcdefgh")
    recent = {task: [True] * 50 for task in tasks[1:]} | {"a": [False] * 50}
    schedule = Training(tasks, 0, 50, np.random.default_rng(0), recent=recent)
    assert schedule.shares == pytest.approx({"a": 1.5 / 8} | dict.fromkeys(tasks[1:], (1 - 1.5 / 8) / 7))
    # All the others unsolved: the solved one is at the floor, the rest is theirs.
    recent = {task: [False] * 50 for task in tasks[1:]} | {"a": [True] * 50}
    schedule = Training(tasks, 0, 50, np.random.default_rng(0), recent=recent)
    assert schedule.shares == pytest.approx({"a": 0.75 / 8} | dict.fromkeys(tasks[1:], (1 - 0.75 / 8) / 7))


def test_between_the_limits_shares_are_in_proportion_to_the_need_and_a_new_task_counts_as_half_solved() -> None:
    recent = {"a": [True, True, False], "b": [True] + [False] * 3}
    schedule = Training(TASKS, 0, 50, np.random.default_rng(0), recent=recent)
    need = {"a": 1 - 3 / 5, "b": 1 - 2 / 6, "c": 1 / 2}
    assert schedule.shares == pytest.approx({task: need[task] / sum(need.values()) for task in TASKS})


def test_only_the_last_episodes_count() -> None:
    schedule = training()
    for end in ["timeout"] * WINDOW_EPISODES + ["success"] * WINDOW_EPISODES:
        schedule.ended("a", 0, end)
    again = Training(TASKS, 1000, 50, np.random.default_rng(0), recent={"a": [True] * WINDOW_EPISODES})
    assert schedule.shares == again.shares and schedule.shares["a"] < schedule.shares["b"]


def test_equal_balance_and_one_task_do_not_depend_on_success() -> None:
    recent = {"a": [True] * 50, "b": [False] * 50}
    equal = Training(TASKS, 0, 50, np.random.default_rng(0), balance="equal", recent=recent)
    equal.ended("c", 0, "failure")
    assert equal.shares == dict.fromkeys(TASKS, 1 / 3)
    assert Training(("a",), 0, 50, np.random.default_rng(0), recent=recent).shares == pytest.approx({"a": 1.0})


@settings(deadline=None)
@given(
    n=st.integers(1, 6),
    solved=st.sets(st.sampled_from("abcdef")),
    ends=st.lists(st.sampled_from(["success", "timeout", "aborted"]), max_size=250),
)
def test_no_task_is_far_from_its_share_and_none_starves(n: int, solved: set[str], ends: list[End]) -> None:
    tasks = tuple("abcdef"[:n])
    schedule = Training(tasks, 0, 50, np.random.default_rng(0))
    harmonic = sum(1 / i for i in range(1, n + 1))
    expected, count, waited = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
    for end in ends:
        shares = schedule.shares
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(0.75 / n - 1e-9 <= share <= 1.5 / n + 1e-9 for share in shares.values())
        episode = schedule.next(tasks)
        assert episode is not None
        for task in tasks:
            expected[task] += shares[task]
            waited[task] = 0 if task == episode[0] else waited[task] + 1
        count[episode[0]] += 1
        assert all(-1 - 1e-9 < expected[task] - count[task] < harmonic - 1 + 1e-9 for task in tasks)
        assert max(waited.values()) <= 4 / 3 * n * harmonic
        schedule.ended(*episode, "success" if episode[0] in solved else end)


def test_a_fixed_list_gives_an_aborted_episode_again_but_not_for_ever() -> None:
    schedule = FixedList([("a", 1)])
    for _ in range(FixedList.MAX_TRIES):
        assert not schedule.finished
        assert schedule.next(TASKS) == ("a", 1)
        assert schedule.next(TASKS) is None
        schedule.ended("a", 1, "aborted")
    assert schedule.finished
    assert schedule.given_up == [("a", 1)]
    assert schedule.ended_count == 0


def test_a_fixed_list_waits_for_a_bridge_with_the_task() -> None:
    schedule = FixedList([("a", 1), ("b", 1)])
    assert schedule.next(("b",)) == ("b", 1)
    assert schedule.next(("b",)) is None
    assert not schedule.finished


@given(data=st.data(), count=st.integers(0, 12), bridges=st.integers(1, 4))
def test_every_episode_of_a_fixed_list_ends_once_or_is_given_up(data: st.DataObject, count: int, bridges: int) -> None:
    episodes = [(TASKS[i % 3], i) for i in range(count)]
    schedule = FixedList(episodes)
    running: list[tuple[str, int]] = []
    ended: list[tuple[str, int]] = []
    while not schedule.finished:
        while len(running) < bridges:
            episode = schedule.next(TASKS)
            if episode is None:
                break
            assert episode not in running
            running.append(episode)
        assert running
        episode = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if data.draw(st.booleans()):
            schedule.ended(*episode, "aborted")
        else:
            schedule.ended(*episode, data.draw(st.sampled_from(["success", "failure", "timeout"])))
            ended.append(episode)
    assert sorted([*ended, *schedule.given_up]) == sorted(episodes)
    assert schedule.ended_count == len(ended)
