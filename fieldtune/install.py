"""A bundle becomes a version of a run: one that ships with fieldtune, one made elsewhere, one of another run."""

from __future__ import annotations

from pathlib import Path

from bridge.backends import make_backend
from bridge.config import ConfigError
from fieldtune.deployment import Deployment, find_bundle
from runtime.bundle import install_bundle, read_bundle
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

    Raises what `install` raises, and `ConfigError` naming the setting of `trainer.vla` that the policy does not fit.
    Whether its weights fit is found by the trainer, which has the network.
    """
    bundle = find_bundle(policy)
    spec, vla = read_bundle(bundle).spec, deployment.trainer.vla
    for key, wanted, has in (
        ("horizon_steps", vla.horizon_steps, spec.horizon),
        ("max_tokens", vla.max_tokens, spec.tokens),
    ):
        if wanted != has:
            raise ConfigError(f"$.trainer.vla.{key}: is {wanted}, the policy {policy} has {has}; they must agree")
    return install(deployment, bundle, policy)
