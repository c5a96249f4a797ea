"""`/versions`: how each version does, what the running canary has shown, and who decides."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any

from nicegui import ui
from starlette.requests import Request

from fieldtune.page import actions
from fieldtune.page.frame import REFRESH_S, STAGE_COLOURS, act_if_sure, column, every, frame, name_of, when
from fieldtune.page.view import RunView, VersionLine
from runtime.status import Status

COLUMNS = [
    column("version"),
    column("stage"),
    column("success"),
    column("steps"),
    column("episodes", align="right"),
    column("since"),
    column("who", "by"),
    column("why", style="white-space: normal; min-width: 14rem"),
]
STAGE_CELL = """
<q-td :props="props"><q-badge :color="props.row.colour" :label="props.row.stage" v-if="props.row.stage" /></q-td>
"""
TESTS = {
    "better": "succeeds more",
    "not_worse": "succeeds as often, but for the margin",
    "faster": "needs fewer steps",
    "worse": "succeeds less",
}


def register(view: RunView) -> None:
    """Add the page."""

    @ui.page("/versions")
    def page(request: Request) -> None:
        name = name_of(request)
        with frame(view, "Versions", name):
            canary = CanaryCard(view, name)
            with ui.card().classes("w-full"):
                with ui.row().classes("w-full items-center gap-2"):
                    ui.label("Versions").classes("text-lg font-medium")
                    ui.label("as the robots run, exploring, with 95 % intervals; select one for its figures").classes(
                        "text-sm opacity-70"
                    )
                    ui.space()
                    pinned = ui.label().classes("text-sm text-orange")
                    pin = ui.button("Pin").props("dense no-caps outline")
                    pin.visible = view.deployment.runtime.deploy.mode == "staged"
                    back = ui.button("Roll back").props("dense no-caps outline color=red")
                    promote = ui.button("Promote").props("dense no-caps outline color=green")
                table = ui.table(rows=[], columns=COLUMNS, row_key="id", selection="single", pagination=15)
                table.classes("w-full figures").props("flat dense")
                table.add_slot("body-cell-stage", STAGE_CELL)
                detail = ui.column().classes("w-full gap-1 text-sm font-mono")

        def selected() -> str:
            return str(table.selected[0]["id"]) if table.selected else ""

        # Which version it is about is settled before the question is asked: it may be another one by the answer.
        async def ask_promote() -> None:
            now = await asyncio.to_thread(view.status)
            version = selected() or (now.staging.get("candidate", "") if now else "")
            if not version:
                ui.notify("no canary runs, or the runtime does not answer; select a version")
                return
            question = f"Make {version[:12]} live now?"
            await act_if_sure(question, partial(actions.govern, view, "promote", version, name))

        async def ask_back() -> None:
            now = await asyncio.to_thread(view.status)
            version = selected() or (now.previous if now else "")
            if not version:
                ui.notify("no version was live before, or the runtime does not answer; select a version")
                return
            question = f"Go back to {version[:12]} now?"
            await act_if_sure(question, partial(actions.govern, view, "rollback", version, name))

        async def ask_pin() -> None:
            if pin.text == "Pin":
                question = "Keep the live version, whatever the rules say?"
                await act_if_sure(question, partial(actions.govern, view, "pin", "", name))
            else:
                await act_if_sure("Let the rules decide again?", partial(actions.govern, view, "unpin", "", name))

        promote.on_click(ask_promote)
        back.on_click(ask_back)
        pin.on_click(ask_pin)

        async def show_detail() -> None:
            version = selected()
            detail.clear()
            stages = await asyncio.to_thread(view.registry.stages, version) if version else []
            with detail:
                for change in stages:
                    ui.label(f"{when(change.unix_s)} {change.stage}: {change.why} ({change.who})")
                    for text in _figures(change.evidence):
                        ui.label(text).classes("pl-6 opacity-70")

        table.on_select(show_detail)

        async def refresh() -> None:
            lines = await asyncio.to_thread(view.versions)
            now = await asyncio.to_thread(view.status)
            rows = [_row(line) for line in lines]
            if rows != table.rows:
                table.rows = rows
            by = now.staging.get("pinned", "") if now else ""
            pinned.text = f"pinned by {by}" if by else ""
            pin.text = "Unpin" if by else "Pin"
            canary.show(now)

        every(REFRESH_S, refresh)


class CanaryCard:
    """The canary that runs, and what its sequential test has so far (docs/canary.md)."""

    def __init__(self, view: RunView, name: str) -> None:
        async def ask_reject() -> None:
            reject = partial(actions.govern, view, "reject", self._candidate, name)
            await act_if_sure(f"End the canary {self._candidate[:12]}? It will not go live.", reject)

        self._candidate = ""
        with ui.card().classes("w-full") as self._card:
            with ui.row().classes("w-full items-center"):
                ui.label("Canary").classes("text-lg font-medium")
                self._what = ui.label().classes("figures")
                ui.space()
                ui.button("Reject", on_click=ask_reject).props("dense no-caps outline color=red")
            self._figures = ui.label().classes("figures text-sm")
            self._bars: dict[str, tuple[ui.linear_progress, ui.label]] = {}
            with ui.element("div").classes("w-full grid grid-cols-1 sm:grid-cols-2 gap-x-6 gap-y-1"):
                for test, meaning in TESTS.items():
                    with ui.row().classes("w-full items-center gap-2 no-wrap"):
                        ui.label(meaning).classes("text-sm w-64")
                        colour = "red" if test == "worse" else "green"
                        bar = ui.linear_progress(0, show_value=False, color=colour, size="10px").classes("grow")
                        self._bars[test] = (bar, ui.label().classes("figures text-sm w-28"))
        self._card.visible = False

    def show(self, now: Status | None) -> None:
        """Bring it up to date."""
        evidence: dict[str, Any] = now.staging.get("evidence", {}) if now else {}
        self._card.visible = bool(evidence)
        if not evidence or now is None:
            return
        self._candidate = now.staging["candidate"]
        self._what.text = f"{now.staging['candidate'][:12]} beside {now.version[:12]}"
        sides = [
            f"{name} {share:.2f} of {evidence[f'{side}_episodes']}"
            for side, name in (("candidate", "candidate"), ("live", "live"))
            if (share := evidence[f"{side}_success"]) is not None
        ]
        low, high = evidence["success_difference"]
        steps_low, steps_high = evidence["steps_difference"]
        self._figures.text = (
            f"success: {', '.join(sides)}; difference [{low:+.2f}, {high:+.2f}]; "
            f"steps [{steps_low:+.0f}, {steps_high:+.0f}]"
        )
        for test, (bar, text) in self._bars.items():
            needed = evidence["needed_to_roll_back" if test == "worse" else "needed_to_promote"]
            # Evidence multiplies from episode to episode, so its logarithm is what fills up.
            bar.value = min(1.0, max(0.0, math.log(max(evidence[test], 1.0)) / math.log(needed)))
            text.text = f"{evidence[test]:.3g} of {needed:g}"


def _figures(evidence: dict[str, Any]) -> list[str]:
    """One line for each figure, sections of figures in one line each."""
    return [f"{key}: {_figure(value)}" for key, value in evidence.items() if not key.startswith("since_")]


def _figure(value: Any) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case list():
            return f"[{', '.join(map(_figure, value))}]"
        case dict():
            return ", ".join(f"{key} {_figure(inner)}" for key, inner in value.items() if inner != [])
        case _:
            return str(value)


def _row(line: VersionLine) -> dict[str, Any]:
    low, high = line.success_interval
    return {
        "id": line.version,
        "version": line.version[:12],
        "stage": line.stage,
        "colour": STAGE_COLOURS.get(line.stage, "grey"),
        "success": f"{line.success:.2f} [{low:.2f}, {high:.2f}]" if line.success is not None else "",
        "steps": _steps(line),
        "episodes": line.episodes,
        "since": when(line.since_unix_s),
        "who": line.who,
        "why": line.why,
    }


def _steps(line: VersionLine) -> str:
    if line.steps is None:
        return ""
    interval = line.steps_interval
    return f"{line.steps:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
