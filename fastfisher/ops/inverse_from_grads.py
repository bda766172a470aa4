"""From gradients to the inverse Fisher in one step, or to its diagonal alone; the Fisher itself is never written."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import inverse_with_estimates, ranges, reference
from fastfisher.ops._registry import define


def _check_common(
    grads: Tensor, num_grads: int, damping: float, num_blocks: int, condition: Tensor, amplification: Tensor
) -> None:
    _checks.num_grads(num_grads)
    _checks.damping(damping)
    _checks.estimate("condition", condition, num_blocks)
    _checks.estimate("amplification", amplification, num_blocks)


def _check_inverse(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    _checks.same_device(
        "f_inv", f_inv, grads=grads, blocks=blocks, condition=condition, amplification=amplification
    )
    num_blocks, block_size = _checks.state("f_inv", f_inv)
    _, num_weights = _checks.grads("grads", grads)
    _checks.blocks(blocks, num_blocks, num_weights, block_size)
    _check_common(grads, num_grads, damping, num_blocks, condition, amplification)


def _check_diagonal(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    _checks.same_device(
        "inv_diag", inv_diag, grads=grads, blocks=blocks, condition=condition, amplification=amplification
    )
    num_weights = _checks.vector("inv_diag", inv_diag)
    _checks.block_size(block_size)
    _checks.grads("grads", grads, num_weights)
    num_blocks = _checks.blocks(blocks, None, num_weights, block_size)
    _check_common(grads, num_grads, damping, num_blocks, condition, amplification)


_inverse = define(
    "inverse_from_grads(Tensor(a!) f_inv, Tensor grads, Tensor blocks, int num_grads, float damping, "
    "Tensor(b!) condition, Tensor(c!) amplification) -> ()",
    _check_inverse,
)
_diagonal = define(
    "inverse_diagonal_from_grads(Tensor(a!) inv_diag, Tensor grads, Tensor blocks, int block_size, "
    "int num_grads, float damping, Tensor(b!) condition, Tensor(c!) amplification) -> ()",
    _check_diagonal,
)


def _block(
    grads: Tensor, start: int, stop: int, num_grads: int, damping: float, dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    G = grads[:, start:stop].to(dtype)  # [k, n]
    return inverse_with_estimates(G.T @ G / num_grads, damping)


@reference("inverse_from_grads")
def _inverse_reference(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    for b, start, stop in ranges(blocks):
        n = stop - start
        inverse, condition[b], amplification[b] = _block(grads, start, stop, num_grads, damping, f_inv.dtype)
        f_inv[b].zero_().diagonal().fill_(1 / damping)
        f_inv[b, :n, :n] = inverse
        if condition[b] == torch.inf:
            f_inv[b].fill_(torch.nan)


@reference("inverse_diagonal_from_grads")
def _diagonal_reference(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    for b, start, stop in ranges(blocks):
        inverse, condition[b], amplification[b] = _block(
            grads, start, stop, num_grads, damping, inv_diag.dtype
        )
        inv_diag[start:stop] = inverse.diagonal()


def inverse_from_grads(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    condition: Tensor,
    amplification: Tensor,
    *,
    damping: float,
) -> None:
    """Write F⁻¹ = (λ I + GᵀG / m)⁻¹ of every block, straight from the gradients.

    f_inv: [K, B, B] float32/float64, contiguous, overwritten, symmetric; in a block of n < B weights the inverse takes
    [:n, :n], and I/λ, the inverse for weights without gradient, the rest.   A block with a pivot that is not positive
    and finite is filled with NaN.
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in the dtype of f_inv.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    num_grads: m of the whole estimate, not k.   damping: λ > 0.
    condition, amplification: float64 [K], overwritten by what spd_inverse_ says of the same F, f = diag(GᵀG) / m.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.3.
    """
    _inverse(f_inv, grads, blocks, num_grads, damping, condition, amplification)


def inverse_diagonal_from_grads(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    condition: Tensor,
    amplification: Tensor,
    *,
    block_size: int,
    damping: float,
) -> None:
    """Write diag F⁻¹ of every block, F = λ I + GᵀG / m, straight from the gradients; no state is kept.

    inv_diag: [d] float32/float64, contiguous, overwritten inside the blocks (NaN in a block that failed), untouched
    outside; the arithmetic runs in its dtype.
    block_size: B, the length of the longest block.   The other arguments are those of inverse_from_grads.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eqs. 2.13 and 3.3.
    """
    _diagonal(inv_diag, grads, blocks, block_size, num_grads, damping, condition, amplification)
