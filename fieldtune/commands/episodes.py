"""`fieldtune episodes list|show`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Column

from bridge.config import ConfigError
from bridge.errors import FieldtuneError
from bridge.messages import RULES, Label
from fieldtune.commands.common import Config, Json, Set, account, list_table, out, print_json, run_dir
from fieldtune.deployment import load_deployment
from runtime.episode import Decision, End, Episode
from runtime.episode_file import SUFFIX
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.reading import read_episode, read_row
from runtime.rundir import RunDir

Log = Annotated[
    str,
    tyro.conf.arg(
        metavar="episodes|demos|eval/VERSION",
        help="the deployment's episodes, the demonstrations, or those of the evaluation of a version (its id or the "
        "beginning of it; eval/VERSION-held_out for held-out wordings)",
    ),
]


def list_episodes(
    config: Config,
    /,
    *,
    overrides: Set = (),
    log: Log = "episodes",
    limit: int = 20,
    task: str | None = None,
    status: End | None = None,
    version: str | None = None,
    as_json: Json = False,
) -> int:
    """List logged episodes, newest first.

    Examples:
      fieldtune episodes list quickstart --status aborted
      fieldtune episodes list quickstart --log demos

    Args:
        limit: at most this many
        task: only this task
        status: only episodes that ended so
        version: only episodes that this version drove
    """
    index = EpisodeIndex(log_directory(run_dir(load_deployment(config, overrides)), log))
    rows = index.list(limit=limit, task=task, status=status, version=version)
    if as_json:
        print_json({"episodes": rows})
        return 0
    table = list_table(Column("episode", no_wrap=True), "task", "seed", "ended", "steps", "versions", "when")
    for row in rows:
        table.add_row(
            row.episode,
            row.task,
            str(row.seed),
            _ended(row),
            str(row.steps),
            " ".join(v[:8] for v in row.versions),
            time.strftime("%d %H:%M:%S", time.localtime(row.started_unix_s)),
        )
    out.print(table)
    return 0


def show_episode(
    config: Config,
    episode: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EPISODE")],
    /,
    *,
    overrides: Set = (),
    log: Log = "episodes",
    as_json: Json = False,
) -> int:
    """Show one episode: where it came from and what happened at each decision.

    Examples:
      fieldtune episodes show quickstart 019ab3...

    Args:
        episode: id of the episode
    """
    index = EpisodeIndex(log_directory(run_dir(load_deployment(config, overrides)), log))
    row = find_episode(index, episode)
    whole = read_episode(index.path(row))
    decisions: list[dict[str, Any]] = [
        {
            "step": decision.step,
            "version": decision.version,
            "executed": len(decision.sent),
            "log_prob": decision.executed_log_prob,
            "reward": float(decision.reward.sum()),
            "rules": _rules(decision),
            "first_action": [round(float(x), 3) for x in decision.sent[0]] if len(decision.sent) else [],
        }
        for decision in whole.decisions
    ]
    if as_json:
        print_json({"row": row, "instruction": whole.start.instruction, "decisions": decisions})
        return 0
    out.print(f"{row.episode}  {row.task} seed {row.seed}: {_ended(row)} after {row.steps} steps")
    out.print(f"instruction: {whole.start.instruction}")
    table = list_table("step", "version", "executed", "log-prob", "reward", "safety", "first action")
    for d in decisions:
        log_prob = "-" if d["log_prob"] is None else f"{d['log_prob']:.2f}"
        table.add_row(
            str(d["step"]),
            str(d["version"])[:8],
            str(d["executed"]),
            log_prob,
            f"{d['reward']:.2f}",
            " ".join(f"{rule} {count}" for rule, count in d["rules"].items()),
            str(d["first_action"]),
        )
    out.print(table)
    return 0


def label_episode(
    config: Config,
    episode: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EPISODE")],
    label: Annotated[tyro.conf.Positional[Label], tyro.conf.arg(metavar="success|failure|discard")],
    /,
    *,
    overrides: Set = (),
    log: Log = "episodes",
    who: str | None = None,
    as_json: Json = False,
) -> int:
    """Say how an episode went, now or again; a trainer that runs takes it up.

    An episode that a robot could not judge is learned from once it is labelled. A success that was none leaves the
    demonstration buffer; a failure that was a success may enter it. `discard`: nothing is to be learned from it.

    Examples:
      fieldtune episodes label my_arm.yaml 0197f3... success
      fieldtune episodes label my_arm.yaml 0197f3... discard --who ada
      fieldtune episodes label my_arm.yaml 0197f3... success --log eval/3fa9

    Args:
        episode: id of the episode
        label: how it went
        who: whose word it is, if not yours
    """
    index = EpisodeIndex(log_directory(run_dir(load_deployment(config, overrides)), log))
    row = index.label(find_episode(index, episode).episode, label, who or account())
    if as_json:
        print_json({"episode": row})
    else:
        out.print(f"{row.episode}  {row.task} seed {row.seed}: {_ended(row)}")
    return 0


def _ended(row: EpisodeRow) -> str:
    """How it ended, why, and whose word that is."""
    why = f" ({row.reason})" if row.reason else ""
    return f"{row.status}, says {row.labelled_by}" if row.labelled_by and not why else row.status + why


def _rules(decision: Decision) -> dict[str, int]:
    """Steps that each rule of the safety stage changed."""
    if decision.rules is None:
        return {}
    counts = {rule: int((decision.rules >> bit & 1).sum()) for bit, rule in enumerate(RULES)}
    return {rule: count for rule, count in counts.items() if count}


def log_directory(run: RunDir, log: Log) -> Path:
    """Where the log is. Raises `ConfigError` for a name that means none."""
    logs = {"episodes": run.episodes, "demos": run.demos}
    if log in logs:
        return logs[log]
    kind, _, name = log.partition("/")
    version, _, variant = name.partition("-")
    there = [path.name.partition("-") for path in run.evaluations.glob("*")] if kind == "eval" and version else []
    found = [whole for whole, _, other in there if whole.startswith(version) and other == variant]
    if len(found) != 1:
        known = ", ".join([*logs, *(f"eval/{path.name}" for path in sorted(run.evaluations.glob("*")))])
        raise ConfigError(f"--log {log}: {'means several' if found else 'there is no such log'} (there are {known})")
    return run.evaluation(found[0], variant)


def find_episode(index: EpisodeIndex, episode: str) -> EpisodeRow:
    """The row of an episode, by its whole id; raises `FieldtuneError` where there is none."""
    row = index.get(episode)
    if row is None:
        raise FieldtuneError(f"no episode {episode} in {index.directory}")
    return row


def read_found(run: RunDir, episode: str, log: Log) -> Episode:
    """An episode by its whole id, as it counts, or by the path of its file, which knows of no label."""
    if episode.endswith(SUFFIX):
        return read_episode(Path(episode))
    index = EpisodeIndex(log_directory(run, log))
    return read_row(index, find_episode(index, episode))
