"""What an evaluation says, with how sure it is: success, steps to success, and two evaluations compared goal by goal.

Intervals of a success rate are Wilson's, intervals of mean steps are percentile bootstraps that resample goals within
each task (the tasks are fixed, the goals are a sample), those that failed too. Everything is deterministic: the
resampling has a fixed seed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bridge.errors import FieldtuneError
from runtime.episode import End

Interval = tuple[float, float]
RESAMPLES = 4000
RESAMPLING_SEED = 20_250
# Student's t, quantile 0.975, for 1, 2, ... degrees of freedom.
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class StatisticsError(FieldtuneError):
    """Figures that cannot be computed or compared; the message says why."""


class Row(Protocol):
    """What `summarise` needs of an episode; a row of the episode index has it."""

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the goal."""
        ...

    @property
    def status(self) -> End:
        """How the episode ended."""
        ...

    @property
    def steps(self) -> int:
        """Environment steps executed."""
        ...


class Trial(Struct, frozen=True, forbid_unknown_fields=True):
    """One goal that was tried to its end."""

    task: str
    seed: int
    success: bool
    steps: int


class Result(Struct, frozen=True, forbid_unknown_fields=True):
    """Success and steps of one task, or of all of them."""

    n: int
    """Episodes counted."""
    successes: int
    success: float
    """Share of successes; 0 where n = 0."""
    success_interval: Interval
    """Wilson 95 % interval."""
    steps: float | None
    """Mean steps over the successes; None without one."""
    steps_interval: Interval | None
    """Bootstrap 95 % interval of `steps`; None with fewer than two successes."""
    steps_all: float | None
    """Mean steps over all episodes, failures counted at the horizon; None where n = 0."""
    steps_all_interval: Interval | None
    """Bootstrap 95 % interval of `steps_all`; None with fewer than two episodes."""
    aborted: int
    """Episodes that broke off (a worker died, say); in none of the figures above."""


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """The result of evaluating one version: by task, overall, and every goal that was tried."""

    version: str
    horizon_steps: int
    action: Literal["mean", "sample"]
    """Whether the mean action was taken, without noise, or a sample."""
    confidence: float
    seeds: tuple[int, ...]
    """Seeds of the goals, ascending, each once."""
    tasks: dict[str, Result]
    overall: Result
    repeated: int
    """Episodes left out because their goal had been counted already."""
    trials: tuple[Trial, ...]
    unjudged: int = 0
    """Episodes that wait for somebody to say how they went; in none of the figures."""


class Comparison(Struct, frozen=True, forbid_unknown_fields=True):
    """Two evaluations on the same goals; differences are `after` minus `before`."""

    goals: int
    """Goals that both evaluations tried."""
    both_succeed: int
    gained: int
    """Goals where only `after` succeeds."""
    lost: int
    """Goals where only `before` succeeds."""
    mcnemar_p: float
    """Exact two-sided p of as uneven a split of gained and lost, were both equally likely."""
    steps_difference: float | None
    """Mean difference of steps over goals where both succeed; None without one."""
    steps_difference_interval: Interval | None
    """Bootstrap 95 % interval; None with fewer than two such goals."""
    steps_ratio: float | None
    """Mean steps after / before over the same goals."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) where n = 0.

    Raises `StatisticsError` unless 0 <= successes <= n and 0 < confidence < 1.
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise StatisticsError(f"wilson: {successes} of {n} at confidence {confidence} is not a proportion")
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # The ends are 0 and 1 exactly where nothing or all succeeded; rounding must not say otherwise.
    return (0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half))


def mean_interval(
    groups: Sequence[Sequence[float | None]], confidence: float = 0.95
) -> tuple[float | None, Interval | None]:
    """Mean over all values and its percentile bootstrap interval, goals resampled within each group.

    A goal without a value (it failed, and steps to success are asked for) is None: which goals have one is by chance
    too, and with it the weight of each group. The mean is None without a value, the interval None with fewer than two.
    """
    arrays = _arrays(groups)
    n = sum(int(np.isfinite(array).sum()) for array in arrays)
    if n == 0:
        return None, None
    mean = float(sum(np.nansum(array) for array in arrays) / n)
    if n < 2:
        return mean, None
    return mean, _middle(_resampled_means(arrays, RESAMPLING_SEED), confidence)


def ratio_interval(
    above: Sequence[Sequence[float | None]], below: Sequence[Sequence[float | None]], confidence: float = 0.95
) -> Interval | None:
    """Bootstrap interval of mean(above) / mean(below), each as in `mean_interval`; None where one has no value.

    The two are resampled apart, so what they have in common is not used and the interval is on the wide side.
    """
    arrays = [_arrays(groups) for groups in (above, below)]
    if not all(any(np.isfinite(array).any() for array in groups) for groups in arrays):
        return None
    means = [_resampled_means(groups, RESAMPLING_SEED + i) for i, groups in enumerate(arrays)]
    return _middle(means[0] / means[1], confidence)


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's 95 % interval of the mean of a few independent values (seeds); None with fewer than two.

    From eleven values on it uses the quantile for ten, which is a little too wide.
    """
    n = len(values)
    if n < 2:
        return None
    array = np.asarray(values, np.float64)
    half = STUDENT_975[min(n - 2, len(STUDENT_975) - 1)] * float(array.std(ddof=1)) / math.sqrt(n)
    return float(array.mean()) - half, float(array.mean()) + half


def _arrays(groups: Sequence[Sequence[float | None]]) -> list[NDArray[np.float64]]:
    """NaN stands for no value."""
    return [np.array(group, np.float64) for group in groups if len(group)]


