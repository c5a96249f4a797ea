"""`/learning`: what the trainer does, success, steps, w(t) and what moves it, losses and buffer; and the runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nicegui import ui
from starlette.requests import Request

from fieldtune.page.frame import every, frame, line_chart, name_of, set_lines, when
from fieldtune.page.view import RunView

CURVES_S = 5.0
Line = dict[str, Any]


def _key(name: str) -> Callable[[Line], Any]:
    return lambda line: line.get(name)


def _of_task(name: str, task: str) -> Callable[[Line], Any]:
    return lambda line: line.get(name, {}).get(task)


def _input(name: str) -> Callable[[Line], Any]:
    return lambda line: line.get("weight_inputs", {}).get(name)


# Title -> largest y (None: as it comes) and, by name, where a line of metrics has it.
CHARTS: dict[str, tuple[float | None, dict[str, Callable[[Line], Any]]]] = {
    "success, exploring": (1.0, {"success": _key("success")}),
    "steps to success, exploring": (
        None,
        {"policy": _key("steps_to_success"), "buffered demonstrations": _key("buffer_steps")},
    ),
    "w(t), the weight of PPO against cloning": (
        1.0,
        {"w": _key("weight"), "ramp": _input("ramp"), "critic": _input("critic"), "brake": _input("brake")},
    ),
    "policy": (None, {"KL": _key("kl"), "clip fraction": _key("clip_fraction")}),
    "losses": (
        None,
        {"policy": _key("policy_loss"), "cloning": _key("cloning_loss"), "value": _key("value_loss")},
    ),
    "critic": (1.0, {"explained variance": _key("explained_variance")}),
    "buffer": (None, {"episodes": _key("buffer_episodes")}),
    "time an iteration, s": (None, {"learning": _key("learn_s"), "waiting for episodes": _key("collect_wait_s")}),
}
BY_TASK = {"success by task": ("success_by_task", 1.0), "steps by task": ("steps_by_task", None)}


def register(view: RunView) -> None:
    """Add the page."""

    @ui.page("/learning")
    def page(request: Request) -> None:
        with frame(view, "Learning", name_of(request)):
            told = ui.label().classes("figures")
            served = ui.label().classes("figures text-sm opacity-80")
            with ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-2 gap-4"):
                charts = {title: line_chart(title, y_max=y_max) for title, (y_max, _) in CHARTS.items()}
                by_task = {title: line_chart(title, y_max=y_max) for title, (_, y_max) in BY_TASK.items()}
            ui.label(
                "Against environment steps, of the exploring policy. An evaluation is in the run's report."
            ).classes("text-sm opacity-70")

        shown: list[list[Line] | None] = [None]

        async def refresh() -> None:
            curves = await asyncio.to_thread(view.curves)
            now = await asyncio.to_thread(view.status)
            told.text = _told(curves)
            served.text = ""
            if now and now.latency_ms:
                ms = now.latency_ms
                served.text = (
                    f"runtime: p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms, max {ms['max']:.1f} ms; "
                    f"starved steps {now.interventions.get('starved', 0)}; "
                    f"inference computes {now.inference_share:.0%} of the time; {now.swaps} swaps"
                )
            if curves is shown[0]:
                return
            shown[0] = curves
            for title, (_, lines) in CHARTS.items():
                set_lines(charts[title], {name: _points(curves, value) for name, value in lines.items()})
            for title, (key, _) in BY_TASK.items():
                tasks = sorted(curves[-1].get(key, {})) if curves else []
                set_lines(by_task[title], {task: _points(curves, _of_task(key, task)) for task in tasks})

        every(CURVES_S, refresh)


def _points(curves: list[Line], value: Callable[[Line], Any]) -> list[tuple[float, float]]:
    found = [(float(line["env_steps"]), value(line)) for line in curves]
    return [(x, round(float(y), 5)) for x, y in found if y is not None]


def _told(curves: list[Line]) -> str:
    if not curves:
        return "The trainer has not learned anything yet."
    last = curves[-1]
    return (
        f"iteration {last['iteration']} at {when(last['unix_s'])}, {last['env_steps']:,} steps, "
        f"{last['minutes']:.0f} minutes   ·   "
        f"w(t) {last['weight']:.2f}   ·   KL {last['kl']:.3f}   ·   "
        f"buffer {last['buffer_episodes']} episodes of {last['buffer_steps']:.1f} steps"
    )
