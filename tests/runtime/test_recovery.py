"""What a crash leaves of the episode log, and what the next start makes of it."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_samples import (
    frames,
    make_decision,
    make_end,
    make_executed,
    make_start,
    names,
    opened,
    record_episode,
)

from runtime import recovery
from runtime.episodes import EpisodeLog
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import read_episode

TORN = [make_start("e"), make_decision(1), make_executed(1), make_decision(2), make_executed(2, 3)]
ENDS = [len(frames(*TORN[: i + 1])) for i in range(len(TORN))]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, ENDS[-1]), st.binary(max_size=20), st.none() | st.integers(1, ENDS[-1] - 1))
def test_a_torn_episode_is_recovered_up_to_its_first_bad_record(
    tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes, flip: int | None
) -> None:
    directory = tmp_path_factory.mktemp("log")
    (directory / "open").mkdir()
    data = bytearray(frames(*TORN)[:cut] + tail)
    good = cut
    if flip is not None and flip < cut:
        data[flip] ^= 0x5A
        good = flip
    (directory / "open" / "e.ep").write_bytes(data)
    whole = sum(end <= good for end in ENDS)
    if data.startswith(frames(*TORN)[: ENDS[whole] if whole < len(ENDS) else ENDS[-1]]):
        whole = sum(data.startswith(frames(*TORN)[:end]) for end in ENDS)  # the tail happened to be what was cut off
    with opened(directory) as log:
        rows = log.index.after(0)
    assert names(directory / "open") == []
    if whole == 0:
        assert rows == [] and names(directory / "damaged") == ["e.ep"] and "damaged" in log.stats().error
        return
    (row,) = rows
    episode = read_episode(log.index.path(row))
    assert row.status == episode.status == "aborted" and f"{whole} records" in row.reason
    assert len(episode.decisions) == row.decisions == sum(whole > i for i in (1, 3))
    assert [len(d.sent) for d in episode.decisions] == [
        [4, 3][i] if whole > [2, 4][i] else 0 for i in range(row.decisions)
    ]
    assert row.steps == episode.steps == sum(len(d.sent) for d in episode.decisions)
    assert row.bytes == log.index.path(row).stat().st_size
    with opened(directory) as log:
        assert log.index.after(0) == rows


def test_an_episode_that_had_ended_stays_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "done").mkdir()
    ended = [make_decision(1), make_executed(1), make_end(4)]
    (tmp_path / "open" / "a.ep").write_bytes(frames(make_start("a"), *ended) + b"junk")
    (tmp_path / "done" / "b.ep").write_bytes(frames(make_start("b"), *ended))
    with opened(tmp_path) as log:
        assert [(row.episode, row.status, row.steps) for row in log.index.after(0)] == [
            ("a", "success", 4), ("b", "success", 4),
        ]  # fmt: skip
        assert all(read_episode(log.index.path(row)).final is not None for row in log.index.after(0))


def test_what_cannot_be_recovered_is_put_aside_and_named(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "done").mkdir()
    end = make_end(0)
    files = {
        "open/other.ep": frames(make_start("e")),
        "open/future.ep": frames(make_start("future", format=99)),
        "open/no-start.ep": frames(make_decision(1)),
        "open/notes.txt": b"hello",
        "done/no-end.ep": frames(make_start("no-end")),
        "done/torn.ep": frames(make_start("torn"), end)[:-1],
        "done/more.ep": frames(make_start("more"), end, end),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "open" / "empty.ep").touch()
    with opened(tmp_path) as log:
        assert log.index.after(0) == []
        assert names(tmp_path / "damaged") == sorted(Path(name).name for name in files)
        assert all(Path(name).name in log.stats().error for name in files)
        assert names(tmp_path / "open") == names(tmp_path / "done") == []
        assert record_episode(log, "e").wait() is None


def test_index_and_files_are_brought_into_agreement(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for name in "abc":
            record_episode(log, name).wait()
    log.index.hold(1, 0, [])
    (retired,) = log.index.retire(1)  # and a crash before its file was removed
    (tmp_path / "done" / "c.ep").unlink()
    with opened(tmp_path) as log:
        assert retired.episode == "a" and names(tmp_path / "done") == ["b.ep"]
        assert [(row.episode, row.deleted) for row in log.index.after(0)] == [("a", True), ("b", False), ("c", True)]
        assert "c.ep" in log.stats().error


def test_a_lost_index_is_made_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for name in "abc":
            record_episode(log, name).wait()
    before = log.index.after(0)
    log.index.close()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    with opened(tmp_path) as log:
        after = log.index.after(0)
    assert [msgspec.structs.replace(row, ended_unix_s=0.0) for row in after] == [
        msgspec.structs.replace(row, ended_unix_s=0.0) for row in before
    ]


def test_a_recovery_that_is_killed_goes_on_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as log:
        for number, name in enumerate("gfedcba"):
            record_episode(log, name, started_unix_s=float(number)).wait()
    log.index.close()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    monkeypatch.setattr(recovery, "BATCH", 2)
    read: list[str] = []
    row_of = recovery._row_of

    def killed_at_the_sixth(path: Path) -> EpisodeRow:
        read.append(path.stem)
        if len(read) == 6:
            raise KeyboardInterrupt
        return row_of(path)

    monkeypatch.setattr(recovery, "_row_of", killed_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        EpisodeLog(tmp_path)
    assert EpisodeIndex(tmp_path).count() == 0  # a part of them would be taken for all
    with opened(tmp_path) as log:
        assert [(row.seq, row.episode) for row in log.index.after(0)] == [*enumerate("gfedcba", start=1)]
    assert read == [*"abcdef", *"efg"]
    with opened(tmp_path):
        assert len(read) == 9


WRITER = """
import sys, threading
from pathlib import Path
sys.path[:0] = [sys.argv[3]]
from log_samples import make_decision, make_end, make_executed, make_start
from runtime.episodes import EpisodeLog
log = EpisodeLog(Path(sys.argv[1]))
room = threading.Semaphore(8)
def stored(episode):
    def call(error):
        if error is None:
            print(episode, flush=True)
        room.release()
    return call
print("ready", flush=True)
for i in range(100000):
    episode = f"{sys.argv[2]}-{i}"
    room.acquire()
    log.start(make_start(episode))
    for number in (1, 2, 3):
        log.append(episode, make_decision(number))
        log.append(episode, make_executed(number))
    log.end(episode, make_end(12), stored(episode))
"""


def test_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    chance = random.Random(0)
    acknowledged: list[str] = []
    for life in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(life), str(Path(__file__).parent)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        acknowledged += [writer.stdout.readline().strip() for _ in range(chance.randint(0, 25))]
        time.sleep(chance.uniform(0.0, 0.02))
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        writer.wait(20)
        writer.stdout.close()
    assert len(acknowledged) > 20
    with opened(tmp_path) as log:
        rows = log.index.after(0, limit=10**9)
    status = {row.episode: row.status for row in rows}
    assert max(Counter(row.episode for row in rows).values()) == 1
    assert [status.get(episode) for episode in acknowledged] == ["success"] * len(acknowledged)
    assert names(tmp_path / "done") == sorted(row.file for row in rows) and names(tmp_path / "open") == []
    assert names(tmp_path / "damaged") == []  # a killed process tears no record's start: each is one write
    for row in rows:
        episode = read_episode(log.index.path(row))
        if row.status == "success":
            assert len(episode.decisions) == 3 and episode.steps == 12 and episode.final is not None
        else:
            assert row.status == "aborted" and episode.final is None
