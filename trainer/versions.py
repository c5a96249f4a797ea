"""The versions that training makes: written as bundles, entered in the registry, made live, and followed by operators.

    bundle on disk -> registry -> ... -> announced to the runtime

What lies between is the trainer's: a version may wait for its announcement through a crash.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from runtime.bundle import Bundle, BundleError, read_bundle
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.config import PPOConfig
from trainer.export import Exporter, become
from trainer.ratio import Behaviours
from trainer.vla import VLA


class Versions:
    """`current` is the version of the weights that `vla` has; `behaviours` knows what may have acted."""

    def __init__(
        self,
        run: RunDir,
        vla: VLA,
        bundle: Bundle,
        *,
        max_staleness_versions: int,
        announce: Callable[[Path], None],
        warn: Callable[[str], None],
    ) -> None:
        """`vla` has the weights of `bundle`, a version of the run. `announce` makes the runtime serve a bundle."""
        self._policies, self._registry = run.policies, Registry(run.registry)
        self._vla, self._announce, self._warn = vla, announce, warn
        self._exporter = Exporter.of_bundle(vla, bundle)
        self._tokenizer = _text_of(bundle)
        self._found_foreign: dict[str, str] = {}
        self._warned_of = ""
        self.behaviours = Behaviours(run.policies, vla, max_staleness_versions + 2)
        self.max_staleness_versions = max_staleness_versions
        """Decisions of older versions are not learned from."""
        self.current = bundle.version

    def add(self, made: dict[str, Any]) -> None:
        """Write the weights as a bundle and enter it in the registry; it is not live yet."""
        version = self._exporter.publish(self._policies, parent=self.current, made=made)
        self._registry.add(version, parent=self.current, made=made)
        self.behaviours.remember(version, self._vla)
        self.current = version

    def age(self, version: str) -> int:
        """How many versions ago it acted; more than `max_staleness_versions` if it is foreign or explored with another
        noise than is now, since nothing can be learned from that.
        """
        age, limit = self.behaviours.age(version), self.max_staleness_versions
        if age > limit:
            return age
        usable = not self._foreign(version) and self.behaviours.explored_like(version, self._vla)
        return age if usable else age + limit + 1

    @property
    def on_trial(self) -> bool:
        """Whether it is not decided yet if the current version goes live (`runtime.staging`)."""
        return self._registry.stage(self.current) in ("candidate", "canary")

    @property
    def waiting(self) -> bool:
        """Whether nothing can be learned now: the current version is on trial, or a foreign one is live."""
        live = self._registry.live()
        return self.on_trial or (live is not None and bool(self._foreign(live)))

    def follow_live(self) -> bool:
        """Announce the current version, or follow whoever has gone back from it; whether other weights are current now.

        A version that never was live or on trial is one whose announcement is still to be made (now, or after a crash),
        unless somebody has gone back from its parent meanwhile: it would bring back what they wanted to be rid of. One
        that is neither any more has been rejected or replaced on purpose: learning goes on from what is live. If that
        is foreign, of another network or tokenizer, the current version stays, until one is live that is not.
        """
        was_live = self.current in {change.version for change in self._registry.history()}
        unknown = not was_live and self._registry.stage(self.current) is None
        if unknown and self._registry.live() in (None, self._registry.get(self.current).parent):
            self._announce(self._policies / self.current)
        live = self._registry.live()
        replaced = False
        if live is not None and (why := self._foreign(live)):
            if live != self._warned_of:
                self._warn(
                    f"version {live[:12]} is live, and it cannot be trained further ({why}); nothing is learned until "
                    "another one is live"
                )
        elif live is not None and live != self.current and not self.on_trial:
            self._warn(f"version {live[:12]} is live, not {self.current[:12]}; going on from it")
            become(self._vla, read_bundle(self._policies / live))
            self.behaviours.remember(live, self._vla)
            self.current = live
            replaced = True
        self._warned_of = live or ""
        self.behaviours.set_history(self._registry.acted())
        return replaced

    def _foreign(self, version: str) -> str:
        """Why its weights cannot be trained further here, nor what it did be learned from; empty if they can."""
        if version not in self._found_foreign:
            known = version in self.behaviours.recent()
            self._found_foreign[version] = "" if known else self._difference(version)
        return self._found_foreign[version]

    def _difference(self, version: str) -> str:
        try:
            bundle = read_bundle(self._policies / version)
            become(copy.deepcopy(self._vla), bundle)
        except BundleError as error:
            return str(error)
        return "" if _text_of(bundle) == self._tokenizer else "its tokenizer is another"

    def set_exploration(self, ppo: PPOConfig) -> None:
        """Let the run explore with the noise that it asks for, if the version it starts from has another.

        Nobody has to make its supervised fine-tuning again for that. What it makes is a version like any other, and the
        runtime swaps to it before anything is learned.
        """
        spec, log_sigma = self._vla.spec, self._vla.log_sigma.detach()
        rho = spec.noise_correlation if ppo.noise_correlation is None else ppo.noise_correlation
        wanted = log_sigma if ppo.sigma is None else torch.full_like(log_sigma, math.log(ppo.sigma))
        if rho == spec.noise_correlation and torch.equal(wanted, log_sigma):
            return
        self._vla.spec = msgspec.structs.replace(spec, noise_correlation=rho)
        with torch.no_grad():
            self._vla.log_sigma.copy_(wanted)
        self.add({"command": "explore", "sigma": self._vla.sigma, "noise_correlation": rho})

    def first(self) -> VLA:
        """The policy that the run started from, as one that does not learn."""
        frozen = copy.deepcopy(self._vla).requires_grad_(False)
        become(frozen, read_bundle(self._policies / self._registry.first().version))
        return frozen


def _text_of(bundle: Bundle) -> str:
    """Its tokenizer, written as an exporter does: a bundle made elsewhere may have the same one in other words."""
    return Tokenizer.from_str(bundle.tokenizer).to_str()
