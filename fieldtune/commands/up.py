"""`fieldtune up`: one deployment from nothing to its summary, and on from wherever it was stopped."""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from rich.live import Live as LiveTable

from bridge.backend import HasExpert
from bridge.backends import make_backend
from bridge.client import SilentError
from bridge.config import ConfigError
from bridge.messages import WireError
from fieldtune.commands.common import Config, Json, Set, err, out, print_json, run_dir, warn
from fieldtune.commands.evaluate import drive_command, evaluate_version, evaluation_table, fieldtune_command
from fieldtune.commands.report import make_report
from fieldtune.commands.status import last_metrics, runtime_status, status_table
from fieldtune.deployment import Deployment, load_deployment, require_workers
from fieldtune.install import install_to_train, require_fine_tunable, require_trainable
from fieldtune.page.child import PageChild
from fieldtune.page.config import check_page_config
from runtime.durable import claim, require_unclaimed, write_atomic
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir
from runtime.supervisor import BAD_USAGE, Child, ChildFailedError, stop_on_signals
from trainer.environment import this_environment
from trainer.statistics import Evaluation
from trainer.tensorboard import require_tensorboard

RUNTIME_START_S = 60.0
RECOVERY_S = 0.2  # more for each logged episode that the index lacks: those are read first
BRIDGE = "bridge-"
FAILED_BRIDGE_S = 60.0  # before a bridge that has failed for good is tried again, while others work
PLAIN_LINE_EVERY_S = 10.0  # where the output is not a terminal


@dataclass(slots=True)
class Up:
    """One run of the command: its deployment, how to start parts of it, and when to stop."""

    deployment: Deployment
    config: str
    overrides: tuple[str, ...]
    stop: threading.Event
    quiet: bool
    """One JSON object is printed at the end, and nothing else on stdout."""
    evaluation: bool = True
    """Whether to evaluate before and after training."""
    training: bool = True
    """Whether there is a trainer. Without it the live version serves its mean action until somebody stops it."""
    drives_on: bool = True
    """Whether robots go on with the live version when the trainer has failed for good, until somebody stops them."""
    page: PageChild | None = None

    def __post_init__(self) -> None:
        if self.deployment.trainer.tensorboard:
            require_tensorboard()  # now, not after hours of demonstrations

    @property
    def run(self) -> RunDir:
        """The run's files."""
        return run_dir(self.deployment)

    def child(self, name: str, command: Sequence[str], niceness: int = 0) -> Child:
        """A child process of this deployment with its log in the run."""
        return Child(name, command, self.run.logs / f"{name}.log", niceness)

    def asked_to_stop(self) -> bool:
        """Whether it is time to stop; looks after the page meanwhile, so whoever waits calls it often."""
        if self.page and (said := self.page.tend()):
            warn(said)
        return self.stop.is_set()

    def say(self, message: str) -> None:
        """A line for the user."""
        err.print(message)


def up(
    config: Config,
    /,
    *,
    overrides: Set = (),
    fresh: bool = False,
    evaluation: bool = True,
    training: bool = True,
    as_json: Json = False,
) -> int:
    """Run a whole deployment: demonstrations, fine-tuning, then runtime, bridge workers and trainer together.

    Ctrl-C stops everything in order; the same command goes on where it stopped. It ends by itself when `trainer.stop`
    is reached, with a summary on goals never trained on and a page of plots in the run's directory. Meanwhile it
    serves the operator's page (`page:` in the YAML), whose address it prints. When the trainer fails for good, robots
    go on with the live version until Ctrl-C.

    Examples:
      fieldtune up quickstart
      fieldtune up my_arm.yaml --set trainer.stop.minutes=480
      fieldtune up my_arm.yaml --no-training

    Args:
        fresh: put an earlier run of this name aside (to NAME.old-TIME) and start anew
        evaluation: evaluate before and after training
        training: improve the policy; without it the live version works, with its mean action, until Ctrl-C
    """
    deployment = load_deployment(config, overrides)
    this = Up(deployment, config, overrides, stop_on_signals(), as_json, evaluation and training, training)
    if this.evaluation:
        require_workers(deployment, "an evaluation (--no-evaluation leaves both out)")
    if fresh:
        put_aside(this)
    with begun(this), page_of(this):
        return run_to_the_end(this)


