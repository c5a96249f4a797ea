"""The page of a report: one HTML file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib.image
import numpy as np
import yaml

from trainer.report_data import Report
from trainer.statistics import Evaluation, Interval, Result, left_out

Frame = tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]


@dataclass(frozen=True, slots=True)
class Strip:
    """One goal as pictures: rows of a label and its frames (a label and uint8 `[H, W, 3]` each)."""

    task: str
    seed: int
    rows: list[tuple[str, list[Frame]]]


STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5b6675; --line: #dfe3e8; --page: #f6f7f9; --card: #ffffff;
  --before: #b8660f; --after: #1d7f58; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a3b3; --line: #2d3540; --page: #12161b;
  --card: #1a2027; --before: #f0a351; --after: #52c497; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 16px; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 0 0 10px; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: .9em; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin: 24px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.tile b span { white-space: nowrap; }
.tile b { display: block; font-size: 25px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .was { color: var(--before); } .tile .is { color: var(--after); }
.tile i { color: var(--soft); font-style: normal; }
.wide { overflow-x: auto; padding: 4px 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14.5px; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; }
thead tr:first-child th { border-bottom: 0; padding-bottom: 0; text-align: center; }
th:nth-child(2), td:nth-child(2), th:nth-child(5), td:nth-child(5), th[colspan] { border-left: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; } tr.overall td { font-weight: 650; }
td small { color: var(--soft); font-weight: 400; font-size: 12.5px; }
.before { color: var(--before) !important; } .after { color: var(--after) !important; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 14px; }
.plots.main { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); margin-bottom: 14px; }
figure { margin: 0; } svg.plot { width: 100%; height: auto; display: block; margin-top: 6px; }
.strip { display: grid; grid-auto-flow: column; gap: 6px; overflow-x: auto; padding: 6px 0 12px;
  grid-template-columns: repeat(var(--frames), minmax(84px, 150px)); justify-content: start; }
.strip div { font-size: 12px; color: var(--soft); text-align: center; }
.strip img { width: 100%; display: block; border-radius: 5px; image-rendering: pixelated; }
.strips { display: grid; gap: 14px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 18px; margin: 0; font-size: 14.5px; }
dt { color: var(--soft); } dd { margin: 0; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.45; margin: 10px 0 0; }
summary { cursor: pointer; }
@media (max-width: 560px) { main { padding: 24px 14px 48px; } h1 { font-size: 25px; } .tile b { font-size: 22px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
"""


