"""The index: order, filters, what may be deleted, and several processes at once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.database import DatabaseError
from runtime.index import EpisodeIndex, EpisodeRow


def make_row(episode: str, **changes: Any) -> EpisodeRow:
    fields: dict[str, Any] = {
        "seq": 0, "episode": episode, "file": f"{episode}.ep", "task": "t", "seed": 1, "source": "policy",
        "explore": True, "status": "success", "steps": 8, "decisions": 2, "versions": ("aaaa1", "bbbb2"),
        "client": "c", "started_unix_s": 1.5, "ended_unix_s": 2.5, "reason": "", "bytes": 100,
    }  # fmt: skip
    return EpisodeRow(**{**fields, **changes})


def test_rows_come_back_whole_and_in_order(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    rows = [make_row("b"), make_row("a", status="aborted", reason="why", explore=False, versions=(), seed=2**63 - 1)]
    index.add(rows)
    index.add([make_row("c")])
    found = index.after(0)
    assert [(row.seq, row.episode) for row in found] == [(1, "b"), (2, "a"), (3, "c")]
    for row, stored in zip(rows, found, strict=False):
        assert stored == msgspec.structs.replace(row, seq=stored.seq)
    assert [row.seq for row in index.after(1, limit=1)] == [2] and index.after(3) == []
    assert index.get("a") == found[1] and index.get("x") is None
    assert index.path(found[0]) == tmp_path / "done" / "b.ep"


def test_an_episode_is_indexed_once(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a")])
    index.add([make_row("a", status="failure"), make_row("b")])
    assert [(row.episode, row.status) for row in index.after(0)] == [("a", "success"), ("b", "success")]


def test_recent_successes_are_of_one_task_in_order_without_what_was_aborted(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    assert index.recent_successes("t", 5) == []
    ends = ["success", "timeout", "aborted", "failure", "success"]
    index.add([make_row(str(i), status=end) for i, end in enumerate(ends)])
    index.add([make_row("other", task="u")])
    assert index.recent_successes("t", 9) == [True, False, False, True]
    assert index.recent_successes("t", 3) == [False, False, True]


def test_filters(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a"), make_row("b", task="u", status="failure"), make_row("c", versions=("cccc3",))])
    assert [row.episode for row in index.list(limit=2)] == ["c", "b"]
    assert [row.episode for row in index.list(limit=9, task="t")] == ["c", "a"]
    assert [row.episode for row in index.list(limit=9, status="failure")] == ["b"]
    assert [row.episode for row in index.list(limit=9, version="bbbb2")] == ["b", "a"]
    assert [row.episode for row in index.list(limit=9, version="cc", task="t")] == ["c"]
    assert index.list(limit=9, version="%") == []
    assert index.count() == 3 and index.count(status="success", version="aaaa") == 1


def test_tallies_sum_up_the_last_episodes_of_one_version_as_they_count(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    assert index.tallies(10) == []
    one = {"versions": ("one",)}
    index.add([make_row("old", **one), make_row("a", steps=3, **one), make_row("b", steps=5, **one), make_row("mixed")])
    index.add([make_row("c", status="timeout", steps=9, **one), make_row("d", status="unjudged", **one)])
    index.label("b", "failure", "Ada")
    index.label("d", "success", "Ada")
    found = {tally.status: (tally.episodes, tally.steps, tally.steps_squared) for tally in index.tallies(5)}
    assert found == {"success": (2, 3 + 8, 9 + 64), "failure": (1, 5, 25), "timeout": (1, 9, 81)}
    assert {tally.version for tally in index.tallies(5)} == {"one"}


def test_neighbours_and_what_waits_to_be_judged(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    assert (index.waiting(), index.next_to(1, 1)) == (0, None)
    index.add([make_row("a", status="unjudged"), make_row("b", status="unjudged"), make_row("c")])
    assert [index.next_to(2, older) for older in (1, -1)] == ["a", "c"]
    assert [index.next_to(1, 1), index.next_to(3, -1)] == [None, None]
    assert index.waiting() == 2
    index.label("a", "discard", "Ada")
    assert index.waiting() == 1
    assert [index.next_to(3, 1, status=status) for status in ("unjudged", "aborted", "failure")] == ["b", "a", None]
    assert index.next_to(1, -1, status="success", task="t") == "c" and index.next_to(1, -1, task="no such") is None


def test_reading_makes_nothing(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path / "run" / "episodes")
    assert index.after(0) == [] and index.list(limit=5) == [] and index.get("a") is None and index.count() == 0
    assert index.known() == {} and index.bytes_on_disk() == 0
    assert not (tmp_path / "run").exists()


def test_only_what_is_taken_and_not_held_is_retired_oldest_first(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row(name) for name in "abcdef"])
    assert index.retire(10**9) == []
    index.hold(4, 0, ["b", "unknown"])
    assert [row.episode for row in index.retire(150)] == ["a", "c"]
    assert index.bytes_on_disk() == 400
    assert [row.episode for row in index.retire(10**9)] == ["d"]
    assert index.retire(10**9) == []
    index.hold(5, 0, [])
    assert [row.episode for row in index.retire(1)] == ["b"]
    assert [(row.episode, row.deleted) for row in index.after(0)] == [
        ("a", True), ("b", True), ("c", True), ("d", True), ("e", False), ("f", False),
    ]  # fmt: skip
    assert index.known()["a"] and not index.known()["f"]


def test_what_waits_for_its_label_and_what_the_trainer_has_not_learned_of_is_not_retired(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row(name, status="success" if name == "c" else "unjudged") for name in "abcd"])
    index.label("b", "success", "ada")
    index.hold(3, 1, [])
    index.label("a", "failure", "ada")
    index.label("d", "success", "ada")
    assert [row.episode for row in index.retire(10**9)] == ["b", "c"]
    index.hold(4, 2, [])
    assert [row.episode for row in index.retire(10**9)] == ["a"]
    index.hold(4, 3, [])
    assert [row.episode for row in index.retire(10**9)] == ["d"]


def test_processes_write_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from runtime.index import EpisodeIndex
from test_index import make_row
index = EpisodeIndex(Path(sys.argv[1]))
for i in range(10):
    index.add([make_row(f"{sys.argv[2]}-{i}"), make_row(f"shared-{i}")])
    index.hold(i, 0, ["x", "y"])
"""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(i), here]) for i in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    rows = EpisodeIndex(tmp_path).after(0)
    assert [row.seq for row in rows] == sorted({row.seq for row in rows})
    assert len({row.episode for row in rows}) == len(rows) == 40