@contextmanager
def begun(this: Up) -> Iterator[None]:
    """The run is this command's alone, and has its configuration. Raises `ClaimedError` where another one is at work:
    its workers would drive the same robots.
    """
    this.run.path.mkdir(parents=True, exist_ok=True)
    with claim(this.run.path):
        remember_config(this.run, this.deployment)
        yield


@contextmanager
def page_of(this: Up) -> Iterator[None]:
    """The operator's page is served meanwhile, unless `page.serve` is false."""
    if not this.deployment.page.serve:
        yield
        return
    check_page_config(this.deployment.page)
    command = fieldtune_command("page", this.config, this.overrides)
    page = this.page = PageChild(command, this.run.page_url, this.run.logs / "page.log")
    try:
        this.say(page.start(this.stop.is_set))
        yield
    finally:
        page.stop()


def run_to_the_end(this: Up) -> int:
    """From wherever the run stands to its summary."""
    deployment, evaluation = this.deployment, this.evaluation
    started_s = time.monotonic()
    if not prepare(this):
        return stopped(this)
    first = Registry(this.run.registry).first().version
    before = evaluate_version_of(this, first, "before") if evaluation else None
    if this.stop.is_set():
        return stopped(this)
    learned = deploy(this)
    if not this.training:
        this.say("stopped")
        return 0
    if not learned:
        this.say(f"the trainer had failed, so learning had stopped; {this.run.logs / 'trainer.log'} says why")
        return stopped(this)
    if this.stop.is_set():
        return stopped(this)
    last = Registry(this.run.registry).live()
    assert last is not None
    after = evaluate_version_of(this, last, "after") if evaluation else None
    if this.stop.is_set():
        return stopped(this)
    if before is None or after is None:
        this.say(f"done: version {last[:12]} is live; evaluation was not asked for")
        return 0
    page, report = make_report(deployment, before, after)
    if this.quiet:
        print_json(report)
        return 0
    out.print(evaluation_table([("before", before), ("after", after)], deployment.trainer.post_train))
    out.print(f"took {(time.monotonic() - started_s) / 60:.1f} minutes")
    out.print(f"report: {page}")
    return 0


def put_aside(this: Up) -> None:
    """Move an earlier run of this name to NAME.old-TIME. Raises `ClaimedError` while its runtime or trainer runs."""
    if this.run.path.exists():
        for directory in (this.run.path, this.run.episodes, this.run.trainer):
            require_unclaimed(directory)
        aside = this.run.path.with_name(f"{this.deployment.name}.old-{int(time.time())}")
        shutil.move(this.run.path, aside)
        this.say(f"the earlier run is in {aside}")


def stopped(this: Up, command: str = "up") -> int:
    """The last words after Ctrl-C."""
    flags = ["--no-evaluation"] if command == "up" and this.training and not this.evaluation else []
    flags += [] if this.training else ["--no-training"]
    again = shlex.join(["fieldtune", command, this.config, *flags, *(x for o in this.overrides for x in ("--set", o))])
    this.say(f"stopped; `{again}` goes on from here")
    return 1


def remember_config(run: RunDir, deployment: Deployment) -> None:
    """Note configuration and computer in the run; refuse a configuration whose policy could not go on from there."""
    path = run.config
    if path.exists():
        earlier = msgspec.json.decode(path.read_bytes(), type=Deployment)
        for name, old, new in [
            ("$.backend", earlier.backend, deployment.backend),
            ("$.trainer.vla", earlier.trainer.vla, deployment.trainer.vla),
            ("$.trainer.tasks", earlier.trainer.tasks, deployment.trainer.tasks),
        ]:
            if old != new:
                raise ConfigError(
                    f"{name}: {run.path} was made with another value ({old}); choose another `name`, or move the run "
                    "away (`fieldtune up --fresh` does)"
                )
    write_atomic(path, msgspec.json.format(msgspec.json.encode(deployment)))
    write_atomic(run.environment, msgspec.json.format(msgspec.json.encode(this_environment())))


