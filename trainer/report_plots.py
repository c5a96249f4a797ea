"""The plots of a report: each once as SVG for the page, where text takes the page's colours, and once as a PNG file."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from msgspec import Struct

# Readable on white and on near-black alike.
BEFORE, AFTER, SERIES = "#d9822b", "#2a9d6f", ("#3d7fd9", "#c2528b", "#8a6fd1")
# Drawn in this colour, text and axes become `currentColor` in the SVG, so that dark mode needs no second plot.
INK = "#010203"
MAX_MARKS = 60
WIDTH_IN, HEIGHT_IN, DPI = 4.6, 2.75, 200


class Line(Struct, frozen=True, kw_only=True):
    """One curve; an empty label needs no legend."""

    label: str
    x: list[float]
    y: list[float]


class Point(Struct, frozen=True, kw_only=True):
    """One evaluation with its interval."""

    label: str
    x: float
    y: float
    low: float | None
    high: float | None


class Plot(Struct, frozen=True, kw_only=True):
    """One plot against environment steps; all its figures are in report.json."""

    name: str
    title: str
    caption: str
    unit: str
    lines: list[Line]
    points: list[Point] = []
    marks: list[float] = []
    """Environment steps at which a new version took over."""
    y_low: float | None = None
    y_high: float | None = None
    log: bool = False


def draw(plot: Plot, directory: Path) -> str:
    """Write `directory/NAME.png` and return the plot as an SVG element."""
    with matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": plot.name,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
        }
    ):
        directory.mkdir(parents=True, exist_ok=True)
        png = _figure(plot, "#333a44")
        png.axes[0].set_title(plot.title, loc="left", fontsize=10, color="#333a44")  # on the page it is a heading
        FigureCanvasAgg(png)
        png.savefig(directory / f"{plot.name}.png", dpi=DPI, facecolor="white")
        vector = _figure(plot, INK)
        FigureCanvasSVG(vector)
        text = io.StringIO()
        vector.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), plot.name)


def _figure(plot: Plot, ink: str) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("environment steps", color=ink)
    axes.set_ylabel(plot.unit, color=ink)
    axes.tick_params(which="both", colors=ink, width=0.8, length=3)
    axes.grid(axis="y", color="#808890", alpha=0.22, linewidth=0.7)
    for spine in axes.spines.values():
        spine.set_color(ink)
    _marks(axes, plot.marks)
    for line, colour in zip(plot.lines, SERIES, strict=False):
        axes.plot(line.x, line.y, color=colour, linewidth=1.8, label=line.label or None, solid_capstyle="round")
    for point, colour in zip(plot.points, (BEFORE, AFTER), strict=False):
        axes.errorbar(
            [point.x],
            [point.y],
            yerr=None if point.low is None or point.high is None else _error(point, point.low, point.high),
            fmt="o",
            color=colour,
            markersize=6,
            capsize=3,
            linewidth=1.6,
            label=point.label,
            zorder=5,
        )
    if plot.log and all(y > 0 for line in plot.lines for y in line.y):
        axes.set_yscale("log")
    else:
        axes.set_ylim(plot.y_low, plot.y_high)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if any(line.label for line in plot.lines) or plot.points:
        axes.legend(frameon=False, fontsize=8, labelcolor=ink, loc="best", handlelength=1.4)
    return figure


def _marks(axes: Axes, marks: Sequence[float]) -> None:
    """Ticks along the lower edge, thinned where there are very many."""
    every = -(-len(marks) // MAX_MARKS) if marks else 1
    for x in marks[::every]:
        axes.axvline(x, ymax=0.04, color="#808890", linewidth=0.9)


def _error(point: Point, low: float, high: float) -> list[list[float]]:
    return [[max(0.0, point.y - low)], [max(0.0, high - point.y)]]


def _inline(svg: str, name: str) -> str:
    """The SVG element alone, as wide as its place, ids made unique on the page, ink as `currentColor`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r'\1class="plot"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = svg.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    return svg.replace(INK, "currentColor")
