"""k rank-1 steps of the inverse Fisher, valid after every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define


def _check(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    _checks.same_device("f_inv", f_inv, grads=grads, blocks=blocks)
    num_blocks, block_size = _checks.state("f_inv", f_inv)
    _, num_weights = _checks.grads("grads", grads)
    _checks.blocks(blocks, num_blocks, num_weights, block_size)
    _checks.num_grads(num_grads)


_op = define("sherman_morrison_(Tensor(a!) f_inv, Tensor grads, Tensor blocks, int num_grads) -> ()", _check)


@reference("sherman_morrison_")
def _reference(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    for b, start, stop in ranges(blocks):
        F_inv = f_inv[b, : stop - start, : stop - start]  # [n, n]
        for g in grads[:, start:stop].to(f_inv.dtype):
            v = F_inv @ g  # [n]
            F_inv -= torch.outer(v, v) / (num_grads + g @ v)


def sherman_morrison_(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Apply k rank-1 steps F⁻¹ ← F⁻¹ − v vᵀ / (m + gᵀv), v = F⁻¹g, to every inverse block, in place.

    f_inv: [K, B, B] float32/float64, contiguous, symmetric, overwritten; a block of n < B weights uses [:n,
    :n].
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in the dtype of f_inv.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    num_grads: m of the whole estimate, not k.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.4.
    """
    _op(f_inv, grads, blocks, num_grads)
