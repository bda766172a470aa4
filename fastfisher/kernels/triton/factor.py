"""An inverse kept as R Rᵀ: its diagonal, its product with vectors, and the removal of weights from it.

R is read from memory once, in pieces of LINES rows; the second pass of R (Rᵀ x) finds a block in the nearest cache.
A removal takes v out of all rows, v the removed row at length one, in float64 and in memory of its own, which stays in
the cache of the program that works on a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import TYPES, block_groups, launch, power_of_two
from fastfisher.kernels.triton.tiles import block_range
from fastfisher.ops.factor_downdate import DEPENDENT


@triton.jit
def _lines(matrix, first, n, B: tl.constexpr, BP: tl.constexpr, LINES: tl.constexpr):
    """Addresses of LINES rows [LINES, BP] of a block, and which of them lie in [:n, :n]."""
    r, i = first + tl.arange(0, LINES), tl.arange(0, BP)
    return matrix + r[:, None] * B + i[None, :], (r < n)[:, None] & (i < n)[None, :]


@triton.jit
def _diagonal(out, root, blocks, B: tl.constexpr, BP: tl.constexpr, LINES: tl.constexpr, T: tl.constexpr):
    pieces: tl.constexpr = (B + LINES - 1) // LINES
    b = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * LINES
    start, n = block_range(blocks, b)
    at, inside = _lines(root + b * B * B, first, n, B, BP, LINES)
    R = tl.load(at, mask=inside, other=0.0).to(T)
    r = first + tl.arange(0, LINES)
    tl.store(out + start + r, tl.sum(R * R, axis=1).to(out.dtype.element_ty), mask=r < n)


def _piece(root: Tensor) -> dict[str, int]:
    """How a block is cut into rows."""
    B = root.shape[1]
    options = tuning.parameters("factor", B, root)
    BP = power_of_two(B)
    lines = min(BP, max(1, options.pop("ENTRIES") // BP))
    return {**options, "B": B, "BP": BP, "LINES": lines}


def factor_diagonal(root: Tensor, blocks: Tensor, out: Tensor) -> None:
    """The op of this name."""
    options = _piece(root)
    grid = (len(root) * triton.cdiv(root.shape[1], options["LINES"]),)
    wide = TYPES[torch.promote_types(root.dtype, out.dtype)]
    launch(_diagonal, grid, out, root, blocks, options={**options, "T": wide})


@triton.jit
def _product(
    out,
    x,
    num_columns: tl.int32,
    root,
    blocks,
    B: tl.constexpr,
    BP: tl.constexpr,
    LINES: tl.constexpr,
    T: tl.constexpr,
):
    """R (Rᵀ x) of one block and one column."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    start, n = block_range(blocks, b)
    y = tl.zeros([BP], T)
    for first in range(0, n, LINES):
        at, inside = _lines(root + b * B * B, first, n, B, BP, LINES)
        r = first + tl.arange(0, LINES)
        x_r = tl.load(x + (start + r) * num_columns + column, mask=r < n, other=0.0).to(T)
        y += tl.sum(tl.load(at, mask=inside, other=0.0).to(T) * x_r[:, None], axis=0)
    for first in range(0, n, LINES):
        at, inside = _lines(root + b * B * B, first, n, B, BP, LINES)
        r = first + tl.arange(0, LINES)
        found = tl.sum(tl.load(at, mask=inside, other=0.0).to(T) * y[None, :], axis=1)
        tl.store(out + (start + r) * num_columns + column, found.to(out.dtype.element_ty), mask=r < n)


def block_factor_matvec(root: Tensor, blocks: Tensor, x: Tensor, out: Tensor) -> None:
    """The op of this name."""
    wide = TYPES[torch.promote_types(root.dtype, x.dtype)]
    grid = (len(root), x.shape[1])
    launch(_product, grid, out, x, x.shape[1], root, blocks, options={**_piece(root), "T": wide})


@triton.jit
def _downdate(
    root,
    wide,
    blocks,
    mask,
    least: tl.float64,
    B: tl.constexpr,
    BP: tl.constexpr,
    LINES: tl.constexpr,
):
    """R ← R (I − V Vᵀ) of one block; wide: float64 [K, B, B] to work in."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    root += b * B * B
    wide += b * B * B
    i = tl.arange(0, BP)
    keeps = tl.load(mask + start + i, mask=i < n, other=1)
    if tl.min(keeps.to(tl.int32)) == 0:
        for first in range(0, n, LINES):
            at, inside = _lines(root, first, n, B, BP, LINES)
            copy, _ = _lines(wide, first, n, B, BP, LINES)
            tl.store(copy, tl.load(at, mask=inside, other=0.0).to(tl.float64), mask=inside)
        tl.debug_barrier()
        for q in range(n):
            if tl.load(mask + start + q).to(tl.int32) == 0:
                v = tl.load(wide + q * B + i, mask=i < n, other=0.0, volatile=True)
                row = tl.load(root + q * B + i, mask=i < n, other=0.0).to(tl.float64)
                norm = tl.sqrt(tl.sum(v * v))
                tl.debug_barrier()  # the row is read before it is written
                if norm > least * tl.sqrt(tl.sum(row * row)):
                    v = v / norm
                    for first in range(0, n, LINES):
                        at, inside = _lines(wide, first, n, B, BP, LINES)
                        R = tl.load(at, mask=inside, other=0.0, volatile=True)
                        tl.store(at, R - tl.sum(R * v[None, :], axis=1)[:, None] * v[None, :], mask=inside)
                    tl.debug_barrier()
        for first in range(0, n, LINES):
            at, inside = _lines(wide, first, n, B, BP, LINES)
            r = first + tl.arange(0, LINES)
            keep = tl.load(mask + start + r, mask=r < n, other=1).to(tl.int32) != 0
            R = tl.load(at, mask=inside, other=0.0, volatile=True)
            to, _ = _lines(root, first, n, B, BP, LINES)
            tl.store(to, tl.where(keep[:, None], R, 0.0).to(root.dtype.element_ty), mask=inside)


def factor_downdate(root: Tensor, blocks: Tensor, mask: Tensor) -> None:
    """The op factor_downdate_."""
    B = root.shape[1]
    options = _piece(root)
    least = DEPENDENT * torch.finfo(root.dtype).eps
    for group in block_groups(len(root), 8 * B * B):
        R = root[group]
        wide = torch.empty(R.shape, dtype=torch.float64, device=root.device)
        launch(_downdate, (len(R),), R, wide, blocks[group], mask, least, options=options)
