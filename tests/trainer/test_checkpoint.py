import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.checkpoint import Checkpoint, CheckpointError, TrainerState, load_checkpoint, save_checkpoint

SAVE_FOR_EVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import checkpoint
from trainer.checkpoint import save_checkpoint
for i in range(1, 10**6):
    save_checkpoint(Path(sys.argv[1]), checkpoint(i))
    print(i, flush=True)
"""


def checkpoint(iteration: int) -> Checkpoint:
    torch.manual_seed(iteration)
    model = torch.nn.Linear(64, 64)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimiser.step()
    state = TrainerState(
        iteration=iteration,
        version="v",
        cursor=7,
        env_steps=100,
        elapsed_s=1.5,
        after_warmup=1,
        buffer={"entries": []},
        weight={"kl": 0.1},
        rng=str(np.random.default_rng(iteration).bit_generator.state),
    )
    return Checkpoint(
        state=state,
        actor=model.state_dict(),
        actor_optimiser=optimiser.state_dict(),
        critic=copy.deepcopy(model.state_dict()),
        critic_optimiser=optimiser.state_dict(),
        generator=torch.Generator().manual_seed(iteration).get_state(),
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trainer" / "checkpoint.pt"
    assert load_checkpoint(path) is None
    for iteration in (1, 2):
        save_checkpoint(path, checkpoint(iteration))
        loaded, expected = load_checkpoint(path), checkpoint(iteration)
        assert loaded is not None
        for name in Checkpoint.__struct_fields__:
            assert same(getattr(loaded, name), getattr(expected, name)), name
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_an_adam_goes_on_from_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", checkpoint(3))
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded is not None
    model = torch.nn.Linear(64, 64)
    model.load_state_dict(loaded.actor)
    optimiser = torch.optim.Adam(model.parameters())
    optimiser.load_state_dict(loaded.actor_optimiser)
    assert float(optimiser.state_dict()["state"][0]["step"]) == 1.0


@pytest.mark.parametrize("cut", [0, 10, 2000])
def test_a_damaged_one_is_refused_with_advice(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, checkpoint(1))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="move it away"):
        load_checkpoint(path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 1"):
        load_checkpoint(path)
    torch.save({"format": 1, "actor": {}}, path)
    with pytest.raises(CheckpointError, match="lacks actor_optimiser"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


def test_code_in_it_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "actor": Evil()}, tmp_path / "c")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "owned").exists()


def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    script = SAVE_FOR_EVER.format(here=str(Path(__file__).parent))
    rng = np.random.default_rng(0)
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(int(rng.integers(5, 40))):
        seen = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    loaded = load_checkpoint(path)
    assert loaded is not None
    # What was reported as saved is there, or a later one.
    assert loaded.state.iteration >= int(rest[-1] if rest else seen)
    assert same(loaded.actor, checkpoint(loaded.state.iteration).actor)
