"""`fieldtune report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from fieldtune.commands.common import Config, Json, Set, out, print_json, run_dir
from fieldtune.deployment import Deployment, load_deployment
from runtime.registry import Registry
from trainer.evaluate import load_evaluation
from trainer.report import write_report
from trainer.statistics import Evaluation


def report(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Write report.html and report.json of a run from its own log: before and after, plots, hashes.

    The first version and the live version must have been evaluated (`fieldtune up` and `fieldtune eval` do that).

    Examples:
      fieldtune report quickstart
    """
    deployment = load_deployment(config, overrides)
    run = run_dir(deployment)
    versions = Registry(run.registry).list()
    ends = [versions[0].version, next(row.version for row in versions if row.live)] if versions else []
    evaluations = [load_evaluation(run, version) for version in ends]
    missing = [version for version, found in zip(ends, evaluations, strict=True) if found is None]
    if not ends or missing:
        what = f"version {missing[0][:12]} was not evaluated" if missing else "the run has no version"
        hint = f"fieldtune eval {config} --policy {missing[0][:12]}" if missing else f"fieldtune up {config}"
        sys.stderr.write(f"fieldtune: {what}; run `{hint}` first\n")
        return 1
    before, after = (found for found in evaluations if found is not None)
    page, content = make_report(deployment, before, after)
    if as_json:
        print_json(content)
    else:
        out.print(f"report: {page}")
    return 0


def make_report(deployment: Deployment, before: Evaluation, after: Evaluation) -> tuple[Path, dict[str, Any]]:
    """Write the page; returns its path and the content of report.json."""
    run = run_dir(deployment)
    page = write_report(run, msgspec.to_builtins(deployment), before, after)
    return page, msgspec.json.decode((run.path / "report.json").read_bytes())
