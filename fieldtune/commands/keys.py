"""`fieldtune keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from bridge.keys import make_keys
from fieldtune.commands.common import Json, out, print_json


def keys(
    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")],
    clients: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CLIENT ...")],
    /,
    *,
    as_json: Json = False,
) -> int:
    """Make CURVE keys: one pair for the runtime, one for each client that may connect from another computer.

    Copy DIRECTORY/CLIENT to that client's computer over a safe way; DIRECTORY/server stays with the runtime.

    Examples:
      fieldtune keys keys arm1 arm2
      fieldtune serve lab.yaml --set runtime.serve.keys=keys/server --set runtime.serve.endpoint=tcp://0.0.0.0:5555
      fieldtune drive lab.yaml --set bridge.keys=keys/arm1 --set bridge.endpoint=tcp://10.0.0.5:5555

    Args:
        directory: where the keys are kept
        clients: names of the clients
    """
    made = make_keys(directory, list(clients))
    if as_json:
        print_json({"server": str(directory / "server"), "clients": [str(path) for path in made]})
        return 0
    out.print(f"runtime: runtime.serve.keys: {directory / 'server'}")
    for path in made:
        out.print(f"client {path.name}: copy {path} to its computer; bridge.keys: {path}")
    return 0
