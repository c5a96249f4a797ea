"""A run as the results see it in one small file, `NAME.json.gz`: it outlives the run's directory, and goes beside the
page, so that anyone can check its figures, and seeds that ran at other times or on other computers come onto one page.

A record is named as its file is: whoever has two of an equal name tells them apart by renaming one.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from runtime.durable import write_atomic
from trainer.results_data import Contestant, ResultsError, on_goals
from trainer.statistics import Evaluation

FORMAT = 1
SUFFIX = ".json.gz"


class RecordFormat(Struct, frozen=True):
    """What every record has, whatever else is in it."""

    format: int


class Record(Struct, frozen=True):
    """Content of the file."""

    format: int
    contestant: Contestant


def write_record(contestant: Contestant, directory: Path) -> Path:
    """Write the record of a run into `directory`; equal runs make equal files."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{contestant.run.name}{SUFFIX}"
    write_atomic(path, gzip.compress(msgspec.json.encode(Record(FORMAT, contestant)), mtime=0))
    return path


def read_record(path: Path) -> Contestant:
    """The run in a record, named as the file is. Raises `ResultsError` for what is none."""
    try:
        content = gzip.decompress(path.read_bytes())
        found = msgspec.json.decode(content, type=RecordFormat).format
        if found != FORMAT:
            raise ResultsError(
                f"{path} is a record of format {found}, this fieldtune reads format {FORMAT}; read it with the "
                "fieldtune that wrote it, or make it again from its run"
            )
        contestant = msgspec.json.decode(content, type=Record).contestant
    except (OSError, EOFError, zlib.error, msgspec.DecodeError) as error:
        raise ResultsError(f"{path} is not the record of a run that `fieldtune report` has written: {error}") from None
    run = contestant.run
    held_out = tuple(replace(held, before=_anew(held.before), after=_anew(held.after)) for held in run.held_out)
    named = replace(run, name=path.name.removesuffix(SUFFIX), before=_anew(run.before), after=_anew(run.after))
    return replace(contestant, run=replace(named, held_out=held_out), expert=_anew(contestant.expert))


def _anew(evaluation: Evaluation | None) -> Evaluation | None:
    """Its figures are those of this fieldtune, not of the one that wrote them."""
    if evaluation is None:
        return None
    return on_goals(evaluation, [(trial.task, trial.seed) for trial in evaluation.trials])
