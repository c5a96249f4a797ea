"""`fieldtune eval`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from msgspec.structs import replace
from rich.table import Table

from bridge.backends import make_backend
from bridge.config import ConfigError
from bridge.endpoint import resolve_endpoint
from fieldtune.commands.common import Config, Json, Set, err, out, print_json, progress_bar, run_dir, warn
from fieldtune.deployment import Deployment, load_deployment, require_workers
from fieldtune.install import find_version
from runtime.config import ServeConfig
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.supervisor import stop_on_signals
from trainer.config import EvaluateConfig
from trainer.evaluate import RESULT
from trainer.evaluate import evaluate as run_evaluation
from trainer.statistics import Evaluation, Result, result_on

HELD_OUT = "held_out"


def evaluate(
    config: Config,
    /,
    *,
    overrides: Set = (),
    policy: str | None = None,
    episodes: int | None = None,
    instructions: Literal["training", "held_out"] | None = None,
    as_json: Json = False,
) -> int:
    """Evaluate one policy: mean action, goals from seeds that training never sees, Wilson 95 % intervals.

    It starts a server and workers of its own. A simulator's running deployment is not disturbed; a robot's has to be
    stopped first, and the operator's commands and the page then reach the evaluation. An interrupted evaluation goes on
    where it stopped. Episodes that nobody has judged are left out of the figures until they are labelled (`fieldtune
    episodes label CONFIG EPISODE success --log eval/VERSION`). A policy that is not of this run becomes one of its
    versions, which is not live.

    Examples:
      fieldtune eval quickstart
      fieldtune eval quickstart --policy 3fa9 --episodes 100
      fieldtune eval my_arm.yaml --policy ../other/policies/3fa9...
      fieldtune eval quickstart --instructions held_out

    Args:
        policy: version id or a unique prefix of it, name of a shipped policy, or directory of a bundle; the live
            version if not given
        episodes: episodes per task, if not as configured
        instructions: wordings that the policy is told, for a backend that has the option `instructions`; `held_out`
            are those it was not trained on, with a log and a result of their own
    """
    if episodes is not None and episodes < 1:
        raise ConfigError(f"--episodes {episodes}: expected at least 1")
    if instructions is not None:
        overrides = told_in(config, overrides, instructions)
    deployment = load_deployment(config, overrides)
    if episodes is not None:
        # For its check alone: none of so many goals may be trained on. The usual goals stay those of the deployment.
        load_deployment(config, (*overrides, f"trainer.evaluate.episodes_per_task={episodes}"))
    stop = stop_on_signals()
    wanted = policy or Registry(run_dir(deployment).registry).live()
    if wanted is None:
        sys.stderr.write(
            f"fieldtune: run {deployment.name} has no version yet; run `fieldtune sft {config}` first, "
            "or give one by --policy\n"
        )
        return 1
    version = find_version(deployment, wanted)
    result = evaluate_version(deployment, config, overrides, version, stop.is_set, quiet=as_json, episodes=episodes)
    if result is None:
        return 1
    if as_json:
        print_json(result)
    else:
        out.print(evaluation_table([("", result)]))
    return 0


def evaluate_version(
    deployment: Deployment,
    config: str,
    overrides: tuple[str, ...],
    version: str,
    stopped: Callable[[], bool],
    *,
    quiet: bool = False,
    episodes: int | None = None,
    title: str = "evaluating",
) -> Evaluation | None:
    """Evaluate with a progress bar; None if stopped before the end.

    A simulator is evaluated at an address of its own, so that a deployment may run beside it. A robot is evaluated at
    that of its deployment, where its operator's orders go.
    """
    require_workers(deployment, "an evaluation")
    spec = make_backend(deployment.backend).spec
    tasks = deployment.trainer.trained(spec)
    goals = deployment.trainer.evaluate
    if episodes is not None:
        goals = replace(goals, episodes_per_task=episodes)
    run = run_dir(deployment)
    usual = goals == usual_goals(run, deployment)
    variant = HELD_OUT if deployment.backend.options.get("instructions") == HELD_OUT else ""
    if spec.paced:
        serve = deployment.runtime.serve
        here: tuple[str, ...] = ()
        address = resolve_endpoint(serve.endpoint, run.path)
        if not quiet:
            err.print(f"the robot is driven from {address}: `fieldtune stop {config}` and `operator` reach it")
    else:
        serve = ServeConfig()
        address = resolve_endpoint("ipc", run.evaluation(version, variant))
        here = ("bridge.keys=null", f"bridge.endpoint={address}")
    with progress_bar(f"{title} {version[:8]}", quiet=quiet) as advance:
        return run_evaluation(
            run,
            version,
            tasks,
            episodes_per_task=goals.episodes_per_task,
            first_seed=goals.first_seed,
            horizon_steps=deployment.bridge.horizon_steps,
            conditions=conditions(deployment),
            variant=variant,
            result=RESULT if usual else f"result-{goals.first_seed}-{goals.episodes_per_task}.json",
            endpoint=address,
            serve=serve,
            workers=deployment.bridge.workers,
            worker_command=lambda i: drive_command(config, (*overrides, *here), f"eval-{i}"),
            stopped=stopped,
            progress=advance,
            warn=warn,
        )


def told_in(config: str, overrides: tuple[str, ...], wordings: Literal["training", "held_out"]) -> tuple[str, ...]:
    """The overrides with which the policy is told these wordings: what was given, where it is told those of training
    anyway. An option more would make another evaluation of it.
    """
    told = (*overrides, f"backend.options.instructions={wordings}")
    now, then = (make_backend(load_deployment(config, those).backend).spec.instructions for those in (overrides, told))
    return overrides if wordings == "training" and now == then else told


def usual_goals(run: RunDir, deployment: Deployment) -> EvaluateConfig:
    """The goals that the run is compared on: those of its configuration, once it has one."""
    if not run.config.exists():
        return deployment.trainer.evaluate
    return msgspec.json.decode(run.config.read_bytes(), type=Deployment).trainer.evaluate


def conditions(deployment: Deployment) -> dict[str, Any]:
    """What the episodes of an evaluation depend on besides version, goal and horizon, as JSON has it."""
    whole: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(deployment))
    bridge = {f"bridge.{name}": whole["bridge"][name] for name in ("merge", "play_steps", "delay_steps", "safety")}
    return {**bridge, "backend": whole["backend"]}


def drive_command(config: str, overrides: tuple[str, ...], name: str) -> list[str]:
    """The command line of a bridge worker."""
    return fieldtune_command("drive", config, overrides, "--name", name)


def fieldtune_command(command: str, config: str, overrides: tuple[str, ...], *rest: str) -> list[str]:
    """A command line of this very installation."""
    return [sys.executable, "-m", "fieldtune", command, config, *rest, *(x for o in overrides for x in ("--set", o))]


def evaluation_table(columns: list[tuple[str, Evaluation]], post_trained: tuple[str, ...] = ()) -> Table:
    """Success with Wilson interval and steps, by task, one group of columns for each evaluation.

    Where only some of the tasks were `post_trained`, those and the others are summed up apart: what was forgotten.
    """
    table = Table(title=f"mean action, unseen goals, n = {columns[0][1].overall.n}")
    table.add_column("task")
    for name, _ in columns:
        table.add_column(f"{name} success".strip(), justify="right")
        table.add_column(f"{name} steps".strip(), justify="right")
    tasks = tuple(columns[0][1].tasks)
    improved = tuple(task for task in tasks if task in post_trained)
    others = tuple(task for task in tasks if task not in post_trained)
    sums = {"post-trained": improved, "others": others} if improved and others else {}

    def result_in(evaluation: Evaluation, row: str) -> Result:
        if row in sums:
            return result_on(evaluation, sums[row])
        return evaluation.overall if row == "overall" else evaluation.tasks[row]

    for row in (*tasks, *sums, *(("overall",) if len(tasks) > 1 else ())):
        cells = [row]
        for _, evaluation in columns:
            result = result_in(evaluation, row)
            low, high = result.success_interval
            success = f"{result.success:.2f} [{low:.2f}, {high:.2f}]" if result.n else "-"
            cells += [success, steps_text(result.steps, result.steps_interval)]
        table.add_row(*cells)
    return table


def steps_text(steps: float | None, interval: tuple[float, float] | None) -> str:
    """Mean steps over successes with its interval; a dash where nothing succeeded."""
    if steps is None:
        return "-"
    return f"{steps:.1f}" if interval is None else f"{steps:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"
