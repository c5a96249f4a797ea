"""The episode log: acknowledged means kept, a crash costs the tail at most, a bad disk never stops who serves."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_samples import (
    HORIZON,
    Answer,
    frames,
    make_decision,
    make_end,
    make_executed,
    make_start,
    names,
    observation,
    opened,
    record_episode,
)

from runtime import episode_file, episodes
from runtime.database import DatabaseError
from runtime.durable import ClaimedError, write_all
from runtime.episode import EndRecord, Record
from runtime.episodes import EpisodeLog, EpisodeLogError
from runtime.index import EpisodeIndex
from runtime.reading import EpisodeError, read_episode


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


class Gate:
    """Stands in for a disk that is slow: writes of this module's log wait until it opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()

        def slow(descriptor: int, *parts: bytes) -> None:
            assert self.open.wait(20)
            write_all(descriptor, *parts)

        monkeypatch.setattr(episode_file, "write_all", slow)


# --- what is written comes back ---------------------------------------------------------------------------------


def test_an_episode_comes_back_as_it_was(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.start(make_start("ep-1", task="t", seed=42))
        log.append("ep-1", make_decision(1, "v1"))
        log.append("ep-1", make_executed(1, 3))
        log.append("ep-1", make_decision(2, "v2", log_prob=None))
        log.append("ep-1", make_executed(2, 1))
        log.append("ep-1", make_decision(3, "v1"))
        answer = Answer()
        log.end("ep-1", make_end(4), answer)
        assert answer.wait() is None
        row = EpisodeIndex(tmp_path).get("ep-1")
        assert row is not None
        path = log.index.path(row)
    assert (row.seq, row.task, row.seed, row.status, row.steps, row.decisions) == (1, "t", 42, "success", 4, 3)
    assert row.versions == ("v1", "v2") and row.source == "policy" and row.explore and row.client == "c"
    assert row.bytes == path.stat().st_size and row.started_unix_s == 1.0 and row.ended_unix_s > 1.0
    assert names(tmp_path / "open") == [] and names(tmp_path / "done") == ["ep-1.ep"]
    episode = read_episode(path)
    assert episode.start == make_start("ep-1", task="t", seed=42)
    assert (episode.status, episode.steps, episode.success, episode.versions) == ("success", 4, True, ["v1", "v2"])
    first, second, third = episode.decisions
    wanted = observation(1)
    assert all(np.array_equal(first.observation.images[n], wanted[f"image/{n}"]) for n in ("eye", "wrist"))
    assert first.observation.privileged is not None and first.observation.privileged.tolist() == [1.0]
    assert first.actions.tolist() == [[1.0, 1.0]] * HORIZON
    assert first.log_prob is not None and first.log_prob.tolist() == [-1.0] * HORIZON
    assert first.sent.shape == (3, 2) and first.reward.tolist() == [1.0] * 3
    assert second.step == HORIZON and second.version == "v2" and second.log_prob is None and len(second.sent) == 1
    assert third.sent.shape == (0, 2) and third.reward.shape == (0,)
    assert episode.final is not None and episode.final.state.tolist() == [99.0] * 3
    for array in (first.observation.images["eye"], first.observation.state, first.actions, first.sent, third.sent):
        assert not array.flags.writeable and array.flags.aligned


def test_many_short_episodes_are_each_stored_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with opened(tmp_path) as log:
        commits = []
        add = log.index.add
        monkeypatch.setattr(log.index, "add", lambda rows: (commits.append(len(rows)), add(rows)))
        answers = [record_episode(log, f"e{i}", 1) for i in range(100)]
        gate.open.set()
        assert [answer.wait() for answer in answers] == [None] * 100
        assert log.stats().stored == 100
    assert [row.episode for row in log.index.after(0)] == [f"e{i}" for i in range(100)]
    assert all(len(answer.calls) == 1 for answer in answers)
    assert sum(commits) == 100 and len(commits) < 50  # those that wait share a transaction


def test_acknowledged_means_on_disk_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    with opened(tmp_path) as log:
        record_episode(log, "first").wait()
        fsync, sync, add = os.fsync, episodes.sync_directory, log.index.add
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append("file"), fsync(fd)))
        monkeypatch.setattr(episodes, "sync_directory", lambda path: (order.append(path.name), sync(path)))
        monkeypatch.setattr(log.index, "add", lambda rows: (add(rows), order.append("index")))
        log.start(make_start("e"))
        log.append("e", make_decision(1))
        answered = threading.Event()
        log.end("e", make_end(0), lambda error: (order.append(f"stored {error}"), answered.set()))
        assert answered.wait(20)
        # The second fsync is that of the directory.
        assert order == ["file", "done", "file", "index", "stored None"]


