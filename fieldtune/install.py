"""A bundle becomes a version of a run: one that ships with fieldtune, one made elsewhere, one of another run."""

from __future__ import annotations

from pathlib import Path

from bridge.backend import BackendSpec
from bridge.backends import make_backend
from bridge.config import ConfigError
from fieldtune.deployment import Deployment, find_bundle
from runtime.bundle import BundleError, install_bundle, read_bundle
from runtime.policy import Policy, compare_specs
from runtime.registry import Registry, RegistryError
from runtime.rundir import RunDir


def install(deployment: Deployment, bundle: Path, name: str) -> str:
    """Check a bundle against the backend, copy it into the run and register it; returns its version, which is not live.

    `name` is what the user called it. Idempotent. Raises `BundleError` for a bundle that is damaged, `WireError` naming
    the first field in which the backend is another than the policy was made for.
    """
    policy = Policy.load(bundle)
    compare_specs(policy.spec, make_backend(deployment.backend).spec)
    run = RunDir(deployment.run_dir)
    version = install_bundle(bundle, run.policies).name
    Registry(run.registry).add(version, parent=policy.spec.parent, made={"command": "import", "from": name})
    return version


def find_version(deployment: Deployment, wanted: str) -> str:
    """The version that `wanted` means: one of the run (an id or a prefix), or a bundle (`find_bundle`).

    A bundle is installed. Raises `RegistryError` where it is neither, and what `install` raises.
    """
    try:
        return Registry(RunDir(deployment.run_dir).registry).get(wanted).version
    except RegistryError as no_version:
        try:
            bundle = find_bundle(wanted)
        except ConfigError as no_bundle:
            raise RegistryError(f"{no_version}; it is no bundle either: {no_bundle}") from no_bundle
        return install(deployment, bundle, wanted)


def install_to_train(deployment: Deployment, policy: str) -> str:
    """Install the bundle that `policy` means (`find_bundle`), which is to be trained further; returns its version.

    Raises what `install` raises, and `ConfigError` where the trainer's network is another.
    """
    bundle = find_bundle(policy)
    require_trainable(deployment, bundle, policy)
    return install(deployment, bundle, policy)


def require_trainable(deployment: Deployment, bundle_dir: Path, name: str) -> None:
    """Raise `ConfigError` if the trainer could not go on from this bundle, which the user knows as `name`: now, and not
    after a robot has worked for it. Names the setting of `trainer.vla` where it is one.
    """
    from trainer.export import load_weights
    from trainer.vla import VLA

    as_it_is = "`fieldtune up --no-training` lets it work as it is"
    bundle, vla = read_bundle(bundle_dir), deployment.trainer.vla
    for key, wanted, has in (
        ("horizon_steps", vla.horizon_steps, bundle.spec.horizon),
        ("max_tokens", vla.max_tokens, bundle.spec.tokens),
    ):
        if wanted != has:
            raise ConfigError(
                f"$.trainer.vla.{key}: is {wanted}, the policy {name} has {has}; they must agree where it is trained, "
                f"and {as_it_is}"
            )
    try:
        load_weights(VLA(vla, bundle.spec), bundle)
    except BundleError as error:
        raise ConfigError(
            f"$.trainer.vla: the policy {name} cannot be trained further ({error}); give trainer.vla the settings that "
            f"it was made with, if it was; {as_it_is}"
        ) from error


def require_fine_tunable(deployment: Deployment, spec: BackendSpec) -> None:
    """Raise `ConfigError` if supervised fine-tuning could not begin with these settings, whatever was demonstrated."""
    from trainer.sft import new_policy

    trainer = deployment.trainer
    new_policy(deployment.name, spec, trainer, find_bundle(trainer.start) if trainer.start is not None else None)