def _resampled_means(arrays: Sequence[NDArray[np.float64]], seed: int) -> NDArray[np.float64]:
    """Means over the values in each of `RESAMPLES` draws with replacement within each array; NaN without one."""
    rng = np.random.default_rng(seed)
    totals: NDArray[np.float64] = np.zeros(RESAMPLES)
    counts: NDArray[np.float64] = np.zeros(RESAMPLES)
    for array in arrays:
        drawn = array[rng.integers(len(array), size=(RESAMPLES, len(array)))]
        totals += np.nansum(drawn, axis=1)
        counts += np.isfinite(drawn).sum(axis=1)
    return totals / np.where(counts > 0, counts, np.nan)


def _middle(values: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def summarise(
    rows: Iterable[Row],
    *,
    version: str,
    horizon_steps: int,
    action: Literal["mean", "sample"] = "mean",
    confidence: float = 0.95,
) -> Evaluation:
    """The evaluation that these episodes are.

    Aborted episodes, and those that nobody has judged, are left out and counted. Of several episodes of one goal the
    first counts: an episode is done again only when its first report was lost, and counting both would weigh that goal
    twice.
    """
    trials: dict[tuple[str, int], Trial] = {}
    aborted: dict[str, int] = defaultdict(int)
    tasks: set[str] = set()
    repeated = unjudged = 0
    for row in rows:
        tasks.add(row.task)
        if row.status == "aborted":
            aborted[row.task] += 1
        elif row.status == "unjudged":
            unjudged += 1
        elif (row.task, row.seed) in trials:
            repeated += 1
        else:
            trials[row.task, row.seed] = Trial(row.task, row.seed, row.status == "success", row.steps)
    ordered = tuple(sorted(trials.values(), key=lambda trial: (trial.task, trial.seed)))
    by_task = {task: [trial for trial in ordered if trial.task == task] for task in sorted(tasks)}
    return Evaluation(
        version=version,
        horizon_steps=horizon_steps,
        action=action,
        confidence=confidence,
        seeds=tuple(sorted({trial.seed for trial in ordered})),
        tasks={task: result_of([own], aborted[task], horizon_steps, confidence) for task, own in by_task.items()},
        overall=result_of(list(by_task.values()), sum(aborted.values()), horizon_steps, confidence),
        repeated=repeated,
        trials=ordered,
        unjudged=unjudged,
    )


def result_on(evaluation: Evaluation, tasks: Iterable[str]) -> Result:
    """The result of some of its tasks together."""
    groups = [[trial for trial in evaluation.trials if trial.task == task] for task in tasks]
    aborted = sum(evaluation.tasks[task].aborted for task in tasks)
    return result_of(groups, aborted, evaluation.horizon_steps, evaluation.confidence)


def left_out(evaluation: Evaluation) -> str:
    """How many episodes count in none of its figures, and why, in words; empty if all do."""
    counts = {
        "aborted": evaluation.overall.aborted,
        "that nobody has judged": evaluation.unjudged,
        "repeated": evaluation.repeated,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """`after` against `before` on the goals that both tried. Raises `StatisticsError` if they share none."""
    old = {(trial.task, trial.seed): trial for trial in before.trials}
    pairs = [(old[trial.task, trial.seed], trial) for trial in after.trials if (trial.task, trial.seed) in old]
    if not pairs:
        raise StatisticsError(
            f"the evaluations of {before.version[:12]} and {after.version[:12]} have no goal in common; "
            "evaluate both with the same tasks and first_seed"
        )
    if before.horizon_steps != after.horizon_steps:
        raise StatisticsError(
            f"one evaluation ran for {before.horizon_steps} steps, the other for {after.horizon_steps}; "
            "evaluate both with the same bridge.horizon_steps"
        )
    both = [(a, b) for a, b in pairs if a.success and b.success]
    gained = sum(b.success and not a.success for a, b in pairs)
    lost = sum(a.success and not b.success for a, b in pairs)
    differences: dict[str, list[float | None]] = defaultdict(list)
    for a, b in pairs:
        differences[a.task].append(b.steps - a.steps if a.success and b.success else None)
    difference, interval = mean_interval(list(differences.values()), after.confidence)
    steps_before = sum(a.steps for a, _ in both)
    return Comparison(
        goals=len(pairs),
        both_succeed=len(both),
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        steps_difference=difference,
        steps_difference_interval=interval,
        steps_ratio=sum(b.steps for _, b in both) / steps_before if steps_before else None,
    )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test: two-sided binomial p of `gained` against `lost` at 1/2; 1 where nothing changed."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    # Integers until the last division: 2**n is beyond a float for large n.
    return min(1.0, 2 * tail / (1 << n))


def result_of(groups: list[list[Trial]], aborted: int, horizon_steps: int, confidence: float = 0.95) -> Result:
    """Success and steps of these trials together; goals are resampled within each group."""
    trials = [trial for group in groups for trial in group]
    successes = sum(trial.success for trial in trials)
    steps, steps_interval = mean_interval(
        [[t.steps if t.success else None for t in group] for group in groups], confidence
    )
    steps_all, steps_all_interval = mean_interval(
        [[t.steps if t.success else horizon_steps for t in group] for group in groups], confidence
    )
    return Result(
        n=len(trials),
        successes=successes,
        success=successes / len(trials) if trials else 0.0,
        success_interval=wilson(successes, len(trials), confidence),
        steps=steps,
        steps_interval=steps_interval,
        steps_all=steps_all,
        steps_all_interval=steps_all_interval,
        aborted=aborted,
    )
