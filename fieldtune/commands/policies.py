"""`fieldtune policies list|show|diff|add|promote|reject|rollback|pin|unpin`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from bridge.client import SilentError
from bridge.messages import Announce, Govern, Governing, Serving
from fieldtune.commands.common import (
    JUDGED_S,
    BundleName,
    Config,
    Json,
    Set,
    account,
    connect,
    list_table,
    out,
    print_json,
    run_dir,
)
from fieldtune.commands.status import runtime_status
from fieldtune.deployment import Deployment, find_bundle, load_deployment
from fieldtune.install import install
from runtime.bundle import read_bundle
from runtime.durable import claim
from runtime.gate import gate_episodes, judge
from runtime.policy import Policy
from runtime.registry import Registry, VersionRow
from runtime.swap import Live

Version = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VERSION", help="a version id or a unique prefix")]
MaybeVersion = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[VERSION]")]


def list_policies(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """List the versions of a run, the live one marked.

    Examples:
      fieldtune policies list quickstart
    """
    run = run_dir(load_deployment(config, overrides))
    rows = Registry(run.registry).list()
    if as_json:
        print_json({"policies": [{**_plain(row), "on_disk": (run.policies / row.version).is_dir()} for row in rows]})
        return 0
    registry = Registry(run.registry)
    stages = {change.version: change for change in registry.stages()}
    table = list_table("", "version", "parent", "made by", "when", "on disk", "why")
    for row in rows:
        change = stages.get(row.version)
        table.add_row(
            "live" if row.live else change.stage if change else "",
            row.version[:12],
            row.parent[:12],
            str(row.made.get("command", "")),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.created_unix_s)),
            "yes" if (run.policies / row.version).is_dir() else "no",
            change.why if change else "",
        )
    out.print(table)
    if registry.pinned():
        out.print(f"the live version is pinned by {registry.pinned()}")
    return 0


def show_policy(config: Config, version: Version, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Show one version: how it was made, its ancestors, when it was live.

    Examples:
      fieldtune policies show quickstart 3fa9

    Args:
        version: a version id or a unique prefix
    """
    registry = Registry(run_dir(load_deployment(config, overrides)).registry)
    row = registry.get(version)
    lineage = registry.lineage(row.version)
    history = [change for change in registry.history() if change.version == row.version]
    stages = registry.stages(row.version)
    if as_json:
        lines = [ancestor.version for ancestor in lineage]
        print_json({**_plain(row), "lineage": lines, "history": history, "stages": stages})
        return 0
    out.print(f"version  {row.version}{'  (live)' if row.live else ''}")
    for key, value in row.made.items():
        out.print(f"  {key}: {value}")
    out.print(f"lineage  {' <- '.join(ancestor.version[:8] for ancestor in lineage)}")
    for change in history:
        out.print(f"live     {_when(change.unix_s)} ({change.why})")
    for step in stages:
        out.print(f"{step.stage:<9}{_when(step.unix_s)} {step.why} ({step.who})")
        for key, value in step.evidence.items():
            out.print(f"  {key}: {value}")
    return 0


def diff(
    config: Config, version: Version, other: MaybeVersion = None, /, *, overrides: Set = (), as_json: Json = False
) -> int:
    """Compare two versions on what the robots of the run have seen; the second is the live one if not given.

    The figures are those of the gate (docs/deploying.md): how far the actions are apart, and how well each repeats what
    was sent in successful episodes.

    Examples:
      fieldtune policies diff quickstart 3fa9
      fieldtune policies diff quickstart 3fa9 77c0

    Args:
        version: a version id or a unique prefix
        other: what it is compared with; the live version if not given
    """
    deployment = load_deployment(config, overrides)
    run = run_dir(deployment)
    registry = Registry(run.registry)
    names = [registry.get(wanted).version for wanted in (version, other or registry.live() or "")]
    first, second = (Policy.load(run.policies / name) for name in names)
    rule = deployment.runtime.deploy.gate
    report = judge(first, second, gate_episodes(run, rule.decisions), rule)
    if as_json:
        print_json({"version": names[0], "other": names[1], "gate": report})
        return 0
    out.print(f"{names[0][:12]} beside {names[1][:12]}, {report.decisions} logged decisions")
    for key in ("divergence", "kl", "outside", "live_outside", "cloning_error", "live_cloning_error"):
        out.print(f"  {key.replace('live_', 'the other: '):<26}{getattr(report, key):.4g}")
    for why in report.refused:
        out.print(f"  the gate would refuse it: {why}")
    return 0


