"""One auxiliary step of FishLeg: R ← R − η (R M − R), M = ZᵀZ/m + γ RᵀR, Z = G R.

Blocks up to 64, in float64 up to 32, are one program each, with M and R or R M in its registers.  Larger ones go
through memory in tiles, a group of blocks at a time: Z, M, the power iterations, R M with its part of the loss, and the
new R.
Floor: gradients read once, R read and written once; 3 n² (k + n) / 2 multiply-adds, of which a Gram product in whole
tiles takes n² (k + n) / 2 more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import block_groups, launch, power_of_two
from fastfisher.kernels.triton.tiles import as_type, block_range, grads_tile, matmul

ON_CHIP = {4: 64, 8: 32}  # largest block that one program holds, by bytes of a number
POWER_STEPS = 3


@triton.jit
def _norm(x):
    """‖x‖ in float64."""
    x = x.to(tl.float64)
    return tl.sqrt(tl.sum(x * x))


@triton.jit
def _normalised(w, v):
    """w / ‖w‖ and that norm; v where the norm is no positive finite number."""
    norm = _norm(w)
    usable = (norm > 0) & (norm < float("inf"))
    return tl.where(usable, (w.to(tl.float64) / tl.where(usable, norm, 1.0)).to(v.dtype), v), norm


@triton.jit
def _equal_entries(i, n, T: tl.constexpr):
    """The unit vector with n equal entries."""
    return tl.where(i < n, 1 / tl.sqrt(tl.full([], n, tl.float64)), 0.0).to(T)


@triton.jit
def _finite(eigenvalue, loss):
    return (eigenvalue < float("inf")) & (tl.abs(loss) < float("inf"))


@triton.jit
def _step_size(eigenvalue, rate, T: tl.constexpr):
    """η = ½ rate / max(1, 1.1 λ̂)."""
    bound = 1.1 * eigenvalue
    return (rate / 2 / tl.where(bound > 1, bound, 1.0)).to(T)


@triton.jit
def _on_chip(
    root,
    top,
    grads,
    stride: tl.int64,
    num_rows: tl.int32,
    blocks,
    num_grads: tl.int32,
    damping: tl.float64,
    rate: tl.float64,
    loss,
    largest,
    B: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = root.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.arange(0, BP)
    at = root + b * B * B + i[:, None] * B + i[None, :]
    inside = (i < n)[:, None] & (i < n)[None, :]
    R = tl.load(at, mask=inside, other=0.0)
    M = matmul(tl.trans(R), R, PRECISION) * tl.full([], damping, tl.float64).to(T)
    scale = (1 / tl.sqrt(tl.full([], num_grads, tl.float64))).to(T)
    for row in range(0, num_rows, ROWS):
        G = as_type(grads_tile(grads, stride, row, num_rows, start, 0, n, ROWS, BP), T)
        Z = matmul(G, R, PRECISION) * scale  # [ROWS, BP]
        M += matmul(tl.trans(Z), Z, PRECISION)
    begin = _equal_entries(i, n, T)
    v, eigenvalue = _normalised(tl.load(top + b * B + i, mask=i < n, other=0.0), begin)
    for _ in tl.static_range(STEPS):
        v, eigenvalue = _normalised(tl.sum(M * v[None, :], axis=1), v)
    R = tl.load(at, mask=inside, other=0.0, volatile=True)  # it need not lie in registers all the time
    RM = matmul(R, M, PRECISION)
    before = tl.sum(tl.sum((R * (RM * 0.5 - R)).to(tl.float64), axis=1))
    finite = _finite(eigenvalue, before)
    tl.store(loss + b, tl.where(finite, before, float("inf")))
    tl.store(largest + b, tl.where(finite, eigenvalue, float("inf")))
    written = tl.where(finite, n, 0)
    tl.store(top + b * B + i, v, mask=i < written)
    inside = (i < written)[:, None] & (i < written)[None, :]
    tl.store(at, R - _step_size(eigenvalue, rate, T) * (RM - R), mask=inside)


@triton.jit
def _tile(matrix, b, first_row, first_column, n, B: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """[ROWS, TILE] of block b of a state [K, B, B], zeros outside of [:n, :n]."""
    r, c = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, TILE)
    at = matrix + b * B * B + r[:, None] * B + c[None, :]
    return tl.load(at, mask=(r < n)[:, None] & (c < n)[None, :], other=0.0)


@triton.jit
def _project(
    Z,
    root,
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
    """Z = G R / √m, [K, k, B]: ROWS gradients and TILE columns."""
    T: tl.constexpr = root.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    groups = tl.cdiv(num_rows, ROWS)
    column = tl.program_id(0) % tiles * TILE
    row = tl.program_id(0) // tiles % groups * ROWS
    b = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    start, n = block_range(blocks, b)
    total = tl.zeros([ROWS, TILE], T)
    for first in range(0, n, TILE):
        G = as_type(grads_tile(grads, stride, row, num_rows, start, first, n, ROWS, TILE), T)
        total += matmul(G, _tile(root, b, first, column, n, B, TILE, TILE), PRECISION)
    a, c = row + tl.arange(0, ROWS), column + tl.arange(0, TILE)
    scale = (1 / tl.sqrt(tl.full([], num_grads, tl.float64))).to(T)
    inside = (a < num_rows)[:, None] & (c < B)[None, :]
    tl.store(Z + (b * num_rows + a)[:, None] * B + c[None, :], total * scale, mask=inside)


@triton.jit
def _gram(
    M,
    Z,
    root,
    num_rows: tl.int32,
    blocks,
    damping: tl.float64,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M = ZᵀZ + γ RᵀR: one tile and its mirror image."""
    T: tl.constexpr = root.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    _, n = block_range(blocks, b)
    i, j = pair // tiles * TILE, pair % tiles * TILE
    if j <= i:
        total = tl.zeros([TILE, TILE], T)
        for first in range(0, n, ROWS):
            R_i = _tile(root, b, first, i, n, B, ROWS, TILE)
            total += matmul(tl.trans(R_i), _tile(root, b, first, j, n, B, ROWS, TILE), PRECISION)
        total *= tl.full([], damping, tl.float64).to(T)
        c = tl.arange(0, TILE)
        for first in range(0, num_rows, ROWS):
            a = first + tl.arange(0, ROWS)
            at = Z + (b * num_rows + a)[:, None] * B
            there = (a < num_rows)[:, None]
            Z_i = tl.load(at + (i + c)[None, :], mask=there & (i + c < n)[None, :], other=0.0)
            Z_j = tl.load(at + (j + c)[None, :], mask=there & (j + c < n)[None, :], other=0.0)
            total += matmul(tl.trans(Z_i), Z_j, PRECISION)
        inside = (i + c < n)[:, None] & (j + c < n)[None, :]
        tl.store(M + b * B * B + (i + c)[:, None] * B + (j + c)[None, :], total, mask=inside)
        mirror = M + b * B * B + (j + c)[:, None] * B + (i + c)[None, :]
        tl.store(mirror, tl.trans(total), mask=tl.trans(inside))


