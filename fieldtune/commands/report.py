"""`fieldtune report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import tyro
from msgspec.structs import replace

from bridge.config import ConfigError
from fieldtune.commands.common import Json, Set, out, print_json, progress_bar, run_dir
from fieldtune.deployment import Deployment, load_deployment
from runtime.registry import Registry
from runtime.rundir import RunDir
from trainer.evaluate import load_evaluation
from trainer.report import write_report
from trainer.statistics import Evaluation

if TYPE_CHECKING:
    from trainer.results_data import Contestant, RunResults

Runs = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="RUN ...", help="configurations, or directories of runs such as runs/NAME"),
]


def report(runs: Runs, /, *, overrides: Set = (), results: Path | None = None, as_json: Json = False) -> int:
    """Write report.html and report.json of a run from its own log: before and after, plots, hashes.

    The first version and the live version must have been evaluated (`fieldtune up` and `fieldtune eval` do that).
    With --results several runs (seeds, sets of demonstrations) become one page: means over seeds with intervals, SFT,
    post-trained and scripted expert on the same goals, what it cost. Runs that are not finished are shown as they are.
    What the page is made from is kept in `records/` beside it, in a small file for each run, named as its directory.
    Such a file can be named in place of its run, when that is deleted or on another computer.

    Examples:
      fieldtune report quickstart
      fieldtune report runs/mt10-seed0 runs/mt10-seed1 runs/mt10-seed2 --results docs/results.md
      fieldtune report docs/records/mt10-seed0.json.gz runs/mt10-seed3 --results docs/results.md

    Args:
        results: write this Markdown page instead, with `pictures/` and `records/` beside it
    """
    if not runs:
        raise ConfigError("no run was named; expected configurations or directories of runs")
    if results is not None:
        page = make_results(runs, overrides, results, quiet=as_json)
        if as_json:
            print_json({"results": str(page)})
        else:
            out.print(f"results: {page}")
        return 0
    from trainer.results_record import SUFFIX

    if records := [name for name in runs if name.endswith(SUFFIX)]:
        raise ConfigError(
            f"{records[0]} is the record of a run, which goes onto a page of results: add --results PAGE; the report "
            "of one run is made from its directory"
        )
    deployments = [find_run(name, overrides) for name in runs]
    codes = [single(name, deployment, as_json) for name, deployment in zip(runs, deployments, strict=True)]
    return max(codes)


def find_run(name: str, overrides: tuple[str, ...]) -> Deployment:
    """The deployment of a run: from its directory, or of a configuration."""
    path = Path(name)
    if not path.is_dir():
        return load_deployment(name, overrides)
    if overrides:
        raise ConfigError(f"{name} is a run, whose configuration is settled; --set is for configurations")
    config = RunDir(path).config
    if not config.exists():
        raise ConfigError(f"{name} is not a run: it has no {config.name}")
    deployment = msgspec.json.decode(config.read_bytes(), type=Deployment)
    path = path.resolve()
    return replace(deployment, name=path.name, runs=str(path.parent))  # it may have been moved since


def single(name: str, deployment: Deployment, as_json: bool) -> int:
    """The report of one run."""
    run = run_dir(deployment)
    versions = Registry(run.registry).served()
    ends = [versions[0].version, next(row.version for row in versions if row.live)] if versions else []
    evaluations = [load_evaluation(run, version) for version in ends]
    missing = [version for version, found in zip(ends, evaluations, strict=True) if found is None]
    if not ends or missing:
        what = f"version {missing[0][:12]} was not evaluated" if missing else "the run has no version"
        config = RunDir(Path(name)).config if Path(name).is_dir() else name
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


def make_results(runs: tuple[str, ...], overrides: tuple[str, ...], page: Path, *, quiet: bool) -> Path:
    """Write the page of several runs, each a configuration, a directory or a record."""
    from trainer.results import check_together, write_results
    from trainer.results_data import Contestant, read_run
    from trainer.results_record import SUFFIX, read_record

    deployments = [None if name.endswith(SUFFIX) else find_run(name, overrides) for name in runs]
    found = [
        Contestant(read_run(run_dir(deployment).path), None, None) if deployment else read_record(Path(name))
        for name, deployment in zip(runs, deployments, strict=True)
    ]
    check_together(found)  # all mistakes before the expert drives
    return write_results(
        [
            contend(deployment, one.run, quiet) if deployment else one
            for one, deployment in zip(found, deployments, strict=True)
        ],
        page,
    )


def contend(deployment: Deployment, found: RunResults, quiet: bool) -> Contestant:
    """The results of a run, after the expert has tried its goals where it has not yet."""
    from trainer.expert import bound_of, evaluate_expert
    from trainer.results_data import Contestant

    run = run_dir(deployment)
    if not found.goals:
        return Contestant(found, None, None)
    with progress_bar(f"expert on the goals of {found.name}", quiet=quiet) as advance:
        expert = evaluate_expert(run, deployment.backend, found.goals, deployment.bridge.horizon_steps, advance)
    return Contestant(found, expert, bound_of(run, deployment.backend, found.goals))
