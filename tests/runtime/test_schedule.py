"""Which task and seed a bridge gets, and that an evaluation runs every episode exactly once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.schedule import FixedList, Training

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


def test_an_aborted_training_episode_does_not_count_for_its_task() -> None:
    schedule = training()
    first = schedule.next(TASKS)
    assert first is not None
    schedule.ended(*first, "aborted")
    again = schedule.next(TASKS)
    assert again is not None and again[0] == first[0]
    schedule.ended(*again, "timeout")
    following = schedule.next(TASKS)
    assert following is not None and following[0] != first[0]


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