def prepare(this: Up) -> bool:
    """Demonstrations and the first version, unless one is live already; False if stopped.

    Raises `ConfigError` for what would fail only later.
    """
    registry, trainer = Registry(this.run.registry), this.deployment.trainer
    backend = make_backend(this.deployment.backend)
    trainer.post_trained(backend.spec)
    if (live := registry.live()) is not None:
        require_started_from(registry, trainer.policy)
        if this.training and registry.first().made.get("command") == "import":
            require_trainable(this.deployment, this.run.policies / live, live[:12])
        return True
    has_expert = isinstance(backend, HasExpert)
    if not has_expert and trainer.policy is None and not EpisodeIndex(this.run.demos).count(status="success"):
        raise ConfigError(
            f"$.backend: {this.deployment.backend.name} has no scripted expert, and {this.run.registry} has no policy; "
            f"put one there first (fieldtune policies add {this.config} BUNDLE), or demonstrations of yours "
            f"(fieldtune demos import DATASET {this.config})"
        )
    # Mistakes show before the demonstrations, which may take hours.
    given = install_to_train(this.deployment, trainer.policy) if trainer.policy is not None else None
    if given is None:
        require_fine_tunable(this.deployment, backend.spec)
    for command in (["demos"] if has_expert else []) + (["sft"] if given is None else []):
        # Their progress bars are the user's; so their output is not sent to a log.
        child = Child(command, fieldtune_command(command, this.config, this.overrides), None)
        child.start()
        code = child.wait(this.asked_to_stop)
        if this.stop.is_set():
            return False
        if code != 0:
            raise ChildFailedError(f"fieldtune {command} failed with exit code {code}; its message is above")
    if given is not None:
        registry.set_live(given, why="trainer.policy")
    return True


def require_started_from(registry: Registry, policy: str | None) -> None:
    """Raise `ConfigError` if the run was to start from `policy` and has started from something else."""
    first = registry.first()
    if policy is not None and first.made.get("from") != policy:
        raise ConfigError(
            f"$.trainer.policy: is {policy}, but the run has started from another version ({first.version[:12]}); "
            "choose another `name`, or move the run away (`fieldtune up --fresh` does)"
        )


def evaluate_version_of(this: Up, version: str, title: str) -> Evaluation | None:
    """Evaluate, with the bar that says which of the two it is."""
    return evaluate_version(
        this.deployment, this.config, this.overrides, version, this.asked_to_stop, quiet=this.quiet, title=title
    )


def deploy(this: Up) -> bool:
    """Runtime, workers and trainer side by side until the trainer is done or the user stops it; see `watch`."""
    config, overrides, bridge = this.config, this.overrides, this.deployment.bridge
    serve = fieldtune_command("serve", config, overrides)
    runtime = this.child("runtime", serve if this.training else [*serve, "--mean"])
    trainers = [this.child("trainer", fieldtune_command("train", config, overrides))] if this.training else []
    for trainer in trainers:
        trainer.ends = True
    workers = [
        this.child(name, drive_command(config, overrides, name), bridge.niceness)
        for name in (f"{BRIDGE}{i}" for i in range(bridge.workers))
    ]
    children = [runtime, *trainers, *workers]
    try:
        runtime.start()
        wait_for_runtime(this, runtime)
        for child in [*trainers, *workers]:
            child.start()
        return watch(this, children)
    finally:
        # Workers first, so that no robot asks a runtime that is gone; the runtime last, so that nothing is lost.
        for group in (workers, trainers, [runtime]):
            stop_together(group)


