"""How often the alarm that success fell is false, and how soon it comes when it is right, in simulated deployments.

Success is nearly all ties, for which the bound of `runtime.drift` is not proved; so it is counted here, from versions
that fail often to those that hardly ever do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fieldtune.bench.common import Goal, Result
from runtime.drift import POWERS, DriftRule
from trainer.statistics import wilson

DEPLOYMENTS, QUICK_DEPLOYMENTS = 4000, 20
LONG_EPISODES = 5000
FAILURE_RATES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
BEFORE = (0.2, 0.1, 0.02, 0.005)
AFTER = (0.2, 0.3, 0.5, 0.9)
CHANGE_AT = (100, 200, 400)
FOUND_WITHIN = 300

Int = NDArray[np.int64]


def bench_drift(*, quick: bool = False) -> tuple[Result, Result]:
    """False alarms and delays of the default rule."""
    deployments = QUICK_DEPLOYMENTS if quick else DEPLOYMENTS
    return false_alarms(deployments), delays(max(2, deployments // 10))


def alarms(
    failure_rate: Callable[[int], float], episodes: int, deployments: int, rng: np.random.Generator, rule: DriftRule
) -> Int:
    """After how many episodes `runtime.drift.DriftMonitor` says that success fell, `[deployments]`; one more than
    `episodes` where it does not. Episode i, from 0, fails with the probability `failure_rate(i)`.
    """
    # Half of the rule's probability is for success and steps, half of that for success.
    needed = rule.window_episodes / (rule.false_alarm / 4)
    failures = np.zeros(deployments)
    sums = np.zeros((deployments, len(POWERS)))
    at = np.full(deployments, episodes + 1)
    for i in range(episodes):
        failed = rng.random(deployments) < failure_rate(i)
        failures += failed
        if i < rule.record_episodes:
            continue
        # A failure ranks among the failures, a success among the successes; one failure more counts as seen.
        border = (failures + 1) / (i + 2)
        low, high = np.where(failed, 0.0, border)[:, None], np.where(failed, border, 1.0)[:, None]
        sums = (1 + sums) * (high**POWERS - low**POWERS) / (high - low)
        at = np.where((at > episodes) & (sums.mean(axis=1) >= needed), i + 1, at)
    return at


def false_alarms(deployments: int) -> Result:
    """While the failure rate stays what it is."""
    rule = DriftRule()
    window = rule.record_episodes + rule.window_episodes
    rows: list[tuple[str | float, ...]] = []
    shares = []
    for seed, rate in enumerate(FAILURE_RATES):
        found = alarms(lambda _i, rate=rate: rate, LONG_EPISODES, deployments, np.random.default_rng(seed), rule)  # type: ignore[misc]
        count = int(np.count_nonzero(found <= window))
        low, high = wilson(count, deployments)
        shares.append(count / deployments)
        long = float(np.mean(found <= LONG_EPISODES))
        rows.append((f"{rate:g}", count / deployments, f"{low:.4f} to {high:.4f}", long))
    return Result(
        bench="drift",
        title=f"false alarms that success fell, in {deployments} simulated deployments of each failure rate",
        columns=("failures", f"within {rule.window_episodes}", "Wilson 95 %", f"within {LONG_EPISODES}"),
        rows=rows,
        goals=[Goal(f"false alarms, worst of {len(rows)} failure rates", max(shares), rule.false_alarm / 4)],
        notes=[f"within so many episodes after the record of {rule.record_episodes}, or in all; rule: {rule}"],
    )


def delays(deployments: int) -> Result:
    """From a change of the failure rate on."""
    rule = DriftRule()
    rows: list[tuple[str | float, ...]] = []
    for before in BEFORE:
        for after in AFTER:
            if after <= before:
                continue
            row: list[str | float] = [f"{before:g}", f"{after:g}"]
            for seed, change_at in enumerate(CHANGE_AT):
                found = alarms(
                    lambda i, now=(before, after), at=change_at: now[i >= at],  # type: ignore[misc]
                    change_at + FOUND_WITHIN,
                    deployments,
                    np.random.default_rng(seed),
                    rule,
                )
                real = found > change_at
                share = float(np.mean(found[real] <= change_at + FOUND_WITHIN))
                median = float(np.median(found[real] - change_at))
                row += [f"{median:.0f}" if median <= FOUND_WITHIN else "-", share]
            rows.append(tuple(row))
    heads = [head for at in CHANGE_AT for head in (f"at {at}", f"found {at}")]
    return Result(
        bench="drift",
        title=f"episodes from a change of the failure rate to the alarm; {deployments} simulated deployments of each",
        columns=("before", "after", *heads),
        rows=rows,
        goals=[],
        notes=[
            "at: median, where the change came after so many episodes (-: more than "
            f"{FOUND_WITHIN}); found: share within {FOUND_WITHIN}",
        ],
    )
