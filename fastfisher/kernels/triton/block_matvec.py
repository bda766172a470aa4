"""Products of every block with vectors: F⁻¹ x from either state, and F x from the gradients.

Primal: rows of the state against x, one pass.  Dual and F: p = G x in float64, something small with p, then Gᵀ p: two
passes over the gradients.  Floor: the state, or the gradients twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, tuning
from fastfisher.kernels.triton.launch import TYPES, launch, pieces, power_of_two
from fastfisher.kernels.triton.tiles import block_range, grads_tile


@triton.jit
def _primal(
    out,
    x,
    num_columns: tl.int32,
    state,
    blocks,
    num_rows: tl.int32,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
):
    """ROWS rows of the state, counted through all blocks, times one column of x, summed in T."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    local = (first_row % B).to(tl.int32) + tl.arange(
        0, ROWS
    )  # rows counted from the first block of this program
    column = tl.program_id(1)
    b, i = first_row // B + local // B, local % B
    r = first_row + tl.arange(0, ROWS)
    start = tl.load(blocks + 2 * b, mask=r < num_rows, other=0)
    n = tl.load(blocks + 2 * b + 1, mask=r < num_rows, other=0) - start
    total = tl.zeros([ROWS, COLUMNS], T)
    for first in range(0, B, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        inside = (i < n)[:, None] & (j[None, :] < n[:, None])
        F_inv = tl.load(state + (r * B)[:, None] + j[None, :], mask=inside, other=0.0)
        x_j = tl.load(x + (start[:, None] + j[None, :]) * num_columns + column, mask=inside, other=0.0)
        total += F_inv.to(T) * x_j.to(T)
    y = tl.sum(total, axis=1)
    tl.store(out + (start + i) * num_columns + column, y.to(out.dtype.element_ty), mask=i < n)


def primal_product(state: Tensor, blocks: Tensor, x: Tensor, out: Tensor) -> None:
    """out [d, n] ← F⁻¹ x from a stored inverse [K, B, B], summed in the wider dtype of state and x."""
    K, B = state.shape[:2]
    wide = torch.promote_types(state.dtype, x.dtype)
    options = tuning.parameters("block_matvec", B, state)
    options["COLUMNS"] = min(options["COLUMNS"], power_of_two(B))
    options["ROWS"] = max(1, options.pop("ENTRIES") // options["COLUMNS"])
    grid = (triton.cdiv(K * B, options["ROWS"]), x.shape[1])
    args = (out, x, x.shape[1], state, blocks, K * B)
    launch(_primal, grid, *args, options={**options, "B": B, "T": TYPES[wide]})


@triton.jit
def _project(
    out,
    x,
    num_columns: tl.int32,
    grads,
    stride: tl.int64,
    k: tl.int32,
    blocks,
    num_pieces: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pieces of G x of one block and ROWS gradients: out [K, pieces, k, n]."""
    groups = tl.cdiv(k, ROWS)
    piece = tl.program_id(0) % num_pieces
    row = tl.program_id(0) // num_pieces % groups * ROWS
    b = (tl.program_id(0) // (num_pieces * groups)).to(tl.int64)
    column = tl.program_id(1)
    start, n = block_range(blocks, b)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(piece * COLUMNS, n, num_pieces * COLUMNS):
        G = grads_tile(grads, stride, row, k, start, first, n, ROWS, COLUMNS).to(tl.float64)
        j = first + tl.arange(0, COLUMNS)
        x_j = tl.load(x + (start + j) * num_columns + column, mask=j < n, other=0.0).to(tl.float64)
        total += G * x_j[None, :]
    a = row + tl.arange(0, ROWS)
    at = out + ((b * num_pieces + piece) * k + a) * num_columns + column
    tl.store(at, tl.sum(total, axis=1), mask=a < k)


def project(grads: Tensor, blocks: Tensor, x: Tensor) -> Tensor:
    """G x of every block, float64 [K, k, n].   grads: [k, d].   x: [d, n]."""
    K, k, columns = blocks.shape[0], grads.shape[0], x.shape[1]
    options = tuning.parameters("project", k, grads)
    options["ROWS"] = min(options["ROWS"], power_of_two(k))
    groups = triton.cdiv(k, options["ROWS"])
    split = pieces(x.shape[0], K, K * groups, options["COLUMNS"])
    out = torch.empty(K, split, k, columns, dtype=torch.float64, device=x.device)
    args = (out, x, columns, grads, grads.stride(0), k, blocks, split)
    launch(_project, (K * groups * split, columns), *args, options=options)
    return out.sum(dim=1) if split > 1 else out[:, 0]


@triton.jit
def _expand(
    out,
    x,
    num_columns: tl.int32,
    coefficients,
    grads,
    stride: tl.int64,
    k: tl.int32,
    blocks,
    alpha: tl.float64,
    beta: tl.float64,
    num_pieces: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out ← alpha x + beta Gᵀ y inside the blocks, y = coefficients [K, k, n]."""
    b = (tl.program_id(0) // num_pieces).to(tl.int64)
    column = tl.program_id(1)
    start, n = block_range(blocks, b)
    for first in range(tl.program_id(0) % num_pieces * COLUMNS, n, num_pieces * COLUMNS):
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for row in range(0, k, ROWS):
            a = row + tl.arange(0, ROWS)
            G = grads_tile(grads, stride, row, k, start, first, n, ROWS, COLUMNS).to(tl.float64)
            y = tl.load(coefficients + (b * k + a) * num_columns + column, mask=a < k, other=0.0)
            total += G * y[:, None]
        j = first + tl.arange(0, COLUMNS)
        at = (start + j) * num_columns + column
        x_j = tl.load(x + at, mask=j < n, other=0.0).to(tl.float64)
        result = alpha * x_j + beta * tl.sum(total, axis=0)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=j < n)


def expand(
    grads: Tensor, blocks: Tensor, coefficients: Tensor, x: Tensor, alpha: float, beta: float, out: Tensor
) -> None:
    """out [d, n] ← alpha x + beta Gᵀ y, summed in float64.   coefficients: y, float64 [K, k, n], contiguous."""
    K, k, columns = coefficients.shape
    options = tuning.parameters("expand", k, grads)
    options["ROWS"] = min(options["ROWS"], power_of_two(k))
    split = pieces(x.shape[0], K, K, options["COLUMNS"])
    args = (out, x, columns, coefficients, grads, grads.stride(0), k, blocks, alpha, beta, split)
    launch(_expand, (K * split, columns), *args, options=options)


def block_matvec(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, x: Tensor, out: Tensor
) -> None:
    """The op of this name."""
    if factor is None:
        return primal_product(state, blocks, x, out)
    y = project(state, blocks, x).contiguous()
    blocked.solve(factor, y)
    return expand(state, blocks, y, x, 1 / damping, -1 / damping, out)


def fisher_vector_product(grads: Tensor, blocks: Tensor, num_grads: int, x: Tensor, out: Tensor) -> None:
    """The op of this name."""
    y = project(grads, blocks, x).contiguous()
    expand(grads, blocks, y, x, 0.0, 1 / num_grads, out)
