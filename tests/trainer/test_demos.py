"""Demonstrations: only successes are kept, in the ordinary log, the same ones every time, by one process or several."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from demo_backends import Leisurely, Troubled
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.backend import Backend, BackendError
from bridge.backends import make_backend
from bridge.config import BackendConfig
from runtime.episode import EndRecord, EpisodeStart
from runtime.index import EpisodeIndex
from runtime.reading import read_episode
from trainer import attempts, demos
from trainer.attempts import Attempt, Demonstration, DemosError, Job
from trainer.config import DemosConfig
from trainer.demos import ATTEMPTS_PER_DEMO, DemoSummary, collect_demos, demo_rows, worker_count

HORIZON = 20  # at half speed some goals are farther away than this
ENOUGH_S = 60.0

point = partial(make_backend, BackendConfig("point"))
SPEC = point().spec


def collect(
    directory: Path,
    per_task: int,
    *,
    stop_after: int = 10**9,
    horizon: int = HORIZON,
    workers: int = 1,
    make: Callable[[], Backend] = point,
) -> DemoSummary:
    calls: list[tuple[int, int]] = []
    config = DemosConfig(per_task=per_task, first_seed=3, workers=workers)
    return collect_demos(
        make,
        directory,
        config,
        (),
        horizon,
        lambda done, total: calls.append((done, total)),
        lambda: len(calls) > stop_after,
    )


def content(directory: Path, per_task: int, task: str = "reach") -> list[tuple[int, list[list[float]]]]:
    """Seeds and actions of the demonstrations, which are in the log in order of their seeds and nowhere else."""
    index = EpisodeIndex(directory)
    rows = demo_rows(index, task, DemosConfig(per_task=per_task, first_seed=3))
    stored = [row.seed for row in index.after(0) if row.task == task and row.status == "success"]
    assert [row.seed for row in rows] == stored[:per_task]
    assert not list((directory / "open").iterdir())
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
        collect_demos(Mute, tmp_path, config, (), HORIZON, lambda done, total: None)  # type: ignore[arg-type]
    with pytest.raises(DemosError, match=r"no task 'fly' \(known: reach\)"):
        collect_demos(point, tmp_path, config, ("fly",), HORIZON, lambda done, total: None)


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
        collect(tmp_path, 5, make=lambda: backend)
    assert collect(tmp_path, 5).kept == 5


def test_several_workers_make_what_one_makes(tmp_path: Path) -> None:
    one = collect(tmp_path / "one", 12, make=Leisurely)
    assert one.failed > 0 and set(one.tasks) == {"reach", "again"}
    first = collect(tmp_path / "two", 12, make=Leisurely, workers=2, stop_after=8)
    assert 0 < first.kept < one.kept
    assert collect(tmp_path / "two", 12, make=Leisurely, workers=2) == one
    assert EpisodeIndex(tmp_path / "two").count() == one.kept
    for task in one.tasks:
        assert content(tmp_path / "two", 12, task) == content(tmp_path / "one", 12, task)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("refuses", "reach with seed 12 failed: the cable fell out"),
        ("raises", "reach with seed 12 failed with exit code 1; its error is above"),
        ("dies", "reach with seed 12 was killed by SIGKILL"),
        ("hangs", "did not answer within 3 s; does the backend hang"),
    ],
)
def test_a_lost_worker_is_an_error_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, message: str
) -> None:
    # An attempt may take 20 steps at 10 Hz besides.
    monkeypatch.setattr(demos, "ATTEMPT_TIMEOUT_S", 1.0 if trouble == "hangs" else ENOUGH_S)
    monkeypatch.setattr(attempts, "STOP_S", 0.5 if trouble == "hangs" else ENOUGH_S)
    with pytest.raises(DemosError, match=message):
        collect(tmp_path, 9, make=partial(Troubled, trouble, 12), workers=2)
    assert not multiprocessing.active_children()
    assert all(seed < 12 for seed, _ in content(tmp_path, 9))
    collect(tmp_path, 9)
    collect(tmp_path / "whole", 9)
    assert content(tmp_path, 9) == content(tmp_path / "whole", 9)


def test_a_demonstration_that_a_kill_has_torn_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "torn"
    collect(directory, 5)
    index = EpisodeIndex(directory)
    last = index.path(index.after(0)[-1])
    index.close()
    for path in directory.glob("index.sqlite*"):
        path.unlink()
    whole = last.read_bytes()
    last.unlink()
    (directory / "open" / last.name).write_bytes(whole[: len(whole) // 2])
    collect(directory, 7)
    collect(tmp_path / "whole", 7)
    assert content(directory, 7) == content(tmp_path / "whole", 7)
    assert EpisodeIndex(directory).count(status="aborted") == 1


@pytest.mark.parametrize("end", ["control-c", "kill -9"])
def test_nothing_is_left_of_a_command_that_was_ended(tmp_path: Path, end: str) -> None:
    options = ["trainer.demos.workers=2", "trainer.demos.per_task=100000", "trainer.demos.first_seed=3"]
    arguments = [each for option in options for each in ("--set", option)]
    command = [sys.executable, "-m", "fieldtune", "demos", "point", *arguments, f"--set=bridge.horizon_steps={HORIZON}"]
    directory = tmp_path / "runs" / "point" / "demos"
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
    deadline_s = time.monotonic() + ENOUGH_S
    try:
        while EpisodeIndex(directory).count() < 5:
            assert process.poll() is None and time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.05)
        if end == "control-c":
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(ENOUGH_S) == 1
            assert "Traceback" not in (tmp_path / "log").read_text()
        else:
            process.kill()
            process.wait()
        while group_lives(process.pid):
            assert time.monotonic() < deadline_s, "a worker is left"
            time.sleep(0.05)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    wanted = EpisodeIndex(directory).count() + 2
    collect(directory, wanted)
    collect(tmp_path / "whole", wanted)
    assert content(directory, wanted) == content(tmp_path / "whole", wanted)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos, "usable_cores", lambda: 8)
    own = DemosConfig()
    assert [worker_count(own, SPEC, missing) for missing in (0, 3, 10, 40, 400)] == [1, 1, 1, 4, 8]
    assert worker_count(own, replace(SPEC, paced=True), 400) == 1
    three = DemosConfig(workers=3)
    assert [worker_count(three, SPEC, missing) for missing in (0, 2, 400)] == [1, 2, 3]


@given(st.lists(st.booleans(), min_size=35, max_size=35), st.integers(1, 7), st.integers(1, 5), st.randoms())
def test_seeds_are_tried_and_kept_as_one_after_another(
    succeeds: list[bool], wanted: int, workers: int, random: Random
) -> None:
    """Answers come in any order; which seeds are tried and kept is decided by which succeed, and by nothing else."""
    alone = [seed for seed in range(ATTEMPTS_PER_DEMO * wanted) if succeeds[seed]][:wanted]
    enough = len(alone) == wanted
    tried = alone[-1] + 1 if enough else ATTEMPTS_PER_DEMO * wanted
    seeds = demos._Seeds("reach", [], DemosConfig(per_task=wanted), HORIZON)
    running: list[Job] = []
    given_out: list[int] = []
    kept: list[int] = []
    try:
        while True:
            while len(running) < workers and seeds.ready():
                running.append(seeds.take())
                given_out.append(running[-1].seed)
            if not running:
                break
            job = running.pop(random.choice(range(len(running))))
            kept += [d.start.seed for d in seeds.answered(Attempt("reach", job.seed, shown(job.seed, succeeds)))]
    except DemosError:
        assert not enough
    else:
        assert enough
    assert kept == alone and given_out == list(range(tried))


def shown(seed: int, succeeds: list[bool]) -> Demonstration | None:
    if not succeeds[seed]:
        return None
    start = EpisodeStart(
        format=1,
        episode=str(seed),
        task="reach",
        instruction="",
        seed=seed,
        source="expert",
        explore=False,
        client="",
        spec=SPEC,
        started_unix_s=0.0,
    )
    return Demonstration(start, [], EndRecord(status="success", steps=0, reason="", tensors={}))


def test_a_paced_backend_is_demonstrated_at_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Counted:
        def __init__(self, period_s: float) -> None:
            self.period_s = period_s

        def start(self) -> None:
            pass

        def wait(self) -> None:
            waits.append(self.period_s)

    def paced() -> Backend:
        backend = point()
        backend._spec = replace(backend.spec, paced=True)
        return backend

    monkeypatch.setattr(attempts, "Pacer", Counted)
    collect(tmp_path / "unpaced", 2)
    assert waits == []
    collect(tmp_path / "paced", 2, make=paced)
    rows = demo_rows(EpisodeIndex(tmp_path / "paced"), "reach", DemosConfig(per_task=2, first_seed=3))
    # Not after the step that ends the episode; attempts that failed waited, too.
    assert len(waits) >= sum(row.steps - 1 for row in rows) > 0
    assert set(waits) == {1.0 / SPEC.control_hz}
