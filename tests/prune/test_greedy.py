"""Removal one by one: its losses are those of its own weights, and it does at least as well as what it refines."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastfisher as ff
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.prune import saliency
from fastfisher.prune.patterns import Pattern
from fastfisher.prune.select import select
from tests.prune.models import batches, classifier, images

UNSTRUCTURED = Pattern.parse("unstructured")


def problem(
    num_grads: int, block_size: int, d: int = 150, seed: int = 0
) -> tuple[ff.FisherInverse, Tensor, Tensor]:
    """An inverse from correlated gradients in float64, its dense Fisher [d, d] in blocks, and weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    grads = torch.randn(num_grads, d, generator=generator, dtype=torch.float64) @ mix
    finv = ff.FisherInverse.from_grads(grads, block_size=block_size, damping=0.01, sizes=[d])
    F = grads.T @ grads / num_grads + 0.01 * torch.eye(d, dtype=torch.float64)
    block = torch.arange(d) // block_size
    return finv, F * (block[:, None] == block), torch.randn(d, generator=generator, dtype=torch.float64)


def loss(F: Tensor, old: Tensor, new: Tensor) -> float:
    return float((new - old) @ F @ (new - old)) / 2


CASES = [(200, 50), (20, 50), (60, 30), (8, 75)]  # primal and dual


@pytest.mark.parametrize(("num_grads", "block_size"), CASES)
@pytest.mark.parametrize("together", [1, 5])
def test_the_claimed_loss_is_the_measured_one(num_grads: int, block_size: int, together: int) -> None:
    finv, F, w = problem(num_grads, block_size)
    order, losses = finv.eliminate(w, together=together)
    for start, stop in finv.layout.blocks.tolist():
        assert sorted(order[start:stop].tolist()) == list(range(start, stop))
    for count in (1, 7, block_size // 2, block_size - 1):
        removed = torch.cat([order[a : a + count] for a, _ in finv.layout.blocks.tolist()])
        mask = torch.ones_like(w, dtype=torch.bool)
        mask[removed] = False
        claimed = sum(float(losses[a : a + count].sum()) for a, _ in finv.layout.blocks.tolist())
        new = finv.prune_update(w, mask, update="joint")
        assert loss(F, w, new) == pytest.approx(claimed, rel=1e-4)


def test_greedy_is_at_most_joint_and_joint_at_most_sum_on_every_block() -> None:
    mended = 0
    for (num_grads, block_size), sparsity, seed in itertools.product(CASES, (0.2, 0.5, 0.8, 0.95), range(3)):
        finv, F, w = problem(num_grads, block_size, seed=seed)
        none = torch.zeros_like(w, dtype=torch.bool)
        ranges = [(int(a), int(b)) for a, b in finv.layout.blocks]
        share = round(sparsity * block_size) / block_size
        by_itself, by_order = (
            select(scores, none, share, scope="layer", ranges=ranges)
            for scores in (finv.saliency(w), saliency.greedy(w, finv, UNSTRUCTURED))
        )
        chosen = saliency.no_worse(by_order, w, finv)
        mended += int(not torch.equal(chosen, by_order))
        assert int(chosen.sum()) == int(by_order.sum())
        summed = finv.prune_update(w, by_itself, update="sum")
        joint = finv.prune_update(w, by_itself, update="joint")
        greedy = finv.prune_update(w, chosen, update="joint")
        for a, b in ranges:
            g, j, s = (loss(F[a:b, a:b], w[a:b], new[a:b]) for new in (greedy, joint, summed))
            assert g <= j * (1 + 1e-9)
            assert j <= s * (1 + 1e-9)
    assert mended > 0  # taking the cheapest each time is no guarantee by itself


@pytest.mark.parametrize(("num_grads", "block_size"), CASES)
def test_the_loss_of_a_mask_is_the_measured_one_in_every_block(num_grads: int, block_size: int) -> None:
    finv, F, w = problem(num_grads, block_size)
    mask = torch.rand(len(w), generator=torch.Generator().manual_seed(1)) < 0.4
    new = finv.prune_update(w, mask, update="joint")
    found = finv.removal_loss(w, mask)
    for b, (start, stop) in enumerate(finv.layout.blocks.tolist()):
        part = slice(start, stop)
        assert float(found[b]) == pytest.approx(loss(F[part, part], w[part], new[part]), rel=1e-7)


def test_one_threshold_cuts_every_block_along_its_order() -> None:
    finv, _, w = problem(200, 50)
    order, _ = finv.eliminate(w)
    scores = saliency.greedy(w, finv, UNSTRUCTURED)
    for start, stop in finv.layout.blocks.tolist():
        along = scores[order[start:stop]]
        assert bool((along[1:] > along[:-1]).all())
    none = torch.zeros_like(w, dtype=torch.bool)
    mask = select(scores, none, 0.37, scope="global", ranges=[(0, len(w))])
    assert int((~mask).sum()) == round(0.37 * len(w))


def test_equal_losses_are_cut_along_the_order_too() -> None:
    losses = torch.tensor([0.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = saliency.in_order(losses, torch.tensor([[0, 4], [4, 7]]), 4)
    assert bool((found[1:4] > found[:3]).all())
    assert bool((found[5:] > found[4:6]).all())
    assert found == pytest.approx([0, 0, 3, 3, 1, 1, 1], abs=1e-12)


def test_groups_keep_what_they_must_and_the_loss_of_the_others_is_nan() -> None:
    finv, _, w = problem(200, 48, d=144)
    layout = ff.BlockLayout(["a"], [(144,)], 48, group=4)
    finv.layout = layout
    order, losses = finv.eliminate(w, keep=2)
    removed = order[~losses.isnan()]
    counts = torch.bincount(removed // 4, minlength=36)
    assert counts.tolist() == [2] * 36


def test_a_broken_block_is_named() -> None:
    finv, _, w = problem(200, 50)
    finv.parts[0].state[1] *= -1
    with pytest.raises(
        FisherError, match=r"the greedy update of tensor0\[50:100\] \(block 1 of 3\) breaks down"
    ):
        finv.eliminate(w)


def test_groups_that_cross_a_block_are_an_error() -> None:
    finv, _, w = problem(200, 50)
    with pytest.raises(
        FastFisherError, match=r"groups of 4 do not fill tensor0\[0:50\], which holds 50 weights"
    ):
        finv.group_saliency(w, 4)


@pytest.mark.parametrize(("num_grads", "block_size"), CASES)
def test_the_saliency_of_a_group_is_the_loss_of_removing_it(num_grads: int, block_size: int) -> None:
    finv, F, w = problem(num_grads, block_size)
    found = finv.group_saliency(w, 5)
    for g in (0, 3, 29):
        mask = torch.ones_like(w, dtype=torch.bool)
        mask[5 * g : 5 * g + 5] = False
        assert float(found[g]) == pytest.approx(
            loss(F, w, finv.prune_update(w, mask, update="joint")), rel=1e-6
        )


def test_exactly_the_zeros_asked_for_over_steps() -> None:
    model = classifier()
    report = ff.prune(
        model,
        batches(*images(32), 8),
        sparsity=0.7,
        num_grads=32,
        block_size=16,
        update="greedy",
        num_recomputations=2,
    )
    assert report.num_zeros == round(0.7 * report.num_weights)
    assert report.update == "greedy"
