"""`fieldtune pretrain`: a bundle that another deployment starts from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import read_bundle
from runtime.registry import Registry
from runtime.rundir import RunDir

pytestmark = [pytest.mark.slow]

QUICK = ("--set", "trainer.demos.per_task=2", "--set", "trainer.sft.steps=3")


def fieldtune(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fieldtune", *arguments, *QUICK]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_base_is_made_copied_once_and_started_from(tmp_path: Path) -> None:
    made: dict[str, Any] = json.loads(
        fieldtune(
            "pretrain", "point", "--to", "bases/mine", "--set", "trainer.sft.auxiliary=1", "--json", cwd=tmp_path
        ).stdout
    )
    base = read_bundle(tmp_path / "bases" / "mine")
    assert base.version == made["version"] == Path(made["bundle"]).name
    assert Registry(RunDir(tmp_path / "runs" / "point").registry).live() == base.version
    # Refused before anything is done: this run is new and would have to collect demonstrations.
    refused = fieldtune("pretrain", "point", "--to", "bases/mine", "--set", "name=other", cwd=tmp_path, code=2)
    assert "--to bases/mine: exists" in refused.stderr and not (tmp_path / "runs" / "other").exists()
    assert read_bundle(tmp_path / "bases" / "mine").version == base.version

    start = ("--set", "name=tuned", "--set", "trainer.start=bases/mine")
    fieldtune("demos", "point", *start, cwd=tmp_path)
    tuned = json.loads(fieldtune("sft", "point", *start, "--json", cwd=tmp_path).stdout)["version"]
    spec = read_bundle(tmp_path / "runs" / "tuned" / "policies" / tuned).spec
    assert spec.made["start"] == base.version and spec.parent == ""


def test_a_start_that_is_not_there_is_found_before_demonstrations_are_collected(tmp_path: Path) -> None:
    done = fieldtune("up", "point", "--set", "trainer.start=nosuch", cwd=tmp_path, code=2)
    assert "nosuch: no such directory, and no shipped policy of that name" in done.stderr
    assert not RunDir(tmp_path / "runs" / "point").demos.exists()
