"""`fieldtune policies list|show|add|rollback`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import tyro

from bridge.client import SilentError
from bridge.messages import Announce, Rollback, Serving
from fieldtune.commands.common import BundleName, Config, Json, Set, connect, list_table, out, print_json, run_dir
from fieldtune.deployment import find_bundle, load_deployment
from fieldtune.install import install
from runtime.registry import Registry, VersionRow
from runtime.swap import Live

Version = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VERSION", help="a version id or a unique prefix")]


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
    table = list_table("", "version", "parent", "made by", "when", "on disk")
    for row in rows:
        table.add_row(
            "live" if row.live else "",
            row.version[:12],
            row.parent[:12],
            str(row.made.get("command", "")),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.created_unix_s)),
            "yes" if (run.policies / row.version).is_dir() else "no",
        )
    out.print(table)
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
    if as_json:
        print_json({**_plain(row), "lineage": [ancestor.version for ancestor in lineage], "history": history})
        return 0
    out.print(f"version  {row.version}{'  (live)' if row.live else ''}")
    for key, value in row.made.items():
        out.print(f"  {key}: {value}")
    out.print(f"lineage  {' <- '.join(ancestor.version[:8] for ancestor in lineage)}")
    for change in history:
        out.print(f"live     {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(change.unix_s))} ({change.why})")
    return 0


def add(config: Config, bundle: BundleName, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Check a bundle, put it into the run and make it live: the first version of a run, or the next one.

    A running runtime swaps to it at once. Without a runtime the version is made live for the next start.

    Examples:
      fieldtune policies add my_arm.yaml policies/3fa9...
    """
    deployment = load_deployment(config, overrides)
    registry = Registry(run_dir(deployment).registry)
    path = find_bundle(bundle)
    try:
        if registry.live() is None:
            raise SilentError("a run without a version has no runtime")
        with connect(deployment, "policies", timeout_s=10.0) as client:
            reply, _ = client.request(Announce(path=str(path.resolve())), Serving)
        version, where = reply.version, "the running runtime"
    except SilentError:
        version, where = install(deployment, path, bundle), "the next start"
        registry.set_live(version, why="added by hand")
    if as_json:
        print_json({"version": version})
    else:
        out.print(f"{version[:12]} is live for {where}")
    return 0


def rollback(config: Config, version: Version = "", /, *, overrides: Set = (), as_json: Json = False) -> int:
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
    try:
        with connect(deployment, "rollback", timeout_s=10.0) as client:
            reply, _ = client.request(Rollback(version=wanted), Serving)
        now, before, where = reply.version, reply.previous, "the running runtime"
    except SilentError:
        live = Live(run, threads=1, keep_versions=deployment.runtime.keep_versions)
        before = live().version
        now, where = live.rollback(wanted), "the next start (no runtime is running)"
    if as_json:
        print_json({"version": now, "previous": before})
    else:
        out.print(f"{now[:12]} is live for {where}; before it was {before[:12]}")
    return 0


def _plain(row: VersionRow) -> dict[str, Any]:
    return {
        "version": row.version,
        "number": row.number,
        "parent": row.parent,
        "live": row.live,
        "created_unix_s": row.created_unix_s,
        "made": row.made,
    }
