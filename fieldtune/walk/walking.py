"""One walk: its processes, what it prints, and waiting that ends."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bridge.client import SilentError
from bridge.errors import FieldtuneError
from bridge.messages import Announce, Serving
from fieldtune.commands.common import connect, err, out, warn
from fieldtune.commands.evaluate import drive_command, fieldtune_command
from fieldtune.commands.up import Up, stop_together, wait_for_runtime
from runtime.index import EpisodeIndex
from runtime.registry import Registry, StageChange
from runtime.rundir import RunDir
from runtime.supervisor import Child

LOOK_S = 0.1
GATE_S = 60.0
"""For a bundle to be loaded and judged on busy cores."""


class WalkError(FieldtuneError):
    """The walk cannot go on; the message says what was waited for."""


@dataclass(slots=True)
class Step:
    """What one step showed."""

    title: str
    page: str
    """Where it can be watched on the operator's page."""
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    """What did not go as it must."""


@dataclass(slots=True)
class Walk:
    """The deployment, its processes, and the steps so far."""

    up: Up
    pause: bool
    """Wait for Enter before each step."""
    children: list[Child] = field(default_factory=list)
    """Those that run, in the order in which they started."""
    steps: list[Step] = field(default_factory=list)
    runtime: Child = field(init=False)
    robots: list[Child] = field(init=False)
    registry: Registry = field(init=False)
    index: EpisodeIndex = field(init=False)

    def __post_init__(self) -> None:
        up, bridge = self.up, self.up.deployment.bridge
        self.runtime = up.child("runtime", fieldtune_command("serve", up.config, up.overrides))
        names = [f"bridge-{i}" for i in range(bridge.workers)]
        self.robots = [up.child(name, drive_command(up.config, up.overrides, name), bridge.niceness) for name in names]
        self.registry, self.index = Registry(self.run.registry), EpisodeIndex(self.run.episodes)

    @property
    def run(self) -> RunDir:
        """The run's files."""
        return self.up.run

    # --- printing -------------------------------------------------------------------------------------------------

    def begin(self, title: str, page: str, intent: str) -> Step:
        """Say what is about to happen, and wait for Enter if that was asked for."""
        self.steps.append(Step(title, page))
        console = self._console()
        where = f"  {self.up.page.url}{page}" if self.up.page and self.up.page.url else ""
        console.print(Text.assemble("\n", (f"{len(self.steps)}. {title}", "bold"), (where, "dim")))
        self.tell(intent)
        if self.pause:
            console.print("   Enter goes on", style="dim")
            self._wait_for_enter()
        return self.steps[-1]

    def tell(self, text: str) -> None:
        """A paragraph, broken at the width of the terminal."""
        self._console().print(text)

    def check(self, text: str, good: bool) -> None:
        """Say what was found in this step, and remember if it must not be so."""
        mark = ("ok ", "green") if good else ("NOT", "red")
        self._console().print(Text.assemble("   ", mark, f" {text}"), soft_wrap=True)
        if not good:
            self.steps[-1].failed.append(text)

    def _console(self) -> Console:
        return err if self.up.quiet else out

    # --- waiting --------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str, within_s: float, *children: Child) -> None:
        """Wait, with all children kept alive. Raises `WalkError` with the ends of these children's logs after
        `within_s`.
        """
        deadline_s = time.monotonic() + within_s
        with err.status(escape(f"waiting for: {what}")):  # on a terminal only
            while not condition():
                if time.monotonic() > deadline_s:
                    raise WalkError(
                        f"waited {within_s:g} s in vain for: {what}{''.join(child.tail() for child in children)}"
                    )
                self._look_after_children()

    def _wait_for_enter(self) -> None:
        # Bytes and not lines: what a line's reader has taken ahead, no select sees. End of file goes on too.
        descriptor = sys.stdin.fileno()
        while True:
            while not select.select([descriptor], [], [], 0)[0]:
                self._look_after_children()
            if os.read(descriptor, 1) in (b"\n", b""):
                return

    def _look_after_children(self) -> None:
        time.sleep(LOOK_S)
        if self.up.asked_to_stop():
            raise WalkError("stopped")
        for child in self.children:
            child.keep_alive(warn)

    # --- children ---------------------------------------------------------------------------------------------------

    def start(self, child: Child) -> None:
        """Start a child, which is looked after from now on."""
        self.children.append(child)
        child.start()

    def end(self, children: Sequence[Child]) -> None:
        """Stop some, together."""
        stop_together(children)
        self.children = [child for child in self.children if child not in children]

    def end_all(self) -> None:
        """Stop the rest, the last started first: the runtime outlives those who talk to it."""
        while self.children:
            self.end(self.children[-1:])

    # --- the runtime ----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start the runtime, and wait until it answers; the robots come later."""
        self.start(self.runtime)
        wait_for_runtime(self.up, self.runtime)

    def announce(self, bundle: Path) -> str:
        """Tell the runtime of a bundle; returns the live version. Raises `RefusedError` if it is none."""
        try:
            with connect(self.up.deployment, "walk", GATE_S) as client:
                reply, _ = client.request(Announce(path=str(bundle.resolve())), Serving)
        except SilentError as error:
            raise WalkError(f"{error}; it was told of {bundle}{self.runtime.tail()}") from error
        return reply.version

    def stage(self, version: str) -> StageChange | None:
        """The last step of a version."""
        changes = self.registry.stages(version)
        return changes[-1] if changes else None

    def drives(self, version: str) -> int:
        """How many episodes it has had a part in."""
        return self.index.count(version=version)

    def success(self, version: str) -> tuple[int, int]:
        """Successes, and episodes that ended, of a version."""
        rows = [row for row in self.index.list(limit=10**9, version=version) if row.status != "aborted"]
        return sum(row.status == "success" for row in rows), len(rows)
