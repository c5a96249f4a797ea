"""Which action is due now: the chunk that plays, and the one that comes while it plays.

Action i of a chunk is for the environment step i after its observation. Those steps are counted as they are executed,
never estimated from a time, so a chunk that comes late is played trimmed, and never shifted. How it takes over from the
one before:

    switch  at once
    blend   over some steps, each the mean of both with a weight that moves from the old one to the new
    prefix  where the actions end that the policy was told to be committed (arXiv 2512.05964); at once if it is late
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bridge.backend import Float32, UInt8
from bridge.messages import Played

BLEND_STEPS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """A chunk `actions` `[h, d]` for what was seen at `observed_step`, to be played from step `first_step` on."""

    decision: int
    observed_step: int
    observed_s: float
    first_step: int
    actions: Float32


@dataclass(slots=True)
class Chunks:
    """The actions of one episode, by environment step.

    `check` says what may be sent of the rest of a chunk `[m, d]`, and by which rules `[m]` it differs; it is asked when
    the chunk takes over, because what may be sent depends on what was sent last.
    """

    check: Callable[[Float32], tuple[Float32, UInt8]]
    blend_steps: int = 0
    plan: Plan | None = None
    """The chunk that plays, or played last."""
    _next: Plan | None = None
    _first_step: int = 0
    _actions: Float32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    _rules: UInt8 = field(default_factory=lambda: np.zeros(0, np.uint8))

    def put(self, plan: Plan) -> None:
        """A chunk has come; it takes over at its first step, or now if that is past."""
        self._next = plan

    def due(self, step: int) -> tuple[Float32, int] | None:
        """The action `[d]` of an environment step and the bits of the rules that changed it; None if there is none.

        `step` never goes back.
        """
        if self._next is not None and step >= self._next.first_step:
            plan, self._next = self._next, None
            rest = plan.actions[step - plan.observed_step :]
            if len(rest):
                rest = self._blended(rest, self.left(step))
                self.plan, self._first_step = plan, step
                self._actions, self._rules = self.check(rest)
        i = step - self._first_step
        return (self._actions[i], int(self._rules[i])) if i < len(self._actions) else None

    def left(self, step: int) -> Float32:
        """What of the chunk that plays is left from this step on, `[m, d]`."""
        return self._actions[max(0, step - self._first_step) :]

    def index(self, step: int) -> int:
        """The index of a step in the chunk that plays, which may have ended before it."""
        assert self.plan is not None, "nothing has played yet"
        return step - self.plan.observed_step

    def drop(self) -> None:
        """Nothing of what has come is played any more."""
        self._next, self._actions = None, self._actions[:0]

    def _blended(self, new: Float32, old: Float32) -> Float32:
        n = min(self.blend_steps, len(new), len(old))
        if not n:
            return new
        weight = (np.arange(1, n + 1, dtype=np.float32) / np.float32(n + 1))[:, None]
        return np.concatenate([(1 - weight) * old[:n] + weight * new[:n], new[n:]])


@dataclass(slots=True)
class StepReport:
    """What was executed since the last report: which actions of which chunks, what was sent, and what came of it."""

    _played: list[Played] = field(default_factory=list)
    _sent: list[Float32] = field(default_factory=list)
    _rewards: list[float] = field(default_factory=list)
    _rules: list[int] = field(default_factory=list)

    def add(self, decision: int, index: int, sent: Float32, reward: float, rules: int) -> None:
        """One environment step, for which the action at `index` of a chunk was due."""
        last = self._played[-1] if self._played else None
        if last is not None and last.decision == decision:
            self._played[-1] = Played(decision, last.start, last.steps + 1)
        else:
            self._played.append(Played(decision, index, 1))
        self._sent.append(sent)
        self._rewards.append(reward)
        self._rules.append(rules)

    def take(self) -> tuple[tuple[Played, ...], dict[str, Float32 | UInt8]]:
        """The slices, and the tensors that go with them (see `bridge.messages.Infer`); begins anew."""
        if not self._played:
            return (), {}
        tensors: dict[str, Float32 | UInt8] = {
            "sent": np.stack(self._sent),
            "reward": np.array(self._rewards, np.float32),
        }
        if any(self._rules):
            tensors["rules"] = np.array(self._rules, np.uint8)
        played = tuple(self._played)
        self._played, self._sent, self._rewards, self._rules = [], [], [], []
        return played, tensors
