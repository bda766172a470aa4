"""F ← F + GᵀG / m in the lower triangles: one program a tile, which sums it on chip and adds it to memory once.

Floor: every gradient read once, a triangle of the state read and written once; m n² / 2 multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import small, tuning
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import as_operand, block_range, grads_tile, matmul


@triton.jit
def _accumulate(
    fisher,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = fisher.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    row0, column0 = pair // tiles * TILE, pair % tiles * TILE
    start, n = block_range(blocks, b)
    if (column0 <= row0) & (row0 < n):
        scale = 1.0 / tl.full([], num_grads, T)
        F = tl.zeros([TILE, TILE], T)
        for row in range(0, num_rows, ROWS):  # in short sums, see inverse_from_grads
            right = as_operand(grads_tile(grads, stride, row, num_rows, start, column0, n, ROWS, TILE), T)
            left = as_operand(grads_tile(grads, stride, row, num_rows, start, row0, n, ROWS, TILE), T)
            F += matmul(tl.trans(left), right, PRECISION) * scale
        i, j = row0 + tl.arange(0, TILE), column0 + tl.arange(0, TILE)
        inside = (i < n)[:, None] & (i[:, None] >= j[None, :])
        at = fisher + b * B * B + i[:, None] * B + j[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + F, mask=inside)


def fisher_accumulate(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """The op fisher_accumulate_."""
    K, B = fisher.shape[:2]
    if B <= small.LARGEST:
        return small.accumulate(fisher, grads, blocks, num_grads)
    options = {**tuning.parameters("fisher_accumulate", B, fisher), "B": B}
    options["TILE"] = min(options["TILE"], power_of_two(B, 16))
    tiles = triton.cdiv(B, options["TILE"])
    args = (fisher, grads, grads.stride(0), grads.shape[0], blocks, num_grads)
    return launch(_accumulate, (K * tiles * tiles,), *args, options=options)
