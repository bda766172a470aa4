"""The Gram update of the empirical Fisher, lower triangle only."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define


def _check(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    _checks.same_device("fisher", fisher, grads=grads, blocks=blocks)
    num_blocks, block_size = _checks.state("fisher", fisher)
    _, num_weights = _checks.grads("grads", grads)
    _checks.blocks(blocks, num_blocks, num_weights, block_size)
    _checks.num_grads(num_grads)


_op = define(
    "fisher_accumulate_(Tensor(a!) fisher, Tensor grads, Tensor blocks, int num_grads) -> ()", _check
)


@reference("fisher_accumulate_")
def _reference(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    for b, start, stop in ranges(blocks):
        n = stop - start
        G = grads[:, start:stop].to(fisher.dtype)  # [k, n]
        rows, cols = torch.tril_indices(n, n, device=fisher.device)
        fisher[b, rows, cols] += (G.T @ G)[rows, cols] / num_grads


def fisher_accumulate_(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Add F ← F + GᵀG / m to the lower triangle of every Fisher block, in place.

    fisher: [K, B, B] float32/float64, contiguous; the strict upper triangle is neither read nor written, nor
    is what lies outside [:n, :n] in a block of n < B weights.
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in the dtype of fisher.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    num_grads: m of the whole estimate, not k.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.3.
    """
    _op(fisher, grads, blocks, num_grads)
