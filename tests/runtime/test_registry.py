"""The registry: versions, lineage, and what a rollback means."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.registry import Registry, RegistryError


def filled(path: Path, *versions: str) -> Registry:
    registry = Registry(path / "registry.sqlite")
    parent = ""
    for version in versions:
        registry.add(version, parent=parent, made={"command": "test", "nested": {"n": 1}})
        parent = version
    return registry


def test_versions_and_lineage(tmp_path: Path) -> None:
    registry = filled(tmp_path, "aaaa1", "bbbb2", "cccc3")
    registry.add("other", parent="aaaa1", made={})
    registry.add("aaaa1", parent="changed", made={"changed": True})
    assert [(row.version, row.parent, row.number) for row in registry.list()] == [
        ("aaaa1", "", 1), ("bbbb2", "aaaa1", 2), ("cccc3", "bbbb2", 3), ("other", "aaaa1", 4),
    ]  # fmt: skip
    assert registry.list()[0].made == {"command": "test", "nested": {"n": 1}}
    assert [row.version for row in registry.lineage("cccc3")] == ["cccc3", "bbbb2", "aaaa1"]
    assert [row.version for row in registry.lineage("othe")] == ["other", "aaaa1"]
    assert not any(row.live for row in registry.list())


def test_lineage_ends_where_the_parent_is_unknown_and_in_a_circle(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.add("from-elsewhere", parent="not here", made={})
    registry.add("circle-a", parent="circle-b", made={})
    registry.add("circle-b", parent="circle-a", made={})
    assert [row.version for row in registry.lineage("from-elsewhere")] == ["from-elsewhere"]
    assert [row.version for row in registry.lineage("circle-a")] == ["circle-a", "circle-b"]


def test_prefixes(tmp_path: Path) -> None:
    registry = filled(tmp_path, "abcd1234", "abcd9999", "e", "abcd%", "x'; DROP")
    assert registry.get("abcd1").version == "abcd1234" and registry.get("e").version == "e"
    with pytest.raises(RegistryError, match="3 versions"):
        registry.get("abcd")
    with pytest.raises(RegistryError, match="at least 4"):
        registry.get("abc")
    with pytest.raises(RegistryError, match="no version begins"):
        registry.get("abcd5")
    assert registry.get("abcd%").version == "abcd%" and registry.get("x'; D").version == "x'; DROP"


def test_live_and_history(tmp_path: Path) -> None:
    registry = filled(tmp_path, "A", "B")
    assert registry.live() is None and registry.previous() is None and registry.history() == []
    with pytest.raises(RegistryError, match="unknown version 'Z'"):
        registry.set_live("Z", why="sft")
    registry.set_live("A", why="sft")
    registry.set_live("A", why="again")
    registry.set_live("B", why="announced")
    assert registry.live() == "B" and registry.previous() == "A"
    assert [(row.version, row.live) for row in registry.list()] == [("A", False), ("B", True)]
    assert registry.get("B").live and not registry.get("A").live
    changes = registry.history()
    assert [(c.version, c.previous, c.why) for c in changes] == [("A", "", "sft"), ("B", "A", "announced")]
    assert changes[0].unix_s <= changes[1].unix_s
    assert Registry(registry.path).live() == "B"


def test_what_was_served_leaves_out_what_was_only_added(tmp_path: Path) -> None:
    registry = filled(tmp_path, "A", "B", "C", "D")
    assert registry.served() == []
    with pytest.raises(RegistryError, match="no version has been live yet"):
        registry.first()
    for version in "CDCB":
        registry.set_live(version, why="test")
    assert registry.first().version == "C"
    assert [(row.version, row.number, row.live) for row in registry.served()] == [
        ("C", 3, False),
        ("D", 4, False),
        ("B", 2, True),
    ]


def test_rollbacks_go_back_and_never_round(tmp_path: Path) -> None:
    registry = filled(tmp_path, "A", "B", "C", "D")
    for version in "ABC":
        registry.set_live(version, why="announced")
    registry.set_live("B", why="rollback")
    assert registry.previous() == "A"  # not C, which somebody has just left
    registry.set_live("D", why="announced")
    assert registry.previous() == "B"
    registry.set_live("B", why="rollback")
    registry.set_live("A", why="rollback")
    assert registry.live() == "A" and registry.previous() is None
    registry.set_live("C", why="chosen by hand")
    assert registry.previous() == "A"


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from("ABCDE"), max_size=15))
def test_previous_follows_the_trail(tmp_path_factory: pytest.TempPathFactory, went_live: list[str]) -> None:
    registry = filled(tmp_path_factory.mktemp("registry"), *"ABCDE")
    trail: list[str] = []
    for version in went_live:
        registry.set_live(version, why="test")
        trail = [*trail[: trail.index(version)], version] if version in trail else [*trail, version]
        assert [registry.previous(), registry.live()] == ([None, *trail])[-2:]
    # Rolling back until nothing is left ends, and passes each version once.
    passed = []
    while (version_before := registry.previous()) is not None:
        registry.set_live(version_before, why="rollback")
        passed.append(version_before)
    assert passed == trail[-2::-1]
    registry.close()


def test_reading_makes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run" / "registry.sqlite")
    assert registry.list() == [] and registry.live() is None and registry.previous() is None
    with pytest.raises(RegistryError):
        registry.get("abcd")
    assert not (tmp_path / "run").exists()


def test_processes_write_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from runtime.registry import Registry
registry = Registry(Path(sys.argv[1]))
for i in range(8):
    registry.add(f"shared-{i}", parent="", made={})
    registry.set_live(f"shared-{i}", why=sys.argv[2])
"""
    path = tmp_path / "registry.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)]) for i in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    registry = Registry(path)
    assert sorted(row.version for row in registry.list()) == sorted(f"shared-{i}" for i in range(8))
    assert registry.live() == "shared-7"


