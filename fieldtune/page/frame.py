"""What all pages share: the header with its stop button, the way to the others, and how an action is carried out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from nicegui import events, ui
from starlette.requests import Request

from bridge.errors import FieldtuneError
from fieldtune.commands.common import account
from fieldtune.page import actions
from fieldtune.page.access import who
from fieldtune.page.view import RunView

PAGES = {"/": "Robots", "/versions": "Versions", "/learning": "Learning", "/episodes": "Episodes"}
REFRESH_S = 1.0
FEW_POINTS = 20  # are drawn as dots too: one alone makes no line
# All others: red.
COLOURS = {"driving": "green", "idle": "grey", "resetting": "orange", "paused": "orange", "holding": "orange"}
STAGE_COLOURS = {"live": "green", "canary": "blue", "candidate": "blue", "rejected": "red", "retired": "grey"}
# Of their own, so that a stop never waits behind what is only looked at, nor behind decisions and labels that hang.
ACTIONS = ThreadPoolExecutor(4, thread_name_prefix="action")
STOPS = ThreadPoolExecutor(4, thread_name_prefix="stop")
# A button that keeps the focus would be pressed again by the space bar.
NO_FOCUS = """<script>
addEventListener("click", (event) => {
  if (event.target.closest("button")) document.activeElement?.blur();
});
</script>"""
LOGOUT = '<form method="post" action="/logout"><button class="text-sm opacity-80 underline">log out</button></form>'
STYLE = """
.q-card { box-shadow: none; border: 1px solid rgba(128, 128, 128, .3); border-radius: 8px }
.camera img { image-rendering: pixelated }
.figures { font-variant-numeric: tabular-nums }
"""


def name_of(request: Request) -> str:
    """Whose name goes with what is done here: the one given at login, else whoever runs the page."""
    return who(request.scope) or account()


@contextmanager
def frame(view: RunView, title: str, name: str) -> Iterator[None]:
    """A page: header and, inside the context, its content. `name` is who looks."""
    ui.page_title(f"{title} - {view.deployment.name}")
    ui.add_css(STYLE)
    ui.add_body_html(NO_FOCUS)
    with ui.header().classes("items-center gap-2 py-2 bg-slate-800") as header:
        ui.label(view.deployment.name).classes("text-lg font-medium")
        version = ui.label().classes("font-mono text-sm opacity-80 max-sm:hidden")
        ui.space()
        reset = ui.button("Reset", on_click=lambda: act(lambda: actions.order(view, "reset"))).props("flat color=white")
        reset.tooltip("lift the stop; paused robots stay paused")
        press = partial(act, lambda: actions.stop(view, name), STOPS)
        stop = ui.button("Stop all", on_click=press, color="red", icon="stop")
        stop.tooltip("stop all robots at once; they stay stopped until Reset")
        if view.deployment.page.password:
            ui.html(LOGOUT, sanitize=False)
        with ui.row().classes("w-full gap-1"):
            for path, text in PAGES.items():
                ui.link(text, path).classes(
                    "px-3 py-1 rounded text-white no-underline " + ("bg-white/20" if text == title else "")
                )
            waiting = ui.link("", "/episodes?status=unjudged").classes("py-1 text-orange-300 no-underline")
            ui.space()
            state = ui.label().classes("text-sm self-center")
    with ui.column().classes("w-full max-w-6xl mx-auto p-2 sm:p-4 gap-4"):
        yield

    async def refresh() -> None:
        now = await asyncio.to_thread(view.status)
        version.text = now.version[:12] if now else ""
        # A robot can also be stopped by itself: by its dead-man, say, while the runtime was away.
        stopped = now is not None and any(state.startswith(("stopped", "stopping")) for state in now.robots.values())
        reset.visible = stopped or bool(now and now.stopped)
        if now is None:
            state.text = "the runtime does not answer"
        elif now.stopped:
            state.text = f"STOPPED: {now.stopped}"
        else:
            state.text = f"{len(now.robots)} robots, {now.episodes_per_min:.0f} episodes / min"
        unjudged = await asyncio.to_thread(view.waiting)
        waiting.text = f"{unjudged} to judge" if unjudged else ""

    with header:
        every(REFRESH_S, refresh)


def every(period_s: float, refresh: Callable[[], Awaitable[None]]) -> None:
    """Bring a page up to date again and again; what keeps it from that is said, so that it does not look alive."""
    trouble = ui.label().classes("text-red-400 font-medium px-4")

    async def refresh_or_say() -> None:
        try:
            await refresh()
        except Exception as error:
            trouble.text = f"not up to date: {error}"
            logging.exception("the page is not up to date")
        else:
            trouble.text = ""

    ui.timer(period_s, refresh_or_say)


def pressed(event: events.KeyEventArguments) -> str:
    """The name of a key as it goes down by itself, without Ctrl, Alt and the like; else empty."""
    modifiers = event.modifiers
    if not event.action.keydown or modifiers.alt or modifiers.ctrl or modifiers.meta or modifiers.shift:
        return ""
    return event.key.name if not event.action.repeat or event.key.is_cursorkey else ""


async def act(what: Callable[[], str], threads: ThreadPoolExecutor = ACTIONS) -> None:
    """Carry out an action away from the page's own thread, and say how it went."""
    client = ui.context.client  # the card that asked may be gone by the answer, its page is not
    try:
        told, failed = await asyncio.get_running_loop().run_in_executor(threads, what), False
    except Exception as error:
        # Whatever it was: nobody may take silence for a stop.
        told, failed = f"not done, or not confirmed: {error or type(error).__name__}", True
        if not isinstance(error, FieldtuneError | OSError):
            logging.exception("an action on the page failed")
    with client:
        # What failed stays until somebody has read it.
        timeout, kind = (0, "negative") if failed else (5000, "positive")
        ui.notify(told, type=kind, timeout=timeout, multi_line=True, close_button=True)  # type: ignore[arg-type]


