"""What several commands share: their common arguments, and how results and warnings are printed."""

from __future__ import annotations

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import msgspec
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from bridge.client import PolicyClient
from bridge.endpoint import resolve_endpoint
from fieldtune.deployment import Deployment
from runtime.rundir import RunDir

Config = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="CONFIG", help="a YAML file, or the name of a shipped configuration"),
]
BundleName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="BUNDLE", help="directory of a bundle, or the name of a shipped policy"),
]
Set = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        name="set", metavar="PATH=VALUE", help="override one key, e.g. --set trainer.ppo.lr=1e-4; repeatable"
    ),
]
Json = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(name="json", help="print one JSON object on stdout and nothing else there"),
]

JUDGED_S = 120.0
"""For the answer to an announcement: a gate may run a large policy over many logged decisions on busy cores."""
UNREACHED = (
    "`fieldtune up` or `serve` starts a runtime; other commands find it from the same directory, with the same --set"
)


class _Stderr:
    """stderr, but what cannot be written is lost: no robot and no runtime stops because the disk of its log is full."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


# No markup: names, reasons and paths come from elsewhere, and what stands in brackets there is no style. Whoever wants
# one gives a `Text`.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(file=cast(TextIO, _Stderr()), highlight=False, markup=False, emoji=False)


def warn(message: str) -> None:
    """A line on stderr with the time of day, for logs."""
    err.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), " ", message))


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


def account() -> str:
    """Name of the account that this process runs as, for what is kept with a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name there
        return f"uid {os.getuid()}"


def run_dir(deployment: Deployment) -> RunDir:
    """The run's files."""
    return RunDir(deployment.run_dir)


def endpoint(deployment: Deployment) -> str:
    """Where the runtime of this deployment is, as a client sees it."""
    return resolve_endpoint(deployment.bridge.endpoint or deployment.runtime.serve.endpoint, deployment.run_dir)


def connect(deployment: Deployment, client: str, timeout_s: float = 5.0) -> PolicyClient:
    """A client of the deployment's runtime."""
    keys = Path(deployment.bridge.keys) if deployment.bridge.keys else None
    return PolicyClient(endpoint(deployment), client=client, timeout_s=timeout_s, keys=keys)


def list_table(*headers: str | Column) -> Table:
    """A table without lines between its cells, narrow enough for 80 columns."""
    return Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields `advance(done, total)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
