"""`fieldtune stop` and `fieldtune operator`: the operator's word to the robots of a running runtime."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

import tyro

from bridge.client import PolicyClient, SilentError
from bridge.messages import GetStatus, Operate, Operated, StatusReply
from fieldtune.commands.common import UNREACHED, Config, Json, Set, connect, out, print_json
from fieldtune.deployment import load_deployment

TIMEOUT_S = 3.0
CONFIRM_S = 2.0  # a robot that has not said by then that it is stopped has to be stopped by hand
LOOK_S = 0.02


def stop(config: Config, /, *, overrides: Set = (), why: str = "by the operator", as_json: Json = False) -> int:
    """Stop all robots of a running runtime at once. They stay stopped until `fieldtune operator CONFIG reset`.

    The exit code is 1 if a robot has not said within two seconds that it is stopped: go and see. The quickest stop is
    the space bar in the terminal of `fieldtune drive`, and an emergency stop on the robot itself is quicker still.

    Examples:
      fieldtune stop my_arm.yaml
      fieldtune stop my_arm.yaml --why "a hand is in the way"

    Args:
        why: goes into the log
    """
    deployment = load_deployment(config, overrides)
    try:
        with connect(deployment, "stop", TIMEOUT_S) as client:
            robots, late = stop_robots(client, why)
    except SilentError as error:
        raise SilentError(f"NOTHING WAS STOPPED, use the robot's own switch. {error}; {UNREACHED}") from error
    if as_json:
        print_json({"robots": robots, "late": late})
    else:
        for name, state in robots.items():
            out.print(f"{name}: {state}")
        if not robots and not late:
            out.print("no robot is connected; none will be given an episode")
    if late:
        sys.stderr.write(f"fieldtune: not stopped: {', '.join(late)}\n")
    return 1 if late else 0


def operator(
    config: Config,
    command: Annotated[
        tyro.conf.Positional[Literal["pause", "resume", "end", "success", "failure", "reset"]],
        tyro.conf.arg(metavar="pause|resume|end|success|failure|reset"),
    ],
    /,
    *,
    overrides: Set = (),
    robot: str = "",
    as_json: Json = False,
) -> int:
    """Tell the robots of a running runtime to hold and go on, or how their episode ends.

    pause and resume hold the robots and let them go on; end cuts the episode off without a verdict; success and
    failure end it with one; reset lifts a stop. The same is to be had by keys in the terminal of `fieldtune drive`.

    Examples:
      fieldtune operator my_arm.yaml pause
      fieldtune operator my_arm.yaml success --robot arm1

    Args:
        command: what to tell them
        robot: only the robot of this name (fieldtune status has them); not for reset
    """
    deployment = load_deployment(config, overrides)
    try:
        with connect(deployment, "operator", TIMEOUT_S) as client:
            reply, _ = client.request(Operate(command=command, robot=robot), Operated)
    except SilentError as error:
        raise SilentError(f"{error}; {UNREACHED}") from error
    if as_json:
        print_json({"robots": reply.robots})
    elif reply.robots:
        out.print(f"{command}: told {', '.join(reply.robots)}")
    elif command in ("end", "success", "failure"):
        who = f"robot {robot} is not" if robot else "no robot is"
        sys.stderr.write(f"fieldtune: {who} in an episode; `fieldtune episodes label` judges one that has ended\n")
    else:
        sys.stderr.write(f"fieldtune: no robot {robot or 'is connected'}\n")
    return 0 if reply.robots else 1


def stop_robots(client: PolicyClient, why: str) -> tuple[dict[str, str], list[str]]:
    """Stop all robots: what each says of itself, and those that do not say within `CONFIRM_S` that they are stopped."""
    told, _ = client.request(Operate(command="stop", why=why), Operated)
    deadline_s = time.monotonic() + CONFIRM_S
    while True:
        reply, _ = client.request(GetStatus(), StatusReply)
        robots: dict[str, str] = reply.status["robots"]
        # One that was told and is not in the list any more has not said it: its runtime has given it up as silent, or
        # has been started anew meanwhile.
        names = dict.fromkeys((*told.robots, *robots))
        late = [name for name in names if not robots.get(name, "").startswith("stopped")]
        if not late or time.monotonic() > deadline_s:
            return robots, late
        time.sleep(LOOK_S)
