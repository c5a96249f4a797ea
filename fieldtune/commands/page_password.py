"""`fieldtune page password`."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bridge.config import ConfigError
from fieldtune.commands.common import out
from fieldtune.page.password import write_password


def page_password(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    /,
    *,
    replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Ask for the password of the operator's page and keep its hash in FILE, for `page.password`.

    On a terminal it is asked for twice and not shown; otherwise it is the first line of standard input.

    Examples:
      fieldtune page password page.password
      fieldtune up my_arm.yaml --set page.password=page.password --set page.host=0.0.0.0

    Args:
        file: where it is written, readable by you alone
        replace: write over a file that is there; a page that is being served takes it at its next start
    """
    if sys.stdin.isatty():
        try:
            password = getpass.getpass("Password of the page: ")
            again = getpass.getpass("Once more: ")
        except EOFError as error:
            raise ConfigError("no password was typed; nothing was written") from error
        if again != password:
            raise ConfigError("the two are not the same; nothing was written")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    write_password(file, password, replace=replace)
    out.print(f"page.password: {file}", soft_wrap=True)
    return 0