async def act_if_sure(question: str, what: Callable[[], str]) -> None:
    """The same once somebody has confirmed it."""
    with ui.dialog() as dialog, ui.card():
        ui.label(question)
        with ui.row().classes("w-full justify-end"):
            ui.button("No", on_click=lambda: dialog.submit(False)).props("flat")
            ui.button("Yes", on_click=lambda: dialog.submit(True))
    if await dialog:
        await act(what)
    dialog.delete()


def when(unix_s: float) -> str:
    """Time of day, with the date if it was not today."""
    moment = time.localtime(unix_s)
    today = moment[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", moment)


def column(name: str, label: str | None = None, align: str = "left", **more: str) -> dict[str, str]:
    """One column of a table, for the values of that name in its rows."""
    return {"name": name, "field": name, "label": name if label is None else label, "align": align, **more}


def line_chart(title: str, *, y_max: float | None = None) -> ui.echart:
    """A chart whose lines `set_lines` sets."""
    return ui.echart(
        {
            "title": {"text": title, "left": 8, "textStyle": {"fontSize": 13, "fontWeight": "normal"}},
            "animation": False,
            "grid": {"left": 48, "right": 16, "top": 58, "bottom": 24},
            "tooltip": {"trigger": "axis", "confine": True},
            "legend": {"top": 26, "left": 4, "type": "scroll", "itemWidth": 14, "textStyle": {"fontSize": 11}},
            "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "splitLine": {"show": False}},
            "yAxis": {"type": "value", "scale": True, "max": y_max},
            "series": [],
        }
    ).classes("w-full h-56")


def set_lines(chart: ui.echart, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Name -> points (x, y)."""
    chart.options["series"] = [
        {
            "name": name,
            "type": "line",
            "showSymbol": len(points) < FEW_POINTS,
            "lineStyle": {"width": 1.5},
            "data": points,
        }
        for name, points in lines.items()
    ]
    chart.update()