def test_records_are_in_the_file_before_the_episode_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.start(make_start("e"))
        log.append("e", make_decision(1))
        wanted = len(frames(make_start("e"), make_decision(1)))
        until(lambda: log.stats().written_bytes >= wanted)
        assert (tmp_path / "open" / "e.ep").stat().st_size == wanted == log.stats().written_bytes
        assert log.stats().open == 1 and log.stats().queued_bytes == 0


# --- the caller's side ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("episode", ["", "a/b", "..", "a.b", "a b", "é", "x" * 65, "a\n", "a\0"])
def test_an_id_that_is_no_plain_file_name_is_refused(tmp_path: Path, episode: str) -> None:
    with opened(tmp_path) as log:
        with pytest.raises(ValueError, match="episode id"):
            log.start(make_start(episode))
        assert log.stats().open == 0


def test_wrong_use_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.start(make_start("e"))
        with pytest.raises(ValueError, match="open already"):
            log.start(make_start("e"))
        for call in (lambda: log.append("x", make_decision(1)), lambda: log.end("x", make_end(0), Answer())):
            with pytest.raises(ValueError, match="not open"):
                call()
        with pytest.raises(ValueError, match="seed"):
            log.start(make_start("f", seed=2**63))
        assert log.stats().open == 1


def test_an_id_is_used_once(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        assert record_episode(log, "e", 1).wait() is None
        error = record_episode(log, "e", 3).wait()
        assert error is not None and "id" in error
        # Also when retention has removed the file.
        log.index.hold(1, 0, [])
        log.index.path(log.index.retire(1)[0]).unlink()
        assert record_episode(log, "e", 3).wait() is not None
        assert log.stats().lost == 2 and log.stats().stored == 1
    assert [row.decisions for row in log.index.after(0)] == [1]


def test_one_process_logs_in_a_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runtime.episodes import EpisodeLog; EpisodeLog(Path(sys.argv[1]))"
    )
    with opened(tmp_path):
        with pytest.raises(ClaimedError, match=f"process {os.getpid()} is at work"):
            EpisodeLog(tmp_path)
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert other.returncode == 1 and "is at work here already" in other.stderr
    with opened(tmp_path) as log:
        assert record_episode(log, "e").wait() is None


def test_closing_ends_open_episodes_as_aborted(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path)
    done = record_episode(log, "done", 1)
    log.start(make_start("running"))
    log.append("running", make_decision(1))
    log.append("running", make_executed(1, 2))
    log.close()
    log.close()
    assert done.calls == [None]
    running = log.index.get("running")
    assert running is not None and (running.status, running.steps, running.decisions) == ("aborted", 2, 1)
    assert running.reason == "the log is closed"
    assert read_episode(log.index.path(running)).final is None
    assert (log.stats().stored, log.stats().aborted, log.stats().open) == (1, 1, 0)
    # Whoever is late is told, and nothing is written any more.
    log.start(make_start("late"))
    log.append("late", make_decision(1))
    late = Answer()
    log.end("late", make_end(0), late)
    assert late.calls == ["the log is closed"] and names(tmp_path / "open") == []


