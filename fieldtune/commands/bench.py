"""`fieldtune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table
from rich.text import Text

from fieldtune.bench.common import Result, machine
from fieldtune.commands.common import Json, Set, err, out, print_json
from fieldtune.deployment import load_deployment

What = Literal["serve", "rollout", "swap", "log", "control", "canary", "drift", "all"]


def bench(
    what: Annotated[
        tyro.conf.Positional[What], tyro.conf.arg(metavar="serve|rollout|swap|log|control|canary|drift|all")
    ],
    config: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="[CONFIG]", help="deployment that rollout and swap (quickstart) and control (realtime) use"
        ),
    ] = "",
    /,
    *,
    overrides: Set = (),
    directory: Path = Path(),
    quick: bool = False,
    as_json: Json = False,
) -> int:
    """Measure this computer against fieldtune's goals: each figure and what it is compared with in one run.

    serve: the server against a bare ZeroMQ echo. rollout: the loop against direct calls, and where its time goes.
    swap: waits while weights change. log: the record of a decision. control: a robot whose policy is slow, in real
    time; it takes some twenty minutes and is not part of all. canary: how often the test that promotes and rolls back
    is wrong; drift: how often the alarm is that success fell; both are simulated for minutes, and not part of all.
    Nothing else should run meanwhile, but canary and drift take no times.
    A goal that is missed is shown, and is no failure of the command.

    Examples:
      fieldtune bench all
      fieldtune bench serve --json
      fieldtune bench rollout my_sim.yaml

    Args:
        directory: where logs are written while it measures; on the disk that runs use
        quick: only a few requests each, to see that it works; the figures mean nothing
    """
    computer = machine()
    results: list[Result] = []
    for name in ("serve", "rollout", "swap", "log") if what == "all" else (what,):
        with err.status(f"measuring {name}"):
            results.extend(measure(name, config, overrides, directory, quick))
    if as_json:
        print_json({"machine": computer, "quick": quick, "results": [result.plain() for result in results]})
        return 0
    packages = ", ".join(f"{name} {version}" for name, version in computer["packages"].items())
    out.print(f"{computer['cpu']}, {computer['cores']} cores, {computer['memory_gb']} GB, {computer['system']}")
    out.print(f"Python {computer['python']}, {packages}, commit {computer['commit'] or '-'}")
    for result in results:
        show(result)
    return 0


def measure(name: str, config: str, overrides: tuple[str, ...], directory: Path, quick: bool) -> tuple[Result, ...]:
    """Run one benchmark; only what it needs is imported."""
    if name == "serve":
        from fieldtune.bench.serve import bench_serve

        return (bench_serve(directory, quick=quick),)
    if name == "log":
        from fieldtune.bench.log import bench_log

        return (bench_log(directory, quick=quick),)
    if name == "control":
        from fieldtune.bench.control import bench_control

        return (bench_control(load_deployment(config or "realtime", overrides), directory, quick=quick),)
    if name == "canary":
        from fieldtune.bench.canary import bench_canary

        return bench_canary(quick=quick)
    if name == "drift":
        from fieldtune.bench.drift import bench_drift

        return bench_drift(quick=quick)
    deployment = load_deployment(config or "quickstart", overrides)
    if name == "rollout":
        from fieldtune.bench.rollout import bench_rollout

        return bench_rollout(deployment, directory, quick=quick)
    from fieldtune.bench.swap import bench_swap

    return (bench_swap(deployment, directory, quick=quick),)


def show(result: Result) -> None:
    """The table of one benchmark, then its goals and notes."""
    out.print(Text.assemble("\n", (result.bench, "bold"), f": {result.title}"))
    table = Table(*result.columns, box=None, pad_edge=False)
    for row in result.rows:
        table.add_row(*(text(cell) for cell in row))
    out.print(table)
    for goal in result.goals:
        state = ("met   ", "green") if goal.met else ("missed", "red")
        sign = ">=" if goal.at_least else "<="
        said = f"  {goal.name}: {text(goal.measured)} {goal.unit} (goal {sign} {text(goal.limit)})"
        out.print(Text.assemble(state, said))
    for note in result.notes:
        out.print(note, style="dim")


def text(cell: str | float) -> str:
    """A figure with three significant digits, or more where it is large."""
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if abs(cell) >= 100 or cell == int(cell) else f"{cell:.3g}"
