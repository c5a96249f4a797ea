"""What a run notes of its computer."""

import os
from pathlib import Path

import pytest

from trainer.environment import CpuTime, cpu_time, installed


def test_idle_share_is_of_the_time_in_between() -> None:
    assert CpuTime(idle=150, total=400).idle_share_since(CpuTime(idle=100, total=200)) == 0.25
    assert CpuTime(idle=100, total=200).idle_share_since(CpuTime(idle=100, total=200)) == 0.0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux counts there")
def test_a_busy_loop_counts_as_busy() -> None:
    before = cpu_time()
    assert before is not None
    spent = os.times()
    while os.times().user - spent.user < 0.3:
        pass
    after = cpu_time()
    assert after is not None
    assert after.total - after.idle - (before.total - before.idle) >= 20  # hundredths of a second
    assert 0.0 <= after.idle_share_since(before) < 1.0


def test_what_runs_from_its_source_alone_has_no_version() -> None:
    assert list(installed(["numpy", "no-such-package"])) == ["numpy"]
