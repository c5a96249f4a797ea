"""`/metrics` for Prometheus, from the runtime's status and the trainer's last metrics line.

docs/monitoring.md has the table of names. Whatever is not known is left out, so that a gap shows as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from bridge.messages import RobotState
from fieldtune.commands.status import recent_results
from runtime.canary import Evidence
from runtime.episodes import LogStats
from runtime.status import Status

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `exposition` gives."""

# Gauges, although most only grow: after a crash the trainer goes back to its checkpoint, and Prometheus would take a
# counter that has become smaller for one that began at zero.
TRAINER = {
    "iteration": ("iteration", "Iterations of the trainer"),
    "env_steps": ("env_steps", "Environment steps learned from"),
    "last_iteration_timestamp_seconds": ("unix_s", "When the last iteration ended"),
    "episodes": ("episodes", "Episodes of the last iteration"),
    "success_ratio": ("success", "Success of the exploring policy in the episodes of the last iteration"),
    "steps_to_success": ("steps_to_success", "Mean steps of the successes among them"),
    "weight": ("weight", "w(t), the weight of PPO against self behaviour cloning; the mean over tasks"),
    "kl_nats": ("kl", "KL of the last update, a decision"),
    "explained_variance": ("explained_variance", "Share of the variance of the returns that the critic explains"),
    "buffer_episodes": ("buffer_episodes", "Episodes in the demonstration buffer"),
    "buffer_steps": ("buffer_steps", "Their mean steps"),
    "grad_norm": ("grad_norm", "Norm of the policy's gradient before it is clipped"),
}
"""Name after `fieldtune_trainer_` -> key of the metrics line, help."""
LOSSES = {"policy": "policy_loss", "cloning": "cloning_loss", "value": "value_loss"}


