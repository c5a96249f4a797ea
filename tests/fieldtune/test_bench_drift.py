"""The simulated watch on success alarms as the real one does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fieldtune.bench.drift import FAILURE_RATES, alarms
from fieldtune.cli import run
from runtime.drift import DriftMonitor, DriftRule


def test_it_runs_and_prints_both_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fieldtune.bench.drift.LONG_EPISODES", 1200)
    assert run(["bench", "drift", "--quick", "--json"]) == 0
    false, found = json.loads(capsys.readouterr().out)["results"]
    assert [row["failures"] for row in false["rows"]] == [f"{rate:g}" for rate in FAILURE_RATES]
    assert false["goals"][0]["limit"] == 0.0125 and found["rows"]


def test_the_simulation_alarms_as_the_monitor_does() -> None:
    rule = DriftRule(record_episodes=20, false_alarm=0.5, window_episodes=50)
    rates = [0.1] * 60 + [0.6] * 60
    found = alarms(lambda i: rates[i], len(rates), 30, np.random.default_rng(5), rule)
    rng = np.random.default_rng(5)
    failed = np.stack([rng.random(30) < rate for rate in rates])
    for i in range(30):
        monitor = DriftMonitor(("success", "steps"), rule)
        at = next(
            (n for n, bad in enumerate(failed[:, i], 1) if monitor.add({"success": float(not bad)})), len(rates) + 1
        )
        assert at == found[i]
    assert (found <= len(rates)).sum() > 20
