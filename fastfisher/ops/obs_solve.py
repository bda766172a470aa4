"""The exact update of the kept weights: the minimiser of the quadratic model, all removed weights at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import capacitance, ranges, reference, tiles
from fastfisher.ops._registry import define


def _check(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    mask: Tensor,
    failed: Tensor,
) -> None:
    _checks.same_device("weight", weight, state=state, factor=factor, blocks=blocks, mask=mask, failed=failed)
    num_weights = _checks.vector("weight", weight)
    _checks.exact_shape("mask", mask, (num_weights,))
    _checks.dtype("mask", mask, (torch.bool,))
    _checks.contiguous("mask", mask)
    _checks.inverse(state, factor, blocks, damping, num_weights)
    if factor is not None:
        _checks.num_grads(num_grads)
    _checks.exact_shape("failed", failed, (blocks.shape[0],))
    _checks.dtype("failed", failed, (torch.bool,))
    _checks.contiguous("failed", failed)


_op = define(
    "obs_solve_(Tensor(a!) weight, Tensor state, Tensor? factor, Tensor blocks, int num_grads, "
    "float damping, Tensor mask, Tensor(b!) failed) -> ()",
    _check,
)


@reference("obs_solve_")
def _reference(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    mask: Tensor,
    failed: Tensor,
) -> None:
    failed.fill_(False)
    for b, start, stop in ranges(blocks):
        w, keep = weight[start:stop], mask[start:stop]
        if keep.all():
            continue
        if factor is None:
            F_inv = state[b, : stop - start, : stop - start].double()  # [n, n]
            updated = _primal(w.double(), F_inv, ~keep)
        else:
            updated = _dual(weight, state, start, stop, num_grads * damping, mask)
        if updated is None:
            failed[b] = True
        else:
            weight[start:stop] = torch.where(keep, updated, 0)


def _primal(w: Tensor, F_inv: Tensor, removed: Tensor) -> Tensor | None:
    L, info = torch.linalg.cholesky_ex(F_inv[removed][:, removed])  # [q, q]
    if info.item() != 0 or not L.diagonal().isfinite().all():
        return None
    multipliers = torch.cholesky_solve(w[removed, None], L)  # [q, 1]
    return w - (F_inv[:, removed] @ multipliers).squeeze(1)


def _dual(weight: Tensor, grads: Tensor, start: int, stop: int, shift: float, mask: Tensor) -> Tensor | None:
    L, info = torch.linalg.cholesky_ex(capacitance(grads, start, stop, shift, keep=mask))  # [k, k]
    if info.item() != 0 or not L.diagonal().isfinite().all():
        return None
    projections = torch.zeros(grads.shape[0], 1, dtype=torch.float64, device=grads.device)  # G_Q w_Q, [k, 1]
    for tile in tiles(start, stop):
        projections += grads[:, tile].double() @ torch.where(mask[tile], 0, weight[tile].double())[:, None]
    coefficients = torch.cholesky_solve(projections, L)  # [k, 1]
    updated = weight[start:stop].double()  # [n]
    for tile in tiles(start, stop):
        updated[tile.start - start : tile.stop - start] += (grads[:, tile].double().T @ coefficients).squeeze(
            1
        )
    return updated


def obs_solve_(
    weight: Tensor,
    state: Tensor,
    blocks: Tensor,
    mask: Tensor,
    failed: Tensor,
    *,
    num_grads: int = 0,
    factor: Tensor | None = None,
    damping: float = 0.0,
) -> None:
    """Remove the weights outside the mask and minimise ½ δwᵀ F δw over the others, in place.

    Primal: δw = −F⁻¹[:, Q] (F⁻¹[Q, Q])⁻¹ w_Q.   Dual, R = kept: δw_R = G_Rᵀ (m λ I + G_R G_Rᵀ)⁻¹ (G_Q w_Q).
    weight: [d] float32/float64, contiguous, overwritten inside the blocks; exactly 0 where mask is False.
    state: primal [K, B, B] float32/float64, or with `factor` the gradients [k, d] of any float dtype.
    factor: None, or float64 [K, k, k]; its values are not read.   num_grads, damping: m and λ, read in the
    dual form only.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    mask: bool [d], True = keep; Q is where it is False.
    failed: bool [K], overwritten: True where a solve, in float64 in either form, broke down; the weights of
    such a block are left as they were.
    Raises FastFisherError on wrong input.   Source: WoodFisher, section 2.2, with all constraints at once.
    """
    _op(weight, state, factor, blocks, num_grads, damping, mask, failed)
