"""`fieldtune backend check`. Needs only what the bridge needs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from bridge.backends import BACKENDS, make_backend
from bridge.config import parse
from bridge.conformance import Check, CheckState, check_backend
from fieldtune.commands.common import Json, Set, err, out, print_json
from fieldtune.deployment import Deployment, load_deployment

COLOURS: dict[CheckState, str] = {"passed": "green", "warned": "yellow", "failed": "red", "skipped": "dim"}


def check(
    name_or_config: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="NAME_OR_CONFIG", help="a backend's name or module:Class, a YAML file or the name of a shipped one"
        ),
    ],
    /,
    *,
    overrides: Set = (),
    moves: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    as_json: Json = False,
) -> int:
    """Check that a backend does what fieldtune relies on; exits with 1 if a check failed.

    A simulator is run. A robot is connected, looked at, stopped and closed, and moves only with --moves.

    Examples:
      fieldtune backend check point
      fieldtune backend check my_arm.yaml
      fieldtune backend check my_arm:MyArm --set backend.options.port=/dev/ttyACM0 --moves

    Args:
        moves: let a robot move too: small moves, and one joint slowly to its nearest limit; stand clear
    """
    config = _deployment(name_or_config, overrides).backend

    def progress(row: Check) -> None:
        if not as_json and err.is_terminal:
            err.print(f"{row.name}: {row.state}", style="dim")

    checks = check_backend(lambda: make_backend(config), moves=moves, report=progress)
    good = all(row.state != "failed" for row in checks)
    if as_json:
        print_json({"backend": config.name, "good": good, "checks": checks})
        return 0 if good else 1
    table = Table("", "", "found, and what to do", box=None, pad_edge=False)
    for row in checks:
        mend = f"\n{row.mend}" if row.mend else ""
        table.add_row(Text(row.state, COLOURS[row.state]), row.name, Text.assemble(row.found, (mend, "bold")))
    out.print(table)
    count = Counter(row.state for row in checks)
    out.print(f"{config.name}: " + ", ".join(f"{count[state]} {state}" for state in COLOURS if count[state]))
    return 0 if good else 1


def _deployment(name_or_config: str, overrides: tuple[str, ...]) -> Deployment:
    """The deployment of a file, or one that has nothing but the backend of this name."""
    is_name = name_or_config in BACKENDS or ":" in name_or_config
    if is_name and not Path(name_or_config).is_file():
        return parse({"name": "check", "backend": {"name": name_or_config}}, Deployment, name_or_config, overrides)
    return load_deployment(name_or_config, overrides)
