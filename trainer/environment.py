"""What a run runs on: versions of libraries, and the computer. It is kept in the run, for reports written elsewhere."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from runtime.rundir import RunDir

LIBRARIES = ("fieldtune", "torch", "onnxruntime", "numpy", "pyzmq", "msgspec", "metaworld", "mujoco", "gymnasium")


class Environment(Struct, frozen=True):
    """Content of environment.json."""

    libraries: dict[str, str]
    """Version by name, of those that are installed."""
    computer: dict[str, str]


def this_environment() -> Environment:
    """The libraries of this installation and this computer; `cores` are those that this process may use."""
    return Environment(
        libraries=installed(LIBRARIES),
        computer={
            "python": platform.python_version(),
            "system": platform.system(),
            "cores": str(usable_cores()),
            "processor": processor(),
        },
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuTime(Struct, frozen=True):
    """Time of all cores together since the computer started, in whatever unit its system counts."""

    idle: int
    total: int

    def idle_share_since(self, earlier: CpuTime) -> float:
        """Share of the cores' time since `earlier` in which they had nothing to do."""
        return (self.idle - earlier.idle) / max(1, self.total - earlier.total)


def cpu_time() -> CpuTime | None:
    """The cores' time so far, of all processes of this computer; None where /proc does not say (not Linux)."""
    source = Path("/proc/stat")
    if not source.exists():
        return None
    with source.open(encoding="ascii") as lines:
        # user, nice, system, idle, waiting for a disk, interrupts ...; those after the eighth are counted in user.
        fields = [int(field) for field in lines.readline().split()[1:9]]
    return CpuTime(idle=fields[3] + fields[4], total=sum(fields))


def load_environment(run: RunDir) -> Environment | None:
    """What the run noted when it was last started; None if it did not."""
    if not run.environment.exists():
        return None
    return msgspec.json.decode(run.environment.read_bytes(), type=Environment)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Version by name, of those of these packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def processor() -> str:
    """The processor's name: Linux says it in /proc alone."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
