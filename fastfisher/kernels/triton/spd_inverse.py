"""The inverse of every block in place: one launch where a block fits on a chip, by panels in memory above.

Floor: a triangle read and a square written once, n³ / 2 multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, small, tuning
from fastfisher.kernels.triton.inverse_from_grads import fits_on_chip
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import invert


@triton.jit
def _invert(
    matrix, damping: tl.float64, condition, amplification, B: tl.constexpr, BP: tl.constexpr, W: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BP)
    inside = (i < B)[:, None] & (i < B)[None, :]
    base = matrix + b * B * B
    row, column = tl.maximum(i[:, None], i[None, :]), tl.minimum(i[:, None], i[None, :])
    M = tl.load(base + row * B + column, mask=inside, other=0.0)
    tl.debug_barrier()  # all of it is read before any of it is written
    F, found, amplified = invert(M, B, damping, base, BP, W)
    tl.store(condition + b, found)
    tl.store(amplification + b, amplified)
    tl.debug_barrier()
    tl.store(base + i[:, None] * B + i[None, :], F, mask=inside)


def spd_inverse(matrix: Tensor, damping: float, condition: Tensor, amplification: Tensor) -> None:
    """The op spd_inverse_."""
    K, B = matrix.shape[:2]
    if B <= small.LARGEST:
        return small.invert(matrix, damping, condition, amplification)
    if not fits_on_chip(B, matrix.itemsize):
        return blocked.inverse(matrix, damping, 0, condition, amplification)
    options = {**tuning.parameters("spd_inverse", B, matrix), "B": B, "BP": power_of_two(B, 16)}
    return launch(_invert, (K,), matrix, damping, condition, amplification, options=options)
