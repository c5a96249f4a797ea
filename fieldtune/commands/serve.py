"""`fieldtune serve`."""

from __future__ import annotations

import numpy as np

from bridge.backends import make_backend
from bridge.endpoint import resolve_endpoint
from fieldtune.commands.common import Config, Set, run_dir, warn
from fieldtune.deployment import load_deployment
from runtime.durable import HOUR_S, remove_leftovers
from runtime.episodes import EpisodeLog
from runtime.registry import Registry
from runtime.schedule import WINDOW_EPISODES, Training
from runtime.server import PolicyServer
from runtime.staging import Staging, end_all_trials
from runtime.supervisor import stop_on_signals
from runtime.swap import Live


def serve(config: Config, /, *, overrides: Set = (), mean: bool = False) -> int:
    """Serve the live policy of a run over ZeroMQ and log every episode.

    Bridges connect with `fieldtune drive CONFIG`; new versions come from `fieldtune train CONFIG`. Ctrl-C stops it;
    open episodes are kept as aborted.

    Examples:
      fieldtune serve quickstart
      fieldtune serve my_arm.yaml --set runtime.serve.endpoint=tcp://127.0.0.1:5555

    Args:
        mean: take the mean action instead of sampling (nothing to learn from)
    """
    deployment = load_deployment(config, overrides)
    stop = stop_on_signals()
    run = run_dir(deployment)
    settings = deployment.runtime
    tasks = deployment.trainer.post_trained(make_backend(deployment.backend).spec)
    horizon_steps = deployment.bridge.horizon_steps
    # The log first: while this process has it, nobody changes what is live behind its back.
    log = EpisodeLog(
        run.episodes,
        queue_mb=settings.log.queue_mb,
        keep_gb=settings.log.keep_gb,
        keep_failures_days=settings.log.keep_failures_days,
    )
    staging: Staging | None = None
    try:
        # The trainer writes there too: no bundle takes an hour.
        remove_leftovers(run.policies, HOUR_S)
        live = Live(run, threads=settings.serve.inference_threads, keep_versions=settings.keep_versions)
        # Seeds go on from where the log stands, so that a restart does not repeat them.
        rng = np.random.default_rng([deployment.seed, log.index.count()])
        trainer = deployment.trainer
        schedule = Training(
            tasks,
            trainer.train_first_seed,
            trainer.train_seeds,
            rng,
            balance=settings.balance,
            recent={task: log.index.recent_successes(task, WINDOW_EPISODES) for task in tasks},
        )
        if settings.deploy.mode == "staged":
            staging = Staging(run, live, settings.deploy, horizon_steps=horizon_steps, warn=warn)
        else:
            end_all_trials(Registry(run.registry))
        server = PolicyServer(
            resolve_endpoint(settings.serve.endpoint, deployment.run_dir),
            staging or live,
            log,
            schedule,
            explore=not mean,
            horizon_steps=horizon_steps,
            config=settings.serve,
        )
        warn(f"serving version {live().version[:12]} on {server.endpoint}")
        if staging:
            staging.start(server.oldest_open_unix_s)
        server.run(stop.is_set)
    finally:
        if staging:
            staging.close()
        log.close()
    return 0