def test_a_damaged_registry_is_an_error_for_people(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(RegistryError, match=r"registry\.sqlite"):
        Registry(path).list()


def test_stages_with_their_evidence(tmp_path: Path) -> None:
    registry = filled(tmp_path, "A", "B")
    assert registry.stage("A") is None and registry.stages() == []
    registry.enter("A", "live", why="it was there")
    registry.enter("B", "candidate", why="announced")
    registry.enter("B", "canary", why="passed the gate", evidence={"gate": {"kl": 0.25, "refused": []}})
    registry.enter("B", "rejected", why="by Ada", who="Ada")
    assert (registry.stage("A"), registry.stage("B")) == ("live", "rejected")
    assert [(s.version, s.stage, s.why, s.who) for s in registry.stages()] == [
        ("A", "live", "it was there", "rule"),
        ("B", "candidate", "announced", "rule"),
        ("B", "canary", "passed the gate", "rule"),
        ("B", "rejected", "by Ada", "Ada"),
    ]
    assert [s.evidence for s in registry.stages("B")] == [{}, {"gate": {"kl": 0.25, "refused": []}}, {}]
    assert registry.live() is None, "what serves is changed by `set_live` alone"


def test_pins(tmp_path: Path) -> None:
    registry = filled(tmp_path)
    assert registry.pinned() == ""
    registry.pin("Ada", pinned=True)
    assert registry.pinned() == "Ada"
    registry.pin("Grace", pinned=True)
    assert Registry(registry.path).pinned() == "Grace"
    registry.pin("Ada", pinned=False)
    assert registry.pinned() == ""


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from("ABCD"), max_size=10))
def test_where_nothing_is_staged_those_that_acted_are_those_that_were_live(
    tmp_path_factory: pytest.TempPathFactory, went_live: list[str]
) -> None:
    registry = filled(tmp_path_factory.mktemp("registry"), *"ABCD")
    for version in went_live:
        registry.set_live(version, why="test")
    assert registry.acted() == [change.version for change in registry.history()]
    registry.close()


def test_after_a_rejected_canary_it_is_the_live_versions_turn_again(tmp_path: Path) -> None:
    registry = filled(tmp_path, *"ABCDE")
    assert registry.acted() == []

    def promote(version: str) -> None:
        before = registry.live()
        registry.set_live(version, why="promoted")
        if before is not None:
            registry.enter(before, "retired", why="replaced")
        registry.enter(version, "live", why="promoted")

    promote("A")
    for version in "BC":
        registry.enter(version, "candidate", why="announced")
        registry.enter(version, "canary", why="passed the gate")
        registry.enter(version, "rejected", why="worse")
    assert registry.acted() == ["A", "B", "A", "C", "A"]
    registry.enter("D", "candidate", why="announced")
    registry.enter("D", "rejected", why="gate: kl")
    assert registry.acted() == ["A", "B", "A", "C", "A"], "what the gate stops has never acted"
    registry.enter("E", "canary", why="passed the gate")
    promote("E")
    assert registry.acted()[-2:] == ["A", "E"], "it goes on acting; its turn has not come twice"
    registry.set_live("A", why="success fell")
    registry.enter("E", "rejected", why="success fell")
    registry.enter("A", "live", why="success fell")
    assert registry.acted()[-2:] == ["E", "A"]


def test_a_clock_that_is_put_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = filled(tmp_path, *"ABCDEF")
    now_s = 1000.0
    monkeypatch.setattr("runtime.registry.time.time", lambda: now_s)
    registry.set_live("A", why="test")
    registry.set_live("B", why="test")
    now_s = 10.0
    registry.set_live("C", why="test")
    now_s = 20.0
    registry.set_live("D", why="test")
    assert registry.acted() == [*"ABCD"]
    registry.enter("D", "live", why="it was live when the runtime started")
    registry.enter("E", "canary", why="passed the gate")
    assert registry.acted() == [*"ABCDE"]
    now_s = 2000.0
    registry.enter("E", "rejected", why="worse")
    now_s = 30.0
    registry.enter("F", "canary", why="passed the gate")
    registry.set_live("F", why="promoted")
    registry.enter("F", "live", why="promoted")
    registry.enter("B", "canary", why="passed the gate")
    assert registry.acted()[-2:] == [*"FB"]


def test_a_registry_of_before_there_were_stages_gets_their_tables(tmp_path: Path) -> None:
    registry = filled(tmp_path, "A")
    registry.set_live("A", why="sft")
    registry.close()
    old = sqlite3.connect(registry.path)
    old.executescript("DROP TABLE stages; DROP TABLE pins; PRAGMA user_version=1")
    old.close()
    again = Registry(registry.path)
    assert again.live() == "A" and again.acted() == ["A"]
    assert again.stages() == [] and again.pinned() == ""
    again.enter("A", "live", why="test")
    again.pin("Ada", pinned=True)
    assert again.stage("A") == "live" and again.pinned() == "Ada"
    assert [row.version for row in again.list()] == ["A"]
