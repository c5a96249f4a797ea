"""What the server remembers of each client: its session, its open episode, its last decision."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendSpec
from bridge.messages import RULES, Code, EndEpisode, Ending, Infer, WireError
from bridge.safety import STARVED
from runtime.inference import Pending

Arrays = dict[str, NDArray[Any]]
MOST_UNPLAYED = 100  # chunks in a row of which nothing was played: each is logged with its images
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
    """An episode in progress. `decision` counts the chunks asked for, `steps` the environment steps reported."""

    episode: str
    task: str
    seed: int
    instruction: str
    horizon_steps: int
    arm: str = ""
    """The version that drives it, if that is not whatever is live."""
    started_unix_s: float = 0.0
    decision: int = 0
    steps: int = 0
    observed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Decision -> environment step of its observation and actions that were committed at it, for those that may still
    be played."""
    waiting: Pending | None = None
    """The chunk that was asked for and not sent yet."""
    started: bool = False
    """The first record is in the log."""
    storing: bool = False
    """The end is with the log and not acknowledged yet."""
    ending: Ending = ""
    """How the operator wants it to end."""
    interventions: Counter[str] = field(default_factory=Counter)
    """Steps reported so far that each rule of the safety stage changed."""

    def check_report(self, message: Infer | EndEpisode, report: Arrays, horizon: int, d: int) -> int:
        """k, the number of environment steps that the message reports.

        Each step is reported exactly once, as the action of a chunk at the index that belongs to it: the log cannot
        disagree with the robot. Raises `RefusalError` and `WireError`.
        """
        if message.episode != self.episode or self.storing:
            raise RefusalError("episode", "episode", f"{message.episode!r} is not open in this session")
        aborting = isinstance(message, EndEpisode) and message.status == "aborted"
        if self.waiting and not aborting:
            raise RefusalError("episode", "episode", f"decision {self.decision} is still being computed")
        k = sum(slice_.steps for slice_ in message.played)
        if not message.played:
            if report:
                raise WireError("tensors", f"has {', '.join(report)}, but `played` is empty")
            return 0
        sent, reward, rules = report.get("sent"), report.get("reward"), report.get("rules")
        if sent is None or reward is None:
            raise WireError("tensors", "expected `sent` and `reward`")
        if sent.dtype != np.float32 or sent.shape != (k, d):
            raise WireError("tensors.sent", f"is {sent.dtype}{list(sent.shape)}, expected float32 [{k}, {d}]")
        if reward.dtype != np.float32 or reward.shape != (k,):
            raise WireError("tensors.reward", f"is {reward.dtype}{list(reward.shape)}, expected float32 [{k}]")
        if rules is not None and (rules.dtype != np.uint8 or rules.shape != (k,) or (rules >> len(RULES)).any()):
            raise WireError("tensors.rules", f"expected uint8 [{k}] with bits of the {len(RULES)} rules")
        if not (np.isfinite(sent).all() and np.isfinite(reward).all()):
            raise WireError("tensors", "`sent` or `reward` holds a value that is not finite")
        if self.steps + k > self.horizon_steps:
            raise RefusalError("episode", "tensors.sent", f"the episode may have {self.horizon_steps} steps")
        self._check_played(message, np.zeros(k, np.uint8) if rules is None else rules, horizon)
        return k

    def _check_played(self, message: Infer | EndEpisode, rules: NDArray[np.uint8], horizon: int) -> None:
        """Raise unless every slice is of a chunk that was sent, in order, and at the index that its time says."""
        playing, step = min(self.observed, default=0), self.steps
        for i, (decision, start, steps) in enumerate((p.decision, p.start, p.steps) for p in message.played):
            where = f"played[{i}]"
            if decision not in self.observed or decision < playing:
                raise RefusalError("episode", f"{where}.decision", f"{decision} is not a decision that can be played")
            observed, committed = self.observed[decision]
            if start != step - observed:
                why = f"is {start}, but {step - observed} steps followed its observation"
                raise RefusalError("episode", f"{where}.start", why)
            if start < committed:
                why = f"is {start}, but {committed} actions of the chunk before were to be played first"
                raise RefusalError("episode", f"{where}.start", why)
            starved = rules[step - self.steps : step - self.steps + steps] & STARVED > 0
            if steps < 1 or not starved[max(0, horizon - start) :].all():
                raise WireError(f"{where}.steps", f"is {steps} from {start} on, the chunk has {horizon} actions")
            playing, step = decision, step + steps

    def note_report(self, message: Infer | EndEpisode, k: int) -> None:
        """What was checked has happened."""
        self.steps += k
        if message.played:
            playing = message.played[-1].decision
            self.observed = {decision: seen for decision, seen in self.observed.items() if decision >= playing}

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
        if len(self.observed) > MOST_UNPLAYED and not k:
            raise RefusalError("episode", "played", f"is empty, and {MOST_UNPLAYED} chunks were not played")

    def check_end(self, message: EndEpisode, k: int) -> None:
        """An episode ends with a decision made and every step counted; an aborted one may end before its first step."""
        if not self.decision:
            raise RefusalError("episode", "decision", "no decision was made in this episode")
        if not self.steps + k and message.status != "aborted":
            raise RefusalError("episode", "played", "nothing was executed in this episode")
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
