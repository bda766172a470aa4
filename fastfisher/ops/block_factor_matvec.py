"""The product of an inverse that is kept as R Rᵀ with vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define


def _check(root: Tensor, blocks: Tensor, x: Tensor, out: Tensor) -> None:
    _checks.same_device("root", root, blocks=blocks, x=x, out=out)
    _checks.columns(x, out)
    num_blocks, block_size = _checks.state("root", root)
    _checks.blocks(blocks, num_blocks, x.shape[0], block_size)


_op = define("block_factor_matvec(Tensor root, Tensor blocks, Tensor x, Tensor(a!) out) -> ()", _check)


@reference("block_factor_matvec")
def _reference(root: Tensor, blocks: Tensor, x: Tensor, out: Tensor) -> None:
    wide = torch.promote_types(root.dtype, x.dtype)
    for b, start, stop in ranges(blocks):
        R = root[b, : stop - start, : stop - start].to(wide)
        out[start:stop] = R @ (R.T @ x[start:stop].to(wide))


def block_factor_matvec(root: Tensor, blocks: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Write R (Rᵀ x) of every block, R read from memory once.

    root: R, [K, B, B] float32/float64, contiguous; a block of n < B weights uses [:n, :n].
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    x: [d, n] float32/float64, contiguous.   out: like x, no memory shared with it, overwritten inside the blocks,
    untouched outside.   Sums run in the wider dtype of root and x.
    Raises FastFisherError on wrong input.   Source: FishLeg (Garcia et al., 2023), its preconditioner.
    """
    _op(root, blocks, x, out)
