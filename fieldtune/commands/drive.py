"""`fieldtune drive`. Runs on the bridge's computer: imports neither torch nor onnxruntime."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from bridge.backends import make_backend
from bridge.client import PolicyClient
from bridge.control import EpisodeReport
from bridge.drive import drive as run_drive
from bridge.messages import Assignment
from fieldtune.commands.common import Config, Json, Set, endpoint, out, print_json, warn
from fieldtune.deployment import load_deployment
from runtime.supervisor import stop_on_signals


def drive(
    config: Config,
    /,
    *,
    overrides: Set = (),
    endpoint_: str | None = None,
    episodes: int | None = None,
    name: str | None = None,
    as_json: Json = False,
) -> int:
    """Drive the configured backend with the policy of a running runtime.

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
    keys = Path(deployment.bridge.keys) if deployment.bridge.keys else None
    client_name = name or f"{socket.gethostname()}-{os.getpid()}"

    def report(result: EpisodeReport, assignment: Assignment) -> None:
        if not as_json:
            version = result.versions[-1][:8] if result.versions else "-"
            out.print(
                f"{assignment.task} seed {assignment.seed}: {result.status} after {result.steps} steps ({version})"
            )

    address = endpoint_ or endpoint(deployment)
    with PolicyClient(address, client=client_name, timeout_s=deployment.bridge.request_timeout_s, keys=keys) as client:
        summary = run_drive(
            backend, client, deployment.bridge, stopped=stop.is_set, report=report, warn=warn, episodes=episodes
        )
    if as_json:
        print_json(summary)
    return 0
