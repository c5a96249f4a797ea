"""The results of several runs: the figures are those of the logs, for three seeds, for one, and for unfinished runs."""

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from run_logs import EPISODE_S, FIRST, HORIZON, LAST, evaluation, make_run, pooled_steps, store_evaluation, trial_row

from bridge.backends.metaworld_bound import GoalBound, HandMotion, KinematicBound
from bridge.backends.metaworld_tasks import DIFFICULTY, MT10, MT50
from bridge.config import BackendConfig
from fieldtune import cli
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.evaluate import load_evaluation
from trainer.expert import bound_of, evaluate_expert
from trainer.results import check_together, grouped, write_results
from trainer.results_data import Contestant, ResultsError, TrainingEpisode, read_run, training_hours
from trainer.results_page import render
from trainer.results_plots import windows
from trainer.results_record import read_record, write_record
from trainer.results_table import headline, verdict
from trainer.statistics import Evaluation, ratio_interval, summarise, t_interval, wilson

GOALS = 10


def result(version: str, steps: int, failures: int = 0, tasks: tuple[str, ...] = MT10) -> Evaluation:
    """Every task alike: the first `failures` goals fail, the others take about `steps`."""
    return evaluation(
        version, {task: [None] * failures + [steps + i % 2 for i in range(GOALS - failures)] for task in tasks}
    )


def contestant(path: Path) -> Contestant:
    run = read_run(path)
    bound = KinematicBound(HandMotion((0.01,), 0.01, 0.0), tuple(GoalBound(task, seed, 40) for task, seed in run.goals))
    return Contestant(run, result("expert", 75), bound)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Contestant]:
    root = tmp_path_factory.mktemp("runs")
    for seed, (steps, failures) in enumerate([(44, 0), (46, 1), (48, 0)]):
        make_run(root / f"s{seed}", MT10, result(FIRST, 78, 2), result(LAST, steps, failures), seed=seed)
    return [contestant(root / f"s{seed}") for seed in range(3)]


def test_the_headline_is_the_mean_over_seeds(three: list[Contestant]) -> None:
    lines = {line.name: line for line in headline(three)}
    success = lines["success, mean of the tasks"]
    assert success.post is not None and success.sft is not None
    assert success.post.mean == pytest.approx((1 + 0.9 + 1) / 3) and success.sft.mean == pytest.approx(0.8)
    assert success.post.interval == pytest.approx(t_interval([1, 0.9, 1])) and success.post.seeds == 3
    assert verdict(success) == "met"
    steps = lines["steps over successes"]
    means = [contestant.run.after.overall.steps for contestant in three if contestant.run.after]
    assert steps.post is not None and steps.post.mean == pytest.approx(np.mean(means))
    assert steps.stretch == pytest.approx(1.05 * 40) and verdict(steps) == "met"
    assert (
        verdict(replace(steps, goal=46.0)) == "missed" and verdict(replace(steps, stretch=47.0)) == "met, stretch too"
    )
    ratio = lines["steps over successes against SFT"]
    assert ratio.post is not None and ratio.post.mean == pytest.approx(np.mean([m / 78.5 for m in means]), abs=1e-3)
    failing = lines["steps, failures counted at the horizon"]
    assert failing.post is not None and failing.post.mean == pytest.approx(
        (44.5 + (0.9 * 46.444 + 20) + 48.5) / 3, abs=1e-2
    )
    worst = lines["worst task's success"]
    assert worst.post is not None and worst.post.mean == pytest.approx(2.9 / 3) and verdict(worst) == "met"
    hours = lines["wall-clock of one seed"]
    assert hours.sft is not None and hours.post is not None
    assert hours.sft.mean == pytest.approx(0.1 + 100 * EPISODE_S / 3600)
    assert hours.post.mean == pytest.approx(hours.sft.mean + 400 * EPISODE_S / 3600)


def test_the_worst_task_is_named_for_each_side(tmp_path: Path) -> None:
    before = evaluation(FIRST, {"reach-v3": [None, 50], "push-v3": [60, 60]})
    after = evaluation(LAST, {"reach-v3": [40, 40], "push-v3": [None, 45]})
    make_run(tmp_path / "two", ("reach-v3", "push-v3"), before, after)
    text = render(grouped([contestant(tmp_path / "two")]), {}, [])
    assert re.search(r"\| worst task's success \| 0\.500 \[.*\], reach \| 0\.500 \[.*\], push \|", text)


