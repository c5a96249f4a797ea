"""`/metrics` and `/healthz`: what a real runtime's status and a trainer's line become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from bridge.backend import Backend
from bridge.client import RefusedError
from bridge.messages import Govern, Infer, Operate, Watch
from fieldtune.page.health import health
from fieldtune.page.prometheus import TRAINER, exposition
from runtime.canary import Canary
from runtime.status import EpisodeBrief, Status

LINE: dict[str, Any] = {
    "iteration": 7,
    "unix_s": 1.7e9,
    "env_steps": 12_345,
    "episodes": 20,
    "success": 0.75,
    "steps_to_success": 41.5,
    "weight": 0.5,
    "kl": 0.02,
    "explained_variance": -0.25,
    "buffer_episodes": 30,
    "buffer_steps": 50.0,
    "grad_norm": 1.5,
    "policy_loss": -0.1,
    "cloning_loss": -0.2,
    "value_loss": 0.3,
}
Labels = tuple[tuple[str, str], ...]


def samples(now: Status | None, trainer: dict[str, Any]) -> dict[str, dict[Labels, float]]:
    """Name -> labels -> value, as Prometheus reads it. Every name and every set of labels comes once."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(exposition(now, trainer).decode()):
        assert family.documentation and family.type in ("gauge", "counter")
        for sample in family.samples:
            assert (family.type == "counter") is sample.name.endswith("_total")
            values, labels = found.setdefault(sample.name, {}), tuple(sorted(sample.labels.items()))
            assert labels not in values
            values[labels] = sample.value
    return found


def plain(found: dict[str, dict[Labels, float]]) -> dict[str, float]:
    """Those without labels."""
    return {name: values[()] for name, values in found.items() if () in values}


def one(label: str, values: dict[str, float]) -> dict[Labels, float]:
    return {((label, name),): value for name, value in values.items()}


def label_of(values: dict[Labels, float]) -> str:
    """The label that these values are told apart by; empty if there is one value only."""
    (names,) = {tuple(name for name, _ in labels) for labels in values}
    return "".join(names)


@pytest.fixture
def status(serve: Any, point: Backend) -> Status:
    """Of a runtime that has served two episodes, refused a request and a rollback, and runs no canary."""
    serving = serve()
    robot = serving.robot(point.spec, "arm")
    robot.run_episode(point.spec, decisions=2)
    robot.next()
    robot.infer(robot.observation(point.spec))
    robot.executed(3)
    robot.end(robot.observation(point.spec), "success")
    client = serving.client("watch")
    client.ask(Watch(bridge="b", client="arm", session=robot.welcome.session, state="holding", why="no chunk"))
    serving.live.change = lambda wanted: 1 / 0
    for bad in (Infer(session="nobody", episode="x", step=0), Govern(command="rollback", who="test", version="b")):
        with pytest.raises(RefusedError):
            client.ask(bad)
    return msgspec.convert(serving.status(), Status)


def staged(status: Status, *, canary: bool) -> Status:
    """The same with versions that are staged, as `runtime.staging` says it."""
    test = Canary("c" * 64, "d" * 64, 40)
    for i in range(4):
        test.add("c" * 64, True, 10)
        test.add("d" * 64, i < 2, 20)
    drift = {"statistic": "success", "direction": "fell", "episode": 130, "record": 0.9, "recent": 0.5}
    standing = {
        "candidate": test.candidate if canary else "",
        "evidence": msgspec.to_builtins(test.evidence()) if canary else {},
        "drifts": [drift],
        "drift": {},
        "pinned": "Ada",
    }
    return replace(status, staging=standing)


def test_what_the_runtime_counted(status: Status) -> None:
    found = samples(status, {})
    got = plain(found)
    assert got["fieldtune_up"] == 1
    assert found["fieldtune_version_info"] == one("version", {"a" * 64: 1})
    assert got["fieldtune_decisions_total"] == 3 and got["fieldtune_sessions"] == 1
    assert found["fieldtune_episodes_total"] == one("status", {"timeout": 1, "success": 1})
    assert found["fieldtune_requests_refused_total"] == one("code", {"session": 1, "bundle": 1})
    assert (got["fieldtune_swaps_total"], got["fieldtune_swaps_refused_total"]) == (0, 1)
    assert got["fieldtune_latency_p99_seconds"] == pytest.approx(status.latency_ms["p99"] / 1000)
    assert got["fieldtune_inference_cpu_seconds_total"] == status.inference_cpu_s > 0
    assert got["fieldtune_log_stored_episodes_total"] == 2 and got["fieldtune_log_error"] == 0
    assert got["fieldtune_log_written_bytes_total"] == status.log["written_bytes"] > 0
    assert got["fieldtune_recent_episodes"] == 2
    assert (got["fieldtune_recent_success_ratio"], got["fieldtune_recent_steps_to_success"]) == (0.5, 3.0)
    robots = {"idle": 0, "resetting": 0, "driving": 0, "paused": 0, "holding": 1, "stopping": 0, "stopped": 0}
    assert found["fieldtune_robots"] == one("state", robots)
    assert got["fieldtune_stopped"] == 0
    assert not any(name.startswith(("fieldtune_canary", "fieldtune_trainer", "fieldtune_pinned")) for name in got)


