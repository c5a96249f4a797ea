"""`fieldtune emulate so101`."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import tyro

from bridge.backends.so101.calibration import Calibration, so101_joints
from bridge.backends.so101.emulator import EmulatedPort, emulated_arm
from bridge.config import ConfigError
from fieldtune.commands.common import err, out

Faults = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="FAULT",
        help="missing=ID, overload=ID, overheat=ID, voltage=ID, corrupt=N (every Nth answer), delay_ms=T, "
        "lost=N (broadcasts); repeatable",
    ),
]


def so101(*, calibration: Path | None = None, fault: Faults = ()) -> int:
    """Be an SO-101 arm: six servos that answer on a pseudo-terminal, with joints that move behind them.

    The first line on stdout is the path of the pseudo-terminal, for `backend.options.port`. Each line on stdin sets a
    fault while it runs; `clear` takes all faults back. Ctrl-C ends it.

    Examples:
      fieldtune emulate so101
      fieldtune emulate so101 --fault corrupt=20 --fault delay_ms=5
      fieldtune drive so101_emulated --set backend.options.port=/dev/pts/7

    Args:
        calibration: the arm's calibration file, for ids and limits; those of an SO-101 centred at 2048 without it
        fault: what is wrong from the start
    """
    arm = emulated_arm(
        Calibration.load(calibration) if calibration else Calibration(so101_joints(), "the emulated arm")
    )
    for text in fault:
        arm.set_fault(text)
    port = EmulatedPort(arm)
    try:
        out.print(port.path, soft_wrap=True)
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            for line in sys.stdin:
                try:
                    port.set_fault(line)
                except ConfigError as error:
                    err.print(str(error))
            # Nobody types: run until a signal comes.
            threading.Event().wait()
    finally:
        port.close()
    return 0
