"""The live policy and how it changes: load beside it, check, flip one reference, keep the one before for rollback."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from bridge.messages import Governing
from runtime.bundle import BundleError, PolicySpec, install_bundle
from runtime.policy import Policy
from runtime.registry import Registry
from runtime.rundir import RunDir

SAME = ("cameras", "state", "action", "control_hz", "horizon", "tokens", "prefix_steps")


class Live:
    """The policy that serves now. Calling it gives that policy; all else may run on any threads beside it: a new policy
    is built, replayed against its probe and warmed up before the one reference is flipped.
    """

    def __init__(self, run: RunDir, *, threads: int, keep_versions: int, version: str | None = None) -> None:
        """Load the registry's live version, or `version` (an id or a prefix) without making it live in the registry.

        Raises `BundleError`, or `RegistryError` for an unknown version.
        """
        self._run, self._threads, self._keep = run, threads, keep_versions
        self._registry = Registry(run.registry)
        self._pinned = version is not None
        chosen = self._registry.get(version).version if version is not None else self._registry.live()
        if chosen is None:
            raise BundleError(
                "registry",
                f"{run.registry} has no live version; `fieldtune up` or `sft` makes one from demonstrations (`demos`, "
                "or `demos import DATASET CONFIG`), `fieldtune policies add CONFIG BUNDLE` brings one",
            )
        self._policy = Policy.load(run.policies / chosen, threads=threads)
        self._previous: Policy | None = None
        self._changing = threading.Lock()
        self.swaps = 0
        """Changes of the live version, whoever made them."""
        self._previous_version = self._registry.previous() or ""

    def __call__(self) -> Policy:
        """The policy that serves now."""
        return self._policy

    def arm_for(self, client: str) -> str:
        """Whatever is live."""
        return ""

    def policy_of(self, arm: str) -> Policy:
        """The policy that serves now."""
        return self._policy

    def failed(self, version: str, why: str) -> None:
        """Whoever asked is told; that is all."""

    @property
    def previous(self) -> str:
        """The version that a rollback would bring back; empty if there is none."""
        return self._previous_version

    def announce(self, path: Path) -> str:
        """Check the bundle in `path`, copy it into the run if it lies elsewhere, and make it live. Idempotent."""
        return self.make_live(self.load(path), "announced")

    def load(self, path: Path) -> Policy:
        """Check the bundle in `path` and make it a version of the run, which is not live. Idempotent."""
        if self._pinned:
            raise BundleError("version", "this runtime serves one fixed version and takes no other")
        policy = Policy.load(path, threads=self._threads)
        require_same_interface(policy.spec, self._policy.spec)
        installed = install_bundle(path, self._run.policies)
        if installed.name != policy.version:
            raise BundleError("version", f"{path} changed while it was read; write it elsewhere and announce it whole")
        self._registry.add(policy.version, parent=policy.spec.parent, made=policy.spec.made)
        return policy

    def installed(self, version: str) -> Policy:
        """A version of the run, checked. Raises `BundleError`."""
        policy = Policy.load(self._run.policies / version, threads=self._threads)
        require_same_interface(policy.spec, self._policy.spec)
        return policy

    def make_live(self, policy: Policy, why: str) -> str:
        """Serve a policy that `load` gave."""
        with self._changing:
            self._flip(policy, why)
            self.prune()
        return policy.version

    def govern(self, command: Governing, version: str, who: str) -> str:
        """Make a version (an id or a prefix) live by hand, or go back; the other commands are for staged versions."""
        if command == "rollback":
            return self.rollback(version, why=f"rolled back by {who}")
        if command != "promote":
            raise BundleError("command", f"{command} is for runtime.deploy.mode: staged; here every version goes live")
        if not version:
            raise BundleError("version", "no canary runs where every version goes live at once; say which version")
        return self.rollback(version, why=f"promoted by {who}")

    def standing(self) -> dict[str, Any]:
        """Nothing is staged."""
        return {}

    def rollback(self, version: str = "", *, why: str = "rollback") -> str:
        """Make an earlier version live again: `version` (an id or prefix), or the one before the live one."""
        if self._pinned:
            raise BundleError("version", "this runtime serves one fixed version and takes no other")
        with self._changing:
            wanted = self._registry.get(version).version if version else self._registry.previous()
            if not wanted:
                raise BundleError("version", "there is no version before the live one")
            if self._previous is not None and self._previous.version == wanted:
                policy = self._previous
            else:
                policy = self.installed(wanted)
            self._flip(policy, why)
        return policy.version

    def _flip(self, policy: Policy, why: str) -> None:
        if policy.version == self._policy.version:
            return
        # The registry first: after a crash in between, the version that was promised is the one that comes up.
        self._registry.set_live(policy.version, why=why)
        self._previous_version = self._registry.previous() or ""
        self._previous, self._policy = self._policy, policy
        self.swaps += 1

    def prune(self, needed: str = "") -> None:
        """Delete old bundles; the roots of a lineage, the live version, the one before it and `needed` always stay.

        A bundle made elsewhere has a parent that this run does not know: here it is a root.
        """
        keep = {self._policy.version, self.previous, needed}
        known = {row.version for row in self._registry.list()}
        rows = [row for row in self._registry.list() if row.parent in known and row.version not in keep]
        for row in sorted(rows, key=lambda row: row.number)[: -self._keep]:
            directory = self._run.policies / row.version
            if directory.is_dir():
                shutil.rmtree(directory)


def require_same_interface(new: PolicySpec, live: PolicySpec) -> None:
    """Robots are connected for the live policy's spec; a version that sees or gives anything else is refused."""
    for name in SAME:
        if getattr(new, name) != getattr(live, name):
            raise BundleError(
                "policy.yaml", f"{name} is {getattr(new, name)!r}, the live policy has {getattr(live, name)!r}"
            )