def test_closing_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(episodes, "CLOSE_TIMEOUT_S", 0.05)
    log = EpisodeLog(tmp_path)
    answer = record_episode(log, "e", 1)
    with pytest.raises(EpisodeLogError, match="did not take"):
        log.close()
    with pytest.raises(ClaimedError, match="is at work here"):
        EpisodeLog(tmp_path)
    gate.open.set()
    assert answer.wait() is None
    monkeypatch.setattr(episodes, "CLOSE_TIMEOUT_S", 20)
    log.close()


def test_a_writer_that_died_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    gate = Gate(monkeypatch)
    log = EpisodeLog(tmp_path)
    waiting = record_episode(log, "a")
    log.start(make_start("b"))
    monkeypatch.setattr(episode_file, "write_all", lambda *_: 1 / 0)
    gate.open.set()
    assert "has died" in (waiting.wait() or "")
    log._writer.join(20)
    late = Answer()
    log.append("b", make_decision(1))
    log.end("b", make_end(0), late)
    assert "has died" in (late.wait() or "") and "has died" in log.stats().error and log.stats().lost >= 1
    log.close()


# --- a queue over its limit, a disk that fails ------------------------------------------------------------------


def test_over_the_queue_limit_the_largest_episode_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with opened(tmp_path, queue_mb=0.1) as log:
        small = record_episode(log, "small", 1)
        log.start(make_start("large"))
        for number in range(1, 400):  # far over the limit; every append returns at once
            log.append("large", make_decision(number))
            assert log.stats().queued_bytes <= 100_000
        large = Answer()
        log.end("large", make_end(0), large)
        assert log.stats().lost == 1
        gate.open.set()
        assert small.wait() is None
        assert "more than 0.1 MB" in (large.wait() or "")
        assert record_episode(log, "later").wait() is None
        assert log.stats().queued_bytes == 0 and "large" in log.stats().error
    # What had been written before may be kept, but never as complete.
    assert {row.episode: row.status for row in log.index.after(0) if row.status != "aborted"} == {
        "small": "success",
        "later": "success",
    }
    assert names(tmp_path / "open") == []


def test_what_is_left_of_an_episode_given_up_is_kept_as_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, queue_mb=0.02) as log:
        log.start(make_start("e"))
        log.append("e", make_decision(1))
        log.append("e", make_executed(1))
        wanted = len(frames(make_start("e"), make_decision(1), make_executed(1)))
        until(lambda: log.stats().written_bytes == wanted)
        gate = Gate(monkeypatch)
        for number in range(2, 50):
            log.append("e", make_decision(number))
        gate.open.set()
        answer = Answer()
        log.end("e", make_end(400), answer)
        assert answer.wait() is not None
    (row,) = log.index.after(0)
    assert row.status == "aborted" and row.steps == HORIZON and "given up" in row.reason
    assert len(read_episode(log.index.path(row)).decisions) == row.decisions


