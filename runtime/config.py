"""Settings of the runtime: where it listens, what it logs, how it serves."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from runtime.canary import CanaryRule
from runtime.drift import DriftRule

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The socket and the inference thread."""

    endpoint: str = "ipc"
    """`ipc` (a socket in a 0700 directory of this run), `ipc://PATH`, `tcp://127.0.0.1:PORT`; with `keys`, any tcp."""
    keys: str | None = None
    """Directory made by `fieldtune keys`; needed for every address that is not on this computer."""
    max_batch: Count = 16
    """Most requests that one inference may join."""
    inference_threads: Count = 1
    """Threads of onnxruntime; trainer and simulator share the cores."""
    session_timeout_s: Positive = 30.0
    """A session silent for longer is closed, its open episode kept as aborted."""


class LogConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The episode log."""

    keep_gb: Positive = 10.0
    """Oldest episodes that the trainer has taken and no longer holds are deleted above this size."""
    keep_failures_days: Annotated[float, Meta(ge=0)] = 0.0
    """Failures and time-outs that ended less than so many days ago are kept even above that size."""
    queue_mb: Positive = 256.0
    """Records that wait for the disk; above this the episode with most of them is given up and counted as lost."""


class GateRule(Struct, frozen=True, forbid_unknown_fields=True):
    """What a candidate may differ by; the defaults are tens of updates away."""

    decisions: Annotated[int, Meta(ge=1)] = 128
    """Logged decisions that are made again, of the newest episodes."""
    max_divergence: Positive = 0.25
    """From the mean actions of the live version, root mean square, in half ranges."""
    max_kl: Positive = 1.0
    """From the live version, nats an action."""
    max_outside: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Share of mean actions beyond the limits, more than the live version has."""
    max_cloning: Annotated[float, Meta(ge=1)] = 1.5
    """Times the live version's error on what was sent in successful episodes."""


class DeployConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How a new version comes to drive robots (docs/deploying.md)."""

    mode: Literal["direct", "staged"] = "direct"
    """direct: at once, for simulators. staged: through the gate and a canary."""
    gate: GateRule = GateRule()
    canary: CanaryRule = CanaryRule()
    drift: DriftRule = DriftRule()
    roll_back_on: tuple[Literal["success", "steps", "interventions"], ...] = ("success", "interventions")
    """Drift of the live version by which it is rolled back; other drift raises an alarm only."""


class RuntimeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The runtime's settings."""

    serve: ServeConfig = ServeConfig()
    log: LogConfig = LogConfig()
    balance: Literal["equal", "need"] = "need"
    """How training episodes are shared among tasks: all the same, or more for those that succeed less, between 3/4
    and 3/2 of an equal share."""
    deploy: DeployConfig = DeployConfig()
    keep_versions: Count = 20
    """Bundles of retired versions kept on disk for rollback; the registry remembers all. At least
    `trainer.max_staleness_versions` less one."""
