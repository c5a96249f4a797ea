"""One YAML file is one deployment: its sections, where it is found, and where its run lives on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from bridge.config import BackendConfig, BridgeConfig, ConfigError, load_yaml, parse
from fieldtune.data.mapping import DatasetConfig
from fieldtune.page.config import PageConfig
from runtime.config import RuntimeConfig
from trainer.config import TrainerConfig


class Deployment(Struct, frozen=True, forbid_unknown_fields=True):
    """A deployment: a backend behind the bridge, the runtime that serves it, the trainer that improves it."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run; its files lie in `runs/NAME`."""
    backend: BackendConfig
    seed: Annotated[int, Meta(ge=0)] = 0
    """Seed of everything that is random in this run."""
    bridge: BridgeConfig = BridgeConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    trainer: TrainerConfig = TrainerConfig()
    dataset: DatasetConfig = DatasetConfig()
    """see `dataset`"""
    page: PageConfig = PageConfig()
    runs: str = "runs"
    """Directory that holds the runs."""

    @property
    def run_dir(self) -> Path:
        """Where this run's files are."""
        return Path(self.runs) / self.name


def config_names() -> list[str]:
    """Names of the configurations that ship with fieldtune."""
    return sorted(
        path.name.removesuffix(".yaml") for path in shipped_configs().iterdir() if path.name.endswith(".yaml")
    )


def find_config(name_or_path: str) -> Path:
    """The file that `name_or_path` means: a path, or the name of a shipped configuration."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_configs() / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    raise ConfigError(
        f"{name_or_path}: no such file, and no shipped configuration of that name ({', '.join(config_names())})"
    )


def find_bundle(name_or_path: str) -> Path:
    """The policy bundle that `name_or_path` means: a directory, or the name of a shipped one (`configs/policies`)."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    shipped = shipped_bundles()
    if name_or_path in shipped:
        return shipped[name_or_path]
    known = ", ".join(shipped) or "none"
    raise ConfigError(f"{name_or_path}: no such directory, and no shipped policy of that name ({known})")


def shipped_bundles() -> dict[str, Path]:
    """Name -> directory of the policies that ship with fieldtune."""
    return {path.name: path for path in sorted((shipped_configs() / "policies").glob("*")) if path.is_dir()}


def load_deployment(name_or_path: str, overrides: Sequence[str] = ()) -> Deployment:
    """Read, override and check a deployment; raises `ConfigError`."""
    path = find_config(name_or_path)
    deployment = parse(load_yaml(path), Deployment, str(path), overrides)
    # The run keeps its configuration as JSON, which has no such numbers.
    for where, number in _not_finite(msgspec.to_builtins(deployment), "$"):
        raise ConfigError(f"{path}: {where}: expected a finite number (found {number})")
    # A trainer that starts again reads the bundles of the versions that it may learn from. Besides those that are kept
    # there are always the live one and the one before it.
    oldest, kept = deployment.trainer.max_staleness_versions, deployment.runtime.keep_versions
    if oldest > kept + 1:
        raise ConfigError(
            f"{path}: $.trainer.max_staleness_versions: is {oldest}, but $.runtime.keep_versions {kept} keeps the "
            f"bundles of versions up to {kept + 1} older than the live one; make the first smaller or the second larger"
        )
    return deployment


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{where}[{i}]")


def require_workers(deployment: Deployment, what: str) -> None:
    """Raise `ConfigError` where the robots are driven elsewhere, so that `what` has nobody to drive."""
    if deployment.bridge.workers < 1:
        raise ConfigError(f"$.bridge.workers: is 0, and {what} starts workers of its own; expected at least 1")


def shipped_configs() -> Path:
    """`configs/`: inside the installed package, or beside it in a checkout."""
    installed = Path(str(resources.files("fieldtune"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "configs"
