"""`fieldtune ablate`: the method with one thing changed at a time, all from the same start with the same budget."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import msgspec
import tyro
from msgspec import Struct
from rich.table import Table

from bridge.config import ConfigError
from fieldtune.ablation import Ablation, ablated_overrides, ablation_names, load_ablated, load_ablation
from fieldtune.commands.common import Json, Set, list_table, out, print_json, warn
from fieldtune.commands.evaluate import steps_text
from fieldtune.commands.status import last_metrics
from fieldtune.commands.up import Up, begun, deploy, evaluate_version_of, prepare
from fieldtune.deployment import Deployment, load_deployment, require_workers
from runtime.branch import branch
from runtime.durable import write_atomic, write_json
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.supervisor import ChildFailedError, stop_on_signals
from trainer.evaluate import EvaluationError, load_evaluation
from trainer.statistics import Comparison, Evaluation, Result, compare

RESULT = "ablation.json"
MARKDOWN = "ablations.md"
START, FULL = "sft", "full"
START_WHY = "Where all of them start: the policy before any post-training."

Files = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(
        metavar="[FILE ...]", help="ablation files, or names of shipped ones; all shipped ones if none is given"
    ),
]


class Row(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the table, as it is stored in the run that it tells of."""

    name: str
    why: str
    overrides: tuple[str, ...]
    version: str
    env_steps: int
    """Environment steps learned from."""
    minutes: float
    """Wall-clock minutes of training."""
    result: Result
    """Over all tasks, on the evaluation goals."""
    deployment: Deployment
    """What it was run with."""


def ablate(
    files: Files = (),
    /,
    *,
    base: str | None = None,
    overrides: Set = (),
    as_json: Json = False,
) -> int:
    """Run ablations one after another and write one table of them into the run of their base deployment.

    Each starts from the policy that the base run started from (demonstrations and fine-tuning are done first if the run
    is new), learns in a run of its own, RUNS/NAME-ablation-X, and is evaluated with the mean action on the evaluation
    goals. Ctrl-C stops; the same command goes on, and what is finished is not run again. The table has what earlier
    calls finished with the same settings, too. Every run keeps its episodes, up to runtime.log.keep_gb each.

    Examples:
      fieldtune ablate --base quickstart --set trainer.stop.env_steps=200000
      fieldtune ablate full no_ppo my_ablation.yaml --set runtime.log.keep_gb=1

    Args:
        base: the deployment to change, if not the one that the files name
    """
    chosen = dict(load_ablation(file) for file in files or ablation_names())
    bases = {base} if base else {ablation.base for ablation in chosen.values()}
    if len(bases) != 1:
        raise ConfigError(f"the ablations have different bases ({', '.join(sorted(bases))}); choose one with --base")
    config = bases.pop()
    deployment = load_deployment(config, overrides)
    _check_budget(deployment)
    require_workers(deployment, "an ablation")
    start = Up(deployment, config, overrides, stop_on_signals(), as_json)
    runs = {name: _child(start, name, ablation) for name, ablation in chosen.items()}  # all mistakes before any work
    rows = [_row_of_start(start)]
    if rows[0] is not None:
        for name, child in runs.items():
            _require_same_start(start, child, name)
    rows += finished_before(start, set(chosen))
    failed: list[str] = []
    for name, child in runs.items():
        if start.stop.is_set():
            break
        try:
            rows.append(_row_of(start, child, name, chosen[name]))
        except (ChildFailedError, EvaluationError) as error:
            # The others say something without it.
            warn(f"ablation {name} failed: {error}")
            failed.append(name)
        _write_table(start.run, _in_order(rows))
    finished = _in_order(rows)
    if start.stop.is_set():
        start.say("stopped; the same command goes on from here")
        return 1
    if as_json:
        print_json({"rows": finished, "failed": failed})
    else:
        out.print(_terminal_table(finished))
        out.print(f"table: {start.run.path / MARKDOWN}")
    return 1 if failed else 0


def _check_budget(deployment: Deployment) -> None:
    if deployment.trainer.stop == type(deployment.trainer.stop)():
        raise ConfigError("$.trainer.stop: sets no limit, so no ablation would end; e.g. --set trainer.stop.minutes=30")


def _child(start: Up, name: str, ablation: Ablation) -> Up:
    """The ablation's own deployment; refuses a run of that name that was made with other settings."""
    overrides = ablated_overrides(start.deployment, start.overrides, name, ablation)
    deployment = load_ablated(start.config, start.deployment, overrides, name)
    child = Up(deployment, start.config, overrides, start.stop, start.quiet, drives_on=False)
    path = child.run.path / "config.json"
    if path.exists() and msgspec.json.decode(path.read_bytes(), type=Deployment) != deployment:
        raise ConfigError(
            f"ablation {name}: {child.run.path} was made with other settings; move it away, or rename the file"
        )
    return child


def _require_same_start(start: Up, child: Up, name: str) -> None:
    """Raise `ConfigError` if the ablation's run, finished or not, has begun with another version than the start."""
    served, first = Registry(child.run.registry).served(), _first(start.run)
    if served and served[0].version != first:
        raise ConfigError(
            f"ablation {name}: {child.run.path} has begun with version {served[0].version[:12]}, {start.run.path} with "
            f"{first[:12]}, so the two cannot be compared; move {child.run.path} away or remove it, or copy the "
            "ablation's file to another name"
        )


def _row_of_start(start: Up) -> Row | None:
    """Make the start if it is not there, and evaluate it; None if stopped."""
    with begun(start):
        if not prepare(start):
            return None
        evaluation = evaluate_version_of(start, _first(start.run), START)
    return None if evaluation is None else _row(start, START, START_WHY, (), evaluation, {})


