"""An ablation: a base deployment, what is changed in it, and why. One YAML file in `configs/ablations/` each."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from bridge.config import ConfigError, load_yaml, parse
from fieldtune.deployment import Deployment, load_deployment, shipped_configs

# What every run of a comparison must share: start, data, goals and budget.
SHARED = (
    "backend",
    "seed",
    "runs",
    "bridge.horizon_steps",
    "trainer.tasks",
    "trainer.train_first_seed",
    "trainer.train_seeds",
    "trainer.demos",
    "trainer.vla",
    "trainer.sft",
    "trainer.stop",
    "trainer.evaluate",
)


class Ablation(Struct, frozen=True, forbid_unknown_fields=True):
    """The file, and the name of its run."""

    base: str
    """The deployment configuration that is changed: a path, or the name of a shipped one."""
    why: str
    """One sentence: what the comparison with the whole method shows."""
    overrides: tuple[str, ...] = ()
    """`path.to.key=value`, as after --set."""


def ablation_names() -> list[str]:
    """Names of the ablations that ship with fieldtune; the whole method, which the others are compared with, first."""
    names = (path.stem for path in (shipped_configs() / "ablations").glob("*.yaml"))
    return sorted(names, key=lambda name: (name != "full", name))


def load_ablation(name_or_path: str) -> tuple[str, Ablation]:
    """Name (that of the file) and content of an ablation: a path, or the name of a shipped one."""
    path = Path(name_or_path)
    if not path.is_file():
        path = shipped_configs() / "ablations" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{name_or_path}: no such file, and no shipped ablation of that name ({', '.join(ablation_names())})"
        )
    return path.stem, parse(load_yaml(path), Ablation, str(path))


def ablated_overrides(base: Deployment, overrides: tuple[str, ...], name: str, ablation: Ablation) -> tuple[str, ...]:
    """All overrides of the ablation's run: those of the base, what is changed, and the name of the run."""
    return (*overrides, *ablation.overrides, f"name={base.name}-ablation-{name}")


def load_ablated(config: str, base: Deployment, overrides: tuple[str, ...], name: str) -> Deployment:
    """The deployment of an ablation's run; raises `ConfigError` if it is one that cannot be compared with its base."""
    deployment = load_deployment(config, overrides)
    for path in SHARED:
        if _at(deployment, path) != _at(base, path):
            raise ConfigError(
                f"ablation {name}: changes $.{path}, which all runs of a comparison must share; change it for all of "
                "them with --set"
            )
    return deployment


def _at(deployment: Deployment, path: str) -> object:
    value: object = deployment
    for key in path.split("."):
        value = getattr(value, key)
    return value
