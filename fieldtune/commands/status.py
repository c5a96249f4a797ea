"""`fieldtune status`, and the table that `fieldtune up` keeps on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from bridge.client import SilentError
from bridge.messages import GetStatus, StatusReply
from fieldtune.commands.common import UNREACHED, Config, Json, Set, connect, out, print_json, run_dir
from fieldtune.deployment import Deployment, load_deployment
from runtime.status import Status

RECENT = 50  # episodes that success and steps to success on the screen are taken over
SHARES_SHOWN = 3  # at either end


def status(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Show what a running deployment does: version, success, buffer, w(t), latency, errors.

    Examples:
      fieldtune status quickstart
      fieldtune status quickstart --json
    """
    deployment = load_deployment(config, overrides)
    try:
        now = runtime_status(deployment, timeout_s=3.0)
    except SilentError as error:
        raise SilentError(f"{error}; {UNREACHED}") from error
    trainer = last_metrics(run_dir(deployment).metrics)
    if as_json:
        print_json({"runtime": now, "trainer": trainer})
    else:
        out.print(status_table(now, trainer))
    return 0


def runtime_status(deployment: Deployment, timeout_s: float) -> Status:
    """The runtime's counters; raises `SilentError` if it does not answer."""
    with connect(deployment, "status", timeout_s) as client:
        reply, _ = client.request(GetStatus(), StatusReply)
    return msgspec.convert(reply.status, Status)


def last_metrics(path: Path) -> dict[str, Any]:
    """The newest line of the trainer's metrics; empty before the first."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            parsed = json.loads(line)
        except ValueError:
            continue  # the line is being written just now; the one before it is whole
        if isinstance(parsed, dict):
            return parsed
    return {}


class RecentResults(NamedTuple):
    """How the last episodes went; None where there is nothing to take a mean over."""

    episodes: int
    success: float | None
    steps: float | None
    """Of the successes."""


def recent_results(now: Status) -> RecentResults:
    """The last `RECENT` episodes that came to an end and were judged."""
    recent = [episode for episode in now.recent if episode.status not in ("aborted", "unjudged")][-RECENT:]
    steps = [episode.steps for episode in recent if episode.status == "success"]
    return RecentResults(
        episodes=len(recent),
        success=len(steps) / len(recent) if recent else None,
        steps=sum(steps) / len(steps) if steps else None,
    )


def status_table(now: Status, trainer: dict[str, Any], *, title: str = "") -> Table:
    """Two columns: what, and how it stands."""
    table = Table(show_header=False, title=title or None, title_justify="left", min_width=64)
    table.add_column("", style="dim")
    table.add_column("")
    recent = recent_results(now)
    ended = sum(count for name, count in now.episodes.items() if name not in ("aborted", "lost"))
    table.add_row("version", f"{now.version[:12]}   {now.swaps} swaps, {now.refused_swaps} refused")
    if recent.success is not None:
        table.add_row("success", f"{recent.success:.2f} of the last {recent.episodes} episodes, exploring")
    if recent.steps is not None:
        table.add_row("steps to success", f"{recent.steps:.1f}")
    aborted = now.episodes.get("aborted", 0)
    table.add_row(
        "episodes", f"{ended} ended, {aborted} aborted, {now.episodes_per_min:.0f} / min, {now.sessions} bridges"
    )
    if len(now.shares) > 1:
        table.add_row("shares", _shares(now.shares))
    if trainer:
        table.add_row("learning", f"iteration {trainer['iteration']}, {trainer['env_steps']:,} steps")
        table.add_row(
            "buffer", f"{trainer['buffer_episodes']} episodes, {trainer['buffer_steps']:.1f} steps on average"
        )
        table.add_row(
            "w(t)", f"{trainer['weight']:.2f}   KL {trainer['kl']:.3f}   EV {trainer['explained_variance']:.2f}"
        )
    if now.latency_ms:
        ms = now.latency_ms
        table.add_row("latency", f"p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms, max {ms['max']:.1f} ms")
    lost = now.log.get("lost", 0)
    if lost or now.log.get("error"):
        table.add_row("log", f"{lost} episodes lost: {now.log.get('error')}", style="red")
    if now.stopped:
        table.add_row("stopped", now.stopped, style="red")
    elif odd := [f"{name} {state}" for name, state in now.robots.items() if state not in ("driving", "idle")]:
        table.add_row("robots", ", ".join(odd))
    if now.interventions:
        table.add_row("safety stage", ", ".join(f"{rule} {count}" for rule, count in now.interventions.items()))
    if now.refused:
        table.add_row("refused", ", ".join(f"{code} {count}" for code, count in now.refused.items()))
    for name, text in staging_rows(now.staging):
        table.add_row(name, text)
    return table


def _shares(shares: dict[str, float]) -> str:
    """The tasks with the largest and the smallest share of the episodes."""
    rows = [f"{task} {share:.3f}" for task, share in sorted(shares.items(), key=lambda item: -item[1])]
    shown = rows if len(rows) <= 2 * SHARES_SHOWN else [*rows[:SHARES_SHOWN], "...", *rows[-SHARES_SHOWN:]]
    return ", ".join(shown)


def staging_rows(staging: dict[str, Any]) -> list[tuple[str, str]]:
    """How the versions that are not live stand: the canary, alarms, and who has pinned the live version."""
    rows = []
    if staging.get("candidate"):
        found = staging["evidence"]
        low, high = found["success_difference"]
        rows.append(
            (
                "canary",
                f"{staging['candidate'][:12]}   {found['candidate_episodes']} episodes beside "
                f"{found['live_episodes']}, success {low:+.2f} to {high:+.2f}",
            )
        )
        against = ", ".join(f"{name} {found[name]:.2g}" for name in ("better", "not_worse", "faster"))
        rows.append(
            (
                "evidence",
                f"{against} of {found['needed_to_promote']:.0f}; worse {found['worse']:.2g} of "
                f"{found['needed_to_roll_back']:.0f}",
            )
        )
    for drift in staging.get("drifts", ()):
        text = f"{drift['statistic']} {drift['direction']}, {drift['record']:.3g} to {drift['recent']:.3g}"
        rows.append(("drift", text))
    if staging.get("pinned"):
        rows.append(("pinned", f"by {staging['pinned']}"))
    return rows
