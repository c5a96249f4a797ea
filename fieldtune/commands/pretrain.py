"""`fieldtune pretrain`."""

from __future__ import annotations

import shutil
from pathlib import Path

from bridge.config import ConfigError
from fieldtune.commands.common import Config, Json, Set, err, out, print_json, run_dir
from fieldtune.commands.train import refuse_policy
from fieldtune.commands.up import Up, begun, prepare, stopped
from fieldtune.deployment import load_deployment
from runtime.bundle import read_bundle
from runtime.durable import atomic_directory
from runtime.registry import Registry
from runtime.supervisor import stop_on_signals


def pretrain(config: Config, /, *, overrides: Set = (), to: Path | None = None, as_json: Json = False) -> int:
    """Make a base: demonstrations of all tasks of the deployment, then one policy learned from them.

    It is what `fieldtune demos` and `fieldtune sft` do. Other deployments of the same cameras, state and actions start
    from it by `trainer.start`. Ctrl-C stops; the same command goes on.

    Examples:
      fieldtune pretrain base
      fieldtune pretrain base --to configs/policies/base

    Args:
        to: also copy the bundle to this directory, which must not exist
    """
    deployment = load_deployment(config, overrides)
    refuse_policy(deployment)
    if to is not None and to.exists():
        raise ConfigError(
            f"--to {to}: exists; a bundle is never replaced in place, so remove it or choose another name"
        )
    this = Up(deployment, config, overrides, stop_on_signals(), as_json)
    with begun(this):
        if not prepare(this):
            return stopped(this, "pretrain")
    run = run_dir(deployment)
    version = Registry(run.registry).first().version
    bundle = run.policies / version
    if to is not None:
        copy_bundle(bundle, to)
        err.print(f"copied to {to}")
    if as_json:
        print_json({"version": version, "bundle": str(bundle)})
    else:
        out.print(f"version {version}\nbundle  {bundle}")
    return 0


def copy_bundle(bundle: Path, to: Path) -> None:
    """Copy a bundle, checked, to the directory `to`, whole or not at all. Raises `FileExistsError` if it exists."""
    read_bundle(bundle)
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(to) as files:
        for part in bundle.iterdir():
            shutil.copyfile(part, files / part.name)
