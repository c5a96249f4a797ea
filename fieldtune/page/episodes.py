"""`/episodes`: the log, with what people say of it."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from starlette.requests import Request

from fieldtune.page.frame import REFRESH_S, column, every, frame, name_of, when
from fieldtune.page.view import RunView
from runtime.index import EpisodeRow

LAST = 500
STATUSES = ["all", "unjudged", "success", "failure", "timeout", "aborted"]
STATUS_COLOURS = {"success": "green", "failure": "red", "timeout": "orange", "unjudged": "blue", "aborted": "grey"}
COLUMNS = [
    column("when", "ended"),
    column("task"),
    column("status"),
    column("steps", align="right"),
    column("version"),
    column("robot"),
    column("by", "labelled by"),
    column("reason", ""),
]
STATUS_CELL = '<q-td :props="props"><q-badge :color="props.row.colour" :label="props.row.status" /></q-td>'


def register(view: RunView) -> None:
    """Add the page."""

    @ui.page("/episodes")
    def page(request: Request, status: str = "all") -> None:
        with frame(view, "Episodes", name_of(request)):
            with ui.row().classes("w-full items-center gap-2"):
                wanted = ui.select(STATUSES, label="status", value=status if status in STATUSES else "all")
                wanted.classes("w-32").props("dense")
                task = ui.input("task").props("clearable dense")
                version = ui.input("version").props("clearable dense")
                ui.space()
                count = ui.label().classes("figures text-sm opacity-80")
            table = ui.table(rows=[], columns=COLUMNS, row_key="id", pagination=25)
            table.classes("w-full figures cursor-pointer").props("flat dense")
            table.add_slot("body-cell-status", STATUS_CELL)
            table.on("row-click", lambda event: ui.navigate.to(episode_url(event.args[1]["id"], **chosen())))
            ui.label("Open one to see it and to say how it went.").classes("text-sm opacity-70")

        def chosen() -> dict[str, Any]:
            status = wanted.value if wanted.value != "all" else None
            return {"status": status, "task": task.value or None, "version": version.value or None}

        def find() -> list[EpisodeRow]:
            return view.index.list(limit=LAST, **chosen())

        async def refresh() -> None:
            found = await asyncio.to_thread(find)
            rows = [_row(row) for row in found]
            if rows != table.rows:
                table.rows = rows
            count.text = f"the last {len(found)} of them" if len(found) == LAST else f"{len(found)} episodes"

        every(2 * REFRESH_S, refresh)
        for control in (wanted, task, version):
            control.on_value_change(refresh)


def episode_url(episode: str, **chosen: str | None) -> str:
    """Address of one episode's page, whose neighbours are those that were `chosen`."""
    query = urlencode({key: value for key, value in chosen.items() if value})
    return f"/episodes/{episode}?{query}" if query else f"/episodes/{episode}"


def _row(row: EpisodeRow) -> dict[str, Any]:
    return {
        "id": row.episode,
        "when": when(row.ended_unix_s),
        "task": row.task,
        "status": row.status,
        "colour": STATUS_COLOURS[row.status],
        "steps": row.steps,
        "version": row.versions[-1][:12] if row.versions else "",
        "robot": row.client,
        "by": row.labelled_by,
        "reason": row.reason + (" (file deleted)" if row.deleted else ""),
    }
