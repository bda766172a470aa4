"""Batched in-place inverse of symmetric positive definite blocks, with estimates of how far to trust it."""

from __future__ import annotations

from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import inverse_with_estimates, reference
from fastfisher.ops._registry import define


def _check(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    _checks.same_device("matrix", matrix, condition=condition, amplification=amplification)
    num_blocks, _ = _checks.state("matrix", matrix)
    _checks.estimate("condition", condition, num_blocks)
    _checks.estimate("amplification", amplification, num_blocks)
    _checks.damping(damping, zero=True)


_op = define(
    "spd_inverse_(Tensor(a!) matrix, float damping, Tensor(b!) condition, Tensor(c!) amplification) -> ()",
    _check,
)


@reference("spd_inverse_")
def _reference(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    for b, M in enumerate(matrix):
        inverse, condition[b], amplification[b] = inverse_with_estimates(M, damping)
        M.copy_(inverse)


def spd_inverse_(matrix: Tensor, condition: Tensor, amplification: Tensor, *, damping: float = 0.0) -> None:
    """Invert every block, M ← F⁻¹ with F = M + λ I, in place, and estimate how rounding errors of F spread.

    matrix: [K, B, B] float32/float64, contiguous; the lower triangle is read, the full symmetric inverse is written.
    A block with a pivot that is not positive and finite is filled with NaN.   damping: λ >= 0.
    condition: float64 [K], overwritten by ‖A‖_F ‖A⁻¹‖_F, A = D^-½ F D^-½, D = diag(F).
    amplification: float64 [K], overwritten by ‖A‖_F ‖F⁻¹ diag(f)^½‖_F max(f)^½, f = diag(M) without the damping: times
    the unit roundoff, an estimate of the relative error of F⁻¹v for the worst v (see fisher/parts.py).
    Both are +inf for a block that failed.
    Raises FastFisherError on wrong input.   Source: Higham, Accuracy and Stability of Numerical Algorithms, ch. 10, 14.
    """
    _op(matrix, damping, condition, amplification)