def exposition(now: Status | None, trainer: dict[str, Any]) -> bytes:
    """Prometheus' text format. `now` is None while the runtime does not answer; `trainer` is empty before its first
    line.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(now, trainer))
    return generate_latest(registry)


class _Snapshot(Collector):
    """What is known at one moment."""

    def __init__(self, now: Status | None, trainer: dict[str, Any]) -> None:
        self._now, self._trainer = now, trainer

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        yield _gauge("up", "Whether the runtime answers", self._now is not None)
        if self._now is not None:
            yield from _served(self._now)
            yield from _logged(msgspec.convert(self._now.log, LogStats))
            yield from _staged(self._now.staging)
        yield from _trained(self._trainer)


def _served(now: Status) -> Iterator[Metric]:
    yield InfoMetricFamily("fieldtune_version", "The live version", {"version": now.version})
    yield _gauge("uptime_seconds", "Since the runtime started", now.uptime_s)
    yield _gauge("sessions", "Bridges that are connected", now.sessions)
    yield _counter("decisions", "Chunks decided", now.decisions)
    yield _counter("batches", "Inferences, each of one or more decisions", now.batches)
    yield _counters("episodes", "Ended episodes", "status", now.episodes)
    yield _counter("swaps", "Changes of the live version: asked for, or by rule", now.swaps)
    yield _counter("swaps_refused", "Versions and requests for another version that were refused", now.refused_swaps)
    yield _counters("requests_refused", "Refused requests", "code", now.refused)
    yield _counter("replies_undeliverable", "Replies to clients that were gone", now.undeliverable)
    yield _counter("chunks_dropped", "Chunks whose episode was over before they were ready", now.dropped)
    yield _counters(
        "interventions", "Steps that a rule of the safety stage changed, of ended episodes", "rule", now.interventions
    )
    for name in ("p50", "p99", "max"):
        if name in now.latency_ms:
            text = f"From a request's arrival to its reply, over the last decisions: {name}"
            yield _gauge(f"latency_{name}_seconds", text, now.latency_ms[name] / 1e3)
    yield _gauge("inference_busy_ratio", "Share of the uptime in which inference computed", now.inference_share)
    yield _counter("inference_cpu_seconds", "Processor time of inference", now.inference_cpu_s)
    yield _gauge("episodes_per_minute", "Episodes that ended in the last minute", now.episodes_per_min)
    recent = recent_results(now)
    yield _gauge("recent_episodes", "Episodes that the two below are taken over", recent.episodes)
    if recent.success is not None:
        yield _gauge("recent_success_ratio", "Success of the exploring policy in them", recent.success)
    if recent.steps is not None:
        yield _gauge("recent_steps_to_success", "Mean steps of the successes among them", recent.steps)
    # All states, so that one that no robot is in any more goes to zero and does not end.
    states: dict[str, float] = dict.fromkeys(get_args(RobotState), 0)
    for text in now.robots.values():
        states[text.partition(":")[0]] += 1
    yield _gauges("robots", "Bridges by what they do", "state", states)
    yield _gauge("stopped", "Whether an operator has stopped all robots", bool(now.stopped))


def _logged(log: LogStats) -> Iterator[Metric]:
    yield _gauge("log_open_episodes", "Episodes that have started and not ended", log.open)
    yield _counter("log_stored_episodes", "Episodes on the disk, without aborted ones", log.stored)
    yield _counter("log_lost_episodes", "Episodes given up: the disk failed, or could not keep up", log.lost)
    yield _counter("log_deleted_episodes", "Episodes deleted to save space", log.deleted)
    yield _counter("log_written_bytes", "Written to the disk", log.written_bytes)
    yield _gauge("log_queued_bytes", "Waiting for the disk", log.queued_bytes)
    yield _gauge(
        "log_error",
        "Whether anything went wrong since the log was opened",
        bool(log.error),
    )


def _staged(staging: dict[str, Any]) -> Iterator[Metric]:
    """Nothing where every version goes live at once."""
    if not staging:
        return
    yield _gauge("canary_running", "Whether a candidate drives a share of the episodes", bool(staging["candidate"]))
    yield _gauge("drift_alarms", "Alarms since the live version went live", len(staging["drifts"]))
    yield _gauge("pinned", "Whether somebody has pinned the live version", bool(staging["pinned"]))
    if not staging["candidate"]:
        return
    yield InfoMetricFamily("fieldtune_canary", "The candidate", {"version": staging["candidate"]})
    found = msgspec.convert(staging["evidence"], Evidence)
    episodes = {"candidate": found.candidate_episodes, "live": found.live_episodes}
    success = {"candidate": found.candidate_success, "live": found.live_success}
    yield _gauges("canary_episodes", "Episodes that the test has of either version", "arm", episodes)
    yield _gauges("canary_success_ratio", "Their success", "arm", success)
    for name, text, (low, high) in (
        ("success_difference", "Success of the candidate less that of the live version", found.success_difference),
        ("steps_difference", "The same of the mean steps of successes", found.steps_difference),
    ):
        text += ", 95 % confidence sequence"
        yield _gauges(f"canary_{name}", text, "bound", {"low": low, "high": high})
    values = {name: getattr(found, name) for name in ("better", "not_worse", "faster", "worse")}
    yield _gauges("canary_evidence", "Largest e-value so far", "hypothesis", values)
    needed = {"promote": found.needed_to_promote, "roll_back": found.needed_to_roll_back}
    yield _gauges("canary_evidence_needed", "The e-value that decides", "decision", needed)


def _trained(line: dict[str, Any]) -> Iterator[Metric]:
    for name, (key, text) in TRAINER.items():
        if line.get(key) is not None:
            yield _gauge(f"trainer_{name}", text, line[key])
    losses = {name: line.get(key) for name, key in LOSSES.items()}
    yield _gauges("trainer_loss", "Losses of the last iteration", "of", losses)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fieldtune_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    """The library writes the `_total` behind the name."""
    return CounterMetricFamily(f"fieldtune_{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    return _labelled(GaugeMetricFamily(f"fieldtune_{name}", text, labels=[label]), values)


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(CounterMetricFamily(f"fieldtune_{name}", text, labels=[label]), values)


def _labelled(family: Any, values: Mapping[str, float | None]) -> Metric:
    for label, value in values.items():
        if value is not None:
            family.add_metric([label], value)
    made: Metric = family
    return made
