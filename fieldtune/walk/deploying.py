"""The first steps of the walk: a version at work, candidates that are caught, one that is promoted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridge.client import RefusedError
from fieldtune.deployment import find_bundle
from fieldtune.walk.bundles import broken_copy, changed_bundle, flipped, shifted
from fieldtune.walk.walking import Walk, WalkError
from runtime.bundle import read_bundle
from runtime.registry import StageChange

SHIPPED = "mt10"
ELEMENT, WEAK, WORSE = "dx", 0.18, 0.33
"""Added to the mean of the element, in half ranges: on the tasks of configs/walk.yaml it then works some of the time,
or hardly ever. Either is small enough for the gate."""
FIRST_EPISODES = 40
AFTERWARDS_EPISODES = 30
EPISODES_S = 180.0
CANARY_S = 300.0


def start_from_weak(walk: Walk) -> str:
    """Make the version that the run starts from and start the runtime with it; returns the version."""
    weak = _made(walk.run.policies, WEAK)
    spec = read_bundle(walk.run.policies / weak).spec
    walk.registry.add(weak, parent=spec.parent, made=spec.made)
    walk.registry.set_live(weak, why="the walk starts from it")
    walk.serve()
    return weak


def put_to_work(walk: Walk, weak: str) -> None:
    """The robots work with a version that is not good yet."""
    step = walk.begin(
        "A version that works some of the time",
        "/",
        f"The live version is the policy that ships ({SHIPPED}), handicapped on purpose: {WEAK} is added to {ELEMENT} "
        "of every mean action, through the bias of its last layer. It stands for a policy fresh from fine-tuning. "
        f"{len(walk.robots)} robots start. Its success is counted in their log, not assumed.",
    )
    for robot in walk.robots:
        walk.start(robot)
    walk.until(lambda: walk.success(weak)[1] >= FIRST_EPISODES, f"{FIRST_EPISODES} episodes", EPISODES_S, *walk.robots)
    successes, episodes = walk.success(weak)
    share = successes / episodes
    walk.check(f"version {weak[:12]} is live", walk.registry.live() == weak)
    walk.check(f"its success: {share:.2f} in {episodes} episodes", 0.1 <= share <= 0.8)
    step.figures = {"version": weak, "episodes": episodes, "success": share}


def refuse_broken(walk: Walk) -> None:
    """A bundle with NaN for weights is not even a candidate."""
    step = walk.begin(
        "A candidate with NaN for weights",
        "/versions",
        "A bundle is announced whose last layer is not finite. The runtime's own checks have to refuse it.",
    )
    before = len(walk.registry.list())
    refusal = ""
    try:
        walk.announce(broken_copy(find_bundle(SHIPPED), _given(walk) / "not-finite"))
    except RefusedError as error:
        refusal = str(error)
    walk.check(f"refused: {refusal or 'no'}", "not finite" in refusal)
    walk.check("the registry knows no version of it", len(walk.registry.list()) == before)
    step.figures = {"refusal": refusal}


def reject_at_gate(walk: Walk) -> str:
    """A policy with the wrong sign is found before a robot moves; returns its version."""
    step = walk.begin(
        "A candidate with the wrong sign",
        "/versions",
        "Every mean action has the other sign, as after a mistake in a convention. Weights, graph and probe are sound. "
        "The gate has to see it in what the version would do on observations that the robots have made.",
    )
    version = changed_bundle(find_bundle(SHIPPED), _given(walk), flipped, "the sign of every mean is changed")
    walk.announce(_given(walk) / version)
    last = walk.stage(version)
    rejected = last is not None and last.stage == "rejected" and last.why.startswith("gate:")
    walk.check(f"{version[:12]} {_told(last)}", rejected)
    step.figures = {"version": version, **_figures(last)}
    return version


def reject_in_canary(walk: Walk) -> None:
    """A policy that is a little beside passes the gate, and its episodes show what it does."""
    step = walk.begin(
        "A candidate that is a little beside",
        "/versions",
        f"{WORSE} is added to {ELEMENT} instead of {WEAK}. So little passes the gate. It drives half of the episodes "
        "until the sequential test has seen enough, and that has to reject it.",
    )
    version = _made(_given(walk), WORSE)
    live = walk.announce(_given(walk) / version)
    _through_canary(walk, version)
    last = walk.stage(version)
    rejected = last is not None and last.stage == "rejected" and last.why.startswith("canary: worse")
    walk.check(f"{version[:12]} {_told(last)}", rejected)
    walk.check(f"live is still {live[:12]}", walk.registry.live() == live)
    step.figures = {"version": version, "drove": walk.drives(version), **_figures(last)}


def promote_good(walk: Walk, flipped_one: str) -> str:
    """The policy that ships is promoted by the rule; returns its version. What the gate rejected has driven nothing."""
    step = walk.begin(
        "A good candidate",
        "/versions",
        "The policy that ships, as it is. It goes the same way: gate, canary, and then the rule has to promote it.",
    )
    bundle = find_bundle(SHIPPED)
    version = read_bundle(bundle).version
    walk.announce(bundle)
    _through_canary(walk, version)
    last = walk.stage(version)
    walk.check(f"{version[:12]} {_told(last)}", last is not None and (last.stage, last.who) == ("live", "rule"))
    if walk.registry.live() != version:
        raise WalkError(f"{version[:12]} was to go live and {_told(last)}; the steps after this one need it")
    before = walk.success(version)
    walk.until(
        lambda: walk.success(version)[1] >= before[1] + AFTERWARDS_EPISODES,
        f"{AFTERWARDS_EPISODES} episodes of {version[:12]}",
        EPISODES_S,
        *walk.robots,
    )
    successes, episodes = (now - then for now, then in zip(walk.success(version), before, strict=True))
    walk.check(f"success since: {successes / episodes:.2f} in {episodes} episodes", successes / episodes > 0.7)
    # Asked now, when episodes have ended that began after its rejection.
    drove = walk.drives(flipped_one)
    walk.check(f"episodes that {flipped_one[:12]} drove, of {walk.index.count()} in all: {drove}", drove == 0)
    step.figures = {
        "version": version,
        "since": {"episodes": episodes, "success": successes / episodes},
        **_figures(last),
    }
    return version


def _made(directory: Path, by: float) -> str:
    """A version of the shipped policy that is `by` beside."""
    return changed_bundle(
        find_bundle(SHIPPED), directory, shifted(ELEMENT, by), f"{by} added to {ELEMENT} of every mean"
    )


def _given(walk: Walk) -> Path:
    """Where bundles lie before they are announced."""
    return walk.run.path / "given"


def _through_canary(walk: Walk, version: str) -> None:
    """Wait for the end of its canary and tell of the gate that it passed."""
    stages = {change.stage: change for change in walk.registry.stages(version)}
    canary = stages.get("canary")
    gate = canary.evidence["gate"] if canary else {}
    walk.check(
        f"{version[:12]} passed the gate: {_gate(gate)}" if canary else f"{version[:12]} is no canary", bool(canary)
    )
    if canary:
        walk.until(lambda: _ended(walk.stage(version)), f"the end of the canary {version[:12]}", CANARY_S, *walk.robots)


def _ended(last: StageChange | None) -> bool:
    return last is not None and last.stage != "canary"


def _told(last: StageChange | None) -> str:
    """Where a version is, why, by whom, and the figures of its canary if it had one."""
    if last is None:
        return "never was a candidate"
    text = f"is {last.stage} by {last.who}: {last.why}"
    return f"{text}\n       {_canary(last.evidence)}" if "candidate_episodes" in last.evidence else text


def _canary(found: dict[str, Any]) -> str:
    low, high = found["success_difference"]
    worse, better = (
        (found[name], found[f"needed_to_{what}"]) for name, what in (("worse", "roll_back"), ("better", "promote"))
    )
    return (
        f"success {_share(found['candidate_success'])} in {found['candidate_episodes']} episodes beside "
        f"{_share(found['live_success'])} in {found['live_episodes']}, difference {low:+.2f} to {high:+.2f}\n"
        f"       e-values: worse {worse[0]:.3g} of {worse[1]:.0f}, better {better[0]:.3g} of {better[1]:.0f}"
    )


def _share(success: float | None) -> str:
    return "-" if success is None else f"{success:.2f}"


def _gate(found: dict[str, Any]) -> str:
    return (
        f"divergence {found['divergence']:.3f}, KL {found['kl']:.2f} nats, cloning error {found['cloning_error']:.4f} "
        f"(the live version's {found['live_cloning_error']:.4f})"
    )


def _figures(last: StageChange | None) -> dict[str, Any]:
    return {"stage": last.stage, "why": last.why, "who": last.who, "evidence": last.evidence} if last else {"stage": ""}
