"""What somebody does on the page: orders to robots, decisions on versions, labels. Each says how it went."""

from __future__ import annotations

from bridge.errors import FieldtuneError
from bridge.messages import Command, Govern, Governing, Label, Operate, Operated, Serving
from fieldtune.commands.common import connect
from fieldtune.commands.operator import stop_robots
from fieldtune.page.view import RunView

ORDER_TIMEOUT_S = 3.0
SWAP_TIMEOUT_S = 15.0


class ActionError(FieldtuneError):
    """What was asked for was not done, or not by all; the message says by whom."""


def stop(view: RunView, who: str) -> str:
    """Stop all robots. Raises `ActionError` if one does not say that it is stopped."""
    with connect(view.deployment, "page", ORDER_TIMEOUT_S) as client:
        robots, late = stop_robots(client, f"by {who} on the page")
    if late:
        raise ActionError(f"NOT stopped: {', '.join(late)}; go and see")
    return f"stopped: {', '.join(robots) or 'no robot is connected'}"


def order(view: RunView, command: Command, robot: str = "", episode: str = "") -> str:
    """Pass an order on to one robot, or to all. A verdict is for that episode, and for no other.

    Raises `ActionError` if nobody was there to hear it.
    """
    with connect(view.deployment, "page", ORDER_TIMEOUT_S) as client:
        reply, _ = client.request(Operate(command=command, robot=robot, episode=episode), Operated)
    if not reply.robots and command != "reset":
        raise ActionError(f"{command}: {robot or 'no robot'} is not connected, or its episode is over already")
    return f"{command}: {', '.join(reply.robots) or 'done'}"


def govern(view: RunView, command: Governing, version: str, who: str) -> str:
    """Decide on versions by hand."""
    with connect(view.deployment, "page", SWAP_TIMEOUT_S) as client:
        reply, _ = client.request(Govern(command=command, version=version, who=who), Serving)
    return f"done: {command}; {reply.version[:12]} is live"


def label(view: RunView, episode: str, value: Label, who: str) -> str:
    """Say how an episode went. Raises `DatabaseError` if there is no such episode."""
    row = view.index.label(episode, value, who)
    return f"{episode[:8]}: {row.status}, by {who}"