def promote(config: Config, version: MaybeVersion = None, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Make a version live by hand: the canary that runs, or any version of the run. Kept with your name.

    Examples:
      fieldtune policies promote my_arm.yaml
      fieldtune policies promote my_arm.yaml 3fa9

    Args:
        version: a version id or a unique prefix; the canary's if not given
    """
    return _govern(config, overrides, "promote", version or "", as_json)


def reject(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """End the canary that runs; its version will not go live.

    Examples:
      fieldtune policies reject my_arm.yaml
    """
    return _govern(config, overrides, "reject", "", as_json)


def pin(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Keep the live version until `unpin`: no candidate drives a robot, nothing is rolled back by rule.

    Examples:
      fieldtune policies pin my_arm.yaml
    """
    return _govern(config, overrides, "pin", "", as_json)


def unpin(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Let the rules decide again.

    Examples:
      fieldtune policies unpin my_arm.yaml
    """
    return _govern(config, overrides, "unpin", "", as_json)


def _govern(config: str, overrides: tuple[str, ...], command: Governing, version: str, as_json: bool) -> int:
    deployment = load_deployment(config, overrides)
    with connect(deployment, "policies", timeout_s=10.0) as client:
        reply, _ = client.request(Govern(command=command, version=version, who=account()), Serving)
    if as_json:
        print_json({"version": reply.version, "previous": reply.previous})
    else:
        out.print(f"{reply.version[:12]} is live")
    return 0


def add(config: Config, bundle: BundleName, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Check a bundle, put it into the run and make it live: the first version of a run, or the next one.

    A running runtime swaps to it at once, or, where versions are staged, puts it through the gate and into a canary.
    Without a runtime the version is made live for the next start.

    Examples:
      fieldtune policies add my_arm.yaml policies/3fa9...
    """
    deployment = load_deployment(config, overrides)
    registry = Registry(run_dir(deployment).registry)
    path = find_bundle(bundle)
    if registry.live() is not None and runtime_answers(deployment):
        with connect(deployment, "policies", timeout_s=JUDGED_S) as client:
            reply, _ = client.request(Announce(path=str(path.resolve())), Serving)
        version = read_bundle(path).version
        where = "the running runtime" if reply.version == version else ""
    else:
        with no_runtime(deployment):
            version, where = install(deployment, path, bundle), "the next start"
            registry.set_live(version, why="added by hand")
    if as_json:
        print_json({"version": version})
    else:
        passed = Registry(run_dir(deployment).registry).stage(version)
        out.print(f"{version[:12]} is live for {where}" if where else f"{version[:12]}: {passed}")
    return 0


def rollback(config: Config, version: MaybeVersion = None, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Make an earlier version live again: the one given, or the one before the live version.

    A running runtime swaps at once; a running trainer goes on from the version that is live. Without a runtime the
    version is made live for the next start.

    Examples:
      fieldtune policies rollback quickstart
      fieldtune policies rollback quickstart 3fa9

    Args:
        version: a version id or a unique prefix; the one before the live one if not given
    """
    deployment = load_deployment(config, overrides)
    run = run_dir(deployment)
    wanted = Registry(run.registry).get(version).version if version else ""
    if runtime_answers(deployment):
        with connect(deployment, "rollback", timeout_s=JUDGED_S) as client:
            reply, _ = client.request(Govern(command="rollback", version=wanted, who=account()), Serving)
        now, before, where = reply.version, reply.previous, "the running runtime"
    else:
        with no_runtime(deployment):
            live = Live(run, threads=1, keep_versions=deployment.runtime.keep_versions)
            before = live().version
            now, where = live.rollback(wanted), "the next start (no runtime is running)"
    if as_json:
        print_json({"version": now, "previous": before})
    else:
        out.print(f"{now[:12]} is live for {where}; before it was {before[:12]}")
    return 0


def runtime_answers(deployment: Deployment) -> bool:
    """Whether a runtime serves the run: what it is asked for must not be done beside it, however long it takes."""
    try:
        runtime_status(deployment, timeout_s=2.0)
    except SilentError:
        return False
    return True


@contextmanager
def no_runtime(deployment: Deployment) -> Iterator[None]:
    """Keep a runtime from coming up meanwhile. Raises `ClaimedError` where one is, though it does not answer (yet): it
    may have read what is live already.
    """
    episodes = run_dir(deployment).episodes
    episodes.mkdir(parents=True, exist_ok=True)
    with claim(episodes):
        yield


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _plain(row: VersionRow) -> dict[str, Any]:
    return {
        "version": row.version,
        "number": row.number,
        "parent": row.parent,
        "live": row.live,
        "created_unix_s": row.created_unix_s,
        "made": row.made,
    }