@pytest.mark.parametrize("failing", ["write", "fsync", "rename", "open"])
def test_a_disk_error_costs_one_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(descriptor: int, *parts: bytes) -> None:
        os.write(descriptor, parts[-1][: len(parts[-1]) // 2])
        full()

    with opened(tmp_path) as log:
        assert record_episode(log, "before").wait() is None
        with monkeypatch.context() as patch:
            match failing:
                case "write":
                    patch.setattr(episode_file, "write_all", half)
                case "fsync":
                    patch.setattr(os, "fsync", full)
                case "rename":
                    patch.setattr(Path, "rename", full)
                case "open":
                    patch.setattr(episode_file.os, "open", full)
            error = record_episode(log, "during", 3).wait()
        assert error is not None and "No space left" in error
        assert log.stats().lost == 1 and "during" in log.stats().error
        assert record_episode(log, "after").wait() is None
    assert [(row.episode, row.status) for row in log.index.after(0)] == [("before", "success"), ("after", "success")]
    assert names(tmp_path / "open") == [] and names(tmp_path / "done") == ["after.ep", "before.ep"]


def test_an_error_while_writing_an_open_episode_frees_its_space_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as log:
        log.start(make_start("e"))
        log.append("e", make_decision(1))

        def broken(_descriptor: int, *_parts: bytes) -> None:
            raise OSError(errno.EIO, "Input/output error")

        until(lambda: log.stats().written_bytes == len(frames(make_start("e"), make_decision(1))))
        with monkeypatch.context() as patch:
            patch.setattr(episode_file, "write_all", broken)
            log.append("e", make_executed(1))
            until(lambda: log.stats().lost == 1)
            until(lambda: names(tmp_path / "open") == [])
        log.append("e", make_decision(2))  # as if nothing had happened
        answer = Answer()
        log.end("e", make_end(4), answer)
        assert "Input/output error" in (answer.wait() or "")
    assert names(tmp_path / "open") == names(tmp_path / "done") == [] and log.index.count() == 0


def test_an_index_that_fails_delays_the_row_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_rows: object) -> None:
        raise DatabaseError("index.sqlite: database or disk is full")

    with opened(tmp_path) as log:
        with monkeypatch.context() as patch:
            patch.setattr(log.index, "add", full)
            assert "disk is full" in (record_episode(log, "a").wait() or "")
        assert record_episode(log, "b").wait() is None
        assert [row.episode for row in log.index.after(0)] == ["a", "b"]
        with monkeypatch.context() as patch:
            patch.setattr(log.index, "add", full)
            assert record_episode(log, "c").wait() is not None
    with opened(tmp_path) as log:
        assert [row.episode for row in log.index.after(0)] == ["a", "b", "c"]


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """RLIMIT_FSIZE gives real short writes and real errors, without a full disk."""
    code = """
import resource, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from log_samples import record_episode
from runtime.episodes import EpisodeLog
log = EpisodeLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))
for episode, decisions in [("a", 2), ("large", 1000), ("b", 2)]:
    print(episode, record_episode(log, episode, decisions).wait())
log.close()
print(log.stats().lost)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    a, large, b, lost = done.stdout.splitlines()
    assert (a, b, lost) == ("a None", "b None", "1") and "File too large" in large
    index = EpisodeIndex(tmp_path)
    assert [row.episode for row in index.after(0)] == ["a", "b"]
    assert names(tmp_path / "open") == [] and names(tmp_path / "done") == ["a.ep", "b.ep"]


# --- retention --------------------------------------------------------------------------------------------------


def test_the_oldest_taken_and_not_held_go_when_space_is_short(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for name in "abcde":
            assert record_episode(log, name).wait() is None
    size = log.index.after(0)[0].bytes
    with opened(tmp_path, keep_gb=3.5 * size / 1e9) as log:
        log.index.hold(4, 0, ["b"])
        assert record_episode(log, "f").wait() is None
        log.close()
        assert log.stats().deleted == 3 and log.stats().error == ""
    assert names(tmp_path / "done") == ["b.ep", "e.ep", "f.ep"]
    assert [row.episode for row in log.index.after(0) if row.deleted] == ["a", "c", "d"]


def test_failures_are_kept_for_their_days_and_no_longer(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for name, status in (("old", "failure"), ("new", "failure"), ("late", "timeout"), ("good", "success")):
            assert record_episode(log, name, status=status).wait() is None
        # The first one ended three days ago.
        with log.index._database.transaction() as connection:
            connection.execute("UPDATE episodes SET ended_unix_s = ended_unix_s - 3 * 86400 WHERE episode = 'old'")
    # Far over its limit, and yet: two failures are too new, and the trainer has not taken all of the rest.
    for taken, name, left in [
        (3, "more", {"new", "late", "good", "more"}),
        (4, "last", {"new", "late", "more", "last"}),
    ]:
        with opened(tmp_path, keep_gb=1e-9, keep_failures_days=2.0) as log:
            log.index.hold(taken, 0, [])
            assert record_episode(log, name).wait() is None
            log.close()
            assert log.stats().deleted == 1 and log.stats().error == ""
        assert {path.removesuffix(".ep") for path in names(tmp_path / "done")} == left


def test_without_a_reader_nothing_is_deleted(tmp_path: Path) -> None:
    with opened(tmp_path, keep_gb=1e-6) as log:
        for name in "abc":
            assert record_episode(log, name).wait() is None
    assert names(tmp_path / "done") == ["a.ep", "b.ep", "c.ep"]


# --- reading ----------------------------------------------------------------------------------------------------

GOOD: list[Record] = [make_start("e"), make_decision(1), make_executed(1), make_end(4)]
NAN = np.full((HORIZON, 2), np.nan, np.float32)
BAD: dict[str, Callable[[], list[Record]]] = {
    "no records": list,
    "format": lambda: [make_start("e", format=2), *GOOD[1:]],
    "does not begin": lambda: GOOD[1:],
    "starts twice": lambda: [GOOD[0], *GOOD],
    "last record is missing": lambda: GOOD[:-1],
    "goes on": lambda: [*GOOD, GOOD[-1]],
    "comes after decision": lambda: [GOOD[0], make_decision(2), make_decision(1), GOOD[-1]],
    "a report on decision 2": lambda: [GOOD[0], make_decision(1), make_executed(2), GOOD[-1]],
    "a report on decision 1": lambda: [*GOOD[:2], make_decision(2), make_executed(2), make_executed(1), GOOD[-1]],
    "start: is 0, expected 4": lambda: [*GOOD[:3], make_executed(1), GOOD[-1]],
    "tensors.actions: missing": lambda: [GOOD[0], make_decision(1, actions=None), GOOD[-1]],
    "tensors.actions: is": lambda: [GOOD[0], make_decision(1, actions=np.zeros((4, 3), np.float32)), GOOD[-1]],
    "tensors.actions: holds": lambda: [GOOD[0], make_decision(1, actions=NAN), GOOD[-1]],
    "tensors.log_prob": lambda: [GOOD[0], make_decision(1, log_prob=np.zeros(3, np.float32)), GOOD[-1]],
    "tensors.state": lambda: [GOOD[0], make_decision(1, state=None), GOOD[-1]],
    "tensors.image/eye": lambda: [GOOD[0], make_decision(1, side=9), GOOD[-1]],
    "tensors.more": lambda: [GOOD[0], make_decision(1, more=np.zeros(1)), GOOD[-1]],
    "5 actions from 0 on": lambda: [*GOOD[:2], make_executed(1, 5), GOOD[-1]],
    "tensors.reward": lambda: [*GOOD[:2], make_executed(1, reward=np.zeros(4)), GOOD[-1]],
    "expected sent, reward": lambda: [*GOOD[:2], make_executed(1, more=np.zeros(4)), GOOD[-1]],
}


@pytest.mark.parametrize("what", BAD)
def test_records_that_do_not_fit_together_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "e.ep"
    path.write_bytes(frames(*BAD[what]()))
    with pytest.raises(EpisodeError, match="last record" if what == "no records" else what) as caught:
        read_episode(path)
    assert caught.value.path == path and str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="No such file"):
        read_episode(tmp_path / "e.ep")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_a_whole_episode_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(frames(*GOOD))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("read") / "e.ep"
    path.write_bytes(whole)
    with pytest.raises(EpisodeError):
        read_episode(path)


def test_an_aborted_episode_has_no_last_observation(tmp_path: Path) -> None:
    path = tmp_path / "e.ep"
    end = EndRecord(status="aborted", steps=4, reason="why", tensors={})
    path.write_bytes(frames(*GOOD[:3], end))
    episode = read_episode(path)
    assert (episode.status, episode.reason, episode.final, episode.success) == ("aborted", "why", None, False)


def test_of_many_files_that_cannot_be_read_a_few_are_named_and_all_counted(tmp_path: Path) -> None:
    EpisodeLog(tmp_path).close()
    for i in range(200):
        (tmp_path / "done" / f"._{i:03}.ep").write_bytes(b"left by another system")
    log = EpisodeLog(tmp_path)
    said = log.stats().error
    log.close()
    assert "._000.ep" in said and said.endswith("; and 180 more") and len(said) < 20_000
