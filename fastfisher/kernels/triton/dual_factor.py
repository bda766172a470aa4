"""U of the capacitance m λ I + G Gᵀ = Uᵀ U of every block, in float64: Gram tiles first, then the factor by panels.

Products of float32 numbers are exact in float64, so no gradient-to-damping ratio is lost; from the A100 on the matrix
units run float64 at the rate of plain float32.  Floor: every gradient read once, k² / 2 multiply-adds a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import blocked, tuning
from fastfisher.kernels.triton.launch import launch, pieces, power_of_two
from fastfisher.kernels.triton.tiles import as_float64, block_range, matmul


@triton.jit
def _gram(
    out,
    grads,
    stride: tl.int64,
    k: tl.int32,
    blocks,
    keep,
    ridge: tl.float64,
    num_pieces: tl.int32,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of G Gᵀ over one piece of the columns: out [pieces, K, k, k], the upper triangle and zeros below."""
    tiles = tl.cdiv(k, TILE)
    piece = tl.program_id(0) % num_pieces
    pair = tl.program_id(0) // num_pieces % (tiles * tiles)
    b = (tl.program_id(0) // (num_pieces * tiles * tiles)).to(tl.int64)
    num_blocks = tl.num_programs(0) // (num_pieces * tiles * tiles)
    row0, column0 = pair // tiles * TILE, pair % tiles * TILE
    i, j = row0 + tl.arange(0, TILE), column0 + tl.arange(0, TILE)
    start, n = block_range(blocks, b)
    C = tl.zeros([TILE, TILE], tl.float64)
    if column0 >= row0:
        for column in range(piece * COLUMNS, n, num_pieces * COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            here = c < n
            if MASKED:
                here = tl.load(keep + start + c, mask=here, other=0.0) != 0
            at = grads + start + c[None, :]
            left = tl.load(at + i[:, None] * stride, mask=(i < k)[:, None] & here[None, :], other=0.0)
            right = tl.load(at + j[:, None] * stride, mask=(j < k)[:, None] & here[None, :], other=0.0)
            C += matmul(as_float64(left), tl.trans(as_float64(right)), "ieee")
    if piece == 0:
        C = tl.where(i[:, None] == j[None, :], C + ridge, C)
    C = tl.where(i[:, None] <= j[None, :], C, 0.0)
    at = out + (piece.to(tl.int64) * num_blocks + b) * k * k + i[:, None] * k + j[None, :]
    tl.store(at, C, mask=(i < k)[:, None] & (j < k)[None, :])


def capacitance(out: Tensor, grads: Tensor, blocks: Tensor, ridge: float, keep: Tensor | None = None) -> None:
    """The upper triangle of ridge I + G Gᵀ, zeros below, G without the columns that `keep` excludes.

    out: float64 [K, k, k].   grads: [k, d].   keep: bool [d] or None.
    """
    K, k = out.shape[:2]
    options = tuning.parameters("dual_factor", k, out)
    options["TILE"] = min(options["TILE"], power_of_two(k, 16))
    pairs = triton.cdiv(k, options["TILE"]) ** 2
    # a piece beyond the first costs another k² numbers: worth it only where a block has many columns
    split = pieces(grads.shape[1], K, 64 * K * pairs, 64 * options["COLUMNS"])
    parts = out if split == 1 else torch.empty(split, K, k, k, dtype=torch.float64, device=out.device)
    # bytes among the operands of a product mislead Triton about their width, so the mask becomes float32
    mask = blocks if keep is None else keep.float()
    args = (parts, grads, grads.stride(0), k, blocks, mask, ridge, split)
    launch(_gram, (split * K * pairs,), *args, options={**options, "MASKED": keep is not None})
    if split > 1:
        torch.sum(parts, dim=0, out=out)


@triton.jit
def _poison(factor, k: tl.int32, failed, TILE: tl.constexpr):
    """NaN into every matrix [k, k] that failed."""
    tiles = tl.cdiv(k * k, TILE)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    if tl.load(failed + b) > 0:
        i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
        tl.store(factor + b * k * k + i, tl.full([TILE], float("nan"), tl.float64), mask=i < k * k)


def dual_factor(
    factor: Tensor, grads: Tensor, blocks: Tensor, num_grads: int, damping: float, condition: Tensor
) -> None:
    """The op dual_factor_."""
    K, k = factor.shape[:2]
    capacitance(factor, grads, blocks, num_grads * damping)
    root = factor.diagonal(dim1=1, dim2=2).sqrt()  # [K, k]
    failed = blocked.cholesky(factor, 1, k)
    # ‖A⁻¹‖₂ of A = D^-½ C D^-½ by power iterations from a fixed start
    signs = 1 - 2 * (torch.arange(k, device=factor.device) * 2654435761 >> 7 & 1)
    x = signs.double().expand(K, k).contiguous()
    for _ in range(3):
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True) * root
        blocked.solve(factor, x[:, :, None])
        x = x * root
    norm = torch.linalg.vector_norm(x, dim=1)
    infinite = torch.full_like(norm, torch.inf)
    condition.copy_(torch.where((failed == 0) & (norm < torch.inf), norm, infinite))
    options = {"TILE": 1024, "num_warps": 4}
    launch(_poison, (K * triton.cdiv(k * k, 1024),), factor, k, failed, options=options)
