"""What the record of a decision costs: the thread that serves, and the one that writes.

In the path is what the serving thread pays to hand a record over; the rest of the processor time of this process is the
writer's. Both are compared with the control period of a fast robot, though a decision is made for a whole chunk.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from fieldtune.bench.common import BenchError, Goal, Result, file_system, milliseconds
from fieldtune.bench.serve import DECISIONS, HORIZON, SPEC, observation
from runtime.episode import FORMAT, DecisionRecord, EndRecord, EpisodeStart, ExecutedRecord
from runtime.episodes import EpisodeLog
from runtime.records import tensor_records

EPISODES = 20
CONTROL_HZ = 50.0
SHARE = 0.02
STORED_S = 30.0


def bench_log(directory: Path, *, quick: bool = False) -> Result:
    """Cost of a decision with two cameras of 224 px; the log is written below `directory`."""
    tensors = observation()
    d = len(SPEC.action.names)
    actions, log_prob = np.zeros((HORIZON, d), np.float32), np.zeros(HORIZON, np.float32)
    executed = {"sent": actions, "reward": log_prob}
    in_path: list[float] = []
    stored = threading.Semaphore(0)
    episodes = 2 if quick else EPISODES
    with tempfile.TemporaryDirectory(prefix="fieldtune-bench-", dir=directory) as place:
        log = EpisodeLog(Path(place))
        process_s, thread_s, hand_over_s = time.process_time(), time.thread_time(), 0.0
        for number in range(episodes):
            episode = f"{number:024x}"
            log.start(
                EpisodeStart(
                    format=FORMAT,
                    episode=episode,
                    task="task",
                    instruction="do the task",
                    seed=number,
                    source="policy",
                    explore=True,
                    client="bench",
                    spec=SPEC,
                    started_unix_s=time.time(),
                )
            )
            for decision in range(1, DECISIONS + 1):
                started_s, cpu_s = time.perf_counter(), time.thread_time()
                whole = tensor_records({**tensors, "actions": actions, "log_prob": log_prob})
                step = (decision - 1) * HORIZON
                log.append(episode, DecisionRecord(decision=decision, step=step, version="0" * 64, tensors=whole))
                log.append(episode, ExecutedRecord(decision=decision, tensors=tensor_records(executed)))
                hand_over_s += time.thread_time() - cpu_s
                in_path.append(time.perf_counter() - started_s)
            end = EndRecord(status="timeout", steps=DECISIONS * HORIZON, reason="", tensors=tensor_records(tensors))
            log.end(episode, end, lambda _error: stored.release())
            if not stored.acquire(timeout=STORED_S):
                raise BenchError(f"log: an episode was not stored within {STORED_S:g} s")
        writer_s = time.process_time() - process_s - (time.thread_time() - thread_s)
        stats = log.stats()
        log.close()
        system = file_system(directory)
    if stats.lost or stats.stored != episodes:
        raise BenchError(f"log: {stats.stored} of {episodes} episodes were stored: {stats.error}")
    count = len(in_path)
    serving_ms, writer_ms = hand_over_s / count * 1e3, writer_s / count * 1e3
    period_ms = 1e3 / CONTROL_HZ
    columns = ("thread", "cpu ms a decision", f"share of {period_ms:g} ms", "p50 ms", "p99 ms")
    rows: list[tuple[str | float, ...]] = [
        ("serving", serving_ms, serving_ms / period_ms, milliseconds(in_path, 0.5), milliseconds(in_path, 0.99)),
        ("writer", writer_ms, writer_ms / period_ms, "-", "-"),
        ("both", serving_ms + writer_ms, (serving_ms + writer_ms) / period_ms, "-", "-"),
    ]
    limit_ms = SHARE * period_ms
    return Result(
        "log",
        "the record of a decision in the episode log",
        columns,
        rows,
        [
            Goal("in the path of serving", serving_ms, limit_ms, "ms"),
            Goal("both threads", serving_ms + writer_ms, limit_ms, "ms"),
        ],
        [
            f"{count} decisions of {stats.written_bytes / count / 1e3:.0f} KB in {episodes} episodes, each with what "
            "became of it; records come as fast as they can",
            f"the goal is {SHARE:.0%} of the control period at {CONTROL_HZ:g} Hz, as if every action had a decision",
            f"start, end and sync of the episodes are in the writer's share; the log is on {system}",
        ],
    )
