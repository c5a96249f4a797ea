"""Backends for the workers of the demonstrations. A worker imports this file, so it is light: no pytest here."""

import os
import signal
import time

from msgspec.structs import replace

from bridge.backend import BackendError
from bridge.backends.point import Point, PointOptions


class Troubled(Point):
    """`point`, in trouble where it is reset to one seed."""

    def __init__(self, trouble: str, seed: int) -> None:
        super().__init__(PointOptions())
        self.trouble, self.seed = trouble, seed

    def reset(self, task: str, seed: int) -> None:
        super().reset(task, seed)
        if seed == self.seed:
            match self.trouble:
                case "refuses":
                    raise BackendError("the cable fell out")
                case "raises":
                    raise RuntimeError("a mistake in the backend")
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(1000)


class Leisurely(Point):
    """`point` with two tasks; every third attempt takes its time, so that answers come in another order."""

    def __init__(self) -> None:
        super().__init__(PointOptions())
        self._spec = replace(self._spec, instructions={"reach": "go", "again": "go"})

    def reset(self, task: str, seed: int) -> None:
        super().reset(task, seed)
        if seed % 3 == 0:
            time.sleep(0.05)
