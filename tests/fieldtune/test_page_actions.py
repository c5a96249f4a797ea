"""What the page does when somebody presses a button: NiceGUI's simulated browser, and no runtime."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from nicegui import ui
from nicegui.testing import User, user_simulation

from fieldtune.deployment import load_deployment
from fieldtune.page import actions, frame, robots, versions
from fieldtune.page.view import RunView
from runtime.status import Status

ENOUGH_S = 20.0


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """The simulation forgets the modules of the pages and all above them, which others would import a second time."""
    before = dict(sys.modules)
    yield
    sys.modules.update(before)


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunView:
    """A run without a runtime."""
    shown = RunView(load_deployment("point", [f"runs={tmp_path}"]))
    monkeypatch.setattr(shown, "status", lambda: None)
    return shown


def browse(view: RunView, path: str, look: Callable[[User], Coroutine[Any, Any, None]]) -> None:
    """Open a page and do what `look` does there."""

    async def main() -> None:
        async with user_simulation() as user:
            for each in (robots, versions):
                each.register(view)
            await user.open(path)
            await look(user)

    asyncio.run(main())


async def told(user: User, text: str) -> None:
    """Wait until the page has said it."""
    async with asyncio.timeout(ENOUGH_S):
        while not any(text in message for message in user.notify.messages):
            await asyncio.sleep(0.02)


def test_whatever_keeps_a_stop_from_being_given_is_said(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("too many open files")

    monkeypatch.setattr(actions, "stop", fail)

    async def look(user: User) -> None:
        user.find("Stop all").click()
        await told(user, "not done, or not confirmed: too many open files")

    browse(view, "/", look)


def test_a_stop_waits_for_no_other_action(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "stop", lambda *_: "stopped: arm")
    hang = threading.Event()
    labels = [frame.ACTIONS.submit(hang.wait, ENOUGH_S) for _ in range(20)]

    async def look(user: User) -> None:
        user.find("Stop all").click()
        await told(user, "stopped: arm")
        assert not hang.is_set() and not any(label.done() for label in labels)

    try:
        browse(view, "/", look)
    finally:
        hang.set()


@pytest.mark.parametrize("state", ["stopped: the runtime is silent", "stopping: the runtime is silent", "driving"])
def test_a_robot_that_stopped_by_itself_can_be_reset(
    state: str, view: RunView, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = dict.fromkeys(
        ("sessions", "decisions", "batches", "swaps", "refused_swaps", "undeliverable", "dropped"), 0
    )
    figures = dict.fromkeys(("uptime_s", "inference_share", "inference_cpu_s", "episodes_per_min"), 0.0)
    empty: dict[str, Any] = {"episodes": {}, "refused": {}, "latency_ms": {}, "log": {}, "shares": {}, "recent": ()}
    robots = {"left": "driving", "right": state}
    status = Status(version="a", previous="", finished=False, robots=robots, **counts, **figures, **empty)
    monkeypatch.setattr(view, "status", lambda: status)

    async def look(user: User) -> None:
        await user.should_see("2 robots", retries=100)
        if state == "driving":
            await user.should_not_see(kind=ui.button, content="Reset")
        else:
            await user.should_see(kind=ui.button, content="Reset")

    browse(view, "/", look)


@pytest.mark.parametrize("button", ["Promote", "Roll back"])
def test_nobody_is_asked_about_a_version_that_is_not_settled(
    button: str, view: RunView, monkeypatch: pytest.MonkeyPatch
) -> None:
    governed: list[object] = []
    monkeypatch.setattr(actions, "govern", lambda *asked: governed.append(asked) or "")

    async def look(user: User) -> None:
        user.find(button).click()
        await told(user, "select a version")
        await user.should_not_see("Yes")

    browse(view, "/versions", look)
    assert governed == []
