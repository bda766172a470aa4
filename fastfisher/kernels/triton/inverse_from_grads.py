"""The fused build: from gradients to the inverse, or to its diagonal, with the Fisher of a block held on chip.

One program a block: it streams the gradients of its block past the Gram matrix, inverts it where it lies, and writes
the result once.  Floor: every gradient read once, the state written once.  Blocks that do not fit on a chip are summed
in the memory of the result and inverted there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, small, tuning
from fastfisher.kernels.triton.fisher_accumulate import fisher_accumulate
from fastfisher.kernels.triton.inverse_diagonal import primal_diagonal
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import as_operand, block_range, grads_tile, invert, matmul

SCRATCH_BYTES = 256 << 20  # for blocks on the way to their diagonal


def fits_on_chip(block_size: int, itemsize: int) -> bool:
    """Whether a block can be inverted in the registers of one program."""
    return block_size <= (64 if itemsize == 8 else 128)


@triton.jit
def _gram(
    grads,
    stride,
    num_rows,
    start,
    n,
    scale,
    T: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale GᵀG of one block [BP, BP], summed in T.

    Every ROWS gradients are summed by themselves and then added: matrix units truncate their running sums, and a sum of
    short sums keeps that below the rounding of float32.
    """
    F = tl.zeros([BP, BP], T)
    for row in range(0, num_rows, ROWS):
        G = as_operand(grads_tile(grads, stride, row, num_rows, start, 0, n, ROWS, BP), T)
        F += matmul(tl.trans(G), G, PRECISION) * scale
    return F


@triton.jit
def _build(
    out,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    damping: tl.float64,
    condition,
    amplification,
    B: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    F = _gram(grads, stride, num_rows, start, n, 1.0 / tl.full([], num_grads, T), T, BP, ROWS, PRECISION)
    i = tl.arange(0, BP)
    park = out + start if DIAGONAL else out + b * B * B
    F, found, amplified = invert(F, n, damping, park, BP, W)
    tl.store(condition + b, found)
    tl.store(amplification + b, amplified)
    tl.debug_barrier()  # the parked diagonal has been read by all threads
    if DIAGONAL:
        inv_diag = tl.sum(tl.where(i[:, None] == i[None, :], F, 0.0), axis=1)
        tl.store(out + start + i, inv_diag, mask=i < n)
    else:
        ridge = 1.0 / tl.full([BP, BP], damping, tl.float64).to(T)
        rest = tl.where(i[:, None] == i[None, :], ridge, 0.0)
        rest = tl.where(found < float("inf"), rest, float("nan"))
        F = tl.where((i < n)[:, None] & (i < n)[None, :], F, rest)
        at = out + b * B * B + i[:, None] * B + i[None, :]
        inside = (i < B)[:, None] & (i < B)[None, :]
        tl.store(at, F, mask=inside)
        # split products of a pair and of its mirror image are summed in another order
        tl.debug_barrier()
        upper = inside & (i[:, None] < i[None, :])
        tl.store(at, tl.load(out + b * B * B + i[None, :] * B + i[:, None], mask=upper), mask=upper)


def _on_chip(
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
    options = {
        **tuning.parameters("inverse_from_grads", block_size, out),
        "B": block_size,
        "BP": power_of_two(block_size, 16),
        "DIAGONAL": diagonal,
    }
    args = (out, grads, grads.stride(0), grads.shape[0], blocks, num_grads, damping, condition, amplification)
    launch(_build, (blocks.shape[0],), *args, options=options)


def _in_memory(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    fisher_accumulate(f_inv.zero_(), grads, blocks, num_grads)
    padding = f_inv.shape[1] - (blocks[:, 1] - blocks[:, 0])
    blocked.inverse(f_inv, damping, padding, condition, amplification)


def inverse_from_grads(
    f_inv: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    """The op of this name."""
    B = f_inv.shape[1]
    if not fits_on_chip(B, f_inv.itemsize):
        return _in_memory(f_inv, grads, blocks, num_grads, damping, condition, amplification)
    build = small.build if B <= small.LARGEST else _on_chip
    return build(f_inv, grads, blocks, B, num_grads, damping, condition, amplification, diagonal=False)


def inverse_diagonal_from_grads(
    inv_diag: Tensor,
    grads: Tensor,
    blocks: Tensor,
    block_size: int,
    num_grads: int,
    damping: float,
    condition: Tensor,
    amplification: Tensor,
) -> None:
    """The op of this name."""
    B = block_size
    if fits_on_chip(B, inv_diag.itemsize):
        build = small.build if B <= small.LARGEST else _on_chip
        return build(inv_diag, grads, blocks, B, num_grads, damping, condition, amplification, diagonal=True)
    K = blocks.shape[0]
    at_once = max(1, min(K, SCRATCH_BYTES // (B * B * inv_diag.itemsize)))
    scratch = torch.empty(at_once, B, B, dtype=inv_diag.dtype, device=inv_diag.device)
    for first in range(0, K, at_once):
        group = slice(first, min(first + at_once, K))
        state = scratch[: group.stop - first]
        args = (num_grads, damping, condition[group], amplification[group])
        _in_memory(state, grads, blocks[group], *args)
        primal_diagonal(state, blocks[group], inv_diag)
    return None
