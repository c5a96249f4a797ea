"""What the server remembers of each client: its session, its open episode, its last decision."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendSpec
from bridge.messages import RULES, Code, EndEpisode, Ending, Infer, WireError

Arrays = dict[str, NDArray[Any]]
REPORT = ("sent", "reward", "rules")


class RefusalError(Exception):
    """A request that does not fit the state of its session."""

    def __init__(self, code: Code, where: str, message: str) -> None:
        super().__init__(f"{code}: {where}: {message}")
        self.code: Code = code
        self.where = where
        self.message = message


@dataclass(slots=True)
class OpenEpisode:
    """An episode in progress. `decision` counts those asked for; `reported` those whose execution is known."""

    episode: str
    task: str
    seed: int
    instruction: str
    horizon_steps: int
    decision: int = 0
    reported: int = 0
    steps: int = 0
    waiting: bool = False
    """A chunk was asked for and not sent yet."""
    started: bool = False
    """The first record is in the log."""
    storing: bool = False
    """The end is with the log and not acknowledged yet."""
    ending: Ending = ""
    """How the operator wants it to end."""
    interventions: Counter[str] = field(default_factory=Counter)
    """Steps reported so far that each rule of the safety stage changed."""

    def check_report(self, message: Infer | EndEpisode, report: Arrays, horizon: int, d: int) -> int:
        """k, the number of actions executed of the last decision; 0 if no decision waits for its report.

        Each decision is reported exactly once, with the request after it: the log cannot disagree with the robot.
        """
        if message.episode != self.episode or self.storing:
            raise RefusalError("episode", "episode", f"{message.episode!r} is not open in this session")
        if self.waiting:
            raise RefusalError("episode", "episode", f"decision {self.decision} is still being computed")
        due = self.decision if self.reported != self.decision else 0
        if message.executed != due:
            why = f"decision {due} was not reported" if due else "no decision waits for its report"
            raise RefusalError("episode", "executed", f"is {message.executed}, but {why}")
        if not due:
            if report:
                raise WireError("tensors", f"has {', '.join(report)}, but `executed` is 0")
            return 0
        sent, reward = report.get("sent"), report.get("reward")
        if sent is None or reward is None:
            raise WireError("tensors", "expected `sent` and `reward`")
        k = len(sent) if sent.ndim else 0
        if sent.dtype != np.float32 or sent.shape != (k, d) or not 1 <= k <= horizon:
            raise WireError("tensors.sent", f"is {sent.dtype}{list(sent.shape)}, expected float32 [1..{horizon}, {d}]")
        if reward.dtype != np.float32 or reward.shape != (k,):
            raise WireError("tensors.reward", f"is {reward.dtype}{list(reward.shape)}, expected float32 [{k}]")
        rules = report.get("rules")
        if rules is not None and (rules.dtype != np.uint8 or rules.shape != (k,) or (rules >> len(RULES)).any()):
            raise WireError("tensors.rules", f"expected uint8 [{k}] with bits of the {len(RULES)} rules")
        if not (np.isfinite(sent).all() and np.isfinite(reward).all()):
            raise WireError("tensors", "`sent` or `reward` holds a value that is not finite")
        if self.steps + k > self.horizon_steps:
            raise RefusalError("episode", "tensors.sent", f"the episode may have {self.horizon_steps} steps")
        return k

    def count_interventions(self, rules: NDArray[np.uint8]) -> None:
        """Add the steps `[k]` of a report in which the safety stage changed the action."""
        for bit, rule in enumerate(RULES):
            count = int((rules >> bit & 1).sum())
            if count:
                self.interventions[rule] += count

    def check_infer(self, message: Infer, k: int) -> None:
        """A chunk is asked for at the step that the reports, with the `k` of this one, have come to."""
        if message.step != self.steps + k:
            raise RefusalError("episode", "step", f"is {message.step}, but {self.steps + k} steps were reported")

    def check_end(self, message: EndEpisode, k: int) -> None:
        """An episode ends with a decision made and every step counted."""
        if not self.decision:
            raise RefusalError("episode", "decision", "no decision was made in this episode")
        if message.steps != self.steps + k:
            raise RefusalError("episode", "steps", f"is {message.steps}, but {self.steps + k} steps were reported")


def take_report(arrays: Arrays) -> Arrays:
    """The tensors of a report, taken out of `arrays`; what is left is the observation."""
    return {name: arrays.pop(name) for name in REPORT if name in arrays}


@dataclass(slots=True)
class Session:
    """One client since its hello."""

    session: str
    identity: bytes
    client: str
    spec: BackendSpec | None
    last_request: int
    last_seen_s: float
    open: OpenEpisode | None = None
    decisions: int = 0
    episodes: int = 0


@dataclass(slots=True)
class Sessions:
    """All sessions, by id and by ZeroMQ identity."""

    by_id: dict[str, Session] = field(default_factory=dict)
    by_identity: dict[bytes, Session] = field(default_factory=dict)

    def add(self, session: Session) -> None:
        """Remember a session; an older one of the same identity must have been removed."""
        self.by_id[session.session] = session
        self.by_identity[session.identity] = session

    def remove(self, session: Session) -> None:
        """Forget a session."""
        self.by_id.pop(session.session, None)
        if self.by_identity.get(session.identity) is session:
            del self.by_identity[session.identity]

    def find(self, session: str, identity: bytes) -> Session:
        """The session, if this client owns it."""
        found = self.by_id.get(session)
        if found is None or found.identity != identity:
            raise RefusalError("session", "session", "unknown or of another client; say hello first")
        return found
