"""The exact removal of weights from an inverse that is kept as R Rᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define

# Of its length, what must be left of a row beyond the rows before it, in roundings; less is an error of the state.
DEPENDENT = 8


def _check(root: Tensor, blocks: Tensor, mask: Tensor) -> None:
    _checks.same_device("root", root, blocks=blocks, mask=mask)
    num_blocks, block_size = _checks.state("root", root)
    _checks.blocks(blocks, num_blocks, _checks.vector("mask", mask, (torch.bool,)), block_size)


_op = define("factor_downdate_(Tensor(a!) root, Tensor blocks, Tensor mask) -> ()", _check)


@reference("factor_downdate_")
def _reference(root: Tensor, blocks: Tensor, mask: Tensor) -> None:
    least = DEPENDENT * torch.finfo(root.dtype).eps
    for b, start, stop in ranges(blocks):
        removed = (~mask[start:stop]).nonzero().flatten().tolist()
        R = root[b, : stop - start, : stop - start].double()  # [n, n]
        before = R.norm(dim=1)
        for q in removed:
            norm = R[q].norm()
            if bool(norm > least * before[q]):
                v = R[q] / norm
                R -= torch.outer(R @ v, v)
            R[q] = 0
        if removed:
            root[b, : stop - start, : stop - start] = R


def factor_downdate_(root: Tensor, blocks: Tensor, mask: Tensor) -> None:
    """Remove weights from Q = R Rᵀ: R ← R (I − V Vᵀ), V an orthonormal basis of the rows of R that are removed.

    Those rows are zeros afterwards, and if Q was F⁻¹ of a block it is the inverse of F without their rows and columns.
    Weights may go one call after the other or all in one, which is the same to rounding.
    root: R, [K, B, B] float32/float64, contiguous, overwritten; a block of n < B weights uses [:n, :n].   The
    arithmetic is float64.   Rows of zeros stay.   A removed row of which less than eight roundings of its length, in
    the dtype of root, lie outside of the span of those removed before it counts as lying within.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    mask: bool [d], contiguous, True where a weight is kept.
    Raises FastFisherError on wrong input.   Source: FishLeg Surgeon (McGowan et al., 2024) masks its Q; this is what
    keeps a square root exact when weights leave.
    """
    _op(root, blocks, mask)
