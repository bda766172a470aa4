"""Exactly the zeros asked for, whatever the ties, the scope, and the zeros that are there already."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfisher.errors import FisherError
from fastfisher.prune.select import keep_mask, layer_zeros, num_zeros, select


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    sparsity=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_counts_are_exact_and_the_least_salient_go(
    sizes: list[int], sparsity: float, levels: int, seed: int
) -> None:
    d = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(levels, (d,), generator=generator).float()  # many ties
    none = torch.zeros(d, dtype=torch.bool)
    mask = select(saliency, none, sparsity, scope="global", ranges=())
    assert int((~mask).sum()) == num_zeros(sparsity, d) == round(sparsity * d)
    order = torch.argsort(saliency, stable=True)
    assert set((~mask).nonzero().squeeze(1).tolist()) == set(order[: num_zeros(sparsity, d)].tolist())

    counts = layer_zeros(sparsity, sizes)
    assert sum(counts) == round(sparsity * d)
    assert all(
        abs(count - sparsity * size) < 1 and 0 <= count <= size
        for count, size in zip(counts, sizes, strict=True)
    )
    stops = torch.tensor(sizes).cumsum(0).tolist()
    ranges = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    mask = select(saliency, none, sparsity, scope="layer", ranges=ranges)
    assert [int((~mask[a:b]).sum()) for a, b in ranges] == counts


def test_zeros_that_are_there_stay_and_count() -> None:
    saliency = torch.tensor([0.0, 0.0, 5.0, 1.0, 0.0, 2.0])
    dead = torch.tensor([False, False, True, False, True, False])
    assert keep_mask(saliency, dead, 3).tolist() == [False, True, False, True, False, True]
    assert keep_mask(saliency, dead, 1).tolist() == [True, True, False, True, False, True]
    assert keep_mask(saliency, dead, 0).tolist() == (~dead).tolist()
    assert keep_mask(saliency, torch.ones(6, dtype=torch.bool), 3).tolist() == [False] * 6


def test_a_saliency_that_is_not_finite_is_an_error() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(FisherError, match="the saliency of weight 1 is nan"):
        keep_mask(torch.tensor([1.0, float("nan"), 0.0]), none, 1)


def test_the_remainder_goes_to_the_largest_fractions_first() -> None:
    # 0.5 · (1, 3, 5) = 0.5, 1.5, 2.5: floors 0, 1, 2 and round(4.5) = 4 leave one, to the first among equals
    assert layer_zeros(0.5, [1, 3, 5]) == [1, 1, 2]
    assert layer_zeros(0.9, [10, 11, 12]) == [9, 10, 11]
