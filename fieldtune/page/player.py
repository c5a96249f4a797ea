"""`/episodes/ID`: one episode, frame by frame, and the keys that say how it went."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any
from urllib.parse import urlencode

import numpy as np
from nicegui import events, ui
from starlette.requests import Request

from bridge.messages import Label
from fieldtune.page import actions
from fieldtune.page.episodes import STATUS_COLOURS, episode_url
from fieldtune.page.frame import REFRESH_S, act, every, frame, line_chart, name_of, pressed, set_lines, when
from fieldtune.page.logged import Logged
from fieldtune.page.view import RunView
from runtime.episode_file import EpisodeError
from runtime.index import EpisodeRow

KEYS: dict[str, Label] = {"s": "success", "f": "failure", "d": "discard"}
SPACE_PLAYS = """<script>
addEventListener("keydown", (event) => {
  if (event.key === " " && event.target === document.body) event.preventDefault();  // it would scroll
});
</script>"""
FASTEST_FRAME_S = 0.1
SHOWN_ELEMENTS = 8  # of an action, as lines


def register(view: RunView) -> None:
    """Add the page."""

    @ui.page("/episodes/{episode}")
    async def page(request: Request, episode: str, status: str = "", task: str = "", version: str = "") -> None:
        name = name_of(request)
        row = await asyncio.to_thread(view.index.get, episode)
        with frame(view, "Episodes", name):
            if row is None:
                ui.label(f"There is no episode {episode} in {view.run.episodes}.")
                return
            players: list[Player] = []
            chosen = {"status": status or None, "task": task or None, "version": version or None}
            _show(view, name, row, players, chosen)
            place = ui.column().classes("w-full gap-4")
        # The page is there before the file has been read, which may take long.
        await ui.context.client.connected()
        with place:
            try:
                logged = await asyncio.to_thread(view.logged, episode)
            except (LookupError, EpisodeError) as error:
                ui.label(str(error)).classes("text-red")
                return
            if logged.decisions:
                players.append(Player(row, logged))


def _show(view: RunView, name: str, row: EpisodeRow, players: list[Player], chosen: dict[str, Any]) -> None:
    """`chosen` says which episodes come before and after: those of the list that one came from."""
    with ui.row().classes("w-full items-center gap-2"):
        ui.label(row.task).classes("text-lg font-medium")
        status = ui.badge()
        said = ui.label().classes("text-sm opacity-80")
        ui.space()
        ui.button("Newer (n)", on_click=lambda: go(-1)).props("flat dense no-caps")
        ui.button("Older (o)", on_click=lambda: go(1)).props("flat dense no-caps")
    ui.label(
        f"{row.episode}, {when(row.ended_unix_s)}, {row.client}, {row.steps} steps, {row.decisions} decisions, "
        f"version {', '.join(version[:12] for version in row.versions)}, seed {row.seed}"
    ).classes("text-sm figures opacity-80")
    with ui.row().classes("gap-2"):
        for shortcut, value in KEYS.items():
            colour = {"success": "green", "failure": "red", "discard": "grey"}[value]
            ui.button(f"{value} ({shortcut})", color=colour, on_click=lambda v=value: give(v)).props(
                "dense no-caps outline"
            ).classes("px-2")

    async def refresh() -> None:
        now = await asyncio.to_thread(view.index.get, row.episode)
        if now:
            status.text = now.status
            status.props(f"color={STATUS_COLOURS[now.status]}")
            said.text = f"labelled by {now.labelled_by}" if now.labelled_by else now.reason

    leaving = False  # the browser takes a while: a key that comes then is meant for the next episode

    async def give(value: Label) -> None:
        if leaving:
            ui.notify("the next episode is not here yet; nothing was said of it", type="warning")
            return
        await act(partial(actions.label, view, row.episode, value, name))
        await refresh()

    async def go(older: int) -> None:
        nonlocal leaving
        leaving = True
        near = await asyncio.to_thread(partial(view.index.next_to, row.seq, older, **chosen))
        if near:
            ui.navigate.to(episode_url(near, **chosen))
        else:
            leaving = False
            which = ", ".join(value for value in chosen.values() if value)
            ui.notify(f"{'no older' if older > 0 else 'no newer'} one{f' of {which}' if which else ''}")

    async def key(event: events.KeyEventArguments) -> None:
        typed = pressed(event)
        if typed in KEYS:
            await give(KEYS[typed])
        elif typed in ("n", "o"):
            await go(-1 if typed == "n" else 1)
        for player in players:
            if typed == " ":
                player.toggle()
            elif typed in ("ArrowLeft", "ArrowRight"):
                player.move(-1 if typed == "ArrowLeft" else 1)

    ui.add_body_html(SPACE_PLAYS)
    ui.keyboard(key, ignore=["input", "select", "textarea"])
    every(2 * REFRESH_S, refresh)


class Player:
    """What each decision saw, and what was sent."""

    def __init__(self, row: EpisodeRow, logged: Logged) -> None:
        self._episode, self._decisions = row.episode, logged.decisions
        self._at = 0
        with ui.row().classes("w-full gap-2"):
            self._cameras = {
                camera.name: ui.interactive_image().classes("camera w-40 sm:w-72").tooltip(camera.name)
                for camera in logged.start.spec.cameras
            }
        with ui.row().classes("w-full items-center gap-2"):
            self._play = ui.button(icon="play_arrow", on_click=self.toggle).props("flat round").tooltip("space")
            last = len(self._decisions) - 1
            self._slider = ui.slider(min=0, max=max(last, 1), value=0, on_change=lambda event: self._show(event.value))
            self._slider.classes("grow min-w-40 w-1")
            self._what = ui.label().classes("figures text-sm w-64")
        ui.label(logged.start.instruction).classes("text-sm opacity-80")
        _actions_chart(logged)
        hz = logged.start.spec.control_hz
        steps = np.diff([decision.step for decision in self._decisions] or [0, 1])
        period_s = float(steps.mean()) / hz if len(steps) else FASTEST_FRAME_S
        self._timer = ui.timer(max(FASTEST_FRAME_S, period_s), self._next, active=False)
        self._show(0)

    def toggle(self) -> None:
        """Play or pause; from the beginning where it has ended."""
        self._timer.active = not self._timer.active
        if self._timer.active and self._at == len(self._decisions) - 1:
            self._slider.value = 0
        self._play.props(f"icon={'pause' if self._timer.active else 'play_arrow'}")

    def move(self, by: int) -> None:
        """Some frames on, or back."""
        self._slider.value = min(max(self._at + by, 0), len(self._decisions) - 1)

    def _next(self) -> None:
        if self._at >= len(self._decisions) - 1:
            self.toggle()
        else:
            self.move(1)

    def _show(self, at: int) -> None:
        self._at = min(int(at), len(self._decisions) - 1)
        decision = self._decisions[self._at]
        self._what.text = f"step {decision.step}, decision {decision.number}, {decision.version[:12]}"
        for camera, image in self._cameras.items():
            image.set_source("/frame.jpg?" + urlencode({"episode": self._episode, "at": self._at, "camera": camera}))


def _actions_chart(logged: Logged) -> None:
    """What was really sent, by step, and how many steps the safety stage changed."""
    chart = line_chart("actions sent, by step")
    names = logged.start.spec.action.names[:SHOWN_ELEMENTS]
    set_lines(chart, {name: [(step, action[i]) for step, action in logged.sent] for i, name in enumerate(names)})
    changed = "; ".join(f"{rule} {len(steps)} steps, first at {steps[0]}" for rule, steps in logged.changed.items())
    if changed:
        ui.label(f"safety stage: {changed}").classes("text-sm")
