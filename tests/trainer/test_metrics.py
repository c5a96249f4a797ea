"""The trainer's lines, on the disk."""

import json
from pathlib import Path

from trainer import metrics


def text(*iterations: int) -> str:
    return "".join(json.dumps({"iteration": i}) + "\n" for i in iterations)


def test_only_what_is_done_again_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(1, 2, 3) + '{"iteration": 4')
    metrics.cut(path, 2)
    assert path.read_text() == text(1, 2)
    inode = path.stat().st_ino
    metrics.cut(path, 2)
    assert path.read_text() == text(1, 2) and path.stat().st_ino == inode, "a full disk has no room for it twice"
