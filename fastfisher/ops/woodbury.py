"""One rank-k step of the inverse Fisher, through the k x k capacitance."""

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


_op = define("woodbury_(Tensor(a!) f_inv, Tensor grads, Tensor blocks, int num_grads) -> ()", _check)


@reference("woodbury_")
def _reference(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    k = grads.shape[0]
    eye = torch.eye(k, dtype=f_inv.dtype, device=f_inv.device)
    for b, start, stop in ranges(blocks):
        F_inv = f_inv[b, : stop - start, : stop - start]  # [n, n]
        G = grads[:, start:stop].to(f_inv.dtype)  # [k, n]
        V = F_inv @ G.T  # [n, k]
        capacitance = num_grads * eye + G @ V  # [k, k]
        L, info = torch.linalg.cholesky_ex(capacitance)
        if info.item() != 0 or not L.diagonal().isfinite().all():
            F_inv.fill_(torch.nan)
            continue
        W = torch.linalg.solve_triangular(L, V.T, upper=False)  # [k, n]
        F_inv -= W.T @ W


def woodbury_(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Apply one rank-k step F⁻¹ ← F⁻¹ − V C⁻¹ Vᵀ, V = F⁻¹Gᵀ, C = m I + G V, to every inverse block, in place.

    f_inv: [K, B, B] float32/float64, contiguous, symmetric, overwritten; a block of n < B weights uses [:n,
    :n].
    A block whose capacitance C is not positive definite is filled with NaN.
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in the dtype of f_inv.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    num_grads: m of the whole estimate, not k.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.1.
    """
    _op(f_inv, grads, blocks, num_grads)
