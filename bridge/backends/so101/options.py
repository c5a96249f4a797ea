"""Options of the backend `so101`, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from bridge.backend import Float32
from bridge.backends.so101.calibration import Calibration, so101_joints
from bridge.backends.so101.cameras import ArmCamera
from bridge.backends.so101.scene import HOME, JOINTS
from bridge.backends.so101.targets import Kind
from bridge.config import ConfigError, Count, Positive

DRAWN = "drawn"
_OPTIONS = "$.backend.options"


class SO101Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the backend `so101`."""

    port: str | None = None
    """The arm's serial port, best by a name that stays: `/dev/serial/by-id/...`."""
    calibration: str | None = None
    """The arm's calibration file (`docs/backends.md`)."""
    emulate: bool = False
    """There is no arm: an emulated one in this process, or the one of `fieldtune emulate so101` whose pseudo-terminal
    `port` names. The task is then `reach`, and cameras have `device: drawn`."""
    cameras: tuple[ArmCamera, ...] = ()
    tasks: dict[str, str | tuple[str, ...]] = {}
    """Each task of the arm, and what the policy is told: one text, or several wordings."""
    home: dict[str, float] = {}
    """Where episodes start, by joint in its unit; joints that are not named start at 0. The emulated arm starts near
    it, by the seed."""
    actions: Kind = "delta"
    """`delta`: an action moves the joints' goals by at most what `max_speed_deg_s` makes in a period. `absolute`: it is
    the goals themselves, as in policies of LeRobot; of noise to learn from the rate limit would leave little."""
    control_hz: Annotated[float, Meta(gt=0, le=200)] = 30.0
    max_speed_deg_s: Annotated[float, Meta(gt=0, le=720)] = 120.0
    """The servos themselves keep this limit, whatever they are told, and the safety stage keeps it too."""
    home_speed_deg_s: Annotated[float, Meta(gt=0, le=180)] = 45.0
    """How fast the arm goes to `home` between episodes."""
    on_stop: Literal["hold", "limp"] = "hold"
    """`hold` stays where it is with torque on; `limp` takes torque off: the arm falls unless it lies somewhere. An
    episode ends with a stop, too."""
    on_close: Literal["limp", "hold"] = "limp"
    """When the bridge leaves."""
    timeout_ms: Positive = 20.0
    """How long servos have for an answer; they need about one."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 2
    """Repeated requests before a servo counts as gone."""
    baud: Count = 1_000_000


def calibration_of(options: SO101Options) -> Calibration:
    """The calibration that the options name, checked against the rest of them. Raises `ConfigError`."""
    if options.calibration is not None:
        path = Path(options.calibration)
        if not path.is_file():
            raise ConfigError(
                f"{_OPTIONS}.calibration: there is no file {path.absolute()}; "
                "a path counts from where the command is given"
            )
        calibration = Calibration.load(path)
    elif options.emulate:
        calibration = Calibration(so101_joints(), "the emulated arm")
    else:
        raise ConfigError(f"{_OPTIONS}.calibration: missing; an arm needs one (docs/backends.md)")
    if options.emulate and calibration.names != JOINTS:
        raise ConfigError(
            f"{_OPTIONS}.calibration: the emulated arm needs the joints {', '.join(JOINTS)} in this order "
            f"(found {', '.join(calibration.names)})"
        )
    if not options.emulate and options.port is None:
        raise ConfigError(f"{_OPTIONS}.port: missing; `ls /dev/serial/by-id` lists serial ports (or `emulate: true`)")
    if options.emulate and options.tasks:
        raise ConfigError(f"{_OPTIONS}.tasks: the emulated arm has one task of its own, reach; leave `tasks` out")
    if not options.emulate and not options.tasks:
        raise ConfigError(f"{_OPTIONS}.tasks: is empty; say what the arm is for, e.g. {{pick: pick up the red block}}")
    for index, camera in enumerate(options.cameras):
        where = f"{_OPTIONS}.cameras[{index}]"
        if camera.name in [other.name for other in options.cameras[:index]]:
            raise ConfigError(f"{where}.name: {camera.name!r} is the name of another camera")
        if (camera.device == DRAWN) != options.emulate:
            raise ConfigError(f"{where}.device: `{DRAWN}` goes with `emulate: true`, and only that does")
    return calibration


def home_of(options: SO101Options, calibration: Calibration) -> Float32:
    """Where episodes start `[joints]`, in the joints' units. Raises `ConfigError` for what the arm cannot reach."""
    named = options.home or (HOME if options.emulate else {})
    for name in named:
        if name not in calibration.names:
            raise ConfigError(f"{_OPTIONS}.home.{name}: no such joint (known: {', '.join(calibration.names)})")
    home = np.array([named.get(name, 0.0) for name in calibration.names], np.float32)
    for name, value, low, high in zip(calibration.names, home, calibration.low, calibration.high, strict=True):
        if not low - 1e-3 <= value <= high + 1e-3:
            raise ConfigError(
                f"{_OPTIONS}.home.{name}: {value:g} is outside of the joint's range of {low:g} to {high:g}"
            )
    return np.clip(home, calibration.low, calibration.high)
