"""`fieldtune episodes replay`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Column

from bridge.backend import ActionSpec
from bridge.errors import FieldtuneError
from fieldtune.commands.common import Config, Json, Set, err, list_table, out, print_json, run_dir
from fieldtune.commands.episodes import Log, read_found
from fieldtune.deployment import load_deployment
from fieldtune.install import find_version
from runtime.decide_again import Again, Difference, decide_again, difference, largest
from runtime.episode import Episode
from runtime.policy import Policy
from runtime.rundir import RunDir


def replay_episode(
    config: Config,
    episode: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EPISODE")],
    /,
    *,
    overrides: Set = (),
    policy: str | None = None,
    log: Log = "episodes",
    as_json: Json = False,
) -> int:
    """Make the decisions of a logged episode again and compare them with the log.

    Each is made by the version that acted, with its noise: the difference is 0, or of the last digit where the runtime
    had several robots to answer at once. If it is more, the log and the bundle do not belong together, and the exit
    code is 1. With --policy a second version decides on the same observations.

    Actions differ in half ranges (1: half of what an action can be), log-probs in nats. The ratio of the second version
    is the log-prob of the executed actions under it minus the logged one.

    Examples:
      fieldtune episodes replay quickstart 019ab3...
      fieldtune episodes replay quickstart 019ab3... --policy 64bc
      fieldtune episodes replay quickstart runs/quickstart/eval/64bc.../done/019ab3....ep

    Args:
        episode: id of the episode, or the path of its file
        policy: version to compare with: its id or a unique prefix, name of a shipped policy, or directory of a bundle;
            one that is not of this run becomes one of its versions, as in `fieldtune eval`
    """
    deployment = load_deployment(config, overrides)
    run = run_dir(deployment)
    whole = read_found(run, episode, log)
    other = None if policy is None else Policy.load(run.policies / find_version(deployment, policy))
    acted = _by_those_who_acted(run, whole)
    if other is None and not any(acted):
        missing = ", ".join(version[:12] for version in whole.versions) or "any version"
        raise FieldtuneError(f"{run.policies} has no bundle of {missing}, which acted; give another with --policy")
    instead: list[Again | None] = [None] * len(whole.decisions)
    if other is not None:
        instead[:] = decide_again(other, whole.start, whole.decisions)
    rows = _rows(whole, acted, instead)
    if as_json:
        print_json({"episode": whole.start.episode, "policy": other.version if other else None, "decisions": rows})
    else:
        _print(rows, whole, other.version if other else None)
    wrong = [row for row in rows if row["acted"] and not row["acted"]["reproduced"]]
    if wrong:
        err.print(
            f"fieldtune: {len(wrong)} of {len(rows)} decisions are not those of the version that they are stamped "
            f"with, the first one at step {wrong[0]['step']}: the log or the bundle is not that of the run"
        )
    return 1 if wrong else 0


def _by_those_who_acted(run: RunDir, whole: Episode) -> list[Again | None]:
    """Each decision by the version that made it; None where its bundle is gone, or an expert acted."""
    found: dict[int, Again] = {}
    for version in whole.versions:
        if (run.policies / version).is_dir():
            own = [decision for decision in whole.decisions if decision.version == version]
            policy = Policy.load(run.policies / version)
            found.update(
                {
                    decision.number: again
                    for decision, again in zip(own, decide_again(policy, whole.start, own), strict=True)
                }
            )
    return [found.get(decision.number) for decision in whole.decisions]


def _rows(whole: Episode, acted: list[Again | None], instead: list[Again | None]) -> list[dict[str, Any]]:
    """One for each decision: `acted` and `instead` are differences from the log, `mean` is that between the two."""
    half_range = _half_range(whole.start.spec.action)
    rows = []
    for decision, first, second in zip(whole.decisions, acted, instead, strict=True):
        mean = None
        if first and second:
            h = min(len(first.mean), len(second.mean))
            mean = largest(first.mean[:h], second.mean[:h], half_range)
        rows.append(
            {
                "decision": decision.number,
                "step": decision.step,
                "version": decision.version,
                "executed": len(decision.sent),
                "acted": _plain(difference(first, decision, half_range)) if first else None,
                "instead": _plain(difference(second, decision, half_range)) if second else None,
                "mean": mean,
            }
        )
    return rows


def _plain(found: Difference) -> dict[str, Any]:
    return {**asdict(found), "reproduced": found.reproduced}


def _half_range(action: ActionSpec) -> Any:
    return (np.array(action.high) - np.array(action.low)) / 2


def _print(rows: list[dict[str, Any]], whole: Episode, other: str | None) -> None:
    start = whole.start
    out.print(f"{start.episode}  {start.task} seed {start.seed}: {whole.status} after {whole.steps} steps")
    out.print(f"instruction: {start.instruction}")
    sampled = any(decision.log_prob is not None for decision in whole.decisions)
    headers = ["step", "version", "executed", "exact", "actions", *(["log-prob"] if sampled else [])]
    if other:
        out.print(f"*: {other[:8]} on the same observations")
        headers += ["mean*", "actions*", *(["ratio*"] if sampled else [])]
    table = list_table(*(Column(header, no_wrap=True) for header in headers))
    for row in rows:
        acted, instead = row["acted"] or {}, row["instead"] or {}
        cells = [str(row["step"]), row["version"][:8], str(row["executed"])]
        exact = ("yes" if acted["identical"] else "no") if acted else "-"
        cells += [exact, _text(acted.get("actions"))]
        cells += [_text(acted.get("log_prob"))] if sampled else []
        if other:
            cells += [_text(row["mean"]), _text(instead["actions"])]
            cells += [_text(instead["log_ratio"])] if sampled else []
        table.add_row(*cells)
    out.print(table)
    acted = [row["acted"] for row in rows if row["acted"]]
    if acted:
        same = sum(found["identical"] for found in acted)
        text = f"by the version that acted: {same} of {len(acted)} decisions to the bit; largest difference "
        text += f"{_most(found['actions'] for found in acted)} of an action"
        out.print(text + (f", {_most(found['log_prob'] for found in acted)} of a log-prob" if sampled else ""))
    if other:
        text = f"by {other[:8]} instead: means differ by at most {_most(row['mean'] for row in rows)}, on average over "
        text += f"decisions by {_average(row['mean'] for row in rows)}"
        ratio = _average(row["instead"]["log_ratio"] for row in rows)
        out.print(text + (f"; log ratio of what was executed, on average {ratio}" if sampled else ""))


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _most(values: Any) -> str:
    return _text(max(_known(values), default=None))


def _average(values: Any) -> str:
    known = _known(values)
    return _text(sum(known) / len(known) if known else None)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
