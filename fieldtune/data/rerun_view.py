"""Opens an episode in the viewer of Rerun (the extra `viz`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rerun

from bridge.backend import Observation
from runtime.episode import Episode

TIMELINE = "time"


def view(episode: Episode) -> None:
    """Send an episode to a viewer, which is started if none runs. Time is step / control rate from 0 on."""
    spec = episode.start.spec
    rerun.init(f"fieldtune {episode.start.episode}", spawn=True)
    rerun.log("episode", rerun.TextDocument(_summary(episode)), static=True)

    def at(step: int) -> None:
        rerun.set_time(TIMELINE, duration=step / spec.control_hz)

    for decision in episode.decisions:
        at(decision.step)
        _observe(spec.state.names, decision.observation)
        rerun.log("decision", rerun.TextLog(f"decision {decision.number} by {decision.version[:12]}"))
        for step, (sent, reward) in enumerate(
            zip(decision.sent, decision.reward, strict=True), decision.step + decision.start
        ):
            at(step)
            _numbers("action", spec.action.names, sent)
            rerun.log("reward", rerun.Scalars(float(reward)))
    if episode.final is not None:
        at(episode.steps)
        _observe(spec.state.names, episode.final)


def _observe(names: Sequence[str], observation: Observation) -> None:
    for camera, image in observation.images.items():
        rerun.log(f"camera/{camera}", rerun.Image(image))
    _numbers("state", names, observation.state)


def _numbers(what: str, names: Sequence[str], values: Any) -> None:
    for name, value in zip(names, values, strict=True):
        rerun.log(f"{what}/{name}", rerun.Scalars(float(value)))


def _summary(episode: Episode) -> str:
    start = episode.start
    return (
        f"{start.task} seed {start.seed}: {episode.status} after {episode.steps} steps {episode.reason}\n\n"
        f"{start.instruction}\n\nversions: {', '.join(episode.versions)}"
    )
