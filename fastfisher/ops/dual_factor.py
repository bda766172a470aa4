"""The k x k Cholesky factor that holds the inverse Fisher of a block with more weights than gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import capacitance, ranges, reference
from fastfisher.ops._registry import define


def _check(
    factor: Tensor, grads: Tensor, blocks: Tensor, num_grads: int, damping: float, condition: Tensor
) -> None:
    _checks.same_device("factor", factor, grads=grads, blocks=blocks, condition=condition)
    num_rows, num_weights = _checks.grads("grads", grads)
    num_blocks = _checks.blocks(blocks, None, num_weights, None)
    _checks.exact_shape("factor", factor, (num_blocks, num_rows, num_rows))
    _checks.dtype("factor", factor, (torch.float64,))
    _checks.contiguous("factor", factor)
    _checks.estimate("condition", condition, num_blocks)
    _checks.num_grads(num_grads)
    _checks.damping(damping)


_op = define(
    "dual_factor_(Tensor(a!) factor, Tensor grads, Tensor blocks, int num_grads, float damping, "
    "Tensor(b!) condition) -> ()",
    _check,
)


@reference("dual_factor_")
def _reference(
    factor: Tensor, grads: Tensor, blocks: Tensor, num_grads: int, damping: float, condition: Tensor
) -> None:
    for b, start, stop in ranges(blocks):
        C = capacitance(grads, start, stop, num_grads * damping)  # [k, k]
        L, info = torch.linalg.cholesky_ex(C)
        if info.item() != 0 or not L.diagonal().isfinite().all():
            factor[b].fill_(torch.nan)
            condition[b] = torch.inf
            continue
        factor[b].copy_(L.T)
        scale = C.diagonal().sqrt()  # [k]
        condition[b] = (scale[:, None] * torch.cholesky_inverse(L) * scale).norm()


def dual_factor_(
    factor: Tensor, grads: Tensor, blocks: Tensor, num_grads: int, damping: float, condition: Tensor
) -> None:
    """Factor the capacitance of every block, C = m λ I + G Gᵀ = Uᵀ U, so that F⁻¹ = (I − Gᵀ C⁻¹ G) / λ.

    factor: float64 [K, k, k], contiguous, overwritten by the upper triangular U, zeros below the diagonal.  A
    block with a pivot that is not positive and finite is filled with NaN.
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in float64.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint, of any size.
    num_grads: m of the whole estimate, not k.   damping: λ > 0.
    condition: float64 [K], overwritten by an estimate between ‖A⁻¹‖₂/4 and ‖A⁻¹‖_F (the reference: ‖A⁻¹‖_F)
    of A = D^-1/2 C D^-1/2, D = diag(C); +inf for a block that failed.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.1, applied to all gradients at once.
    """
    _op(factor, grads, blocks, num_grads, damping, condition)