def _row_of(start: Up, child: Up, name: str, ablation: Ablation) -> Row | None:
    """Run one ablation to its end, or read what it came to; None if stopped."""
    result = child.run.path / RESULT
    if result.exists():
        return msgspec.json.decode(result.read_bytes(), type=Row)
    start.say(f"ablation {name}: {ablation.why}")
    with begun(child):
        branch(start.run, child.run)
        deploy(child)
        if start.stop.is_set():
            return None
        last = Registry(child.run.registry).live()
        assert last is not None
        evaluation = evaluate_version_of(child, last, name)
    if evaluation is None:
        return None
    row = _row(child, name, ablation.why, ablation.overrides, evaluation, last_metrics(child.run.metrics))
    write_json(result, row)
    return row


def finished_before(start: Up, chosen: Collection[str]) -> list[Row]:
    """Rows of ablations that are not `chosen` now, but were finished from this start with the settings of this call."""
    rows = []
    for path in sorted(start.run.path.parent.glob(f"{glob.escape(start.deployment.name)}-ablation-*/{RESULT}")):
        try:
            row = msgspec.json.decode(path.read_bytes(), type=Row)
            ablation = Ablation(base=start.config, why=row.why, overrides=row.overrides)
            overrides = ablated_overrides(start.deployment, start.overrides, row.name, ablation)
            same = load_ablated(start.config, start.deployment, overrides, row.name) == row.deployment
        except (msgspec.ValidationError, ConfigError):
            continue  # settings of another version of fieldtune
        if same and row.name not in chosen and _first(RunDir(path.parent)) == _first(start.run):
            rows.append(row)
    return rows


def _in_order(rows: list[Row | None]) -> list[Row]:
    """The start, the whole method, then the others as they came; without those that were stopped."""
    return sorted((row for row in rows if row is not None), key=lambda row: (row.name != START, row.name != FULL))


def _first(run: RunDir) -> str:
    """The version that the run started from."""
    return Registry(run.registry).first().version


def _row(
    run: Up, name: str, why: str, overrides: tuple[str, ...], evaluation: Evaluation, metrics: dict[str, Any]
) -> Row:
    return Row(
        name=name,
        why=why,
        overrides=overrides,
        version=evaluation.version,
        env_steps=metrics.get("env_steps", 0),
        minutes=metrics.get("minutes", 0.0),
        result=evaluation.overall,
        deployment=run.deployment,
    )


# --- the table --------------------------------------------------------------------------------------------------------

HEADERS = (
    "",
    "success (Wilson 95 %)",
    "steps to success",
    "steps, failures at the horizon",
    "success against full (McNemar)",
    "steps against full, same goals",
    "env steps",
    "minutes",
)


def cells(row: Row, against: Comparison | None) -> tuple[str, ...]:
    """The figures of a row as text, in the order of `HEADERS`; `against` compares it with the whole method."""
    result = row.result
    low, high = result.success_interval
    return (
        row.name,
        f"{result.success:.2f} [{low:.2f}, {high:.2f}]",
        steps_text(result.steps, result.steps_interval),
        steps_text(result.steps_all, result.steps_all_interval),
        f"{(against.gained - against.lost) / against.goals:+.2f}, p {against.mcnemar_p:.2g}" if against else "-",
        steps_text(against.steps_difference, against.steps_difference_interval) if against else "-",
        f"{row.env_steps:,}",
        f"{row.minutes:.1f}",
    )


def compared(rows: list[Row]) -> dict[str, Comparison]:
    """Every row but the whole method's against it, on the goals of both, by name; none before that is finished."""
    evaluations = {row.name: load_evaluation(RunDir(row.deployment.run_dir), row.version) for row in rows}
    full = evaluations.pop(FULL, None)
    return {name: compare(full, other) for name, other in evaluations.items() if full is not None and other is not None}


def markdown(rows: list[Row], comparisons: Mapping[str, Comparison]) -> str:
    """The table as Markdown, with what each ablation changes and why."""
    first = rows[0]
    budget = {key: value for key, value in msgspec.to_builtins(first.deployment.trainer.stop).items() if value}
    lines = [
        f"# Ablations of {first.deployment.name}",
        "",
        f"Mean action, n = {first.result.n} goals never trained on, one training seed ({first.deployment.seed}); all "
        f"from version `{first.version[:12]}`; each stopped at "
        f"{', '.join(f'{key} {value}' for key, value in budget.items())}.",
        "",
        "| " + " | ".join((*HEADERS, "changes", "why")) + " |",
        "|---" * (len(HEADERS) + 2) + "|",
    ]
    for row in rows:
        changes = ", ".join(f"`{override}`" for override in row.overrides)
        lines.append("| " + " | ".join((*cells(row, comparisons.get(row.name)), changes, row.why)) + " |")
    return "\n".join(lines) + "\n"


def _write_table(run: RunDir, rows: list[Row]) -> None:
    """`ablations.md` and `ablations.json` in the base run, with what is finished so far."""
    if rows:
        comparisons = compared(rows)
        write_atomic(run.path / MARKDOWN, markdown(rows, comparisons).encode())
        write_json(run.path / "ablations.json", {"rows": rows, "against_full": comparisons})


def _terminal_table(rows: list[Row]) -> Table:
    table, comparisons = list_table(*HEADERS), compared(rows)
    for row in rows:
        table.add_row(*cells(row, comparisons.get(row.name)))
    return table
