"""The operator's side of the runtime: who watches for orders, what was ordered, and what each robot says it does.

An order goes out to all bridges at once, before anything else is done; none waits for the robot's next question. It is
repeated in the answer to each of their signs of life.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bridge.messages import Operate, Operated, Orders, RobotState, Watch
from runtime.router import Router
from runtime.sessions import OpenEpisode, Session, Sessions

LONGEST_RESET_S = 600.0  # a reset that takes longer hangs


@dataclass(slots=True)
class Robot:
    """One bridge that watches."""

    identity: bytes
    bridge: str
    client: str
    session: str
    state: RobotState
    why: str
    seen_s: float
    resetting_since_s: float
    """When it said so first; its state says whether it still does."""
    paused: bool
    stopped: str
    """Why it is to be stopped, whoever else is: another runtime, or the bridge before this one, knew of it."""

    @property
    def own_name(self) -> str:
        """A name that no other robot ever gets: an order that comes late must not reach, and move, another one."""
        return f"{self.client} ({self.bridge[:8]})"


class Operator:
    """Takes orders and passes them on. Called with the server's lock held."""

    def __init__(self, sessions: Sessions, router: Router, abort: Callable[[Session, str], None]) -> None:
        """`abort` closes a session's open episode."""
        self.stopped = ""
        """Why all robots are stopped; empty if they are not. No episode is assigned meanwhile."""
        self._sessions, self._router, self._abort = sessions, router, abort
        self._robots: dict[str, Robot] = {}
        self._paused = False
        self._paused_names: set[str] = set()
        self._stopped_names: dict[str, str] = {}

    def watch(self, identity: bytes, message: Watch) -> None:
        """Note what a bridge says of itself, and answer with its orders."""
        known = self._robots.get(message.bridge)
        now_s = time.monotonic()
        # One that was told to pause stays so for a runtime that has started anew, and for a bridge that has.
        paused = self._paused or message.paused or message.client in self._paused_names
        # So does one that was stopped.
        stopped = known.stopped if known else self._stopped_names.get(message.client, "")
        if message.state in ("stopping", "stopped"):
            self._stopped_names[message.client] = message.why
        elif known:
            self._stopped_names.pop(message.client, None)
        was_resetting = known is not None and known.state == message.state == "resetting"
        robot = self._robots[message.bridge] = Robot(
            identity=identity,
            bridge=message.bridge,
            client=message.client,
            session=message.session,
            state=message.state,
            why=message.why,
            seen_s=now_s,
            resetting_since_s=known.resetting_since_s if known is not None and was_resetting else now_s,
            paused=known.paused if known else paused,
            stopped=stopped,
        )
        self._send(robot, request=message.request)
        session = self._sessions.by_id.get(message.session)
        if session is None:
            return
        resetting = message.state == "resetting" and now_s - robot.resetting_since_s < LONGEST_RESET_S
        if resetting or message.state in ("paused", "stopping", "stopped"):
            # Its loop waits for the robot or the operator, so it is not silent.
            session.last_seen_s = robot.seen_s
        if message.state in ("stopping", "stopped"):
            self._abort(session, f"stopped: {message.why}")

    def operate(self, identity: bytes, message: Operate) -> None:
        """Pass an order on, then note it and answer."""
        reset, resume = message.command == "reset", message.command == "resume"
        if message.command == "stop":
            self.stopped = message.why or "by the operator"
        elif reset:
            self.stopped = ""
            self._stopped_names.clear()
            for robot in self._robots.values():
                robot.stopped = ""
        everybody = message.command in ("stop", "reset") or not message.robot
        told = [
            robot for robot in self._robots.values() if everybody or message.robot in (robot.client, robot.own_name)
        ]
        if message.command in ("end", "success", "failure"):
            told = [robot for robot in told if self._is_in(robot, message.episode)]
        for robot in told:
            self._change(robot, message)
            self._send(robot, reset=reset, resume=resume)
        if everybody and message.command in ("pause", "resume"):
            self._paused = message.command == "pause"
            self._paused_names.clear()
        elif resume:
            self._paused_names.discard(message.robot)
        if message.command == "stop":
            for session in self._sessions.by_id.values():
                self._abort(session, f"stopped: {self.stopped}")
        names = tuple(sorted(self._name(robot) for robot in told))
        self._router.send(identity, Operated(request=message.request, robots=names))

    def forget_before(self, limit_s: float) -> None:
        """Forget bridges that were last seen before that time."""
        for bridge in [bridge for bridge, robot in self._robots.items() if robot.seen_s < limit_s]:
            del self._robots[bridge]

    def holds(self, session: Session) -> bool:
        """Whether its robot is ordered to pause; one that does not watch yet goes by its client's name."""
        for robot in self._robots.values():
            if robot.session == session.session:
                return robot.paused
        return self._paused or session.client in self._paused_names

    def waits(self, session: Session) -> bool:
        """Whether its robot is paused, which may be for long."""
        return any(robot.session == session.session and robot.state == "paused" for robot in self._robots.values())

    def robots(self) -> dict[str, str]:
        """Name -> what it does, and why."""
        return {
            self._name(robot): f"{robot.state}: {robot.why}" if robot.why else robot.state
            for robot in self._robots.values()
        }

    def _name(self, robot: Robot) -> str:
        """That of its client; of several with one name all but the first go by their own."""
        first = next(other for other in self._robots.values() if other.client == robot.client)
        return robot.client if first is robot else robot.own_name

    def _change(self, robot: Robot, message: Operate) -> None:
        match message.command:
            case "pause" | "resume":
                robot.paused = message.command == "pause"
                if message.robot and robot.paused:
                    self._paused_names.add(robot.client)
                elif not any(other.paused for other in self._robots.values() if other.client == robot.client):
                    self._paused_names.discard(robot.client)
            case "end" | "success" | "failure":
                opened = self._opened(robot)
                assert opened is not None
                opened.ending = message.command

    def _is_in(self, robot: Robot, episode: str) -> bool:
        """Whether it is in that episode, or in any that has begun where none is named: on the way to the start of the
        next one, a word is most often for the one before.
        """
        opened = self._opened(robot)
        return opened is not None and (episode == opened.episode or (not episode and opened.started))

    def _send(self, robot: Robot, *, request: int = 0, reset: bool = False, resume: bool = False) -> None:
        opened = self._opened(robot)
        orders = Orders(
            request=request,
            stopped=self.stopped or robot.stopped,
            reset=reset,
            paused=robot.paused,
            resume=resume,
            episode=opened.episode if opened else "",
            end=opened.ending if opened else "",
        )
        self._router.send(robot.identity, orders)

    def _opened(self, robot: Robot) -> OpenEpisode | None:
        session = self._sessions.by_id.get(robot.session)
        return session.open if session is not None else None
