"""`fieldtune walk`: one deployment with its accidents on MetaWorld, each step shown with its figures."""

from __future__ import annotations

import shlex
import time
from typing import Annotated, Any

import tyro

from bridge.errors import FieldtuneError
from fieldtune.commands.common import Json, Set, print_json
from fieldtune.commands.up import Up, begun, page_of, put_aside
from fieldtune.deployment import load_deployment
from fieldtune.walk.data import export_and_import, relabel
from fieldtune.walk.deploying import (
    promote_good,
    put_to_work,
    refuse_broken,
    reject_at_gate,
    reject_in_canary,
    start_from_weak,
)
from fieldtune.walk.walking import Step, Walk
from runtime.supervisor import stop_on_signals

CONFIG = "walk"


def walk(
    *,
    overrides: Set = (),
    pause: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="step")] = False,
    as_json: Json = False,
) -> int:
    """Walk through one deployment: bad candidates are caught, a good one is promoted, an episode is labelled anew, the
    log is exported and imported again.

    Runtime, robots and trainer are real processes on MetaWorld, in the run `walk`; an earlier one is put aside. Each
    step says what is about to happen, what was found, and where it can be watched on the page. It takes about two
    minutes on two cores. The exit code is 0 only when each step went as it must.

    Examples:
      fieldtune walk
      fieldtune walk --step

    Args:
        pause: wait for Enter before each step
    """
    started_s = time.monotonic()
    up = Up(load_deployment(CONFIG, overrides), CONFIG, overrides, stop_on_signals(), as_json)
    put_aside(up)
    this = Walk(up, pause)
    with begun(up), page_of(up):
        try:
            put_to_work(this, start_from_weak(this))
            refuse_broken(this)
            rejected = reject_at_gate(this)
            reject_in_canary(this)
            version = promote_good(this, rejected)
            relabelled = relabel(this, version)
            export_and_import(this, version, relabelled)
        except FieldtuneError as error:
            # What was found before it is told too.
            if not this.steps or up.stop.is_set():
                raise
            this.check(str(error), False)
        finally:
            this.end_all()
    failed = [f"{number}. {step.title}: {text}" for number, step in enumerate(this.steps, 1) for text in step.failed]
    settings = [f"--set {shlex.quote(setting)}" for setting in overrides]
    minutes = (time.monotonic() - started_s) / 60
    if as_json:
        print_json({"steps": [_plain(step) for step in this.steps], "failed": failed, "minutes": minutes})
    elif failed:
        this.tell("\nnot as it must be:\n  " + "\n  ".join(failed))
    else:
        this.tell(
            f"\nall {len(this.steps)} steps went as they must, in {minutes:.1f} minutes; "
            f"the run is in {up.run.path}, and `{' '.join(['fieldtune page walk', *settings])}` shows it"
        )
    return 1 if failed else 0


def _plain(step: Step) -> dict[str, Any]:
    return {"title": step.title, "page": step.page, "failed": step.failed, **step.figures}
