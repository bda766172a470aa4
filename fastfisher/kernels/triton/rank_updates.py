"""The running inverse: k rank-1 steps, or rank-k steps through the capacitance, with a block on chip where it fits.

Floor: every gradient read once, the state read and written once; 2 k n² multiply-adds rank-1, of which symmetry would
save a quarter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import small, tuning
from fastfisher.kernels.triton.inverse_from_grads import fits_on_chip
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import (
    as_type,
    block_range,
    cholesky_inverse,
    cholesky_inverse_by_panels,
    grads_tile,
    matmul,
    square_root,
)


@triton.jit
def _rank_one_steps(
    f_inv,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    B: tl.constexpr,
    BP: tl.constexpr,
):
    """F ← F − v vᵀ / (m + gᵀv), v = F g, for one gradient after the other."""
    T: tl.constexpr = f_inv.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.arange(0, BP)
    at = f_inv + b * B * B + i[:, None] * B + i[None, :]
    inside = (i < n)[:, None] & (i < n)[None, :]
    F = tl.load(at, mask=inside, other=0.0)
    m = tl.full([], num_grads, T)
    base = grads + start + i
    g = tl.load(base, mask=i < n, other=0.0)
    for row in range(num_rows):
        ahead = tl.load(base + (row + 1) * stride, mask=i < tl.where(row + 1 < num_rows, n, 0), other=0.0)
        g = g.to(T)
        v = tl.sum(F * g[None, :], axis=1)
        # one factor for both sides keeps F symmetric to the bit; NaN where the inverse is not definite
        u = v / square_root(m + tl.sum(v * g))
        F -= u[:, None] * u[None, :]
        g = ahead
    tl.store(at, F, mask=inside)


@triton.jit
def _rank_k_steps(
    f_inv,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    B: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """F ← F − V C⁻¹ Vᵀ, V = F Gᵀ, C = m I + G V, for ROWS gradients at a time."""
    T: tl.constexpr = f_inv.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i, r = tl.arange(0, BP), tl.arange(0, ROWS)
    at = f_inv + b * B * B + i[:, None] * B + i[None, :]
    inside = (i < n)[:, None] & (i < n)[None, :]
    F = tl.load(at, mask=inside, other=0.0)
    failures = 0
    for row in range(0, num_rows, ROWS):
        G = as_type(grads_tile(grads, stride, row, num_rows, start, 0, n, ROWS, BP), T)
        V = matmul(F, tl.trans(G), "ieee")  # [BP, ROWS]
        C = matmul(G, V, "ieee")
        C = tl.where(r[:, None] == r[None, :], C + tl.full([], num_grads, T), C)
        X, failed = cholesky_inverse(C, ROWS)
        failures += failed
        U = matmul(V, tl.trans(X), "ieee")
        F -= matmul(U, tl.trans(U), "ieee")
    tl.store(at, tl.where(failures > 0, float("nan"), F), mask=inside)


@triton.jit
def _products(
    V,
    f_inv,
    grads,
    stride: tl.int64,
    row: tl.int32,
    num_rows: tl.int32,
    blocks,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """V = F Gᵀ of ROWS gradients, one tile of rows, [K, B, ROWS]."""
    T: tl.constexpr = f_inv.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    start, n = block_range(blocks, b)
    total = tl.zeros([TILE, ROWS], T)
    for first in range(0, n, TILE):
        j = first + tl.arange(0, TILE)
        F = tl.load(
            f_inv + b * B * B + i[:, None] * B + j[None, :],
            mask=(i < n)[:, None] & (j < n)[None, :],
            other=0.0,
        )
        G = as_type(grads_tile(grads, stride, row, num_rows, start, first, n, ROWS, TILE), T)
        total += matmul(F, tl.trans(G), "ieee")
    r = tl.arange(0, ROWS)
    tl.store(V + (b * B + i)[:, None] * ROWS + r[None, :], total, mask=(i < B)[:, None])


@triton.jit
def _capacitance(
    out,
    V,
    grads,
    stride: tl.int64,
    row: tl.int32,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    failed,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """L⁻¹ of C = m I + G V = L Lᵀ, [K, ROWS, ROWS]."""
    T: tl.constexpr = V.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    r = tl.arange(0, ROWS)
    C = tl.zeros([ROWS, ROWS], T)
    for first in range(0, n, TILE):
        j = first + tl.arange(0, TILE)
        G = as_type(grads_tile(grads, stride, row, num_rows, start, first, n, ROWS, TILE), T)
        V_j = tl.load(V + (b * B + j)[:, None] * ROWS + r[None, :], mask=(j < n)[:, None], other=0.0)
        C += matmul(G, V_j, "ieee")
    C = tl.where(r[:, None] == r[None, :], C + tl.full([], num_grads, T), C)
    X, failures = cholesky_inverse_by_panels(C, ROWS, ROWS, 16)
    tl.store(failed + b, tl.load(failed + b) + failures)
    tl.store(out + b * ROWS * ROWS + r[:, None] * ROWS + r[None, :], X)


@triton.jit
def _scale(V, inverses, B: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """V ← V L⁻ᵀ, one tile of rows."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    X = tl.load(inverses + b * ROWS * ROWS + r[:, None] * ROWS + r[None, :])
    at = V + (b * B + i)[:, None] * ROWS + r[None, :]
    inside = (i < B)[:, None]
    tl.store(at, matmul(tl.load(at, mask=inside, other=0.0), tl.trans(X), "ieee"), mask=inside)


