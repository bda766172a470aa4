"""Batched in-place inverse of symmetric positive definite blocks, with an estimate of how far to trust it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import reference
from fastfisher.ops._registry import define


def _check(matrix: Tensor, condition: Tensor) -> None:
    _checks.same_device("matrix", matrix, condition=condition)
    num_blocks, _ = _checks.state("matrix", matrix)
    _checks.exact_shape("condition", condition, (num_blocks,))
    _checks.dtype("condition", condition, (torch.float64,))
    _checks.contiguous("condition", condition)


_op = define("spd_inverse_(Tensor(a!) matrix, Tensor(b!) condition) -> ()", _check)


@reference("spd_inverse_")
def _reference(matrix: Tensor, condition: Tensor) -> None:
    for b, M in enumerate(matrix):
        lower = M.tril()  # the upper triangle may hold anything
        L, info = torch.linalg.cholesky_ex(lower)
        if info.item() != 0 or not L.diagonal().isfinite().all():
            M.fill_(torch.nan)
            condition[b] = torch.inf
            continue
        scale = lower.diagonal().double().sqrt()  # D^1/2, [B]
        inverse = torch.cholesky_inverse(L)
        A = (lower + lower.tril(-1).T).double() / scale[:, None] / scale
        M.copy_((inverse + inverse.T) / 2)
        condition[b] = A.norm() * (scale[:, None] * M.double() * scale).norm()


def spd_inverse_(matrix: Tensor, condition: Tensor) -> None:
    """Invert every block, M ← M⁻¹ = (L Lᵀ)⁻¹, in place, and estimate its condition after diagonal scaling.

    matrix: [K, B, B] float32/float64, contiguous; the lower triangle is read, the full symmetric inverse is
    written.
    A block with a pivot that is not positive and finite is filled with NaN.
    condition: float64 [K], overwritten by ‖A‖_F ‖A⁻¹‖_F, A = D^-1/2 M D^-1/2, D = diag(M); +inf for a block that
    failed.
    Raises FastFisherError on wrong input.   Source: Higham, Accuracy and Stability of Numerical Algorithms,
    ch. 10 and 14.
    """
    _op(matrix, condition)
