"""`fieldtune demos`, `fieldtune sft`, `fieldtune train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bridge.backends import make_backend
from bridge.client import SilentError
from bridge.config import ConfigError
from bridge.messages import Announce, GetStatus, Serving, StatusReply
from fieldtune.commands.common import (
    JUDGED_S,
    Config,
    Json,
    Set,
    connect,
    err,
    out,
    print_json,
    progress_bar,
    run_dir,
    warn,
)
from fieldtune.commands.status import runtime_status
from fieldtune.deployment import Deployment, find_bundle, load_deployment
from runtime.registry import Registry
from runtime.supervisor import stop_on_signals

ANNOUNCE_TRIES = 6
ANNOUNCE_TIMEOUT_S = 10.0


def demos(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Collect scripted demonstrations of every task until there are `trainer.demos.per_task` successes of each.

    What is there already counts, so the command goes on where it stopped. Several processes share the work
    (`trainer.demos.workers`); which demonstrations come out does not depend on how many.

    Examples:
      fieldtune demos quickstart
      fieldtune demos quickstart --set trainer.demos.per_task=100
    """
    from trainer.demos import collect_demos

    deployment = load_deployment(config, overrides)
    stop = stop_on_signals()
    with progress_bar("demonstrations", quiet=as_json) as advance:
        summary = collect_demos(
            partial(make_backend, deployment.backend),
            run_dir(deployment).demos,
            deployment.trainer.demos,
            deployment.trainer.tasks,
            horizon_steps=deployment.bridge.horizon_steps,
            progress=advance,
            stopped=stop.is_set,
        )
    if as_json:
        print_json(summary)
    else:
        out.print(f"{summary.kept} demonstrations, {summary.steps_mean:.0f} steps on average; {summary.failed} failed")
    return 1 if stop.is_set() else 0


def sft(config: Config, /, *, overrides: Set = (), as_json: Json = False) -> int:
    """Fine-tune the VLA on the demonstrations, export it and make it the live version of the run.

    Examples:
      fieldtune sft quickstart
    """
    from trainer.sft import run_sft

    deployment = load_deployment(config, overrides)
    refuse_policy(deployment)
    stop = stop_on_signals()
    with progress_bar("fine-tuning", quiet=as_json) as advance:
        version = run_sft(
            run_dir(deployment),
            make_backend(deployment.backend).spec,
            deployment.trainer,
            deployment.seed,
            progress=advance,
            stopped=stop.is_set,
            start=find_bundle(deployment.trainer.start) if deployment.trainer.start else None,
        )
    if version is None:
        return 1
    if as_json:
        print_json({"version": version})
    else:
        out.print(f"version {version}")
    return 0


def refuse_policy(deployment: Deployment) -> None:
    """Raise `ConfigError` where the configuration says that there is no supervised fine-tuning."""
    if deployment.trainer.policy is not None:
        raise ConfigError(
            f"$.trainer.policy: the run starts from {deployment.trainer.policy} as it is, so nothing is fine-tuned on "
            "demonstrations; to do that, give it as trainer.start instead"
        )


def train(config: Config, /, *, overrides: Set = ()) -> int:
    """Improve the policy from the episodes of the run and push new versions to its runtime, until `trainer.stop`.

    It can be stopped and started at any time; it goes on from its last checkpoint.

    Examples:
      fieldtune train quickstart
      fieldtune train quickstart --set trainer.stop.minutes=30
    """
    from trainer.continual import train as run_training

    deployment = load_deployment(config, overrides)
    stop = stop_on_signals()

    def report(line: dict[str, Any]) -> None:
        err.print(
            f"iteration {line['iteration']}: {line['env_steps']} steps, success {line['success']:.2f}, "
            f"steps to success {line['steps_to_success'] or float('nan'):.1f}, w {line['weight']:.2f}"
        )

    version = run_training(
        run_dir(deployment),
        make_backend(deployment.backend).spec,
        deployment.trainer,
        deployment.seed,
        announce=lambda path: announce(deployment, path),
        stop=stop,
        report=report,
        warn=warn,
    )
    out.print(f"version {version}")
    return 1 if stop.is_set() else 0


def announce(deployment: Deployment, path: Path) -> None:
    """Tell the runtime of a new bundle; a runtime that is being restarted is asked again for about a minute."""
    registry = Registry(run_dir(deployment).registry)
    for attempt in range(1, ANNOUNCE_TRIES + 1):
        asked_s = time.monotonic()
        try:
            with connect(deployment, "trainer", ANNOUNCE_TIMEOUT_S) as client:
                client.request(GetStatus(), StatusReply)
                client.request(Announce(path=str(path.resolve())), Serving)
                return
        except SilentError as error:
            if was_taken(registry, path.name, partial(runs_since, deployment, asked_s)):
                return
            if attempt == ANNOUNCE_TRIES:
                raise
            warn(f"{error}; announcing again ({attempt}/{ANNOUNCE_TRIES})")


def was_taken(registry: Registry, version: str, still_at_it: Callable[[], bool]) -> bool:
    """Whether a runtime that has not answered an announcement takes it all the same: it may still load or judge, and
    asked again it would do so twice, or it may have ended before it could answer.

    `still_at_it` says whether the runtime that was asked still runs.
    """
    judged_by_s = time.monotonic() + JUDGED_S
    while registry.live() != version and (stage := registry.stage(version)) in (None, "candidate"):
        if time.monotonic() >= judged_by_s or (stage is None and not still_at_it()):
            return False
        time.sleep(0.5)
    return True


def runs_since(deployment: Deployment, asked_s: float) -> bool:
    """Whether a runtime answers that was started before `asked_s` on the monotonic clock."""
    try:
        return runtime_status(deployment, ANNOUNCE_TIMEOUT_S).uptime_s > time.monotonic() - asked_s
    except SilentError:
        return False
