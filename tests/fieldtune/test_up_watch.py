"""What `fieldtune up` does while its children work, with children that end when the test says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fieldtune.commands import ablate, up
from fieldtune.deployment import load_deployment
from runtime.registry import Registry
from runtime.status import Counters, Status
from runtime.supervisor import BAD_USAGE, ChildFailedError

ROUNDS = 5
STATUS = Status(
    version="a" * 64,
    previous="",
    uptime_s=1.0,
    sessions=1,
    decisions=1,
    batches=1,
    episodes={},
    swaps=0,
    refused_swaps=0,
    refused={},
    undeliverable=0,
    dropped=0,
    latency_ms=Counters().latency_ms(),
    inference_share=0.0,
    inference_cpu_s=0.0,
    log={},
    recent=(),
    episodes_per_min=0.0,
    shares={},
    finished=False,
)


class Stop(threading.Event):
    """Nobody waits; the user stops after some rounds."""

    rounds = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.rounds += 1
        if self.rounds == ROUNDS:
            self.set()
        return self.is_set()


class FakeChild:
    """Does what `looks` says each time that it is looked after."""

    def __init__(self, name: str, *looks: Callable[[], int | None]) -> None:
        self.name, self.ends, self.restarts, self.log = name, name == "trainer", 0, Path(f"logs/{name}.log")
        self.looked, self._looks = 0, [*looks]
        self.again_s: list[float] = []
        self.runs = True

    def keep_alive(self, _warn: Any) -> int | None:
        self.looked += 1
        return self._looks.pop(0)() if self._looks else None

    def try_again_after(self, pause_s: float) -> None:
        self.again_s.append(pause_s)
        self.runs = False


def runs() -> int | None:
    return None


def failing(code: int) -> Callable[[], int | None]:
    def look() -> int | None:
        raise ChildFailedError(f"it failed with exit code {code}; the end of its log", code)

    return look


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(record=True, width=200)
    monkeypatch.setattr(up, "err", console)
    monkeypatch.setattr(up, "warn", console.print)
    monkeypatch.setattr(up, "PLAIN_LINE_EVERY_S", 0.0)
    monkeypatch.setattr(up, "runtime_status", lambda _deployment, timeout_s: STATUS)
    return console


def made(tmp_path: Path, *overrides: str, **fields: Any) -> up.Up:
    return up.Up(load_deployment("point", (f"runs={tmp_path}", *overrides)), "point", (), Stop(), False, **fields)


def test_robots_go_on_when_the_trainer_has_failed_for_good(tmp_path: Path, screen: Console) -> None:
    runtime, trainer, worker = (
        FakeChild("runtime"),
        FakeChild("trainer", runs, failing(1)),
        FakeChild("bridge-0"),
    )
    assert not up.watch(made(tmp_path), [runtime, trainer, worker])  # type: ignore[list-item]
    assert (runtime.looked, trainer.looked, worker.looked) == (ROUNDS, 2, ROUNDS)
    said = screen.export_text()
    assert said.count("it failed with exit code 1") == 1 and "the end of its log" in said
    assert "has stopped: the trainer failed (logs/trainer.log)" in said


def test_a_bridge_that_has_failed_for_good_is_tried_again_while_another_works(tmp_path: Path, screen: Console) -> None:
    runtime, dead, works = FakeChild("runtime"), FakeChild("bridge-0", failing(1)), FakeChild("bridge-1")
    this = made(tmp_path, "bridge.workers=2")
    assert up.watch(this, [runtime, dead, works])  # type: ignore[list-item]
    assert dead.again_s == [up.FAILED_BRIDGE_S] and dead.looked == works.looked == ROUNDS
    assert "has failed (logs/bridge-0.log); tried again every 60 s" in screen.export_text()
    both = [FakeChild(f"bridge-{i}", failing(1)) for i in range(2)]
    with pytest.raises(ChildFailedError):
        up.watch(made(tmp_path, "bridge.workers=2"), [runtime, *both])  # type: ignore[list-item]


def test_a_runtime_that_has_to_read_its_log_may_take_longer(tmp_path: Path) -> None:
    this = made(tmp_path)
    assert up.start_limit_s(this.run) == up.RUNTIME_START_S
    (this.run.episodes / "done").mkdir(parents=True)
    for number in range(10):
        (this.run.episodes / "done" / f"{number}.ep").touch()
    assert up.start_limit_s(this.run) == up.RUNTIME_START_S + 10 * up.RECOVERY_S


def test_a_trainer_that_is_done_ends_it(tmp_path: Path, screen: Console) -> None:
    assert up.watch(made(tmp_path), [FakeChild("runtime"), FakeChild("trainer", lambda: 0)])  # type: ignore[list-item]
    assert "has stopped" not in screen.export_text()


@pytest.mark.usefixtures("screen")
def test_another_child_that_fails_for_good_ends_it(tmp_path: Path) -> None:
    for name in ("runtime", "bridge-0"):
        with pytest.raises(ChildFailedError):
            up.watch(made(tmp_path), [FakeChild(name, failing(1)), FakeChild("trainer")])  # type: ignore[list-item]


@pytest.mark.usefixtures("screen")
def test_an_ablation_whose_trainer_fails_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = made(tmp_path)
    monkeypatch.setattr(ablate, "load_ablated", lambda *_: start.deployment)
    child = ablate._child(start, "full", SimpleNamespace(overrides=()))  # type: ignore[arg-type]
    with pytest.raises(ChildFailedError):
        up.watch(child, [FakeChild("trainer", failing(1))])  # type: ignore[list-item]


@pytest.mark.usefixtures("screen")
def test_a_configuration_that_the_trainer_refuses_at_first_ends_it_and_later_does_not(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError):
        up.watch(made(tmp_path), [FakeChild("trainer", failing(BAD_USAGE))])  # type: ignore[list-item]
    restarted = FakeChild("trainer", failing(BAD_USAGE))
    restarted.restarts = 1
    assert not up.watch(made(tmp_path), [restarted])  # type: ignore[list-item]
    this = made(tmp_path)

    def learns() -> None:
        this.run.trainer.mkdir(parents=True)
        numbers = dict.fromkeys(("env_steps", "buffer_episodes", "buffer_steps", "weight", "kl"), 0.0)
        this.run.metrics.write_text(json.dumps({"iteration": 1, "minutes": 1.0, "explained_variance": 0, **numbers}))

    assert not up.watch(this, [FakeChild("trainer", learns, failing(BAD_USAGE))])  # type: ignore[list-item]


def test_after_it_nothing_is_evaluated_and_the_exit_code_says_so(
    tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = made(tmp_path)
    this.run.path.mkdir()
    registry = Registry(this.run.registry)
    registry.add("a" * 64, parent="", made={})
    registry.set_live("a" * 64, why="test")
    titles: list[str] = []
    monkeypatch.setattr(up, "prepare", lambda _: True)
    monkeypatch.setattr(up, "evaluate_version_of", lambda _up, _version, title: titles.append(title))
    monkeypatch.setattr(up, "deploy", lambda _: False)
    assert up.run_to_the_end(this) == 1
    said = " ".join(screen.export_text().split())
    assert titles == ["before"] and "learning had stopped" in said and "`fieldtune up point` goes on" in said
