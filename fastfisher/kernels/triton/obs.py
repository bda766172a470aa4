"""Optimal Brain Surgeon on the blocks: saliency of every weight, summed and exact joint removal of many.

The summed removal is memory-bound in its product with F⁻¹.  The joint one solves for all removed weights of a block
together, in float64: on chip where the block fits, else by a factor in scratch memory for a group of blocks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, tuning
from fastfisher.kernels.triton.block_matvec import block_matvec, expand, primal_product, project
from fastfisher.kernels.triton.dual_factor import capacitance
from fastfisher.kernels.triton.inverse_from_grads import fits_on_chip
from fastfisher.kernels.triton.launch import TYPES, block_groups, launch, pieces, power_of_two
from fastfisher.kernels.triton.tiles import block_range, spd_inverse

PIECE = 1024  # weights of a program in what goes through all of them


@triton.jit
def _saliency(out, weight, inv_diag, num_weights: tl.int64, T: tl.constexpr, PIECE: tl.constexpr):
    q = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    w = tl.load(weight + q, mask=q < num_weights, other=0.0).to(T)
    d = tl.load(inv_diag + q, mask=q < num_weights, other=1.0).to(T)
    tl.store(out + q, (w * w / (2 * d)).to(out.dtype.element_ty), mask=q < num_weights)


def obs_saliency(weight: Tensor, inv_diag: Tensor, out: Tensor) -> None:
    """The op of this name."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, inv_diag.dtype), out.dtype)
    options = {"T": TYPES[wide], "PIECE": PIECE, "num_warps": 4}
    n = weight.numel()
    launch(_saliency, (triton.cdiv(n, PIECE),), out, weight, inv_diag, n, options=options)


@triton.jit
def _removed(out, weight, inv_diag, mask, num_weights: tl.int64, PIECE: tl.constexpr):
    """x = 1_Q ∘ w / diag F⁻¹."""
    T: tl.constexpr = out.dtype.element_ty
    q = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = q < num_weights
    keep = tl.load(mask + q, mask=inside, other=1) != 0
    w = tl.load(weight + q, mask=inside, other=0.0).to(T)
    d = tl.load(inv_diag + q, mask=inside, other=1.0).to(T)
    tl.store(out + q, tl.where(keep, 0.0, w / d), mask=inside)