def test_how_the_canary_stands(status: Status) -> None:
    found = samples(staged(status, canary=True), {})
    assert found["fieldtune_canary_info"] == one("version", {"c" * 64: 1})
    assert found["fieldtune_canary_episodes"] == one("arm", {"candidate": 4, "live": 4})
    assert found["fieldtune_canary_success_ratio"] == one("arm", {"candidate": 1.0, "live": 0.5})
    assert found["fieldtune_canary_evidence_needed"] == one("decision", {"promote": 40, "roll_back": 20})
    bounds = found["fieldtune_canary_success_difference"]
    assert bounds[(("bound", "low"),)] < 0.5 < bounds[(("bound", "high"),)]
    got = plain(found)
    assert (got["fieldtune_canary_running"], got["fieldtune_drift_alarms"], got["fieldtune_pinned"]) == (1, 1, 1)
    none = samples(staged(status, canary=False), {})
    assert {name for name in none if "canary" in name} == {"fieldtune_canary_running"}
    assert plain(none)["fieldtune_canary_running"] == 0


def test_a_silent_runtime_leaves_what_the_trainer_wrote(status: Status) -> None:
    assert samples(None, {}) == {"fieldtune_up": {(): 0}}
    found = samples(None, LINE)
    got = plain(found)
    assert got.pop("fieldtune_up") == 0
    assert got == {f"fieldtune_trainer_{name}": LINE[key] for name, (key, _) in TRAINER.items()}
    assert found["fieldtune_trainer_loss"] == one("of", {"policy": -0.1, "cloning": -0.2, "value": 0.3})
    without = samples(None, {**LINE, "steps_to_success": None})
    assert found.keys() - without.keys() == {"fieldtune_trainer_steps_to_success"}


def test_labels_from_outside_cannot_break_the_page(status: Status) -> None:
    odd = 'say "hi"\\n\nfieldtune_up 5'
    found = samples(replace(status, interventions={odd: 3}), {})
    assert found["fieldtune_interventions_total"] == one("rule", {odd: 3})
    assert found["fieldtune_up"] == {(): 1}


def test_an_episode_without_a_verdict_is_neither_success_nor_failure(status: Status) -> None:
    ends = ("success", "unjudged", "aborted", "failure", "unjudged")
    recent = tuple(EpisodeBrief("reach", end, 10, "a", 0.0) for end in ends)
    got = plain(samples(replace(status, recent=recent), {}))
    assert (got["fieldtune_recent_episodes"], got["fieldtune_recent_success_ratio"]) == (2, 0.5)


def test_the_page_of_names_has_each_and_no_other(status: Status) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "monitoring.md").read_text()
    rows = dict(re.findall(r"^\| `(fieldtune_\w+)` \| (?:`(\w+)` )?\|", page, re.MULTILINE))
    full = samples(replace(staged(status, canary=True), interventions={"rate": 1}), LINE)
    assert rows == {name: label_of(values) for name, values in full.items()}
    rules = re.findall(r"expr: (.*)", page)
    assert rules and all(name in rows for rule in rules for name in re.findall(r"fieldtune_\w+", rule))


def test_health(serve: Any, point: Backend, status: Status) -> None:
    assert health(None) == (503, {"healthy": False, "why": ["the runtime does not answer"]})
    code, body = health(status)
    assert (code, body) == (200, {"healthy": True, "why": [], "stopped": False})
    lost = replace(status, log={**status.log, "lost": 2, "error": "No space left on device"})
    code, body = health(lost)
    assert code == 503 and body["why"][0] == "2 episodes lost" and "fieldtune status" in body["why"][1]
    assert "No space" not in str(body), "whoever may not see the page may see this"
    assert plain(samples(lost, {}))["fieldtune_log_lost_episodes_total"] == 2


def test_robots_that_an_operator_has_stopped_are_no_fault(serve: Any) -> None:
    serving = serve()
    serving.client("operator").ask(Operate(command="stop", why="Ada"))
    now = msgspec.convert(serving.status(), Status)
    code, body = health(now)
    assert code == 200 and body["stopped"] is True
    assert plain(samples(now, {}))["fieldtune_stopped"] == 1
