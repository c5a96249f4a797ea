"""Time in the control loop: ticks at absolute deadlines, and what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct


class Ticks(Struct):
    """What became of the ticks of a control loop."""

    ticks: int = 0
    """Environment steps."""
    starved: int = 0
    """Ticks with the hold action, because a chunk had ended and the next had not come."""
    held: int = 0
    """Ticks with the hold action, because a rule of the safety stage asked for it."""
    overruns: int = 0
    """Ticks whose work took longer than a period."""
    work_s: float = 0.0
    """Time from each tick to the end of its work, waits for a chunk included."""
    sleep_s: float = 0.0
    """Time from there to the next tick."""
    wait_s: float = 0.0
    """Time in which the loop stood still, waiting for a chunk."""

    def add(self, other: Ticks) -> None:
        """Count those of another loop too."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Pacer:
    """Sleeps to absolute deadlines on a monotonic clock, so that one slow tick does not shift all later ones."""

    period_s: float
    ticks: Ticks = field(default_factory=Ticks)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _woke_s: float = field(default=0.0, init=False)
    _next_s: float = field(default=0.0, init=False)

    def start(self) -> None:
        """The first tick is now."""
        self._next_s = self._woke_s = self.clock()

    def wait(self) -> None:
        """Sleep to the next tick. A tick that is already past is an overrun, and the schedule starts anew from now."""
        self._next_s += self.period_s
        now_s = self.clock()
        self.ticks.work_s += now_s - self._woke_s
        late_s = now_s - self._next_s
        if late_s > 0:
            self.ticks.overruns += 1
            self._next_s = self._woke_s = now_s
            return
        self.sleep(-late_s)
        self._woke_s = self.clock()
        self.ticks.sleep_s += self._woke_s - now_s