def stop_together(children: Sequence[Child]) -> None:
    """Stop children that need not wait for each other."""
    for child in children:
        child.ask_to_stop()
    for child in children:
        child.stop()


def wait_for_runtime(this: Up, runtime: Child) -> None:
    """Until the runtime answers; its failure or silence is an error with the end of its log."""
    limit_s = start_limit_s(this.run)
    deadline = time.monotonic() + limit_s
    while not this.stop.is_set():
        try:
            runtime_status(this.deployment, timeout_s=0.5)
            return
        except SilentError as error:
            runtime.keep_alive(warn)
            if time.monotonic() > deadline:
                raise ChildFailedError(f"the runtime did not answer within {limit_s:g} s{runtime.tail()}") from error


def start_limit_s(run: RunDir) -> float:
    """How long the runtime may take to answer. An index that was lost is made anew from all files of the log."""
    files = sum(1 for _ in (run.episodes / "done").glob("*"))
    indexed = sum(not deleted for deleted in EpisodeIndex(run.episodes).known().values())
    return RUNTIME_START_S + RECOVERY_S * max(0, files - indexed)


def watch(this: Up, children: Sequence[Child]) -> bool:
    """Keep the children alive and the table fresh until the trainer is done or the user stops; False if it failed.

    A trainer that fails for good ends the learning, not the robots' work (`Up.drives_on`), and a bridge that does, not
    that of the others: it is tried again every minute. Raises `ChildFailedError` where the runtime or the last bridge
    fails so, and where the trainer refuses the configuration at its first start: that is the user's mistake, and should
    show while the user looks.
    """
    title = f"{this.deployment.name}  (Ctrl-C stops; the same command goes on)"
    minutes = this.deployment.trainer.stop.minutes
    children = [*children]
    failed: Child | None = None
    dead: dict[str, Child] = {}
    learned_before = last_metrics(this.run.metrics)
    next_line_s = 0.0
    with LiveTable(console=err, refresh_per_second=2, transient=False) as live:
        while not this.asked_to_stop():
            for child in [*children]:
                try:
                    if child.keep_alive(warn) == 0:
                        return True
                except ChildFailedError as error:
                    if child.name.startswith(BRIDGE):
                        dead[child.name] = child
                        if not this.drives_on or len(dead) == this.deployment.bridge.workers:
                            raise
                        warn(f"{error}\nthe others go on; it is tried again in {FAILED_BRIDGE_S:g} s")
                        child.try_again_after(FAILED_BRIDGE_S)
                        continue
                    began = child.restarts or last_metrics(this.run.metrics) != learned_before
                    if not (child.ends and this.drives_on) or (error.code == BAD_USAGE and not began):
                        raise
                    warn(f"{error}\nlearning has stopped; robots go on with the live version until you stop them")
                    failed = child
                    children.remove(child)
            try:
                now = runtime_status(this.deployment, timeout_s=1.0)
            except (SilentError, WireError):
                this.stop.wait(0.2)
                continue
            dead = {name: child for name, child in dead.items() if not child.runs}
            metrics = last_metrics(this.run.metrics) if this.training else {}
            done = f"  {metrics['minutes']:.1f} of {minutes:g} minutes" if metrics and minutes else ""
            table = status_table(now, metrics, title=title + done)
            if failed:
                table.add_row("learning", f"has stopped: the trainer failed ({failed.log})", style="red")
            for name, child in dead.items():
                table.add_row(name, f"has failed ({child.log}); tried again every {FAILED_BRIDGE_S:g} s", style="red")
            if any(child.restarts for child in children):
                table.add_row("restarts", ", ".join(f"{c.name} {c.restarts}" for c in children if c.restarts))
            live.update(table)
            if not err.is_terminal and time.monotonic() > next_line_s:
                next_line_s = time.monotonic() + PLAIN_LINE_EVERY_S
                err.print(table)
            this.stop.wait(0.5)
    return failed is None
