"""Who may move the robot: one owner at a time, and only for as long as it is heard."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bridge.errors import FieldtuneError
from bridge.messages import Code


class OwnershipError(FieldtuneError):
    """A request that is not this sender's to make; `code` and `field` are those of the refusal."""

    def __init__(self, code: Code, field: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


@dataclass(slots=True)
class Owner:
    """Who drives the robot now."""

    session: str
    client: str
    heard_s: float
    """When it was last heard, on the monotonic clock."""
    request: int
    """Its last request id; those of one owner only grow."""


class Ownership:
    """Grants the robot to one client, and takes it back."""

    def __init__(self, silence_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody owns the robot yet."""
        self.silence_s = silence_s
        self.owner: Owner | None = None
        self._clock = clock

    def claim(self, session: str, client: str, request: int) -> None:
        """Make this client the owner; raises `OwnershipError` with the name of another one."""
        owner = self.owner
        if owner is not None:
            heard = self._clock() - owner.heard_s
            raise OwnershipError(
                "session",
                "owner",
                f"the robot is driven by {owner.client!r}, heard {heard:.1f} s ago; stop that client first: the robot "
                f"is free when it leaves or is silent for {self.silence_s:g} s",
            )
        self.owner = Owner(session, client, self._clock(), request)

    def admit(self, session: str, request: int, *, late: bool = False) -> None:
        """Hear a request of the owner. Raises `OwnershipError` for anybody else's.

        One that a later one has overtaken is refused too unless it may come `late`: nothing but a stop may.
        """
        owner = self.owner
        if owner is None or owner.session != session:
            now = "nobody" if owner is None else repr(owner.client)
            raise OwnershipError(
                "session",
                "session",
                f"this client does not own the robot, {now} does: it was silent for {self.silence_s:g} s and the robot "
                "was stopped, or the far side was started again; connect again",
            )
        owner.heard_s = self._clock()
        if request <= owner.request and not late:
            # What has overtaken it may have been a stop, and the robot must not move after that.
            raise OwnershipError("replayed", "request", f"{request} comes after {owner.request} and is too late")
        owner.request = max(request, owner.request)

    def hear(self, session: str) -> None:
        """A sign of life; one of somebody else means nothing."""
        if self.owner is not None and self.owner.session == session:
            self.owner.heard_s = self._clock()

    def release(self, session: str) -> None:
        """The robot is free if this session owned it."""
        if self.owner is not None and self.owner.session == session:
            self.owner = None

    def take_from_silent(self) -> Owner | None:
        """The owner that has been silent for too long, who is one no longer; None if there is none."""
        owner = self.owner
        if owner is None or self._clock() - owner.heard_s <= self.silence_s:
            return None
        self.owner = None
        return owner
