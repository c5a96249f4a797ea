"""The toy backend as a robot would be: it moves in real time and, where asked, cannot tell how an episode went."""

from __future__ import annotations

from msgspec.structs import replace

from bridge.backend import BackendSpec, Outcome
from bridge.backends.point import Point, PointOptions


class SlowPoint(Point):
    """20 steps a second; without `judges` every episode goes on to its horizon."""

    def __init__(self, *, judges: bool = True) -> None:
        super().__init__(PointOptions(size_px=32))
        self._judges = judges
        self._slow = replace(super().spec, control_hz=20.0, paced=not judges, judges=judges)

    @property
    def spec(self) -> BackendSpec:
        """Fast where it judges, so that demonstrations take no time."""
        return self._slow

    def outcome(self) -> Outcome:
        """Whether it has arrived is for people to see."""
        outcome = super().outcome()
        return outcome if self._judges else Outcome(status="running", reward=0.0)
