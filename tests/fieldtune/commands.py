"""Commands as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def fieldtune(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, "-m", "fieldtune", *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def one_object(stdout: str) -> dict[str, Any]:
    """What --json promises."""
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value
