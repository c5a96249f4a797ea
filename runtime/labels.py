"""Labels on the disk beside the index: an index that is made anew from the episodes gets them back.

One JSON map a line. Each begins with its line break, so that what a crash has torn stands on a line of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from bridge.messages import Label
from runtime.durable import sync_directory, write_all


class StoredLabel(Struct, frozen=True):
    """What somebody said of an episode."""

    episode: str
    label: Label
    who: str
    unix_s: float


def append_label(path: Path, label: StoredLabel) -> None:
    """Add a label; it is on the disk on return. Raises `OSError`."""
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        write_all(descriptor, b"\n" + msgspec.json.encode(label))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync_directory(path.parent)


def read_labels(path: Path) -> list[StoredLabel]:
    """All labels in the order in which they were given; torn lines are passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(msgspec.json.decode(line, type=StoredLabel))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return found
