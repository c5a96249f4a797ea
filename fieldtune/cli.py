"""`fieldtune COMMAND ...`: finds the command, imports only what it needs, turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import os
import sys
from typing import NoReturn

import tyro

from bridge.config import ConfigError
from bridge.errors import FieldtuneError
from fieldtune import __version__
from fieldtune.extras import missing_package

# name -> (module:function, summary)
COMMANDS = {
    "up": ("fieldtune.commands.up:up", "run a whole deployment: demonstrations, SFT, serve, drive, train, evaluate"),
    "walk": (
        "fieldtune.commands.walk:walk",
        "walk through one deployment: candidates caught and promoted, data out and in",
    ),
    "serve": ("fieldtune.commands.serve:serve", "serve the live policy and log episodes"),
    "drive": ("fieldtune.commands.drive:drive", "drive one backend with a runtime's policy"),
    "stop": ("fieldtune.commands.operator:stop", "stop all robots of a running runtime at once"),
    "operator": ("fieldtune.commands.operator:operator", "pause, resume, end or judge the episode, reset after a stop"),
    "train": ("fieldtune.commands.train:train", "improve the policy from the episodes of a run"),
    "eval": ("fieldtune.commands.evaluate:evaluate", "evaluate a version on goals never trained on"),
    "demos": ("fieldtune.commands.train:demos", "collect scripted demonstrations"),
    "demos import": ("fieldtune.commands.data:import_dataset", "make demonstrations of a LeRobotDataset"),
    "sft": ("fieldtune.commands.train:sft", "fine-tune the VLA on the demonstrations; makes the first version"),
    "ablate": ("fieldtune.commands.ablate:ablate", "run the method with one thing changed at a time, and compare"),
    "pretrain": ("fieldtune.commands.pretrain:pretrain", "make a base policy that others are fine-tuned from"),
    "report": ("fieldtune.commands.report:report", "write the report of a run, or one page of the results of several"),
    "status": ("fieldtune.commands.status:status", "show what a running deployment does"),
    "page": ("fieldtune.commands.page:page", "serve the operator's page of a run"),
    "policies list": ("fieldtune.commands.policies:list_policies", "list the versions of a run"),
    "policies show": ("fieldtune.commands.policies:show_policy", "show one version and its lineage"),
    "policies diff": ("fieldtune.commands.policies:diff", "compare two versions on what the robots have seen"),
    "policies add": ("fieldtune.commands.policies:add", "put a bundle made elsewhere into a run and make it live"),
    "policies promote": ("fieldtune.commands.policies:promote", "make a version live by hand"),
    "policies reject": ("fieldtune.commands.policies:reject", "end the canary that runs"),
    "policies rollback": ("fieldtune.commands.policies:rollback", "make an earlier version live again"),
    "policies pin": ("fieldtune.commands.policies:pin", "keep the live version whatever the rules say"),
    "policies unpin": ("fieldtune.commands.policies:unpin", "let the rules decide again"),
    "episodes list": ("fieldtune.commands.episodes:list_episodes", "list logged episodes"),
    "episodes show": ("fieldtune.commands.episodes:show_episode", "show one episode, decision by decision"),
    "episodes label": ("fieldtune.commands.episodes:label_episode", "say how an episode went"),
    "episodes export": ("fieldtune.commands.data:export_episodes", "export episodes as a LeRobotDataset or as MCAP"),
    "episodes view": ("fieldtune.commands.data:view_episode", "open one episode in Rerun"),
    "episodes replay": ("fieldtune.commands.replay:replay_episode", "make an episode's decisions again, and compare"),
    "bundle list": ("fieldtune.commands.bundle:list_bundles", "list the policies that ship with fieldtune"),
    "bundle make": ("fieldtune.commands.bundle:make", "make a bundle from any ONNX policy and a spec"),
    "bundle inspect": ("fieldtune.commands.bundle:inspect", "show what a bundle sees and gives"),
    "bundle verify": ("fieldtune.commands.bundle:verify", "check a bundle: hash, weights, shapes, probe replay"),
    "backend serve": (
        "fieldtune.commands.backend_serve:serve",
        "serve a backend to `backend: {name: remote}` on another computer",
    ),
    "emulate so101": ("fieldtune.commands.emulate:so101", "an SO-101 arm that is not there, on a pseudo-terminal"),
    "backend check": ("fieldtune.commands.backend_check:check", "check that a backend does what fieldtune relies on"),
    "keys": ("fieldtune.commands.keys:keys", "make CURVE keys for clients on other computers"),
    "page password": ("fieldtune.commands.page_password:page_password", "make the file with the page's password"),
    "doctor": ("fieldtune.commands.doctor:doctor", "check this computer and say how to mend what is missing"),
    "bench": ("fieldtune.commands.bench:bench", "measure serving, rollout, swap and logging"),
}

FULL = (errno.ENOSPC, errno.EDQUOT)


def main() -> NoReturn:
    """Entry point of the `fieldtune` command."""
    # Trainer, runtime and simulators share the cores: a thread that waits must sleep. Spinning, the default of OpenMP,
    # makes torch ten times slower as soon as a core is wanted by somebody else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        try:
            code = run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        # Commands that have something to put in order see to that themselves (`stop_on_signals`).
        code = _fail("interrupted", 1)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    name, rest = _find(arguments)
    if name is None:
        return _usage(arguments)
    module_name, _, function_name = COMMANDS[name][0].partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        # tyro alone would leave the examples out of the help.
        description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
        return int(tyro.cli(function, prog=f"fieldtune {name}", description=description, args=rest))
    except ConfigError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if message is None:
            raise
        return _fail(message, 1)
    except FieldtuneError as error:
        return _fail(str(error), 1)
    except OSError as error:
        # A file that cannot be read or written and a full disk are no bugs. Of anything else the traceback is wanted.
        if isinstance(error, BrokenPipeError) or (error.filename is None and error.errno not in FULL):
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror}", 1)


def _find(arguments: list[str]) -> tuple[str | None, list[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if len(arguments) >= words and name in COMMANDS:
            return name, arguments[words:]
    return None, arguments


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"fieldtune: {message}\n")
    return code


def _usage(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first == "--version":
        sys.stdout.write(f"fieldtune {__version__}\n")
        return 0
    group = {name: entry for name, entry in COMMANDS.items() if name.split()[0] == first}
    if first in ("", "-h", "--help") or (group and (len(arguments) == 1 or arguments[1] in ("-h", "--help"))):
        sys.stdout.write(_help(group or COMMANDS))
        return 0 if first in ("-h", "--help") or arguments[1:] else 2
    words = " ".join(arguments[:2]) if group else first
    near = difflib.get_close_matches(words, COMMANDS, n=1)
    hint = f"; did you mean `fieldtune {near[0]}`?" if near else ""
    return _fail(f"no command `{words}`{hint} (fieldtune --help lists them)", 2)


def _help(commands: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in commands.items()]
    return "\n".join(
        [
            "usage: fieldtune COMMAND ... (fieldtune COMMAND --help has options and examples)",
            "",
            *lines,
            "",
            "examples:",
            "  fieldtune up quickstart          the whole loop on one MetaWorld task, a few minutes on two cores",
            "  fieldtune up my_arm.yaml         the same for a deployment of yours",
            "  fieldtune status quickstart      what it is doing now",
            "",
        ]
    )