@triton.jit
def _downdate(f_inv, V, blocks, failed, B: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """F ← F − V Vᵀ in one tile and its mirror image; NaN where the capacitance was not definite."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    _, n = block_range(blocks, b)
    i = pair // tiles * TILE + tl.arange(0, TILE)
    j = pair % tiles * TILE + tl.arange(0, TILE)
    if pair % tiles <= pair // tiles:
        r = tl.arange(0, ROWS)
        V_i = tl.load(V + (b * B + i)[:, None] * ROWS + r[None, :], mask=(i < n)[:, None], other=0.0)
        V_j = tl.load(V + (b * B + j)[:, None] * ROWS + r[None, :], mask=(j < n)[:, None], other=0.0)
        inside = (i < n)[:, None] & (j < n)[None, :]
        at = f_inv + b * B * B + i[:, None] * B + j[None, :]
        F = tl.load(at, mask=inside, other=0.0) - matmul(V_i, tl.trans(V_j), "ieee")
        F = tl.where(tl.load(failed + b) > 0, float("nan"), F)
        tl.store(at, F, mask=inside)
        tl.store(f_inv + b * B * B + j[:, None] * B + i[None, :], tl.trans(F), mask=tl.trans(inside))


def _in_memory(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Rank-k steps on blocks that do not fit on a chip: four launches a chunk of gradients."""
    K, B = f_inv.shape[:2]
    options = {**tuning.parameters("rank_updates", B, f_inv), "B": B}
    rows = options["ROWS"] = min(options["ROWS"], power_of_two(grads.shape[0], 16))
    tiles = triton.cdiv(B, options["TILE"])
    V = torch.empty(K, B, rows, dtype=f_inv.dtype, device=f_inv.device)
    inverses = torch.empty(K, rows, rows, dtype=f_inv.dtype, device=f_inv.device)
    failed = torch.zeros(K, dtype=torch.int32, device=f_inv.device)
    k, stride = grads.shape[0], grads.stride(0)
    for row in range(0, k, rows):
        piece = (grads, stride, row, k, blocks)
        launch(_products, (K * tiles,), V, f_inv, *piece, options=options)
        launch(_capacitance, (K,), inverses, V, *piece, num_grads, failed, options=options)
        launch(_scale, (K * tiles,), V, inverses, options=options)
        launch(_downdate, (K * tiles * tiles,), f_inv, V, blocks, failed, options=options)


def sherman_morrison(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """The op sherman_morrison_; blocks that do not fit on a chip take the same steps many at a time."""
    K, B = f_inv.shape[:2]
    if B <= small.LARGEST:
        return small.rank_one_steps(f_inv, grads, blocks, num_grads)
    if not fits_on_chip(B, f_inv.itemsize):
        return _in_memory(f_inv, grads, blocks, num_grads)
    options = {**tuning.parameters("sherman_morrison", B, f_inv), "B": B, "BP": power_of_two(B, 16)}
    args = (f_inv, grads, grads.stride(0), grads.shape[0], blocks, num_grads)
    return launch(_rank_one_steps, (K,), *args, options=options)


def woodbury(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """The op woodbury_; all k gradients at once or some after the others is the same to rounding."""
    K, B = f_inv.shape[:2]
    if B <= small.LARGEST:
        return small.rank_one_steps(f_inv, grads, blocks, num_grads)
    if B > 64:
        return _in_memory(f_inv, grads, blocks, num_grads)
    options = {**tuning.parameters("woodbury", B, f_inv), "B": B, "BP": power_of_two(B, 16)}
    args = (f_inv, grads, grads.stride(0), grads.shape[0], blocks, num_grads)
    return launch(_rank_k_steps, (K,), *args, options=options)
