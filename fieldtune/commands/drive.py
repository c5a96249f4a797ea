"""`fieldtune drive`. Runs on the bridge's computer: imports neither torch nor onnxruntime."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import tyro

from bridge.backends import make_backend
from bridge.client import PolicyClient
from bridge.control import EpisodeReport
from bridge.drive import drive as run_drive
from bridge.guard import Guard
from bridge.messages import Assignment
from bridge.pacing import Ticks
from fieldtune.aside import Aside
from fieldtune.commands.common import Config, Json, Set, account, endpoint, out, print_json, warn
from fieldtune.deployment import load_deployment
from fieldtune.keyboard import keys
from fieldtune.robot_keys import HELP, RobotKeys
from runtime.supervisor import stop_on_signals

TELL_S = 2.0
STDIN = 0


def drive(
    config: Config,
    /,
    *,
    overrides: Set = (),
    endpoint_: Annotated[str | None, tyro.conf.arg(name="endpoint")] = None,
    episodes: int | None = None,
    name: str | None = None,
    as_json: Json = False,
) -> int:
    """Drive the configured backend with the policy of a running runtime.

    In a terminal, keys stop, pause and judge: space or esc stops all robots of the runtime, r resets them; p pauses and
    resumes this robot, e ends its episode, s and f end it as a success or a failure, d ends it and nothing is learned
    from it. Between two episodes s, f and d are for the last one, whatever was said of it before.

    Examples:
      fieldtune drive quickstart --episodes 5
      fieldtune drive my_arm.yaml --set bridge.endpoint=tcp://10.0.0.5:5555 --set bridge.keys=keys/arm1

    Args:
        endpoint_: address of the runtime, if it is not the configured one
        episodes: leave after this many episodes
        name: this client's name in the log
    """
    deployment = load_deployment(config, overrides)
    stop = stop_on_signals()
    backend = make_backend(deployment.backend)
    secret = Path(deployment.bridge.keys) if deployment.bridge.keys else None
    client_name = name or f"{socket.gethostname()}-{os.getpid()}"

    def report(result: EpisodeReport, assignment: Assignment) -> None:
        if not as_json:
            version = result.versions[-1][:8] if result.versions else "-"
            with suppress(OSError):  # the robot drives on, whether or not its log has room
                out.print(
                    f"{assignment.task} seed {assignment.seed}: {result.status} after {result.steps} steps ({version})"
                )

    address = endpoint_ or endpoint(deployment)

    def connect() -> PolicyClient:
        return PolicyClient(address, client=client_name, timeout_s=TELL_S, keys=secret)

    with Aside(warn) as say:  # the guard must not wait for a terminal
        guard = Guard(backend, deployment.bridge.safety, warn=say)
        timeout_s = deployment.bridge.request_timeout_s
        with (
            RobotKeys(guard, connect, name=client_name, who=account(), warn=say) as robot_keys,
            PolicyClient(address, client=client_name, timeout_s=timeout_s, keys=secret) as client,
            keys(robot_keys.handle, STDIN) as terminal,
        ):
            if terminal:
                say(HELP)
            summary = run_drive(
                backend,
                client,
                deployment.bridge,
                stopped=stop.is_set,
                report=report,
                warn=say,
                episodes=episodes,
                guard=guard,
            )
    if as_json:
        print_json(summary)
    else:
        out.print(ticks_line(summary.ticks))
    return 0


def ticks_line(ticks: Ticks) -> str:
    """What became of the ticks (docs/control.md). Only a robot's loop has a pace, so only it works and sleeps."""
    pace = f"work {ticks.work_s:.1f} s, sleep {ticks.sleep_s:.1f} s, " if ticks.work_s else ""
    counts = f"{ticks.overruns} overruns, {ticks.starved} starved, {ticks.held} held"
    return f"{ticks.ticks} ticks: {pace}{counts}"
