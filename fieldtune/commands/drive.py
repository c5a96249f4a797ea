"""`fieldtune drive`. Runs on the bridge's computer: imports neither torch nor onnxruntime."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import tyro

from bridge.backends import make_backend
from bridge.client import PolicyClient, SilentError
from bridge.control import EpisodeReport
from bridge.drive import drive as run_drive
from bridge.guard import Guard
from bridge.messages import Assignment, Command, Ending, Operate, Operated
from bridge.pacing import Ticks
from fieldtune.commands.common import Config, Json, Set, endpoint, out, print_json, warn
from fieldtune.deployment import load_deployment
from fieldtune.keyboard import keys
from runtime.supervisor import stop_on_signals

STOP_KEYS = (" ", "\x1b")
ENDING_KEYS: dict[str, Ending] = {"e": "end", "s": "success", "f": "failure"}
HELP = "keys: space or esc stop all robots, r reset, p pause or resume, e end, s success, f failure"
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
    resumes this robot, e ends its episode, s and f end it as a success or a failure.

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
    guard = Guard(backend, deployment.bridge.safety, warn=warn)
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

    def tell(command: Command, why: str = "") -> None:
        """To all robots of the runtime, over a connection of its own: the others are busy."""
        try:
            with PolicyClient(address, client=client_name, timeout_s=TELL_S, keys=secret) as operator:
                operator.request(Operate(command=command, why=why), Operated)
        except SilentError as error:
            warn(f"{command}: {error}")

    apart: dict[str, threading.Thread] = {}

    def beside(name: str, call: Callable[..., None], *arguments: str) -> None:
        """Make a call on a thread of its own, unless the last one of its name still goes on; keys wait for nothing."""
        if name not in apart or not apart[name].is_alive():
            apart[name] = threading.Thread(target=call, args=arguments, name=name, daemon=True)
            apart[name].start()

    def handle(key: str) -> None:
        if key in STOP_KEYS:
            why = f"by a key at {client_name}"
            # Neither waits for the other: this robot needs no runtime for it, and the others not this robot.
            beside("stop all", tell, "stop", why)
            beside("stop", guard.stop, why)
        elif key == "r":
            beside("reset all", tell, "reset")
        elif key == "p":
            guard.pause(not guard.paused)
        elif key in ENDING_KEYS:
            guard.finish(ENDING_KEYS[key])

    with (
        PolicyClient(address, client=client_name, timeout_s=deployment.bridge.request_timeout_s, keys=secret) as client,
        keys(handle, STDIN) as terminal,
    ):
        if terminal:
            warn(HELP)
        summary = run_drive(
            backend,
            client,
            deployment.bridge,
            stopped=stop.is_set,
            report=report,
            warn=warn,
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
