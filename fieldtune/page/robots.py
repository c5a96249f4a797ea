"""`/`: every robot with its cameras, what it does, and the operator's word to it."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import urlencode

from nicegui import events, ui
from starlette.requests import Request

from bridge.messages import Command
from fieldtune.commands.status import recent_results
from fieldtune.page import actions
from fieldtune.page.frame import COLOURS, REFRESH_S, act, every, frame, name_of, pressed
from fieldtune.page.running import Running
from fieldtune.page.view import RunView
from runtime.status import Status

CAMERAS_S = 0.5
# As in the terminal of `fieldtune drive`, where r lifts a stop: here only the button does that.
KEYS: dict[Command, str] = {"success": "s", "failure": "f", "end": "e", "pause": "p", "resume": "p"}
BUTTONS: dict[Command, str] = {
    "success": "green",
    "failure": "red",
    "end": "grey",
    "pause": "orange",
    "resume": "primary",
}


def register(view: RunView) -> None:
    """Add the page."""

    @ui.page("/")
    def page(request: Request) -> None:
        with frame(view, "Robots", name_of(request)):
            summary = ui.label().classes("figures")
            alarms = ui.label().classes("text-red font-medium")
            empty = ui.label("No robot is connected.").classes("opacity-70")
            grid = ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-2 gap-4")
        cards: dict[str, RobotCard] = {}

        async def refresh() -> None:
            now = await asyncio.to_thread(view.status)
            robots = now.robots if now else {}
            summary.text = _summary(now) if now else "The runtime does not answer; demonstrations, fine-tuning and the "
            if now is None:
                summary.text += "evaluation of a simulator run without it."
            alarms.text = _alarms(now) if now else ""
            empty.visible = not robots and now is not None
            # While the runtime is silent the robots may well be there.
            for gone in [client for client in cards if now and client not in robots]:
                cards.pop(gone).delete()
            for client, state in sorted(robots.items()):
                if client not in cards:
                    with grid:
                        cards[client] = RobotCard(view, client)
                cards[client].show(state)

        async def look() -> None:
            running = await asyncio.to_thread(view.running.look)
            for client, card in cards.items():
                card.look(running.get(client))

        async def key(event: events.KeyEventArguments) -> None:
            meant = [command for command, own in KEYS.items() if own == pressed(event)]
            if meant and len(cards) == 1:
                (card,) = cards.values()
                await card.order(meant[-1] if card.paused else meant[0])
            elif meant:
                ui.notify("the keys are for one robot; here are several, or none")

        every(REFRESH_S, refresh)
        every(CAMERAS_S, look)
        ui.keyboard(key, ignore=["input", "select", "textarea"])


class RobotCard:
    """One robot."""

    def __init__(self, view: RunView, client: str) -> None:
        self._view, self._client = view, client
        self._cameras: dict[str, ui.interactive_image] = {}
        self._shown = ("", 0)
        with ui.card().classes("w-full") as self._card:
            with ui.row().classes("w-full items-center"):
                ui.label(client).classes("text-lg font-medium")
                self._state = ui.badge()
                self._why = ui.label().classes("text-sm opacity-70")
            self._images = ui.row().classes("w-full gap-2")
            with ui.label().classes("figures text-sm") as self._episode:
                self._instruction = ui.tooltip()
            with ui.row().classes("gap-2"):
                for command, key in KEYS.items():
                    order = partial(self.order, command)
                    button = ui.button(f"{command} ({key})", color=BUTTONS[command], on_click=order)
                    button.props("dense no-caps outline").classes("px-2")

    @property
    def paused(self) -> bool:
        """Whether it said so last."""
        return bool(self._state.text == "paused")

    async def order(self, command: Command) -> None:
        """Give an order; a verdict is for the episode that is shown."""
        verdict = command in ("success", "failure", "end")
        if verdict and not self._shown[0]:
            ui.notify("no episode of this robot has been seen here yet, so nobody knows which one is meant")
            return
        episode = self._shown[0] if verdict else ""
        await act(partial(actions.order, self._view, command, self._client, episode))

    def delete(self) -> None:
        """The robot has left."""
        self._card.delete()

    def show(self, state: str) -> None:
        """What it says of itself."""
        name, _, why = state.partition(": ")
        self._state.text, self._why.text = name, why
        self._state.props(f"color={COLOURS.get(name, 'red')}")

    def look(self, running: Running | None) -> None:
        """What it sees and does now; the last picture stays between two episodes."""
        if running is None:
            return
        start, shown = running.start, (running.start.episode, running.decision)
        over = "ended: " if running.ended else ""
        self._episode.text = f"{over}{start.task}, step {running.step}, version {running.version[:12]}"
        self._instruction.text = start.instruction
        if shown == self._shown:
            return
        self._shown = shown
        for camera in running.images:
            if camera not in self._cameras:
                with self._images:
                    image = ui.interactive_image().classes("camera w-40 sm:w-56")
                    image.tooltip(camera)
                    self._cameras[camera] = image
            query = urlencode({"client": self._client, "camera": camera, "of": f"{shown[0]}-{shown[1]}"})
            self._cameras[camera].set_source(f"/camera.jpg?{query}")


def _summary(now: Status) -> str:
    results = recent_results(now)
    parts = [f"{now.episodes_per_min:.0f} episodes / min"]
    if results.success is not None:
        parts.append(f"success {results.success:.2f} of the last {results.episodes} episodes")
    if results.steps is not None:
        parts.append(f"{results.steps:.1f} steps to success")
    if now.latency_ms:
        parts.append(f"latency p50 {now.latency_ms['p50']:.1f} ms, p99 {now.latency_ms['p99']:.1f} ms")
    if now.interventions:
        parts.append("safety stage: " + ", ".join(f"{rule} {steps}" for rule, steps in now.interventions.items()))
    return "   ·   ".join(parts)


def _alarms(now: Status) -> str:
    parts = [f"log: {now.log['error']}"] if now.log.get("error") else []
    parts += [f"{now.log['lost']} episodes lost"] if now.log.get("lost") else []
    for drift in now.staging.get("drifts", []):
        parts.append(f"drift: {drift['statistic']} {drift['direction']}")
    return "   ·   ".join(parts)
