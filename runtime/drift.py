"""The drift alarm: are success, steps, actions and observations still what the version's own record says?

Every statistic of an episode is one number. Its first `record_episodes` values are the record; after that each new
value is ranked among all before it. While nothing changes the values are exchangeable, so every rank is equally
likely whatever their distribution, and a bet on extreme ranks gains nothing on average. That is a conformal test
martingale; its Shiryaev-Roberts sum R <- (1 + R) e starts a new bet at every episode, so that a change is found
however late it comes (Vovk et al., "Retrain or not retrain", arXiv 2102.10439). Without ties R - n is a martingale,
so that by Doob's inequality R reaches A within n episodes with probability at most n / A (it is an e-detector: Shin,
Ramdas and Rinaldo, arXiv 2203.03532); with ties its mean is n or less, which proves no such bound. A is chosen so that
all alarms together stay below what `DriftRule` allows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bridge.backend import BackendSpec
from bridge.errors import FieldtuneError
from runtime.episode import Episode

Direction = Literal["fell", "rose"]

POWERS: NDArray[np.float64] = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
"""The k of the bets k p^(k - 1) on the rank p in (0, 1]; R is shared equally among them (Vovk's power martingales)."""
OUTCOMES: dict[str, tuple[Direction, ...]] = {"success": ("fell",), "steps": ("rose",)}
INTERVENTIONS = "interventions"
# Where nearly all values are one, they win and lose nothing, and R grows by 1 an episode; the first other value would
# then win hugely, and one failure after 800 successes be an alarm. So the worst counts as if it had been seen once.
WORST: dict[tuple[str, Direction], float] = {("success", "fell"): 0.0, (INTERVENTIONS, "rose"): 1.0}
RECENT = 20


class DriftError(FieldtuneError):
    """Statistics that do not belong to this monitor, or are not numbers."""


class DriftRule(Struct, frozen=True, forbid_unknown_fields=True):
    """How large the record is and how seldom a false alarm must be."""

    record_episodes: Annotated[int, Meta(ge=2)] = 100
    """Values of a statistic that make up its record; no alarm before."""
    false_alarm: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    """Most that the probability of a false alarm, of any statistic, may be within `window_episodes`."""
    window_episodes: Annotated[int, Meta(ge=1)] = 1000
    """Episodes after the record within which `false_alarm` holds."""


class Drift(Struct, frozen=True):
    """A statistic that has left its record."""

    statistic: str
    direction: Direction
    episode: int
    """How many episodes had been taken in, the record's too, when the alarm came."""
    record: float
    """Mean over the record."""
    recent: float
    """Mean over the last 20 values at the alarm."""


def statistic_names(spec: BackendSpec) -> tuple[str, ...]:
    """The statistics that `episode_statistics` can give for a backend."""
    vectors = (("action", spec.action.names), ("state", spec.state.names))
    return (
        *OUTCOMES,
        *(f"{kind} {name} {what}" for kind, names in vectors for name in names for what in ("mean", "std")),
        *(f"image {camera.name} brightness" for camera in spec.cameras),
    )


def episode_statistics(episode: Episode) -> dict[str, float]:
    """One episode as numbers, by the names of `statistic_names`.

    success is 1 or 0; steps are given for a success only. Mean and standard deviation of each element are over the
    actions that were sent and over the observations at the decisions; brightness is the mean of all pixels, 0 to 255.
    An aborted episode gives nothing, one that sent nothing no actions.
    """
    if episode.status == "aborted":
        return {}
    spec = episode.start.spec
    found = {"success": float(episode.success)}
    if episode.success:
        found["steps"] = float(episode.steps)
    observations = [decision.observation for decision in episode.decisions]
    sent = [decision.sent for decision in episode.decisions if len(decision.sent)]
    if sent:
        found |= _moments("action", spec.action.names, np.concatenate(sent))
    if observations:
        found |= _moments("state", spec.state.names, np.stack([seen.state for seen in observations]))
        for camera in spec.cameras:
            brightness = np.mean([seen.images[camera.name].mean() for seen in observations])
            found[f"image {camera.name} brightness"] = float(brightness)
    return found


class DriftMonitor:
    """Watches the episodes of one version. Its state is what was added: add the same again, and it stands as before."""

    def __init__(self, names: Iterable[str], rule: DriftRule | None = None) -> None:
        """`names` are the statistics to watch; "success" is watched for falling, "steps" for rising, others for both.

        Half of the false alarms that the rule allows are for success and steps, half for all else.
        """
        self.rule = DriftRule() if rule is None else rule
        directions = {name: OUTCOMES.get(name, ("fell", "rose")) for name in names}
        outcomes = sum(len(directions[name]) for name in OUTCOMES if name in directions)
        others = sum(map(len, directions.values())) - outcomes
        per_alarm = self.rule.window_episodes / (self.rule.false_alarm / 2)
        self._watched = {
            name: [
                _Watch(direction, WORST.get((name, direction)), per_alarm * (outcomes if name in OUTCOMES else others))
                for direction in given
            ]
            for name, given in directions.items()
        }
        self.names = frozenset(directions)
        self._values: dict[str, list[float]] = {name: [] for name in directions}
        self._ordered: dict[str, list[float]] = {name: [] for name in directions}
        """The same, sorted."""
        self.drifts: list[Drift] = []
        """All alarms, oldest first; each statistic and direction gives one at most."""
        self.episodes = 0

    def add(self, statistics: Mapping[str, float]) -> list[Drift]:
        """Take in one episode; gives the alarms that it raises. A statistic that it does not have is left out.

        Raises `DriftError` for a name that is not watched or a value that is not finite.
        """
        for name, value in statistics.items():
            if name not in self._values or not np.isfinite(value):
                raise DriftError(f"drift: {name} = {value} is not watched here, or not a finite number")
        self.episodes += 1
        raised = []
        for name, value in statistics.items():
            values, ordered = self._values[name], self._ordered[name]
            values.append(value)
            insort(ordered, value)
            if len(values) <= self.rule.record_episodes:
                continue
            for watch in self._watched[name]:
                if not watch.alarmed and watch.step(ordered, value):
                    record, recent = np.mean(values[: self.rule.record_episodes]), np.mean(values[-RECENT:])
                    raised.append(Drift(name, watch.direction, self.episodes, float(record), float(recent)))
        self.drifts += raised
        return raised

    def evidence(self) -> dict[str, float]:
        """For each statistic the larger of its R over what would raise the alarm; 1 and more is an alarm."""
        return {
            name: max(float(watch.sums.mean()) / watch.needed for watch in found)
            for name, found in self._watched.items()
        }


def rank_bet(
    ordered: Sequence[float], last: float, direction: Direction, worst: float | None = None
) -> NDArray[np.float64]:
    """e-value of `last` being extreme among all values seen, for each of `POWERS`. `ordered` are these values, sorted,
    `last` among them.

    Ties are shared out: the bet is the mean over all ranks that the value may be said to have. `worst` counts as if it
    had been seen once. Over n values, each the last in its turn, the mean is exactly 1, with `worst` at most 1.
    """
    less, more = bisect_left(ordered, last), len(ordered) - bisect_right(ordered, last)
    count = len(ordered)
    if worst is not None:
        less, more, count = less + (worst < last), more + (worst > last), count + 1
    beyond, behind = (less, more) if direction == "fell" else (more, less)
    low, high = beyond / count, (count - behind) / count
    # The integral of k p^(k - 1) from low to high, over its width.
    return np.asarray((high**POWERS - low**POWERS) / (high - low))


class _Watch:
    """One statistic in one direction: the Shiryaev-Roberts sums of `POWERS`."""

    def __init__(self, direction: Direction, worst: float | None, needed: float) -> None:
        self.direction, self.worst, self.needed = direction, worst, needed
        self.sums = np.zeros(len(POWERS))

    @property
    def alarmed(self) -> bool:
        return bool(self.sums.mean() >= self.needed)

    def step(self, ordered: Sequence[float], last: float) -> bool:
        self.sums = (1 + self.sums) * rank_bet(ordered, last, self.direction, self.worst)
        return self.alarmed


def _moments(kind: str, names: tuple[str, ...], rows: NDArray[np.float32]) -> dict[str, float]:
    """Mean and standard deviation of each element of rows `[n, d]`."""
    # In float64: the sum of many equal float32 is not exact, and ties matter where ranks are compared.
    wide = rows.astype(np.float64)
    moments: dict[str, float] = {}
    for name, mean, std in zip(names, wide.mean(axis=0), wide.std(axis=0), strict=True):
        moments |= {f"{kind} {name} mean": float(mean), f"{kind} {name} std": float(std)}
    return moments
