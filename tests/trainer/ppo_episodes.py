"""Episodes made by hand for the tests of batch, PPO and the loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, Observation, VectorSpec, instruction_of
from runtime.bundle import FORMAT, PolicySpec
from runtime.episode import Decision, End, Episode, EpisodeStart

CAMERA = CameraSpec("top", 16, 16)
STATE = VectorSpec(names=("x", "y"), units=("1", "1"))
ACTION = ActionSpec(names=("vx", "vy"), units=("1", "1"), low=(-1.0, -2.0), high=(1.0, 2.0), kind="delta")
SPEC = BackendSpec(
    name="toy",
    cameras=(CAMERA,),
    state=STATE,
    action=ACTION,
    control_hz=10.0,
    instructions={"left": "go left", "right": "go right"},
    privileged=VectorSpec(names=("g",), units=("1",)),
)
TASKS = ("left", "right")


def policy_spec(horizon: int = 4, tokens: int = 8) -> PolicySpec:
    return PolicySpec(
        format=FORMAT,
        name="toy",
        cameras=(CAMERA,),
        state=STATE,
        action=ACTION,
        control_hz=10.0,
        horizon=horizon,
        tokens=tokens,
    )


def tokens(_instruction: str) -> np.ndarray:
    return np.zeros(8, np.int64)


def observation(rng: np.random.Generator) -> Observation:
    return Observation(
        images={"top": rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)},
        state=rng.normal(size=2).astype(np.float32),
        privileged=rng.normal(size=1).astype(np.float32),
    )


def episode(
    executed: Sequence[int],
    status: End = "success",
    *,
    horizon: int = 4,
    task: str = "left",
    versions: Sequence[str] = ("v0",),
    name: str = "e0",
    seed: int = 0,
) -> Episode:
    """An episode whose decisions executed `executed` actions each; `versions` act in turn, the last one to the end."""
    rng = np.random.default_rng(seed)
    decisions, step = [], 0
    for i, k in enumerate(executed):
        actions = rng.normal(size=(horizon, 2)).astype(np.float32)
        decisions.append(
            Decision(
                number=i + 1,
                step=step,
                version=versions[min(i, len(versions) - 1)],
                observation=observation(rng),
                actions=actions,
                log_prob=rng.normal(size=horizon).astype(np.float32),
                sent=np.clip(actions[:k], -1, 1),
                reward=np.full(k, 100.0, np.float32),
            )
        )
        step += k
    start = EpisodeStart(
        format=1,
        episode=name,
        task=task,
        instruction=instruction_of(SPEC, task, seed),
        seed=seed,
        source="policy",
        explore=True,
        client="test",
        spec=SPEC,
        started_unix_s=0.0,
    )
    final = None if status == "aborted" else observation(rng)
    return Episode(start=start, decisions=decisions, status=status, steps=step, final=final)
