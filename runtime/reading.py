"""An episode's file as arrays, every record checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bridge.backend import BackendSpec, Observation
from bridge.messages import WireError, check_observation
from bridge.safety import STARVED
from runtime.episode import FORMAT, Decision, DecisionRecord, EndRecord, Episode, EpisodeStart, ExecutedRecord, Record
from runtime.episode_file import EpisodeError
from runtime.index import EpisodeIndex, EpisodeRow
from runtime.records import RecordError, scan_records, tensor_arrays

__all__ = ["EpisodeError", "read_episode", "read_row", "read_start"]


Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")


def read_episode(path: Path) -> Episode:
    """Read an episode that has ended. All arrays are read-only; images are views of the record they came in.

    A decision that was never reported as executed has `sent` `[0, d]` and `reward` `[0]`. Raises `EpisodeError` for a
    file that is missing, damaged, not ended, or whose records do not fit together or the backend's spec in it.
    """
    return _with_path(_read, path)


def read_row(index: EpisodeIndex, row: EpisodeRow) -> Episode:
    """The episode of a row of the index, with the status and the reason that count: those of its last label, if it has
    any. Raises `EpisodeError` as `read_episode` does.
    """
    episode = read_episode(index.path(row))
    episode.status, episode.reason = row.status, row.reason
    return episode


def read_start(path: Path) -> EpisodeStart:
    """Read only how an episode began. Raises `EpisodeError` for a file that is missing or does not begin as one."""
    return _with_path(_read_start, path)


def _with_path(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except RecordError as error:
        raise EpisodeError(path, str(error)) from error
    except WireError as error:
        raise EpisodeError(path, f"a record holds a wrong tensor: {error}") from error
    except OSError as error:
        raise EpisodeError(path, f"cannot be read: {error.strerror}") from error


def _read_start(path: Path) -> EpisodeStart:
    with path.open("rb") as file:
        return _start(path, next((record for record, _ in scan_records(file)), None))


def _start(path: Path, record: Record | None) -> EpisodeStart:
    if not isinstance(record, EpisodeStart) or record.format != FORMAT:
        raise EpisodeError(path, f"does not begin with a start of format {FORMAT}")
    return record


def _read(path: Path) -> Episode:
    start: EpisodeStart | None = None
    end: EndRecord | None = None
    final: Observation | None = None
    decisions: list[Decision] = []
    last, played = 0, 0  # numbers of the last decision, and of the last that was reported
    with path.open("rb") as file:
        for record, offset in scan_records(file):
            if start is None:
                start = _start(path, record)
                continue
            if end is not None:
                raise EpisodeError(path, f"goes on after its last record, up to byte {offset}")
            match record:
                case EpisodeStart():
                    raise EpisodeError(path, f"starts twice, the second time before byte {offset}")
                case DecisionRecord():
                    if record.decision <= last:
                        raise EpisodeError(path, f"decision {record.decision} comes after decision {last}")
                    last = record.decision
                    decisions.append(_decision(record, start.spec))
                case ExecutedRecord():
                    # Often of an earlier decision, which played on while the last one was made.
                    reported = next((d for d in reversed(decisions) if d.number == record.decision), None)
                    if reported is None or record.decision < played:
                        raise EpisodeError(path, f"a report on decision {record.decision} after one on {played}")
                    played = record.decision
                    _execute(reported, record)
                case EndRecord():
                    end = record
                    final = _observation(tensor_arrays(record.tensors), start.spec) if record.tensors else None
    if start is None or end is None:
        raise EpisodeError(path, "the last record is missing; an episode can be read when it has ended")
    truncated = end.status in ("timeout", "unjudged")
    return Episode(start, decisions, end.status, end.steps, end.reason, final, truncated)


def _decision(record: DecisionRecord, spec: BackendSpec) -> Decision:
    arrays = tensor_arrays(record.tensors)
    if "actions" not in arrays:
        raise WireError("tensors.actions", f"missing from decision {record.decision}")
    actions, d = arrays.pop("actions"), len(spec.action.names)
    log_prob, first_log_prob = arrays.pop("log_prob", None), arrays.pop("first_log_prob", None)
    prefix = arrays.pop("prefix", None)
    h = len(actions) if actions.ndim else 0
    _check("actions", actions, (h, d))
    for name, by_action in (("log_prob", log_prob), ("first_log_prob", first_log_prob)):
        if by_action is not None:
            _check(name, by_action, (h,))
    if prefix is not None:
        _check("prefix", prefix, (min(len(prefix) if prefix.ndim else 0, h), d))
    return Decision(
        number=record.decision,
        step=record.step,
        version=record.version,
        observation=_observation(arrays, spec),
        actions=actions,
        log_prob=log_prob,
        sent=_nothing(0, d),
        reward=_nothing(0),
        first_log_prob=first_log_prob,
        prefix=prefix,
    )


def _execute(decision: Decision, record: ExecutedRecord) -> None:
    """Add what a record says to what is known of the decision."""
    arrays = tensor_arrays(record.tensors)
    rules = arrays.pop("rules", None)
    if sorted(arrays) != ["reward", "sent"]:
        raise WireError("tensors", f"a report has {', '.join(arrays)}; expected sent, reward")
    sent, reward = arrays["sent"], arrays["reward"]
    k = len(sent) if sent.ndim else 0
    h, d = decision.actions.shape
    _check("sent", sent, (k, d))
    _check("reward", reward, (k,))
    if rules is not None and (rules.dtype != np.uint8 or rules.shape != (k,)):
        raise WireError("tensors.rules", f"is {rules.dtype}{list(rules.shape)}, expected uint8[{k}]")
    before = len(decision.sent)
    due = decision.start + before if before else min(max(record.start, 0), h)
    if record.start != due:
        raise WireError("start", f"is {record.start}, expected {due} of a chunk of {h}, {before} of it reported before")
    beyond = max(0, record.start + k - h)
    if beyond and (rules is None or not (rules[-min(beyond, k) :] & STARVED).all()):
        raise WireError("tensors.sent", f"{k} actions from {record.start} on were sent of a chunk of {h}")
    if not before:
        decision.start, decision.sent, decision.reward, decision.rules = record.start, sent, reward, rules
        return
    if rules is not None or decision.rules is not None:
        decision.rules = np.concatenate([_rules(decision.rules, before), _rules(rules, k)])
    decision.sent = np.concatenate([decision.sent, sent])
    decision.reward = np.concatenate([decision.reward, reward])


def _rules(rules: NDArray[np.uint8] | None, k: int) -> NDArray[np.uint8]:
    return np.zeros(k, np.uint8) if rules is None else rules


def _observation(arrays: Arrays, spec: BackendSpec) -> Observation:
    check_observation(arrays, spec)
    images = {camera.name: arrays[f"image/{camera.name}"] for camera in spec.cameras}
    return Observation(images, arrays["state"], arrays.get("privileged"))


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise WireError(f"tensors.{name}", f"is {array.dtype}{list(array.shape)}, expected float32{list(shape)}")
    if not np.isfinite(array).all():
        raise WireError(f"tensors.{name}", "holds a value that is not finite")


def _nothing(*shape: int) -> NDArray[np.float32]:
    empty = np.zeros(shape, np.float32)
    empty.flags.writeable = False
    return empty
