"""The paper's update of the kept weights: the sum of the corrections of all removed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import fisher_inverse_times, ranges, reference
from fastfisher.ops._registry import define


def _check(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    inv_diag: Tensor,
    mask: Tensor,
) -> None:
    _checks.same_device(
        "weight", weight, state=state, factor=factor, blocks=blocks, inv_diag=inv_diag, mask=mask
    )
    num_weights = _checks.vector("weight", weight)
    _checks.exact_shape("inv_diag", inv_diag, (num_weights,))
    _checks.dtype("inv_diag", inv_diag, _checks.STATE_DTYPES)
    _checks.contiguous("inv_diag", inv_diag)
    _checks.exact_shape("mask", mask, (num_weights,))
    _checks.dtype("mask", mask, (torch.bool,))
    _checks.contiguous("mask", mask)
    _checks.inverse(state, factor, blocks, damping, num_weights)


_op = define(
    "obs_update_(Tensor(a!) weight, Tensor state, Tensor? factor, Tensor blocks, float damping, "
    "Tensor inv_diag, Tensor mask) -> ()",
    _check,
)


@reference("obs_update_")
def _reference(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    inv_diag: Tensor,
    mask: Tensor,
) -> None:
    wide = torch.promote_types(weight.dtype, torch.float64 if factor is not None else state.dtype)
    for b, start, stop in ranges(blocks):
        w, keep = weight[start:stop].to(wide), mask[start:stop]
        x = torch.where(keep, 0, w / inv_diag[start:stop].to(wide))  # [n]
        correction = torch.empty_like(x)
        fisher_inverse_times(state, factor, b, start, stop, damping, x[:, None], correction[:, None])
        weight[start:stop] = torch.where(keep, w - correction, 0)


def obs_update_(
    weight: Tensor,
    state: Tensor,
    blocks: Tensor,
    inv_diag: Tensor,
    mask: Tensor,
    *,
    factor: Tensor | None = None,
    damping: float = 0.0,
) -> None:
    """Remove the weights outside the mask and correct the others: w ← w − F⁻¹ (1_Q ∘ w / diag F⁻¹), w_Q = 0.

    weight: [d] float32/float64, contiguous, overwritten inside the blocks; exactly 0 where mask is False.
    state: primal [K, B, B] float32/float64, or with `factor` the gradients [k, d] of any float dtype.
    factor: None, or float64 [K, k, k] from dual_factor_.   damping: λ, read in the dual form only.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    inv_diag: [d] float32/float64, diag F⁻¹.   mask: bool [d], True = keep; Q is where it is False.
    Sums run in the wider dtype of state and weight, in float64 in the dual form.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 2.11 and section 2.2.2.
    """
    _op(weight, state, factor, blocks, damping, inv_diag, mask)
