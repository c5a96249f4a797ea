"""Batch sizes come again, and nothing is lost by it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.shapes import SIZES_A_DOUBLING, filled_up, image_parts, minibatches
from trainer.vla import ImageEncoder


@given(st.integers(0, 5000))
def test_what_is_filled_up_begins_as_it_was_and_is_hardly_longer(count: int) -> None:
    filled = filled_up(torch.arange(count))
    assert torch.equal(filled[:count], torch.arange(count))
    assert torch.equal(filled[count:], torch.arange(len(filled) - count))
    assert len(filled) <= count * (1 + 1 / SIZES_A_DOUBLING)


@given(st.integers(0, 5000), st.integers(1, 600))
def test_minibatches_are_equal_parts_of_almost_all_rows(count: int, size: int) -> None:
    rows = torch.randperm(count)
    parts = minibatches(rows, size)
    together = torch.cat(parts) if parts else torch.arange(0)
    assert torch.equal(together, rows[: len(together)])
    assert len({len(part) for part in parts}) <= 1
    # What equal parts leave over, and what the next size in use below leaves.
    assert count - len(together) < len(parts) + (count / (SIZES_A_DOUBLING + 1) if count else 1)
    assert all(len(part) <= 1.5 * size for part in parts)


def test_few_sizes_are_in_use() -> None:
    batches = range(1000, 3000)
    assert len({len(filled_up(torch.arange(count))) for count in batches}) <= 2 * SIZES_A_DOUBLING
    sizes = {len(part) for count in batches for part in minibatches(torch.arange(count), 500)}
    assert len(sizes) <= 2 * SIZES_A_DOUBLING


def test_large_images_are_seen_in_parts_with_the_same_outcome_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(16, 24, (4, 8), 5)
    image = torch.randint(0, 256, (10, 16, 24, 3), dtype=torch.uint8)
    seen: list[int] = []

    def see(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append(len(image))
        result: torch.Tensor = encoder(image, text)
        return result

    def outcome() -> list[torch.Tensor]:
        text = torch.linspace(-1, 1, 50).reshape(10, 5).requires_grad_()
        encoder.zero_grad()
        features = image_parts(see, image, text)
        torch.autograd.backward(features.square().sum())
        assert text.grad is not None
        return [features.detach(), text.grad, *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]

    whole = outcome()
    assert seen == [10]
    seen.clear()
    monkeypatch.setattr("trainer.shapes.MOST_PIXELS", 3 * 16 * 24)
    parts = outcome()
    assert sorted(seen) == [2, 2, 2, 2, 3, 3, 3, 3], "each once more for its gradients"
    assert len(whole) == len(parts) == 2 + len(list(encoder.parameters()))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one)
    with torch.no_grad():
        seen.clear()
        torch.testing.assert_close(image_parts(see, image, torch.zeros(10, 5)), encoder(image, torch.zeros(10, 5)))
        assert sorted(seen) == [2, 2, 3, 3]
