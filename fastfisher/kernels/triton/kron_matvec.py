"""D∘(T (D∘x) S) of every tile: two products through memory, the scale applied where x is read and the result written.

Floor: factors, scale and x read once, the result written once; o i (o + i) multiply-adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import launch
from fastfisher.kernels.triton.tiles import matmul


@triton.jit
def _load(matrix, first_row, first_column, rows, columns, TILE: tl.constexpr):
    """[TILE, TILE] of a matrix [rows, columns], zeros outside."""
    r, c = first_row + tl.arange(0, TILE), first_column + tl.arange(0, TILE)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    return tl.load(matrix + r[:, None].to(tl.int64) * columns + c[None, :], mask=inside, other=0.0)


@triton.jit
def _multiply(
    out,
    x,
    factor,
    scale,
    num_tiles: tl.int32,
    o: tl.int32,
    i: tl.int32,
    LEFT: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of T (D∘x), or without LEFT of D∘(x S)."""
    T: tl.constexpr = out.dtype.element_ty
    down, across = tl.cdiv(o, TILE), tl.cdiv(i, TILE)
    column = tl.program_id(0) % across * TILE
    row = tl.program_id(0) // across % down * TILE
    matrix = (tl.program_id(0) // (across * down)).to(tl.int64)
    t = matrix % num_tiles
    x += matrix * o * i
    scale += t * o * i
    total = tl.zeros([TILE, TILE], T)
    if LEFT:
        factor += t * o * o
        for first in range(0, o, TILE):
            inner = _load(x, first, column, o, i, TILE) * _load(scale, first, column, o, i, TILE)
            total += matmul(_load(factor, row, first, o, o, TILE), inner, PRECISION)
    else:
        factor += t * i * i
        for first in range(0, i, TILE):
            inner = _load(x, row, first, o, i, TILE)
            total += matmul(inner, _load(factor, first, column, i, i, TILE), PRECISION)
        total *= _load(scale, row, column, o, i, TILE)
    r, c = row + tl.arange(0, TILE), column + tl.arange(0, TILE)
    at = out + matrix * o * i + r[:, None].to(tl.int64) * i + c[None, :]
    tl.store(at, total, mask=(r < o)[:, None] & (c < i)[None, :])


def kron_matvec(left: Tensor, right: Tensor, scale: Tensor, x: Tensor, out: Tensor) -> None:
    """The op of this name."""
    columns, N, o, i = x.shape
    options = tuning.parameters("kron_matvec", max(o, i), x)
    grid = (columns * N * triton.cdiv(o, options["TILE"]) * triton.cdiv(i, options["TILE"]),)
    inner = torch.empty_like(out)
    launch(_multiply, grid, inner, x, left, scale, N, o, i, options={**options, "LEFT": True})
    launch(_multiply, grid, out, inner, right, scale, N, o, i, options={**options, "LEFT": False})
