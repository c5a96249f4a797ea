"""Batch sizes come again, and nothing is lost by it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.shapes import SIZES_A_DOUBLING, filled_up, minibatches


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