@triton.jit
def _power(
    vectors,
    eigenvalues,
    top,
    M,
    blocks,
    B: tl.constexpr,
    BP: tl.constexpr,
    LINES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The power iterations of a block, LINES rows of M at a time; `vectors` [K, B] becomes the last one."""
    T: tl.constexpr = M.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    _, n = block_range(blocks, b)
    i, line = tl.arange(0, BP), tl.arange(0, LINES)
    begin = _equal_entries(i, n, T)
    v, norm = _normalised(tl.load(top + b * B + i, mask=i < n, other=0.0), begin)
    for _ in range(STEPS):
        for first in range(0, n, LINES):
            inside = (first + line < n)[:, None] & (i < n)[None, :]
            lines = tl.load(M + b * B * B + (first + line)[:, None] * B + i[None, :], mask=inside, other=0.0)
            tl.store(
                vectors + b * B + first + line, tl.sum(lines * v[None, :], axis=1), mask=first + line < n
            )
        tl.debug_barrier()
        v, norm = _normalised(tl.load(vectors + b * B + i, mask=i < n, other=0.0, volatile=True), v)
        tl.debug_barrier()
    tl.store(vectors + b * B + i, v, mask=i < n)
    tl.store(eigenvalues + b, norm)


@triton.jit
def _apply(
    RM,
    parts,
    root,
    M,
    blocks,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of R M, and of the loss: parts [K, tiles²]."""
    T: tl.constexpr = root.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    _, n = block_range(blocks, b)
    i, j = pair // tiles * TILE, pair % tiles * TILE
    total = tl.zeros([TILE, TILE], T)
    for first in range(0, n, ROWS):
        R_i = _tile(root, b, i, first, n, B, TILE, ROWS)
        total += matmul(R_i, _tile(M, b, first, j, n, B, ROWS, TILE), PRECISION)
    R = _tile(root, b, i, j, n, B, TILE, TILE)
    c = tl.arange(0, TILE)
    inside = (i + c < n)[:, None] & (j + c < n)[None, :]
    tl.store(RM + b * B * B + (i + c)[:, None] * B + (j + c)[None, :], total, mask=inside)
    loss = tl.sum(tl.sum((R * (total * 0.5 - R)).to(tl.float64), axis=1))
    tl.store(parts + b * tiles * tiles + pair, loss)


@triton.jit
def _finish(
    root,
    top,
    loss,
    largest,
    RM,
    parts,
    vectors,
    eigenvalues,
    blocks,
    rate: tl.float64,
    B: tl.constexpr,
    BP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The new rows of R, TILE of them; the first program of a block also writes what is told of it."""
    T: tl.constexpr = root.dtype.element_ty
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) % tiles * TILE
    b = (tl.program_id(0) // tiles).to(tl.int64)
    _, n = block_range(blocks, b)
    before = tl.zeros([], tl.float64)
    for pair in range(tiles * tiles):
        before += tl.load(parts + b * tiles * tiles + pair)
    eigenvalue = tl.load(eigenvalues + b)
    finite = _finite(eigenvalue, before)
    eta = _step_size(eigenvalue, rate, T)
    written = tl.where(finite, n, 0)
    c = tl.arange(0, TILE)
    for j in range(0, written, TILE):
        at = b * B * B + (i + c)[:, None] * B + (j + c)[None, :]
        inside = (i + c < n)[:, None] & (j + c < n)[None, :]
        R = tl.load(root + at, mask=inside, other=0.0)
        tl.store(root + at, R - eta * (tl.load(RM + at, mask=inside, other=0.0) - R), mask=inside)
    if i == 0:
        q = tl.arange(0, BP)
        tl.store(loss + b, tl.where(finite, before, float("inf")))
        tl.store(largest + b, tl.where(finite, eigenvalue, float("inf")))
        v = tl.load(vectors + b * B + q, mask=q < n, other=0.0)
        tl.store(top + b * B + q, v, mask=q < written)


def _in_memory(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    """A step on blocks that do not fit on a chip: five launches a group."""
    B, k = root.shape[1], grads.shape[0]
    options = {**tuning.parameters("fishleg_block_step", B, root), "B": B}
    BP, lines = power_of_two(B), max(1, 4096 // power_of_two(B))
    tiles = triton.cdiv(B, options["TILE"])
    new, stride = root.new_empty, grads.stride(0)
    for group in block_groups(len(root), (k + 2 * B + 1) * B * root.itemsize):
        R, v, ranges = root[group], top[group], blocks[group]
        K = len(R)
        Z, M, RM, vectors = new(K, k, B), new(K, B, B), new(K, B, B), new(K, B)
        parts, eigenvalues = new(K, tiles * tiles, dtype=torch.float64), new(K, dtype=torch.float64)
        grid = (K * tiles * triton.cdiv(k, options["ROWS"]),)
        launch(_project, grid, Z, R, grads, stride, k, ranges, num_grads, options=options)
        pairs = (K * tiles * tiles,)
        launch(_gram, pairs, M, Z, R, k, ranges, damping, options=options)
        whole = {"B": B, "BP": BP, "num_warps": options["num_warps"]}
        power = {**whole, "LINES": lines, "STEPS": POWER_STEPS}
        launch(_power, (K,), vectors, eigenvalues, v, M, ranges, options=power)
        launch(_apply, pairs, RM, parts, R, M, ranges, options=options)
        found = (loss[group], largest[group], RM, parts, vectors, eigenvalues, ranges, rate)
        launch(_finish, (K * tiles,), R, v, *found, options={**whole, "TILE": options["TILE"]})


def fishleg_block_step(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    """The op fishleg_block_step_."""
    K, B = root.shape[:2]
    args = (num_grads, damping, rate, loss, largest)
    if ON_CHIP[root.itemsize] < B:
        return _in_memory(root, top, grads, blocks, *args)
    options = {**tuning.parameters("fishleg_block_step", B, root), "B": B, "BP": power_of_two(B, 16)}
    options |= {"STEPS": POWER_STEPS}
    options.pop("TILE", None)
    rows = (grads, grads.stride(0), grads.shape[0], blocks)
    return launch(_on_chip, (K,), root, top, *rows, *args, options=options)
