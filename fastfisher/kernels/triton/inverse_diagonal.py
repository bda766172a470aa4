"""diag F⁻¹: read from a stored inverse, or from the dual form as (1 − Σᵢ Vᵢ²) / λ with V = L⁻¹ G, L Lᵀ the capacitance.

Dual: L⁻¹ of a group of blocks is formed in scratch memory, so that V is a product of tiles for the matrix units, in
float64, and never leaves the chip.  Floor: every gradient and half a factor read once, k² / 2 multiply-adds a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, tuning
from fastfisher.kernels.triton.launch import launch, pieces, power_of_two
from fastfisher.kernels.triton.tiles import as_float64, block_range, grads_tile, matmul

SCRATCH_BYTES = 256 << 20  # for the inverse factors of a group of blocks


@triton.jit
def _primal(out, state, blocks, B: tl.constexpr, COLUMNS: tl.constexpr):
    tiles: tl.constexpr = (B + COLUMNS - 1) // COLUMNS
    b = (tl.program_id(0) // tiles).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(state + b * B * B + i.to(tl.int64) * (B + 1), mask=i < n, other=0.0)
    tl.store(out + start + i, x, mask=i < n)


def primal_diagonal(state: Tensor, blocks: Tensor, out: Tensor) -> None:
    """The diagonals of a stored inverse [K, B, B], into out [d]."""
    K, B = state.shape[:2]
    columns = min(1024, power_of_two(B))
    options = {"B": B, "COLUMNS": columns, "num_warps": 1 if columns <= 128 else 4}
    launch(_primal, (K * triton.cdiv(B, columns),), out, state, blocks, options=options)


@triton.jit
def _dual(
    out,
    inverse,
    grads,
    stride: tl.int64,
    k: tl.int32,
    blocks,
    damping: tl.float64,
    num_pieces: tl.int32,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns of a block, piece by piece: V of all rows, tile after tile, down to its sums of squares."""
    b = (tl.program_id(0) // num_pieces).to(tl.int64)
    start, n = block_range(blocks, b)
    i, c = tl.arange(0, TILE), tl.arange(0, COLUMNS)
    X = inverse + b * k * k
    for column in range(tl.program_id(0) % num_pieces * COLUMNS, n, num_pieces * COLUMNS):
        squares = tl.zeros([COLUMNS], tl.float64)
        for row0 in range(0, k, TILE):
            V = tl.zeros([TILE, COLUMNS], tl.float64)
            for M in range(0, row0 + TILE, TILE):
                lower = (row0 + i < k)[:, None] & (row0 + i[:, None] >= M + i[None, :])
                left = tl.load(X + (row0 + i)[:, None] * k + M + i[None, :], mask=lower, other=0.0)
                G = as_float64(grads_tile(grads, stride, M, k, start, column, n, TILE, COLUMNS))
                V += matmul(left, G, "ieee")
            squares += tl.sum(V * V, axis=0)
        inv_diag = (1.0 - squares) / damping
        at = out + start + column + c
        tl.store(at, inv_diag.to(out.dtype.element_ty), mask=column + c < n)


def inverse_diagonal(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, out: Tensor
) -> None:
    """The op of this name."""
    if factor is None:
        return primal_diagonal(state, blocks, out)
    K, k = factor.shape[:2]
    at_once = max(1, min(K, SCRATCH_BYTES // (8 * k * k)))
    scratch = torch.empty(at_once, k, k, dtype=torch.float64, device=state.device)
    options = tuning.parameters("inverse_diagonal", k, factor)
    options["TILE"] = min(options["TILE"], power_of_two(k, 16))
    for first in range(0, K, at_once):
        last = min(first + at_once, K)
        blocked.factor_inverse(factor[first:last], scratch)
        split = pieces(out.numel(), K, last - first, options["COLUMNS"])
        args = (out, scratch, state, state.stride(0), k, blocks[first:last], damping, split)
        launch(_dual, ((last - first) * split,), *args, options=options)
    return None