def render(report: Report, drawn: dict[str, str], strips: list[Strip]) -> str:
    """The page. `drawn` holds the SVG element of each plot by name."""
    before, after = report.before, report.after
    main_plots = [p for p in report.plots if p.name in ("success", "steps_to_success")]
    other_plots = [p for p in report.plots if p not in main_plots]
    parts = [
        f"<h1>{escape(report.name)}: before and after fine-tuning on the job</h1>",
        f'<p class="soft">{_sentence(report)}</p>',
        _tiles(report),
        "<h2>Evaluation</h2>",
        _table(report),
        f'<p class="soft" style="margin-top:10px">{_protocol(before, after)}</p>',
        f"<p>{_paired(report)}</p>",
        "<h2>Training</h2>",
        _figures(main_plots, drawn, "plots main"),
        _figures(other_plots, drawn, "plots"),
        *(_strip_section(strips) if strips else []),
        "<h2>What ran</h2>",
        _facts(report),
        '<div class="card" style="margin-top:14px"><details><summary>Resolved configuration</summary><pre>'
        f"{escape(yaml.safe_dump(report.deployment, sort_keys=False))}</pre></details></div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: fieldtune report</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def percent(share: float) -> str:
    """A share as a percentage: `83.3 %`."""
    return f"{100 * share:.1f} %"


def _success(result: Result) -> str:
    return percent(result.success) if result.n else "-"


def steps(value: float | None) -> str:
    """A number of steps, or a dash where there is none."""
    return "-" if value is None else f"{value:.1f}"


def _sentence(report: Report) -> str:
    tasks = f"Task {report.tasks[0]}" if len(report.tasks) == 1 else f"{len(report.tasks)} tasks"
    took = f" in {report.minutes:.1f} minutes" if report.minutes is not None else ""
    written = time.strftime("%Y-%m-%d %H:%M", time.gmtime(report.written_unix_s))
    return escape(
        f"{tasks} · {report.env_steps:,} environment steps in {report.episodes:,} training episodes{took} · "
        f"{len(report.versions)} policy versions · written {written} UTC"
    )


def _tiles(report: Report) -> str:
    before, after = report.before.overall, report.after.overall
    tiles = [
        _tile("Success", _success(before), _success(after), f"n = {before.n} and {after.n}"),
        _tile(
            "Steps to success",
            steps(before.steps),
            steps(after.steps),
            _ratio(before.steps, after.steps, "mean over successes"),
        ),
        _tile(
            "Steps, failures counted at the horizon",
            steps(before.steps_all),
            steps(after.steps_all),
            _ratio(before.steps_all, after.steps_all, f"horizon {report.after.horizon_steps}"),
        ),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(title: str, was: str, now: str, note: str) -> str:
    return (
        f'<div class="card tile"><span class="soft">{escape(title)}</span><b><span class="was">{was}</span> <i>→</i> '
        f'<span class="is">{now}</span></b><span class="soft">{escape(note)}</span></div>'
    )


def _ratio(before: float | None, after: float | None, note: str) -> str:
    return f"ratio {after / before:.2f} · {note}" if before and after else note


def _table(report: Report) -> str:
    columns: list[tuple[str, str, dict[str, Result], Result]] = [
        ("before", "before", report.before.tasks, report.before.overall),
        ("after", "after", report.after.tasks, report.after.overall),
    ]
    head = "".join(f'<th colspan="3" class="{css}">{name}</th>' for name, css, _, _ in columns)
    sub = "<th>success</th><th>steps</th><th>with failures</th>" * len(columns)
    body = []
    if len(report.tasks) > 1:
        for task in report.tasks:
            cells = "".join(_cells(tasks.get(task)) for _, _, tasks, _ in columns)
            body.append(f"<tr><td>{escape(task)}</td>{cells}</tr>")
    name = "overall" if len(report.tasks) > 1 else report.tasks[0] if report.tasks else "overall"
    body.append(
        f'<tr class="overall"><td>{escape(name)}</td>{"".join(_cells(overall) for _, _, _, overall in columns)}</tr>'
    )
    return (
        f'<div class="card wide"><table><thead><tr><th></th>{head}</tr><tr><th>task</th>{sub}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cells(result: Result | None) -> str:
    if result is None or not result.n:
        return "<td>-</td>" * 3
    low, high = result.success_interval
    success = f"{percent(result.success)} <small>[{100 * low:.0f}, {100 * high:.0f}]</small>"
    return (
        f"<td>{success}</td><td>{steps(result.steps)}{_interval(result.steps_interval)}</td>"
        f"<td>{steps(result.steps_all)}{_interval(result.steps_all_interval)}</td>"
    )


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f" <small>[{interval[0]:.1f}, {interval[1]:.1f}]</small>"


def _protocol(before: Evaluation, after: Evaluation) -> str:
    noise = "mean action, no noise" if after.action == "mean" else "sampled actions"
    seeds = f"seeds {after.seeds[0]} to {after.seeds[-1]}" if after.seeds else "no seeds"
    missing = [(name, left_out(e)) for name, e in (("before", before), ("after", after))]
    notes = "".join(f" Left out {name}: episodes {words}." for name, words in missing if words)
    return escape(
        f"Goals that training never saw ({seeds}), {noise}, at most {after.horizon_steps} steps, the episode ends at "
        "success. Small figures: 95 % intervals, Wilson's for success, bootstrap over goals for steps. "
        f"“with failures” counts a failure as {after.horizon_steps} steps.{notes}"
    )


def _paired(report: Report) -> str:
    paired = report.comparison
    if paired is None:
        return escape(f"The two evaluations cannot be paired: {report.note}.")
    text = (
        f"Goal by goal ({paired.goals} goals tried by both): {paired.gained} newly succeed, {paired.lost} newly fail "
        f"(McNemar exact p = {paired.mcnemar_p:.3g})."
    )
    if paired.steps_difference is not None:
        interval = paired.steps_difference_interval
        within = f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else ""
        text += f" Where both succeed ({paired.both_succeed}), steps change by {paired.steps_difference:+.1f}{within}"
        text += f", a ratio of {paired.steps_ratio:.2f}." if paired.steps_ratio is not None else "."
    if report.expert is not None:
        text += (
            f" For scale: the scripted expert, on the seeds of the demonstrations, succeeds in "
            f"{percent(report.expert.success)} of {report.expert.n} and needs {steps(report.expert.steps)} steps."
        )
    return escape(text)


def _figures(plots: Iterable[Any], drawn: dict[str, str], css: str) -> str:
    figures = [
        f'<figure class="card"><h3>{escape(plot.title)}</h3>{drawn[plot.name]}'
        + (f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else "")
        + "</figure>"
        for plot in plots
    ]
    return f'<div class="{css}">{"".join(figures)}</div>' if figures else ""


def _strip_section(strips: list[Strip]) -> list[str]:
    cards = []
    for strip in strips:
        rows, columns = "", max(len(frames) for _, frames in strip.rows)
        for label, frames in strip.rows:
            pictures = "".join(_picture(*frame) for frame in frames)
            rows += (
                f'<div class="soft">{escape(label)}</div><div class="strip" style="--frames:{columns}">{pictures}</div>'
            )
        cards.append(f'<div class="card"><h3>{escape(strip.task)}, seed {strip.seed}</h3>{rows}</div>')
    return [
        "<h2>The same goal, before and after</h2>",
        '<p class="soft">What the policy saw. The goal is the one whose change in steps is the median of its task.</p>',
        f'<div class="strips">{"".join(cards)}</div>',
    ]


def _picture(label: str, image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    png = io.BytesIO()
    matplotlib.image.imsave(png, image, format="png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<div><img alt="{escape(label)}" src="data:image/png;base64,{data}">{escape(label)}</div>'


def _facts(report: Report) -> str:
    seeds = report.seeds
    training = (
        f"{seeds.training_first} to {seeds.training_first + seeds.training_count - 1}"
        if seeds.training_first is not None and seeds.training_count is not None
        else "not recorded"
    )
    backend = report.deployment.get("backend", {}).get("name", "not recorded")
    facts = [
        ("tasks", escape(", ".join(report.tasks))),
        ("backend", escape(str(backend))),
        *(
            (name, _version(e.version, report.versions))
            for name, e in (("before", report.before), ("after", report.after))
        ),
        ("seed of the run", str(seeds.run) if seeds.run is not None else "not recorded"),
        ("seeds of training goals", training),
        (
            "seeds of evaluation goals",
            f"{seeds.evaluation[0]} to {seeds.evaluation[-1]}" if seeds.evaluation else "none",
        ),
        ("libraries", escape(", ".join(f"{name} {version}" for name, version in report.libraries.items()))),
        ("computer", escape(", ".join(f"{name} {value}" for name, value in report.computer.items()))),
    ]
    return f'<dl class="card">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)}</dl>'


def _version(version: str, versions: dict[str, int]) -> str:
    number = f"version {versions[version]}, " if version in versions else ""
    return f"{number}<code>{escape(version)}</code>"
