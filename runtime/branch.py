"""A run that starts where another one did: the same first version, the same demonstrations, nothing learned yet."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from runtime.bundle import install_bundle
from runtime.durable import sync_directory
from runtime.index import EpisodeIndex
from runtime.registry import Registry
from runtime.rundir import RunDir


def branch(source: RunDir, target: RunDir) -> None:
    """Give `target` the first version of `source`, live, and the demonstrations of `source`. Idempotent.

    Episode files never change, so they are linked and take no space; across file systems they are copied. That the
    version is live comes last: a `target` without a live version is not whole yet, one with it is left as it is.
    """
    registry = Registry(target.registry)
    if registry.live() is not None:
        return
    first = Registry(source.registry).first()
    _link_episodes(source.demos, target.demos)
    install_bundle(source.policies / first.version, target.policies)
    registry.add(first.version, parent=first.parent, made=first.made)
    registry.set_live(first.version, why=f"start of {source.path.name}")


def _link_episodes(source: Path, target: Path) -> None:
    rows = [row for row in EpisodeIndex(source).after(0, limit=10**9) if not row.deleted]
    if not rows:
        return
    done = target / "done"
    done.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if not (done / row.file).exists():
            _link(source / "done" / row.file, done / row.file)
    sync_directory(done)
    EpisodeIndex(target).add(rows)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # Under another name first, so that a copy that broke off is not taken for the file.
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, partial)
        partial.rename(target)