@triton.jit
def _apply(weight, step, mask, blocks, failed, num_pieces: tl.int32, PIECE: tl.constexpr):
    """w ← w − step, and 0 where removed, inside the blocks that did not fail."""
    b = (tl.program_id(0) // num_pieces).to(tl.int64)
    start, n = block_range(blocks, b)
    if tl.load(failed + b) == 0:
        for first in range(tl.program_id(0) % num_pieces * PIECE, n, num_pieces * PIECE):
            i = first + tl.arange(0, PIECE)
            keep = tl.load(mask + start + i, mask=i < n, other=1) != 0
            at = weight + start + i
            w = tl.load(at, mask=i < n, other=0.0)
            new = (w - tl.load(step + start + i, mask=i < n, other=0.0)).to(w.dtype)
            tl.store(at, tl.where(keep, new, 0.0), mask=i < n)


def _write(weight: Tensor, step: Tensor, mask: Tensor, blocks: Tensor, failed: Tensor) -> None:
    K = blocks.shape[0]
    mean = triton.cdiv(weight.numel(), K)
    piece = min(PIECE, power_of_two(mean, 16))
    split = pieces(weight.numel(), K, K, piece)
    options = {"PIECE": piece, "num_warps": 1 if piece <= 128 else 4}
    launch(_apply, (K * split,), weight, step, mask, blocks, failed, split, options=options)


def obs_update(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    inv_diag: Tensor,
    mask: Tensor,
) -> None:
    """The op obs_update_."""
    wide = torch.float64 if factor is not None else torch.promote_types(weight.dtype, state.dtype)
    x = torch.empty(weight.numel(), 1, dtype=wide, device=weight.device)
    step = torch.empty_like(x)
    keep = mask.view(torch.uint8)
    n = weight.numel()
    options = {"PIECE": PIECE, "num_warps": 4}
    launch(_removed, (triton.cdiv(n, PIECE),), x, weight, inv_diag, keep, n, options=options)
    block_matvec(state, factor, blocks, damping, x, step)
    none = torch.zeros(blocks.shape[0], dtype=torch.int32, device=weight.device)
    _write(weight, step, keep, blocks, none)


@triton.jit
def _solve_on_chip(
    x, failed, weight, state, blocks, mask, B: tl.constexpr, BP: tl.constexpr, W: tl.constexpr
):
    """x = (F⁻¹[Q, Q])⁻¹ w_Q of one block, 0 outside of Q: kept weights stand for rows and columns of the identity."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.arange(0, BP)
    keep = tl.load(mask + start + i, mask=i < n, other=1) != 0
    both = ~(keep[:, None] | keep[None, :])
    S = tl.load(state + b * B * B + i[:, None] * B + i[None, :], mask=both, other=0.0).to(tl.float64)
    S = tl.where((i[:, None] == i[None, :]) & keep[:, None], 1.0, S)
    S, failures = spd_inverse(S, n, BP, W)
    w = tl.load(weight + start + i, mask=~keep, other=0.0).to(tl.float64)
    inside = both & (i < n)[:, None] & (i < n)[None, :]
    tl.store(x + start + i, tl.sum(tl.where(inside, S, 0.0) * w[None, :], axis=1), mask=i < n)
    tl.store(failed + b, failures)


@triton.jit
def _submatrix(out, state, blocks, mask, B: tl.constexpr, TILE: tl.constexpr):
    """F⁻¹ with the rows and columns of kept weights, and of the padding, replaced by those of the identity."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    start, n = block_range(blocks, b)
    i = pair // tiles * TILE + tl.arange(0, TILE)
    j = pair % tiles * TILE + tl.arange(0, TILE)
    gone_i = tl.load(mask + start + i, mask=i < n, other=1) == 0
    gone_j = tl.load(mask + start + j, mask=j < n, other=1) == 0
    at = b * B * B + i[:, None] * B + j[None, :]
    S = tl.load(state + at, mask=gone_i[:, None] & gone_j[None, :], other=0.0).to(tl.float64)
    S = tl.where((i[:, None] == j[None, :]) & ~gone_i[:, None], 1.0, S)
    tl.store(out + at, S, mask=(i < B)[:, None] & (j < B)[None, :])


@triton.jit
def _gather(out, weight, blocks, mask, B: tl.constexpr, PIECE: tl.constexpr):
    """w_Q of every block, 0 elsewhere, [K, B]."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    for first in range(0, B, PIECE):
        i = first + tl.arange(0, PIECE)
        gone = tl.load(mask + start + i, mask=i < n, other=1) == 0
        w = tl.load(weight + start + i, mask=gone, other=0.0).to(tl.float64)
        tl.store(out + b * B + i, w, mask=i < B)


@triton.jit
def _scatter(out, x, blocks, B: tl.constexpr, PIECE: tl.constexpr):
    """[K, B] back to [d]."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    for first in range(0, B, PIECE):
        i = first + tl.arange(0, PIECE)
        tl.store(out + start + i, tl.load(x + b * B + i, mask=i < n, other=0.0), mask=i < n)


def _multipliers(x: Tensor, weight: Tensor, state: Tensor, blocks: Tensor, keep: Tensor) -> Tensor:
    """x [d] ← (F⁻¹[Q, Q])⁻¹ w_Q, 0 elsewhere; returns how many pivots failed, int32 [K]."""
    K, B = state.shape[:2]
    if fits_on_chip(B, 8):
        failed = torch.empty(K, dtype=torch.int32, device=x.device)
        options = {**tuning.parameters("obs_solve", B, x), "B": B, "BP": power_of_two(B, 16)}
        launch(_solve_on_chip, (K,), x, failed, weight, state, blocks, keep, options=options)
        return failed
    found = []
    for group in block_groups(K, 8 * B * B):
        ranges, part = blocks[group], state[group]
        S = torch.empty(len(ranges), B, B, dtype=torch.float64, device=x.device)
        tiles = triton.cdiv(B, blocked.SQUARE)
        options = {"B": B, "TILE": blocked.SQUARE, "num_warps": 4}
        launch(_submatrix, (len(ranges) * tiles * tiles,), S, part, ranges, keep, options=options)
        found.append(blocked.cholesky(S, 1, B))
        y = torch.empty(len(ranges), B, 1, dtype=torch.float64, device=x.device)
        options = {"B": B, "PIECE": min(PIECE, power_of_two(B)), "num_warps": 4}
        launch(_gather, (len(ranges),), y, weight, ranges, keep, options=options)
        blocked.solve(S, y)
        launch(_scatter, (len(ranges),), x, y, ranges, options=options)
    return torch.cat(found)


def _dual_step(
    step: Tensor, weight: Tensor, grads: Tensor, blocks: Tensor, ridge: float, mask: Tensor
) -> Tensor:
    """step [d, 1] ← −G_Rᵀ (ridge I + G_R G_Rᵀ)⁻¹ (G_Q w_Q); returns how many pivots failed, int32 [K]."""
    k = grads.shape[0]
    removed = torch.where(mask, 0, weight.double())[:, None]  # w_Q, [d, 1]
    found = []
    for group in block_groups(blocks.shape[0], 8 * k * k):
        ranges = blocks[group]
        C = torch.empty(len(ranges), k, k, dtype=torch.float64, device=weight.device)
        capacitance(C, grads, ranges, ridge, keep=mask)
        found.append(blocked.cholesky(C, 1, k))
        y = project(grads, ranges, removed).contiguous()
        blocked.solve(C, y)
        expand(grads, ranges, y, removed, 0.0, -1.0, step)
    return torch.cat(found)


def obs_solve(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    mask: Tensor,
    failed: Tensor,
) -> None:
    """The op obs_solve_."""
    keep = mask.view(torch.uint8)
    step = torch.empty(weight.numel(), 1, dtype=torch.float64, device=weight.device)
    if factor is None:
        x = torch.empty_like(step)
        failures = _multipliers(x, weight, state, blocks, keep)
        primal_product(state, blocks, x, step)
    else:
        failures = _dual_step(step, weight, state, blocks, num_grads * damping, mask)
    # a block that loses nothing cannot fail
    gone = torch.nn.functional.pad((~mask).cumsum(0), (1, 0))  # removed weights before each, [d + 1]
    touched = gone[blocks[:, 1]] > gone[blocks[:, 0]]
    torch.logical_and(failures > 0, touched, out=failed)
    _write(weight, step, keep, blocks, (failed | ~touched).int())
