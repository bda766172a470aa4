"""The diagonal of an inverse that is kept as R Rᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define


def _check(root: Tensor, blocks: Tensor, out: Tensor) -> None:
    _checks.same_device("root", root, blocks=blocks, out=out)
    num_blocks, block_size = _checks.state("root", root)
    _checks.blocks(blocks, num_blocks, _checks.vector("out", out), block_size)


_op = define("factor_diagonal(Tensor root, Tensor blocks, Tensor(a!) out) -> ()", _check)


@reference("factor_diagonal")
def _reference(root: Tensor, blocks: Tensor, out: Tensor) -> None:
    wide = torch.promote_types(root.dtype, out.dtype)
    for b, start, stop in ranges(blocks):
        R = root[b, : stop - start, : stop - start].to(wide)
        out[start:stop] = R.square().sum(dim=1)


def factor_diagonal(root: Tensor, blocks: Tensor, *, out: Tensor) -> None:
    """Write diag(R Rᵀ), the row sums of R∘R, of every block.

    root: R, [K, B, B] float32/float64, contiguous; a block of n < B weights uses [:n, :n].
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    out: [d] float32/float64, overwritten inside the blocks, untouched outside.   Sums run in the wider dtype of
    root and out.
    Raises FastFisherError on wrong input.   Source: FishLeg Surgeon (McGowan et al., 2024), what its saliency divides
    by.
    """
    _op(root, blocks, out)
