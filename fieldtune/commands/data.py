"""`fieldtune episodes export`, `fieldtune episodes view`, `fieldtune demos import`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bridge.backends import make_backend
from bridge.errors import FieldtuneError
from fieldtune.commands.common import Config, Json, Set, err, out, print_json, progress_bar, run_dir
from fieldtune.commands.episodes import Log, log_directory, read_found
from fieldtune.data.export import Target, Wanted, export
from fieldtune.data.frames import Frames
from fieldtune.deployment import load_deployment
from runtime.episode import End
from runtime.index import EpisodeIndex
from runtime.supervisor import stop_on_signals

LEFT_OUT_SHOWN = 5


def export_episodes(
    config: Config,
    /,
    *,
    out_dir: Annotated[Path, tyro.conf.arg(name="out", metavar="DIR")],
    format: Literal["lerobot", "mcap"],  # noqa: A002 (the name of the option)
    overrides: Set = (),
    log: Log = "episodes",
    frames: Frames = "steps",
    status: tuple[End, ...] = (),
    task: str | None = None,
    version: str | None = None,
    since: str | None = None,
    as_json: Json = False,
) -> int:
    """Export finished episodes as a LeRobotDataset v3, or as MCAP files.

    Only reads the log, so it may run beside a deployment. The same command goes on after it was stopped or killed, and
    adds what came since; what is there already is not written again.

    Examples:
      fieldtune episodes export quickstart --format lerobot --out data/quickstart
      fieldtune episodes export quickstart --format lerobot --out data/good --status success --since 2026-03-01
      fieldtune episodes export quickstart --format mcap --out data/mcap --log demos

    Args:
        out_dir: directory of the dataset, or of the MCAP files
        format: what to write
        frames: rows of a LeRobot dataset: one a step with the newest observation, or one a decision with its chunk
        status: only episodes that ended so, one or several; all but aborted and unjudged without it
        task: only this task
        version: only episodes that this version drove
        since: only episodes that started then or later: 2026-03-01 or 2026-03-01T14:30, local time
    """
    deployment = load_deployment(config, overrides)
    index = EpisodeIndex(log_directory(run_dir(deployment), log))
    wanted = Wanted(status, task, version, None if since is None else _unix_s(since))
    stop = stop_on_signals()
    with progress_bar("export", quiet=as_json) as advance:
        done = export(index, _target(format, out_dir, frames), wanted, advance, stop.is_set)
    if as_json:
        print_json(done)
    else:
        out.print(f"{done.written} episodes written to {out_dir}, {done.there} were there already")
    for episode, why in list(done.left_out.items())[:LEFT_OUT_SHOWN]:
        err.print(f"left out {episode}: {why}")
    if len(done.left_out) > LEFT_OUT_SHOWN:
        err.print(f"... and {len(done.left_out) - LEFT_OUT_SHOWN} more")
    if done.unjudged:
        err.print(
            f"left out {done.unjudged} episodes that nobody has judged: `fieldtune episodes label` says how they went, "
            "`--status unjudged` exports them as they are"
        )
    if not done.written + done.there:
        raise FieldtuneError(f"{index.directory} has no episode that fits")
    return 1 if stop.is_set() else 0


def _target(kind: str, directory: Path, frames: Frames) -> Target:
    if kind == "mcap":
        from fieldtune.data.mcap_export import McapExport

        return McapExport(directory)
    from fieldtune.data.lerobot_export import LeRobotExport

    return LeRobotExport(directory, frames)


def _unix_s(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise FieldtuneError(f"--since {text}: expected a date as 2026-03-01 or 2026-03-01T14:30") from error


def import_dataset(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    config: Config,
    /,
    *,
    overrides: Set = (),
    as_json: Json = False,
) -> int:
    """Make demonstrations of the run of a LeRobotDataset v3, of images or video, for `fieldtune sft`.

    Section `dataset` of the configuration says what in the dataset is what in the backend; what does not fit is refused
    by name. What was imported already is not imported again, so the command goes on where it was stopped or killed.

    Examples:
      fieldtune demos import data/my_teleop my_arm.yaml
      fieldtune demos import data/my_teleop my_arm.yaml --set dataset.cameras.wrist=observation.images.front

    Args:
        path: directory of the dataset, the one with meta/info.json
    """
    from fieldtune.data.importing import import_demos
    from fieldtune.data.lerobot_reading import LeRobotReader

    deployment = load_deployment(config, overrides)
    stop = stop_on_signals()
    with progress_bar("import", quiet=as_json) as advance:
        done = import_demos(
            LeRobotReader(path),
            run_dir(deployment).demos,
            make_backend(deployment.backend).spec,
            deployment.dataset,
            deployment.trainer.demos.first_seed,
            advance,
            stop.is_set,
        )
    if as_json:
        print_json(done)
        return 1 if stop.is_set() else 0
    out.print(
        f"{done.written} demonstrations imported, {done.there} were there already, {done.failures} failures left out"
    )
    per_task = deployment.trainer.demos.per_task
    for task, count in done.tasks.items():
        more = f"; `fieldtune sft` takes {per_task} of them (trainer.demos.per_task)" if count > per_task else ""
        out.print(f"{task}: {count}{more}")
    return 1 if stop.is_set() else 0


def view_episode(
    config: Config,
    episode: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EPISODE")],
    /,
    *,
    overrides: Set = (),
    log: Log = "episodes",
) -> int:
    """Open one episode in Rerun: cameras, state, actions and rewards over time.

    Needs the extra `viz`: pip install 'fieldtune[viz]'.

    Examples:
      fieldtune episodes view quickstart 019ab3...

    Args:
        episode: id of the episode, or the path of its file
    """
    from fieldtune.data.rerun_view import view

    view(read_found(run_dir(load_deployment(config, overrides)), episode, log))
    return 0