def test_what_a_run_cost(three: list[Contestant]) -> None:
    run = three[0].run
    assert run.cost.env_steps == sum(episode.steps for episode in run.training) and run.cost.episodes == 400
    assert run.cost.decisions == sum(-(-episode.steps // 8) for episode in run.training) - 8 * 3
    hours = [episode.hours for episode in run.training]
    assert [hours[0], hours[-1]] == pytest.approx([EPISODE_S / 3600, 400 * EPISODE_S / 3600], abs=1e-6)
    # An hour's pause after the fourth iteration is on the clock of the wall, not on the trainer's.
    rows = [trial_row("reach-v3", i, True, 50, i) for i in range(400)]
    late = rows[200].ended_unix_s - EPISODE_S / 2
    paused = training_hours(
        [replace(row, ended_unix_s=row.ended_unix_s + 3600 * (row.ended_unix_s > late)) for row in rows],
        [{**line, "unix_s": line["unix_s"] + 3600 * (line["unix_s"] > late)} for line in run.metrics],
    )
    assert paused[-1] == pytest.approx(training_hours(rows, run.metrics)[-1]) == pytest.approx(hours[-1], abs=1e-6)


def test_what_waits_to_be_judged_has_cost_steps_and_was_not_learned_from(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MT10, result(FIRST, 78), result(LAST, 60))
    before = read_run(run.path).cost
    rows = EpisodeIndex(run.episodes).after(0, 10**6)
    shutil.rmtree(run.episodes)
    run.episodes.mkdir()
    EpisodeIndex(run.episodes).add([*[replace(row, status="unjudged") for row in rows[:3]], *rows[3:]])
    after = read_run(run.path).cost
    assert after.decisions == before.decisions - sum(row.decisions for row in rows[:3])
    assert (after.env_steps, after.episodes) == (before.env_steps, before.episodes)


def test_the_page_shows_both_sets(three: list[Contestant], tmp_path: Path) -> None:
    make_run(tmp_path / "many", MT10, result(FIRST, 76, 1), result(LAST, 40), demos=100)
    store_evaluation(RunDir(tmp_path / "many").evaluation(LAST + "-held-out"), result(LAST, 41, 4))
    runs = [contestant(tmp_path / "many"), *three]
    assert {title: [c.run.name for c in group] for title, group in grouped(runs).items()} == {
        "10 demonstrations a task": ["s0", "s1", "s2"],
        "100 demonstrations a task": ["many"],
    }
    text = render(
        grouped(runs), {"100 demonstrations a task": {"A caption.": "pictures/some-name.png"}}, ["records/s0.json.gz"]
    )
    small, large = text.split("## 100 demonstrations a task")
    assert "Mean over 3 seeds" in small and "One seed (n = 1)" in large
    assert (
        "| success, mean of the tasks | 0.800 [0.800, 0.800] | 0.967 [0.823, 1.000] | >= 0.930 (stretch 0.980) | met |"
        in small
    )
    low, high = wilson(90, 100)
    assert f"| success, mean of the tasks | 0.900 [{low:.3f}, {high:.3f}] | 1.000 [0.963, 1.000] |" in large
    assert "met, stretch too" in large
    afters = [c.run.after for c in three if c.run.after]
    for task in MT10:
        steps = pooled_steps(*afters, task=task)
        assert re.search(
            rf"\| {task} \| 78\.5 \[[\d., ]+\] \| {steps:.1f} \[[\d., ]+\] \| 75\.5 \[[\d., ]+\] \| 40\.0 \|", small
        )
    assert "Held-out instructions" not in small and "| held-out | 0 | - | 0.600 [" in large
    assert "line of the trainer's metrics: [s0.json.gz](records/s0.json.gz). `fieldtune" in text
    assert "![some-name](pictures/some-name.png)\n\n*A caption.*" in large and "![" not in small
    for version in (FIRST, LAST):
        assert version in text
    assert "Unfinished" not in text
    assert small.count(" | 22.5% | ") == 3  # 0.05 to 0.40 in eight iterations of equal length


def test_success_on_mt50_is_told_by_difficulty_too(tmp_path: Path) -> None:
    assert Counter(DIFFICULTY.values()) == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    before = result(FIRST, 80, 2, MT50)
    very_hard = {task for task, difficulty in DIFFICULTY.items() if difficulty == "very hard"}
    after = evaluation(LAST, {task: [None if task in very_hard else 50] * GOALS for task in MT50})
    make_run(tmp_path / "all", MT50, before, after)
    text = render(grouped([contestant(tmp_path / "all")]), {}, [])
    low, high = wilson(0, 5 * GOALS)
    assert f"| very hard (5 tasks) | 0.80 [0.67, 0.89] | 0.00 [{low:.2f}, {high:.2f}] |" in text
    assert "| easy (28 tasks) | 0.80 [" in text and "] | 1.00 [" in text
    assert text.index("| easy (28") < text.index("| medium (11") < text.index("| hard (6") < text.index("| very hard")


def test_other_tasks_have_no_goals_and_their_pictures_are_drawn(tmp_path: Path) -> None:
    tasks = MT10[:2]
    make_run(
        tmp_path / "two", tasks, result(FIRST, 78, tasks=tasks), result(LAST, 70, tasks=tasks), episodes_per_task=20
    )
    runs = [contestant(tmp_path / "two")]
    assert all(line.goal is None and verdict(line) == "" for line in headline(runs))
    page = write_results(runs, tmp_path / "docs" / "results.md")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(pictures) == len(set(pictures)) == 7
    assert all((page.parent / picture).read_bytes()[:4] == b"\x89PNG" for picture in pictures)


def test_a_page_is_made_again_from_its_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, first, again = ("reach",), tmp_path / "docs" / "results.md", tmp_path / "again" / "results.md"
    for seed in range(2):
        after = evaluation(LAST, {"reach": [15 + seed + i % 2 for i in range(GOALS - 1)] + [None]})
        run = make_run(tmp_path / f"s{seed}", tasks, result(FIRST, 30, tasks=tasks), after, backend="point", seed=seed)
        store_evaluation(run.evaluation(LAST + "-held_out"), result(LAST, 20, 2, tasks))
    assert cli.run(["report", str(tmp_path / "s0"), str(tmp_path / "s1"), "--results", str(first)]) == 0
    shutil.rmtree(tmp_path / "s1")
    records = sorted((first.parent / "records").iterdir())
    assert [path.name for path in records] == ["s0.json.gz", "s1.json.gz"]
    assert cli.run(["report", str(tmp_path / "s0"), str(records[1]), "--results", str(again)]) == 0
    pages = [re.sub(r"Written \S+ \S+", "", page.read_text(encoding="utf-8")) for page in (first, again)]
    assert pages[0] == pages[1] and "Mean over 2 seeds" in pages[0]
    for kind in ("records", "pictures"):
        files = [{path.name: path.read_bytes() for path in (page.parent / kind).iterdir()} for page in (first, again)]
        assert files[0] == files[1]
    capsys.readouterr()
    # A run and its own record are one run twice; what is no record is not taken for one.
    assert cli.run(["report", str(tmp_path / "s0"), str(records[0]), "--results", str(again)]) == 1
    assert "two of the runs are named s0" in capsys.readouterr().err
    whole = records[0].read_bytes()
    other = gzip.decompress(whole).replace(b'{"format":1', b'{"format":2', 1)
    for broken in (b"", whole[:500], b"no gzip", gzip.compress(b"{}"), gzip.compress(other)):
        records[0].write_bytes(broken)
        assert cli.run(["report", str(records[0]), "--results", str(again)]) == 1
        assert f"{records[0]} is " in capsys.readouterr().err
    assert pages[1] == re.sub(r"Written \S+ \S+", "", again.read_text(encoding="utf-8"))


def test_a_record_is_named_as_its_run_or_its_own_file_whatever_the_run_was_called_when_it_began(tmp_path: Path) -> None:
    tasks = ("reach",)
    for computer in "ab":
        path = tmp_path / f"{computer}-seed{ord(computer) % 2}"
        run = make_run(path, tasks, result(FIRST, 30, tasks=tasks), result(LAST, 15, tasks=tasks), backend="point")
        content = json.loads(run.config.read_bytes())
        run.config.write_text(json.dumps({**content, "name": "mt10", "seed": ord(computer) % 2}))
    names = [path.name for path in sorted(tmp_path.iterdir())]
    records = [write_record(contestant(tmp_path / name), tmp_path / "kept") for name in names]
    assert (
        [path.name for path in records]
        == [f"{name}.json.gz" for name in names]
        == ["a-seed1.json.gz", "b-seed0.json.gz"]
    )
    # A file that comes from somebody else names no place of ours.
    text = gzip.decompress(records[0].read_bytes()).replace(b'"name":"a-seed1"', b'"name":"../../out"', 1)
    assert b"../../out" in text
    (tmp_path / "sent.json.gz").write_bytes(gzip.compress(text))
    page = write_results([read_record(tmp_path / "sent.json.gz")], tmp_path / "docs" / "results.md")
    assert [path.name for path in (page.parent / "records").iterdir()] == ["sent.json.gz"]
    assert not list(tmp_path.glob("**/out*")) and "from the logs of `sent`" in page.read_text(encoding="utf-8")


def test_a_record_that_cannot_be_read_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, page = tmp_path / "later.json.gz", str(tmp_path / "results.md")
    record.write_bytes(gzip.compress(b'{"format": 7, "contestants": []}'))
    assert cli.run(["report", str(record), "--results", page]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{record} is a record of format 7, this fieldtune reads format 1" in said
    assert cli.run(["report", str(record)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{record} is the record of a run" in said and "add --results PAGE" in said


def setup(root: Path, name: str, settings: dict[str, Any], after: Evaluation | None = None, **made: Any) -> Contestant:
    """A run of two tasks with one setting of its configuration after another changed."""
    tasks = MT10[:2]
    run = make_run(root / name, tasks, result(FIRST, 78, tasks=tasks), after or result(LAST, 60, tasks=tasks), **made)
    content = json.loads(run.config.read_bytes())
    for path, value in settings.items():
        *above, last = path.split(".")
        section = content
        for key in above:
            section = section[key]
        section[last] = value
    run.config.write_text(json.dumps(content))
    return contestant(run.path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backend.options", {"size_px": 32}),
        ("bridge.horizon_steps", 150),
        ("runtime.balance", "equal"),
        ("trainer.ppo.lr", 1e-3),
        ("trainer.evaluate.first_seed", 1_000_000),
        ("trainer.tasks", ["reach-v3"]),
    ],
)
def test_runs_of_other_settings_are_not_averaged(path: str, value: object, tmp_path: Path) -> None:
    runs = [setup(tmp_path, "usual", {}), setup(tmp_path, "other", {path: value}, seed=1)]
    page = tmp_path / "docs" / "results.md"
    with pytest.raises(ResultsError, match=rf"usual and other cannot be averaged .*: {path} is .* in the one and"):
        write_results(runs, page)
    assert not page.exists()


def test_runs_are_averaged_where_nothing_differs_that_changes_their_result(tmp_path: Path) -> None:
    free = {"trainer.stop.minutes": 5, "trainer.threads": 2, "trainer.tensorboard": True, "trainer.demos.workers": 1}
    runs = [setup(tmp_path, "usual", {}), setup(tmp_path, "other", free, seed=1)]
    # The record of an older fieldtune lacks a setting, and has one that is gone.
    deployment = runs[1].run.deployment
    ppo = {key: value for key, value in deployment["trainer"]["ppo"].items() if key != "clip"} | {"gone": 3}
    older = {**deployment, "seed": 2, "trainer": {**deployment["trainer"], "ppo": ppo}}
    check_together([*runs, replace(runs[1], run=replace(runs[1].run, name="older", deployment=older))])
    # Other sets of demonstrations are other groups.
    check_together([runs[0], setup(tmp_path, "many", {}, demos=100)])


def test_runs_of_one_seed_or_on_other_goals_are_not_averaged(tmp_path: Path) -> None:
    tasks = MT10[:2]
    runs = [setup(tmp_path, "usual", {}), setup(tmp_path, "again", {})]
    with pytest.raises(ResultsError, match=r"again and usual cannot be averaged .*: both have seed 0"):
        check_together(runs)
    fewer = evaluation(LAST, {task: [60] * (GOALS - 1) for task in tasks})
    short = setup(tmp_path, "short", {}, fewer, seed=1)
    goals = "20 of 2 tasks, seeds 2000000 to 2000009 in the one and 18 of 2 tasks, seeds 2000000 to 2000008"
    with pytest.raises(ResultsError, match=rf"usual and short cannot be averaged .*: the goals .* differ, {goals}"):
        check_together([runs[0], short])
    # Two that nobody has judged are missing, as said on the page.
    check_together([runs[0], setup(tmp_path, "waiting", {}, replace(fewer, unjudged=2), seed=1)])


def test_unfinished_runs_say_so(tmp_path: Path) -> None:
    make_run(tmp_path / "early", MT10, result(FIRST, 78), None)
    make_run(tmp_path / "late", MT10, None, result(LAST, 60))
    for name, missing in (
        ("early", "post-training has not made a version"),
        ("late", "the first version is not evaluated"),
    ):
        text = render(grouped([contestant(tmp_path / name)]), {}, [])
        assert f"- `{name}`: {missing}" in text and "| - |" in text
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ResultsError, match="not a run"):
        read_run(tmp_path / "nothing")


def test_a_seed_that_is_behind_is_not_taken_for_the_mean_of_all(tmp_path: Path) -> None:
    make_run(tmp_path / "early", MT10, result(FIRST, 78), None)
    make_run(tmp_path / "late", MT10, result(FIRST, 76), result(LAST, 60), seed=1)
    text = render(grouped([contestant(tmp_path / name) for name in ("early", "late")]), {}, [])
    assert "| 1.000 (1 of 2 seeds) | >= 0.930" in text and "| steps over successes | 77" in text


def test_a_run_that_was_rolled_back_to_its_first_version_counts_as_what_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "back", MT10, result(FIRST, 78, 2), result(LAST, 60))
    make_run(tmp_path / "late", MT10, result(FIRST, 76), result(LAST, 60), seed=1)
    Registry(RunDir(tmp_path / "back").registry).set_live(FIRST, why="rollback")
    runs = [contestant(tmp_path / name) for name in ("back", "late")]
    back = runs[0].run
    assert back.last == back.first and back.after == back.before and back.versions == 2
    text = render(grouped(runs), {}, [])
    assert "- `back`: it was rolled back to its first version" in text
    assert "| 0.900 [0.000, 1.000] | 0.900 [0.000, 1.000] |" in text  # of both sides: (0.8 + 1) / 2


def test_evaluations_without_a_goal_in_common_are_no_result(tmp_path: Path) -> None:
    make_run(tmp_path / "run", MT10[:1], result(FIRST, 78, tasks=MT10[:1]), result(LAST, 60, tasks=MT10[1:2]))
    found = read_run(tmp_path / "run")
    assert found.before is None and found.after is None and "the 0 common ones count" in " ".join(found.unfinished)
    assert "No run has been evaluated yet" in render(grouped([contestant(tmp_path / "run")]), {}, [])


def test_a_version_that_was_only_evaluated_is_not_of_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", MT10, result(FIRST, 78), None)
    run, other = RunDir(tmp_path / "run"), "f" * 64
    Registry(run.registry).add(other, parent="e" * 64, made={"command": "import", "from": "mt10"})
    store_evaluation(run.evaluation(other), result(other, 50))
    found = read_run(run.path)
    assert (found.first.version, found.last, found.after, found.versions) == (FIRST, None, None, 1)


def test_only_common_goals_count(tmp_path: Path) -> None:
    more = evaluation(LAST, {task: [50] * 2 * GOALS for task in MT10})
    make_run(tmp_path / "run", MT10, result(FIRST, 78), more)
    run = read_run(tmp_path / "run")
    assert run.after is not None and run.after.overall.n == 10 * GOALS and len(run.goals) == 10 * GOALS
    assert any("not evaluated on the same goals" in note for note in run.unfinished)


def test_what_nobody_has_judged_is_told_and_is_no_failure(tmp_path: Path) -> None:
    tasks = ("reach-v3",)
    waits = replace(trial_row("reach-v3", 2_000_000, True, 50), status="unjudged")
    nothing = summarise([waits, replace(waits, seed=2_000_001)], version=FIRST, horizon_steps=HORIZON)
    run = make_run(tmp_path / "early", tasks, nothing, None)
    run.episodes.mkdir()
    EpisodeIndex(run.episodes).add([waits, trial_row("reach-v3", 5, False, 50, 1)])
    found = contestant(run.path)
    assert [episode.success for episode in found.run.training] == [None, False]
    assert found.run.cost.env_steps == 50 + HORIZON and found.run.cost.episodes == 2
    text = render(grouped([found]), {}, [])
    assert "No episode of an evaluation has been judged yet." in text
    assert "left out of the evaluation of version 1: episodes 2 that nobody has judged" in text
    # Beside a run that was judged its figures are missing, not 0.
    make_run(tmp_path / "done", tasks, result(FIRST, 78, tasks=tasks), result(LAST, 60, tasks=tasks), seed=1)
    text = render(grouped([found, contestant(tmp_path / "done")]), {}, [])
    assert "| 0 | `early` | - -> - |" in text and "| success, mean of the tasks | 1.000 (1 of 2 seeds) |" in text
    partly = replace(result(LAST, 60, tasks=tasks), unjudged=3)
    make_run(tmp_path / "partly", tasks, result(FIRST, 78, tasks=tasks), partly)
    assert read_run(tmp_path / "partly").left_out == 3


def test_windows_of_training() -> None:
    rows = [TrainingEpisode("reach-v3", i % 2 == 0, 50 + i, 0.1 * i) for i in range(25)]
    x = [float(i) for i in range(25)]
    success = windows(rows, x, "success", 2)
    assert [(w.x, w.y) for w in success] == [(12.0, 7 / 13)] and (success[0].low, success[0].high) == wilson(7, 13)
    steps = windows(rows, x, "steps", 40)
    assert [w.y for w in steps] == [54.0, 64.0] and steps[0].low < 54 < steps[0].high
    assert windows(rows[:5], x[:5], "steps", 40) == [] and windows([rows[1]] * 10, x[:10], "steps", 40) == []
    # What nobody has judged moves the others along and is no failure.
    waiting = TrainingEpisode("reach-v3", None, 50, 0.0)
    between = [episode for row in rows for episode in (waiting, row)]
    moved = windows(between, [float(i) for i in range(50)], "success", 2)
    assert [(w.x, w.y) for w in moved] == [(25.0, 7 / 13)]


def test_the_expert_on_the_goals_of_an_evaluation(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), BackendConfig("point")
    goals = [("reach", seed) for seed in range(20)]
    calls: list[tuple[int, int]] = []
    found = evaluate_expert(run, config, goals, 30, lambda *call: calls.append(call))
    assert found is not None and found.overall.successes == 20 and found.version == "expert" and calls[-1] == (20, 20)
    assert found.overall.steps is not None and 9 < found.overall.steps < 30
    calls.clear()
    assert evaluate_expert(run, config, goals, 30, lambda *call: calls.append(call)) == found and calls == [(20, 20)]
    short = evaluate_expert(run, config, goals, 3, lambda *_: None)  # another horizon is another evaluation
    assert short is not None and short.overall.successes == 0 and short.overall.steps_all == 3
    assert bound_of(run, config, goals) is None


def test_the_command_takes_directories_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "dot", tmp_path / "docs" / "results.md"
    tasks = ("reach",)
    make_run(path, tasks, result(FIRST, 30, tasks=tasks), result(LAST, 15, tasks=tasks), backend="point")
    assert cli.run(["report", str(path), "--results", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"results": str(page)}
    text = page.read_text(encoding="utf-8")
    expert = load_evaluation(RunDir(path), "expert")
    assert expert is not None and expert.overall.n == GOALS and "None is known for these tasks." in text
    assert f"| reach | 30.5 [30.2, 30.8] | 15.5 [15.2, 15.8] | {expert.overall.steps:.1f} [" in text
    assert cli.run(["report", str(path), "--set", "seed=1"]) == 2
    assert "--set is for configurations" in capsys.readouterr().err
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_intervals_over_seeds_and_of_a_ratio() -> None:
    low, high = t_interval([0.90, 0.92, 0.97]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.8404, 1.0196), abs=1e-3)  # mean 0.93, s 0.03606, t(2) 4.303
    assert t_interval([0.9]) is None
    rng = np.random.default_rng(0)
    above, below = [list(rng.normal(40, 5, 400))], [list(rng.normal(80, 5, 400))]
    interval = ratio_interval(above, below)
    assert interval is not None and interval[0] < 0.5 < interval[1] and interval[1] - interval[0] < 0.02
    assert ratio_interval([], below) is None
