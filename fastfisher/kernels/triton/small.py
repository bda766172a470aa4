"""Blocks of up to 16 weights: several to a program, with every entry of every block in its own register.

A matrix unit would multiply mostly padding here, and a program for each block would leave most of its threads idle.
Gradients are taken one at a time; NB blocks of a program lie beside each other, so that a row is read in one piece.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import finite_or_inf, square_root, usable

LARGEST = 16


@triton.jit
def _ranges(blocks, num_blocks, NB: tl.constexpr):
    """Of the NB blocks of this program: index, start and length, 0 for those that do not exist."""
    b = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    start = tl.load(blocks + 2 * b, mask=b < num_blocks, other=0)
    stop = tl.load(blocks + 2 * b + 1, mask=b < num_blocks, other=0)
    return b, start, (stop - start).to(tl.int32)


@triton.jit
def _gradient(grads, row, stride, start, n, T: tl.constexpr, BP: tl.constexpr):
    """One gradient of NB blocks, twice: down the rows [NB, BP, 1] and across the columns [NB, 1, BP]."""
    i = tl.arange(0, BP)
    at = grads + row * stride + start[:, None] + i[None, :]
    within = i[None, :] < n[:, None]
    down = tl.load(at[:, :, None], mask=within[:, :, None], other=0.0).to(T)
    across = tl.load(at[:, None, :], mask=within[:, None, :], other=0.0).to(T)
    return down, across


@triton.jit
def _addresses(state, b, B, BP: tl.constexpr):
    """Where the entries [NB, BP, BP] of the blocks stand in a state [K, B, B]."""
    i = tl.arange(0, BP)
    return state + (b * B * B)[:, None, None] + i[None, :, None] * B + i[None, None, :]


@triton.jit
def _gram(grads, stride, num_rows, start, n, scale, T: tl.constexpr, NB: tl.constexpr, BP: tl.constexpr):
    """scale GᵀG, [NB, BP, BP]."""
    F = tl.zeros([NB, BP, BP], T)
    for row in range(num_rows):
        down, across = _gradient(grads, row, stride, start, n, T, BP)
        F += down * across
    return F * scale


@triton.jit
def _invert(M, n, damping, NB: tl.constexpr, BP: tl.constexpr):
    """As tiles.invert, for NB matrices [NB, BP, BP] of length n [NB]; pivot after pivot."""
    i = tl.arange(0, BP)
    within = i[None, :] < n[:, None]  # [NB, BP]
    inside = within[:, :, None] & within[:, None, :]
    diagonal = (i[:, None] == i[None, :])[None, :, :]
    M = tl.where(inside, M, 0.0)
    f = tl.sum(tl.where(diagonal, M, 0.0), axis=2)  # [NB, BP]
    ridge = tl.full([NB, BP], damping, tl.float64).to(M.dtype)
    root = square_root(f + ridge)
    F = tl.where(diagonal, M + tl.where(within, ridge, 1.0)[:, :, None], M)
    A = tl.where(inside, F / root[:, :, None] / root[:, None, :], 0.0)
    norm = tl.sum(tl.sum(A * A, axis=2), axis=1)  # [NB]
    failures = tl.zeros([NB], tl.int32)
    for j in range(BP):
        at_row, at_column = (i == j)[None, :, None], (i == j)[None, None, :]
        column = tl.sum(tl.where(at_column, F, 0.0), axis=2)  # [NB, BP]
        row = tl.sum(tl.where(at_row, F, 0.0), axis=1)
        pivot = tl.sum(tl.where((i == j)[None, :], column, 0.0), axis=1)  # [NB]
        failures += tl.where(usable(pivot), 0, 1)
        root_pivot = square_root(pivot)[:, None]
        # one factor for both sides keeps both triangles equal to the bit
        F -= (column / root_pivot)[:, :, None] * (row / root_pivot)[:, None, :]
        F = tl.where(at_column, (column / pivot[:, None])[:, :, None], F)
        F = tl.where(at_row, (row / pivot[:, None])[:, None, :], F)
        F = tl.where(at_row & at_column, -1.0 / pivot[:, None, None], F)
    F = tl.where(inside, -F, 0.0)
    A = F * root[:, :, None] * root[:, None, :]
    columns = F * square_root(f)[:, None, :]
    condition = square_root(norm * tl.sum(tl.sum(A * A, axis=2), axis=1))
    squares = tl.sum(tl.sum(columns * columns, axis=2), axis=1)
    amplification = square_root(norm * squares) * square_root(tl.max(f, axis=1))
    failed = failures > 0
    condition = tl.where(failed, float("inf"), finite_or_inf(condition))
    amplification = tl.where(failed, float("inf"), finite_or_inf(amplification))
    return tl.where(failed[:, None, None], float("nan"), F), condition, amplification


@triton.jit
def _build(
    out,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_blocks: tl.int32,
    num_grads: tl.int32,
    damping: tl.float64,
    condition,
    amplification,
    B: tl.constexpr,
    DIAGONAL: tl.constexpr,
    NB: tl.constexpr,
    BP: tl.constexpr,
):
    T: tl.constexpr = out.dtype.element_ty
    b, start, n = _ranges(blocks, num_blocks, NB)
    M = _gram(grads, stride, num_rows, start, n, 1.0 / tl.full([], num_grads, T), T, NB, BP)
    F, found, amplified = _invert(M, n, damping, NB, BP)
    tl.store(condition + b, found, mask=b < num_blocks)
    tl.store(amplification + b, amplified, mask=b < num_blocks)
    i = tl.arange(0, BP)
    if DIAGONAL:
        inv_diag = tl.sum(tl.where((i[:, None] == i[None, :])[None, :, :], F, 0.0), axis=2)
        tl.store(out + start[:, None] + i[None, :], inv_diag, mask=i[None, :] < n[:, None])
    else:
        within = i[None, :] < n[:, None]
        keep = (within[:, :, None] & within[:, None, :]) | (found == float("inf"))[:, None, None]
        ridge = 1.0 / tl.full([NB, BP, BP], damping, tl.float64).to(T)
        F = tl.where(keep, F, tl.where((i[:, None] == i[None, :])[None, :, :], ridge, 0.0))
        inside = (b < num_blocks)[:, None, None] & (i < B)[None, :, None] & (i < B)[None, None, :]
        tl.store(_addresses(out, b, B, BP), F, mask=inside)


@triton.jit
def _invert_in_place(
    matrix,
    num_blocks: tl.int32,
    damping: tl.float64,
    condition,
    amplification,
    B: tl.constexpr,
    NB: tl.constexpr,
    BP: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    i = tl.arange(0, BP)
    base = matrix + (b * B * B)[:, None, None]
    row, column = i[None, :, None], i[None, None, :]
    inside = (b < num_blocks)[:, None, None] & (row < B) & (column < B)
    lower = base + tl.maximum(row, column) * B + tl.minimum(row, column)
    n = tl.where(b < num_blocks, B, 0)
    F, found, amplified = _invert(tl.load(lower, mask=inside, other=0.0), n, damping, NB, BP)
    tl.store(condition + b, found, mask=b < num_blocks)
    tl.store(amplification + b, amplified, mask=b < num_blocks)
    tl.store(_addresses(matrix, b, B, BP), F, mask=inside)


@triton.jit
def _accumulate(
    fisher,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_blocks: tl.int32,
    num_grads: tl.int32,
    B: tl.constexpr,
    NB: tl.constexpr,
    BP: tl.constexpr,
):
    T: tl.constexpr = fisher.dtype.element_ty
    b, start, n = _ranges(blocks, num_blocks, NB)
    F = _gram(grads, stride, num_rows, start, n, 1.0 / tl.full([], num_grads, T), T, NB, BP)
    i = tl.arange(0, BP)
    inside = (i[:, None] >= i[None, :])[None, :, :] & (i[None, :] < n[:, None])[:, :, None]
    at = _addresses(fisher, b, B, BP)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + F, mask=inside)


@triton.jit
def _rank_one_steps(
    f_inv,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_blocks: tl.int32,
    num_grads: tl.int32,
    B: tl.constexpr,
    NB: tl.constexpr,
    BP: tl.constexpr,
):
    T: tl.constexpr = f_inv.dtype.element_ty
    b, start, n = _ranges(blocks, num_blocks, NB)
    i = tl.arange(0, BP)
    within = i[None, :] < n[:, None]
    inside = within[:, :, None] & within[:, None, :]
    at = _addresses(f_inv, b, B, BP)
    F = tl.load(at, mask=inside, other=0.0)
    m = tl.full([], num_grads, T)
    for row in range(num_rows):
        down, across = _gradient(grads, row, stride, start, n, T, BP)
        v = tl.sum(F * across, axis=2)  # [NB, BP], and the same as the product with the columns
        v_across = tl.sum(F * down, axis=1)
        denominator = m + tl.sum(tl.sum(down * v[:, :, None], axis=2), axis=1)  # [NB]
        root = square_root(denominator)[:, None]  # NaN where the inverse is not definite
        F -= (v / root)[:, :, None] * (v_across / root)[:, None, :]
    tl.store(at, F, mask=inside)


def _options(block_size: int, tensor: Tensor) -> dict[str, object]:
    options = tuning.parameters("small", block_size, tensor)
    BP = power_of_two(block_size)
    NB = min(512, options.pop("ENTRIES") // (BP * BP))
    return {**options, "B": block_size, "NB": NB, "BP": BP}


def _grid(num_blocks: int, options: dict[str, object]) -> tuple[int]:
    return (triton.cdiv(num_blocks, options["NB"]),)


def build(
    out: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
    *,
    diagonal: bool,
) -> None:
    """inverse_from_grads, or with `diagonal` inverse_diagonal_from_grads."""
    options = {**_options(block_size, out), "DIAGONAL": diagonal}
    k, K = grads.shape[0], blocks.shape[0]
    args = (out, grads, grads.stride(0), k, blocks, K, num_grads, damping, condition, amplification)
    launch(_build, _grid(K, options), *args, options=options)


def invert(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    """spd_inverse_."""
    K, B = matrix.shape[:2]
    options = _options(B, matrix)
    launch(_invert_in_place, _grid(K, options), matrix, K, damping, condition, amplification, options=options)


def accumulate(fisher: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """fisher_accumulate_."""
    K, B = fisher.shape[:2]
    options = _options(B, fisher)
    args = (fisher, grads, grads.stride(0), grads.shape[0], blocks, K, num_grads)
    launch(_accumulate, _grid(K, options), *args, options=options)


def rank_one_steps(f_inv: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """sherman_morrison_, and woodbury_, which is the same to rounding; NaN where a step has no inverse."""
    K, B = f_inv.shape[:2]
    options = _options(B, f_inv)
    args = (f_inv, grads, grads.stride(0), grads.shape[0], blocks, K, num_grads)
    launch(_rank_one_steps, _grid(K, options), *args, options=options)
