"""The benchmarks run, and say what they say they say. No test looks at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.backend import Observation
from bridge.backends.point import Point, PointOptions
from fieldtune.bench import common
from fieldtune.bench.common import BenchError, Goal, Result
from fieldtune.bench.control import played
from fieldtune.bench.swap import Asked, summary
from fieldtune.cli import run
from fieldtune.commands.bench import text
from runtime.episode import Decision, Episode, EpisodeStart


def measured(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert run(["bench", what, "point", "--quick", "--json", "--directory", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quick"] is True
    assert {"cpu", "cores", "python", "packages", "commit"} <= set(report["machine"])
    results: list[dict[str, Any]] = report["results"]
    assert results[0]["goals"]
    for result in results:
        assert result["bench"] == what and result["rows"] and result["notes"]
        figures = [value for row in result["rows"] for value in row.values() if isinstance(value, (int, float))]
        assert all(math.isfinite(value) and value >= 0 for value in figures)
    assert not list(tmp_path.iterdir()), "something was left behind"
    return results


def test_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = measured("log", tmp_path, capsys)
    assert [row["thread"] for row in result["rows"]] == ["serving", "writer", "both"]
    assert [goal["limit"] for goal in result["goals"]] == [0.4, 0.4]  # 2 % of 20 ms


@pytest.mark.slow
def test_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = measured("serve", tmp_path, capsys)
    for row in result["rows"]:
        assert row["requests"] == row["clients"] * 25
    server, echo, small = result["rows"][:3]
    assert (server["side"], echo["side"], small["side"]) == ("server", "echo", "small echo")
    assert server["server p50 / p50"] == 1
    assert echo["server p50 / p50"] == pytest.approx(server["p50 ms"] / echo["p50 ms"])
    assert len(result["goals"]) == 4


@pytest.mark.slow
def test_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = measured("control", tmp_path, capsys)
    assert [row["merge"] for row in result["rows"]] == ["none", "switch", "blend"]  # it takes no prefix
    waiting, *asynchronous = result["rows"]
    assert waiting["starved"] == 0 and waiting["stands still %"] > 0
    assert result["goals"][0]["measured"] == sum(row["starved"] for row in asynchronous)
    assert "the policy is untrained" in result["notes"][0]


def test_changes_at_takeovers_are_told_from_those_inside_a_chunk_and_starved_ticks_are_neither() -> None:
    spec = Point(PointOptions()).spec
    start = EpisodeStart(
        format=1,
        episode="e",
        task="t",
        instruction="go",
        seed=0,
        source="policy",
        explore=False,
        client="c",
        spec=spec,
        started_unix_s=0.0,
    )
    sent = [[0.0, 1.0, 2.0], [5.0, 7.0, 0.0, 0.0], [9.0]]
    decisions = [
        Decision(
            number=i,
            step=0,
            version="v",
            observation=Observation({}, np.zeros(2, np.float32)),
            actions=np.zeros((4, 1), np.float32),
            log_prob=None,
            sent=np.array(own, np.float32)[:, None],
            reward=np.zeros(len(own), np.float32),
            rules=np.array([0, 0, 64, 64], np.uint8) if i == 1 else None,
        )
        for i, own in enumerate(sent)
    ]
    found = played(Episode(start, decisions, "success", 8), np.array([2.0]))
    assert (found.success, found.steps, found.starved) == (True, 8, 2)
    assert found.at_boundaries == [1.5] and found.inside == [0.5, 0.5, 1.0]


@pytest.mark.slow
def test_swap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = measured("swap", tmp_path, capsys)
    assert result["rows"][2]["n"] == result["rows"][3]["n"] == 2
    assert result["goals"][1]["measured"] == 0, "an old version answered after the new one was live"


@pytest.mark.slow
def test_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, shares = measured("rollout", tmp_path, capsys)
    assert [row["way"] for row in result["rows"]] == ["direct, one process", "direct, one a core", "loop"]
    assert all(row["steps"] > 0 for row in result["rows"])
    assert result["rows"][2]["server cpu us a step"] > 0
    *parts, whole = shares["rows"]
    assert [row["part"] for row in parts[:4]] == ["physics", "reset", "render", "inference"]
    assert whole["direct us a step"] == pytest.approx(sum(row["direct us a step"] for row in parts))
    assert whole["loop us a step"] == pytest.approx(sum(row["loop us a step"] for row in parts))
    assert sum(row["share of loop"] for row in parts) == pytest.approx(1) and whole["share of loop"] == 1
    assert whole["loop us a step"] == pytest.approx(
        result["rows"][2]["cpu us a step"] + result["rows"][2]["server cpu us a step"]
    )


def test_requests_under_way_in_a_swap_are_told_from_the_others() -> None:
    asked = [
        Asked(0.0, 0.1, "a"),
        Asked(0.9, 1.3, "a"),  # under way when b was announced
        Asked(1.4, 1.5, "b"),  # the first of the new version ends the window
        Asked(2.0, 2.1, "b"),
        Asked(2.2, 2.3, "a"),  # stale: b was said to be live
    ]
    result = summary(asked, [(1.0, 1.45, "b")], clients=1, numbers=0)
    rows = {row[0]: row for row in result.rows}
    assert rows["a request during swaps"][-1] == 2 and rows["a request beside swaps"][-1] == 3
    assert rows["a request during swaps"][3] == pytest.approx(400)
    assert rows["announcement to first chunk"][1] == pytest.approx(500)
    assert rows["announcement to its answer"][1] == pytest.approx(450)
    assert result.goals[1].measured == 1 and not result.goals[1].met


def test_a_swap_that_nobody_saw_is_an_error() -> None:
    with pytest.raises(BenchError, match="no client got a chunk"):
        summary([Asked(0.0, 0.1, "a")], [(1.0, 1.1, "b")], clients=1, numbers=0)


def test_goals() -> None:
    assert Goal("a", 1.5, 1.5).met and not Goal("a", 1.6, 1.5).met
    assert Goal("a", 0.8, 0.8, at_least=True).met and not Goal("a", 0.7, 0.8, at_least=True).met
    plain = Result("b", "t", ("x", "y"), [("one", 2.0)], [Goal("a", 1.0, 2.0)], ["n"]).plain()
    assert plain["rows"] == [{"x": "one", "y": 2.0}] and plain["goals"][0]["met"] is True


def test_figures_as_text() -> None:
    assert [text(cell) for cell in ("ipc", 4, 0.0, 1.23456, 0.00012345, 1234.56)] == [
        "ipc",
        "4",
        "0",
        "1.23",
        "0.000123",
        "1235",
    ]


def test_this_computer_in_words() -> None:
    found = common.machine()
    assert found["cores"] >= 1 and found["packages"]["numpy"]
    assert common.file_system(Path("/proc")) == "proc"


def _fails(connection: object) -> None:
    raise SystemExit(1)


def test_a_process_that_ends_at_its_start_is_an_error() -> None:
    with pytest.raises(BenchError, match="_fails ended at its start"), common.process(_fails):
        pass