def test_threads_share_one_index(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(lambda i=i: (index.add([make_row(str(i))]), index.count())) for i in range(40)]:
            future.result(30)
    assert index.count() == 40


def test_a_failed_transaction_leaves_nothing_and_the_index_usable(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    with pytest.raises(DatabaseError, match=r"index\.sqlite"):
        index.add([make_row("a"), make_row("b", task=None)])
    assert index.after(0) == []
    index.add([make_row("a")])
    assert index.count() == 1


def test_a_damaged_or_newer_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(DatabaseError, match="move it away"):
        EpisodeIndex(tmp_path).after(0)
    (tmp_path / "index.sqlite").unlink()
    index = EpisodeIndex(tmp_path)
    index.add([])
    with index._database.transaction() as connection:
        connection.execute("PRAGMA user_version=99")
    index.close()
    with pytest.raises(DatabaseError, match="newer fieldtune"):
        index.count()


# --- labels ---------------------------------------------------------------------------------------------------------


def test_the_last_label_counts_and_what_the_robot_said_is_kept_below_it(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a"), make_row("b", status="unjudged"), make_row("c", status="timeout", reason="why")])
    assert index.label("a", "failure", "ada").status == "failure"
    assert index.label("b", "success", "bob").labelled_by == "bob"
    assert index.label("c", "discard", "ada").status == "aborted"
    rows = {row.episode: (row.status, row.labelled_by, row.reason) for row in index.after(0)}
    assert rows == {
        "a": ("failure", "ada", ""),
        "b": ("success", "bob", ""),
        "c": ("aborted", "ada", "discarded by ada"),
    }
    assert index.count(status="success") == 1 and [row.episode for row in index.list(limit=9, status="failure")] == [
        "a"
    ]
    assert index.recent_successes("t", 9) == [False, True]
    index.label("a", "success", "bob")
    index.label("c", "failure", "bob")
    assert [(row.status, row.reason) for row in index.after(0)] == [
        ("success", ""),
        ("success", ""),
        ("failure", "why"),
    ]


def test_labels_are_read_in_order_and_the_one_that_was_waited_for_is_known(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a"), make_row("b", status="unjudged")])
    assert index.labels_after(0) == []
    for episode, label in (("b", "failure"), ("a", "failure"), ("b", "success")):
        index.label(episode, label, "ada")  # type: ignore[arg-type]
    given = [(row.number, row.episode, row.label, row.awaited) for row in index.labels_after(0)]
    assert given == [(1, "b", "failure", True), (2, "a", "failure", False), (3, "b", "success", False)]
    assert [row.number for row in index.labels_after(2)] == [3]


def test_only_an_episode_that_is_there_is_labelled(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    with pytest.raises(DatabaseError, match="no episode a"):
        index.label("a", "success", "ada")
    index.add([make_row("a")])
    assert index.after(0)[0].labelled_by == "" and index.labels_after(0) == []


def test_an_index_from_before_labels_gets_them(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a")])
    with index._database.transaction() as connection:
        for statement in ("DROP VIEW rated", "DROP TABLE labels", "PRAGMA user_version=1"):
            connection.execute(statement)
    index.close()
    assert [row.episode for row in index.after(0)] == ["a"]
    assert index.label("a", "failure", "ada").status == "failure"


def test_an_index_that_is_made_anew_gets_its_labels_back_and_a_torn_one_costs_no_other(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path)
    index.add([make_row("a"), make_row("b")])
    index.label("a", "failure", "ada")
    with (tmp_path / "labels.jsonl").open("ab") as file:
        file.write(b'\n{"episode":"b","la')  # the power went
    index.label("b", "discard", "bob")
    before = index.labels_after(0)
    index.restore_labels()
    assert index.labels_after(0) == before
    index.close()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    index.add([make_row("b"), make_row("a")])
    index.restore_labels()
    assert index.labels_after(0) == before
    assert {row.episode: row.status for row in index.after(0)} == {"a": "failure", "b": "aborted"}


def test_a_log_that_takes_the_place_of_another_is_the_one_that_is_read_and_written(tmp_path: Path) -> None:
    index = EpisodeIndex(tmp_path / "log")
    index.add([make_row("old")])
    (tmp_path / "log").rename(tmp_path / "aside")
    assert index.list(limit=9) == []
    EpisodeIndex(tmp_path / "log").add([make_row("new")])
    assert [row.episode for row in index.list(limit=9)] == ["new"]
    with pytest.raises(DatabaseError, match="no episode old"):
        index.label("old", "success", "Ada")
    assert index.label("new", "failure", "Ada").status == "failure"
    assert [row.status for row in EpisodeIndex(tmp_path / "aside").list(limit=9)] == ["success"]
