"""Cloning samples hold what was really executed, and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bridge.backend import ActionSpec, BackendSpec, CameraSpec, Observation, VectorSpec
from runtime.episode import FORMAT, Decision, Episode, EpisodeStart
from trainer.samples import cloning_samples, random_prefix, random_shift, random_wording, wordings

SPEC = BackendSpec(
    name="fake",
    cameras=(CameraSpec("eye", 4, 5),),
    state=VectorSpec(("x",), ("m",)),
    action=ActionSpec(("a", "b"), ("1", "1"), (-1.0, -1.0), (1.0, 1.0), "delta"),
    control_hz=10.0,
    instructions={"t": "go"},
)
START = EpisodeStart(
    format=FORMAT,
    episode="e",
    task="t",
    instruction="go",
    seed=0,
    source="policy",
    explore=True,
    client="c",
    spec=SPEC,
    started_unix_s=0.0,
)


def sent_at(step: int) -> list[float]:
    return [step + 0.25, -step - 0.5]


def episode(chunks: list[tuple[int, int]], horizon: int) -> Episode:
    """Decisions as (step, executed actions); what was sampled is 99 everywhere, what was sent is `sent_at`."""
    decisions = [
        Decision(
            number=i + 1,
            step=step,
            version="v",
            observation=Observation({"eye": np.full((4, 5, 3), step, np.uint8)}, np.array([step], np.float32)),
            actions=np.full((horizon, 2), 99, np.float32),
            log_prob=None,
            sent=np.array([sent_at(step + j) for j in range(k)], np.float32).reshape(k, 2),
            reward=np.zeros(k, np.float32),
        )
        for i, (step, k) in enumerate(chunks)
    ]
    return Episode(START, decisions, "success", max((s + k for s, k in chunks), default=0))


def test_targets_run_on_over_the_following_decisions() -> None:
    # Chunks of 3, cut after 2 and after 1; the last decision was never executed.
    samples = cloning_samples(episode([(0, 2), (2, 3), (5, 1), (6, 0)], 3), 3, np.array([[7, 8], [9, 0]]))
    assert samples.state[:, 0].tolist() == [0, 2, 5]
    assert samples.images["eye"][:, 0, 0, 0].tolist() == [0, 2, 5]
    assert samples.mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert samples.target[0].tolist() == [sent_at(0), sent_at(1), sent_at(2)]
    assert samples.target[1].tolist() == [sent_at(2), sent_at(3), sent_at(4)]
    assert samples.target[2].tolist() == [sent_at(5), [0, 0], [0, 0]]
    assert samples.tokens.tolist() == [[[7, 8], [9, 0]]] * 3


def test_a_chunk_that_began_late_was_sent_where_it_began() -> None:
    # Asked for at step 2 while the first of 4 played; its actions from the third on were sent at 4 and 5.
    late = episode([(0, 4), (2, 2)], 4)
    late.decisions[1].start, late.decisions[1].sent = 2, np.array([sent_at(4), sent_at(5)], np.float32)
    samples = cloning_samples(late, 4)
    assert samples.target.tolist() == [[sent_at(step) for step in range(first, first + 4)] for first in (0, 2)]
    assert samples.mask.all()


def test_a_hold_is_not_imitated() -> None:
    held = episode([(0, 3), (3, 2)], 3)
    held.decisions[0].rules = np.array([1, 4, 64], np.uint8)  # clipped to its range, a first jump, starved
    samples = cloning_samples(held, 3)
    assert samples.mask.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert samples.target[0].tolist() == [sent_at(0), [0, 0], [0, 0]]


def test_a_random_delay_is_told_and_the_rest_is_imitated() -> None:
    h, p, known = 5, 3, torch.tensor([5, 2, 1, 0]).repeat(500)
    target = torch.arange(1.0, 2000 * h * 2 + 1).reshape(2000, h, 2)
    mask = (torch.arange(h) < known[:, None]).float()
    mask[known == 0, 3] = 1.0  # after a gap: it can be imitated, but nothing before it can be told
    mask[known == 2, 4] = 1.0
    target = target * mask[..., None]
    prefix, prefix_mask, left = random_prefix(target, mask, p, torch.Generator().manual_seed(0))
    assert prefix is not None and prefix_mask is not None
    assert prefix.shape == (2000, p, 2) and prefix_mask.shape == (2000, p)
    delay = prefix_mask.sum(dim=1).long()
    assert torch.equal(prefix_mask, (torch.arange(p) < delay[:, None]).float())
    assert torch.equal(prefix, target[:, :p] * prefix_mask[..., None])
    assert torch.equal(left, mask * (torch.arange(h) >= delay[:, None]))
    # 0 to 3 equally often where the whole target is known; at most what leaves an action to imitate elsewhere.
    counts = torch.bincount(delay[known == 5], minlength=4)
    assert len(counts) == 4 and counts.min() > 90
    assert delay[known == 2].unique().tolist() == [0, 1] and not delay[known <= 1].any()
    again = random_prefix(target, mask, p, torch.Generator().manual_seed(0))
    assert again[0] is not None and torch.equal(again[0], prefix)
    assert random_prefix(target, mask, 0, torch.Generator()) == (None, None, mask)


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 9), st.sampled_from([0, 3]))
def test_every_masked_target_was_sent_at_that_step(executed: list[int], horizon: int, gap: int) -> None:
    chunks, step = [], 0
    for i, k in enumerate(executed):
        chunks.append((step, k))
        step += k + (gap if i == 1 else 0)
    samples = cloning_samples(episode(chunks, 4), horizon)
    really = {step + j for step, k in chunks for j in range(k)}
    assert len(samples) == sum(any(step + j in really for j in range(horizon)) for step, _ in chunks)
    for state, target, mask in zip(samples.state, samples.target, samples.mask, strict=True):
        steps = [int(state[0]) + j for j in range(horizon)]
        assert mask.tolist() == [float(step in really) for step in steps]
        assert target.tolist() == [sent_at(step) if step in really else [0, 0] for step in steps]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_shift_is_a_shift_with_a_repeated_border(dtype: torch.dtype) -> None:
    images = torch.randint(0, 255, (64, 6, 9, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    shifted = random_shift(images, 2, torch.Generator().manual_seed(1))
    assert shifted.dtype == dtype and torch.equal(shifted, random_shift(images, 2, torch.Generator().manual_seed(1)))
    offsets = set()
    for image, moved in zip(images, shifted, strict=True):
        matches = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.equal(image[(torch.arange(6) + y).clamp(0, 5)][:, (torch.arange(9) + x).clamp(0, 8)], moved)
        ]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 15  # of 25: not one shift for the whole batch
    assert random_shift(images, 0, torch.Generator()) is images


@pytest.mark.parametrize(
    ("told", "expected"), [("go", [[1, 0], [2, 3]]), ("go there", [[1, 0], [2, 3]]), ("run", [[4, 0], [0, 0]])]
)
def test_an_episode_may_be_told_what_means_the_same(told: str, expected: list[list[int]]) -> None:
    words = {"go": [1, 0], "go there": [2, 3], "run": [4, 0], "stop": [5, 0]}
    spec = replace(SPEC, instructions={"t": ("go", "go there"), "other": "stop"})
    assert wordings(spec, "t", told, lambda text: np.array(words[text])).tolist() == expected
    # A text that says nothing does not hide those behind it.
    silent = replace(SPEC, instructions={"t": ("", "go")})
    nothing = {**words, "": [0, 0]}
    assert wordings(silent, "t", "go", lambda text: np.array(nothing[text])).tolist() == [[1, 0], [0, 0]]
    assert wordings(spec, "other", "stop", lambda text: np.array(words[text])).tolist() == [[5, 0], [0, 0]]


def test_each_wording_is_told_as_often() -> None:
    three, one = [[1, 0], [2, 3], [4, 0]], [[5, 6], [0, 0], [0, 0]]
    tokens = torch.tensor([three, one]).repeat(3000, 1, 1)
    told = random_wording(tokens, 0.0, torch.Generator().manual_seed(1))
    assert torch.equal(told, random_wording(tokens, 0.0, torch.Generator().manual_seed(1)))
    assert told.shape == (6000, 2) and told.dtype == torch.int64
    found, counts = told[::2].unique(dim=0, return_counts=True)
    assert found.tolist() == three and (counts - 1000).abs().max() < 100
    assert (told[1::2] == torch.tensor([5, 6])).all()
    nothing = torch.zeros((5, 1, 0), dtype=torch.int64)
    assert random_wording(nothing, 0.3, torch.Generator()).shape == (5, 0)
    assert (random_wording(torch.zeros((5, 2, 4), dtype=torch.int64), 0.3, torch.Generator()) == 0).all()


def test_words_are_left_out_but_never_all() -> None:
    tokens = torch.tensor([[7, 8, 9, 10, 0, 0], [5, 0, 0, 0, 0, 0]]).repeat(2000, 1)
    told = random_wording(tokens[:, None], 0.25, torch.Generator().manual_seed(1))
    kept = told != 0
    assert torch.equal(told[kept], tokens[kept])  # each where it was
    assert kept.any(dim=1).all() and not kept[:, 4:].any()
    # All four of the long one go with probability 1 / 256, and then they stay; 0.75 but for that.
    assert kept[::2, :4].double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert kept[::2, :4].any(dim=0).all() and not kept[::2, :4].all(dim=0).any()
    assert kept[1::2, 0].all()
