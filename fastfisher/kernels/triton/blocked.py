"""Symmetric positive definite matrices too large for a chip, in memory, by panels: factored, inverted, solved with.

A panel is three launches: its pivot square in one program a matrix, its rows, and the update of all tiles that the
panel reaches.  Only the lower triangle is read and written, given by two strides, so that a factor may be stored as
its transpose.  Floor: n³ / 6 multiply-adds to factor, n³ / 2 to invert; every tile moves once a panel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import launch, power_of_two
from fastfisher.kernels.triton.tiles import (
    cholesky_and_inverse,
    cholesky_inverse_by_panels,
    matmul,
    triangular_inverse,
)

SQUARE = 64  # rows and columns of a tile where all tiles are alike


@triton.jit
def _tile(matrix, row0, column0, n, row_stride, column_stride, TILE: tl.constexpr):
    """Addresses of a tile and which of them lie in the lower triangle of a matrix [n, n]."""
    i, j = row0 + tl.arange(0, TILE), column0 + tl.arange(0, TILE)
    at = matrix + i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    return at, (i < n)[:, None] & (i[:, None] >= j[None, :])


@triton.jit
def _pivot(
    matrix,
    matrix_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    n: tl.int32,
    J: tl.int32,
    pivots,
    failed,
    SWEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The pivot square D = L Lᵀ of panel J: L⁻¹ goes to `pivots`, and D becomes L, or −D⁻¹ in a sweep."""
    b = tl.program_id(0).to(tl.int64)
    at, inside = _tile(matrix + b * matrix_stride, J, J, n, row_stride, column_stride, TILE)
    i = tl.arange(0, TILE)
    lower = tl.load(at, mask=inside, other=0.0)
    D = lower + tl.trans(tl.where(i[:, None] > i[None, :], lower, 0.0))
    D = tl.where((i[:, None] == i[None, :]) & (J + i >= n)[:, None], 1.0, D)
    if SWEEP:
        X, failures = cholesky_inverse_by_panels(D, tl.minimum(n - J, TILE), TILE, 16)
        tl.store(at, -matmul(tl.trans(X), X, "ieee"), mask=inside)
    else:
        L, X, failures = cholesky_and_inverse(D, TILE)
        tl.store(at, L, mask=inside)
    tl.store(failed + b, tl.load(failed + b) + failures)
    tl.store(pivots + b * TILE * TILE + i[:, None] * TILE + i[None, :], X)


@triton.jit
def _panel(
    matrix,
    matrix_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    n: tl.int32,
    J: tl.int32,
    pivots,
    panel,
    first: tl.int32,
    SWEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The other rows P of panel J: H = P L⁻ᵀ goes to `panel`, and P becomes H, or H L⁻¹ in a sweep."""
    tiles = tl.cdiv(n, TILE) - first
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row0 = (first + tl.program_id(0) % tiles) * TILE
    if row0 != J:
        i = tl.arange(0, TILE)
        at, inside = _tile(
            matrix + b * matrix_stride,
            tl.maximum(row0, J),
            tl.minimum(row0, J),
            n,
            row_stride,
            column_stride,
            TILE,
        )
        P = tl.load(at, mask=inside, other=0.0)
        if row0 < J:
            P = tl.trans(P)
        X = tl.load(pivots + b * TILE * TILE + i[:, None] * TILE + i[None, :])
        H = matmul(P, tl.trans(X), "ieee")
        if not SWEEP:
            # one step of refinement: a factor is solved with later, and an explicit inverse alone would cost it digits
            square, there = _tile(matrix + b * matrix_stride, J, J, n, row_stride, column_stride, TILE)
            L = tl.load(square, mask=there, other=0.0)
            H += matmul(P - matmul(H, tl.trans(L), "ieee"), tl.trans(X), "ieee")
        tl.store(panel + (b * n + row0 + i)[:, None] * TILE + i[None, :], H, mask=(row0 + i < n)[:, None])
        if SWEEP:
            H = matmul(H, X, "ieee")
            if row0 < J:
                H = tl.trans(H)
        tl.store(at, H, mask=inside)


@triton.jit
def _update(
    matrix,
    matrix_stride: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    n: tl.int32,
    J: tl.int32,
    panel,
    first: tl.int32,
    TILE: tl.constexpr,
):
    """A ← A − H Hᵀ in the tiles from `first` on that are not in panel J."""
    tiles = tl.cdiv(n, TILE) - first
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    row0, column0 = (first + pair // tiles) * TILE, (first + pair % tiles) * TILE
    if (column0 <= row0) & (row0 != J) & (column0 != J):
        at, inside = _tile(matrix + b * matrix_stride, row0, column0, n, row_stride, column_stride, TILE)
        i = tl.arange(0, TILE)
        base = panel + b * n * TILE + i[None, :]
        left = tl.load(base + (row0 + i)[:, None] * TILE, mask=(row0 + i < n)[:, None], other=0.0)
        right = tl.load(base + (column0 + i)[:, None] * TILE, mask=(column0 + i < n)[:, None], other=0.0)
        A = tl.load(at, mask=inside, other=0.0)
        tl.store(at, A - matmul(left, tl.trans(right), "ieee"), mask=inside)


def _eliminate(matrix: Tensor, row_stride: int, column_stride: int, *, sweep: bool) -> Tensor:
    """All panels of every matrix [K, n, n], in place; returns how many pivots failed, int32 [K]."""
    K, n = matrix.shape[:2]
    tile = min(tuning.parameters("blocked", n, matrix)["TILE"], power_of_two(n, 16))
    tiles = triton.cdiv(n, tile)
    failed = torch.zeros(K, dtype=torch.int32, device=matrix.device)
    pivots = torch.empty(K, tile, tile, dtype=matrix.dtype, device=matrix.device)
    panel = torch.empty(K, n if tiles > 1 else 0, tile, dtype=matrix.dtype, device=matrix.device)
    pivot = {**tuning.parameters("blocked_pivot", tile, matrix), "SWEEP": sweep, "TILE": tile}
    rows = {**tuning.parameters("blocked_panel", tile, matrix), "SWEEP": sweep, "TILE": tile}
    update = {**tuning.parameters("blocked", n, matrix), "TILE": tile}
    strides = (matrix, matrix.stride(0), row_stride, column_stride, n)
    for J in range(tiles):
        first = 0 if sweep else J + 1
        rest = tiles - first
        launch(_pivot, (K,), *strides, J * tile, pivots, failed, options=pivot)
        if tiles == 1 or rest == 0:
            break
        launch(_panel, (K * rest,), *strides, J * tile, pivots, panel, first, options=rows)
        launch(_update, (K * rest * rest,), *strides, J * tile, panel, first, options=update)
    return failed


def cholesky(matrix: Tensor, row_stride: int, column_stride: int) -> Tensor:
    """L of every A = L Lᵀ, in place of its lower triangle.   matrix: [K, n, n], contiguous but for the meaning of its
    strides.   Returns how many pivots failed, int32 [K].
    """
    return _eliminate(matrix, row_stride, column_stride, sweep=False)


@triton.jit
def _finish(matrix, n: tl.int32, failed, TILE: tl.constexpr):
    """The inverse after a sweep: its negative, mirrored; NaN where a pivot failed."""
    tiles = tl.cdiv(n, TILE)
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    row0, column0 = pair // tiles * TILE, pair % tiles * TILE
    if column0 <= row0:
        i, j = row0 + tl.arange(0, TILE), column0 + tl.arange(0, TILE)
        base = matrix + b * n * n
        lower = base + i[:, None] * n + j[None, :]
        inside = (i < n)[:, None] & (i[:, None] >= j[None, :])
        A = -tl.load(lower, mask=inside, other=0.0)
        A = tl.where(tl.load(failed + b) > 0, float("nan"), A)
        tl.store(lower, A, mask=inside)
        tl.store(base + j[:, None] * n + i[None, :], tl.trans(A), mask=tl.trans(inside))


@triton.jit
def _norms(matrix, n: tl.int32, scale, weight, partial, TILE: tl.constexpr):
    """Of one tile of a symmetric matrix C: its share of ‖s C s‖² and of ‖C diag(v)‖², from the lower triangle.

    scale: s, weight: v, float64 [K, n].   partial: float64 [K, tiles, tiles, 2].
    """
    tiles = tl.cdiv(n, TILE)
    pair = tl.program_id(0) % (tiles * tiles)
    b = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    row0, column0 = pair // tiles * TILE, pair % tiles * TILE
    both, columns = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if column0 <= row0:
        i, j = row0 + tl.arange(0, TILE), column0 + tl.arange(0, TILE)
        inside = (i < n)[:, None] & (i[:, None] >= j[None, :])
        C = tl.load(matrix + b * n * n + i[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float64)
        s_i = tl.load(scale + b * n + i, mask=i < n, other=0.0)
        s_j = tl.load(scale + b * n + j, mask=j < n, other=0.0)
        v_i = tl.load(weight + b * n + i, mask=i < n, other=0.0)
        v_j = tl.load(weight + b * n + j, mask=j < n, other=0.0)
        scaled = C * s_i[:, None] * s_j[None, :]
        here, there = C * v_i[:, None], C * v_j[None, :]
        off = i[:, None] > j[None, :]  # an entry off the diagonal stands there twice
        both = tl.sum(scaled * scaled * tl.where(off, 2.0, 1.0))
        columns = tl.sum(tl.where(off, here * here, 0.0) + there * there)
    at = partial + 2 * tl.program_id(0).to(tl.int64)
    tl.store(at, both)
    tl.store(at + 1, columns)


def _measure(matrix: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """‖s C s‖² and ‖C diag(v)‖² of every matrix, float64 [K, 2]."""
    K, n = matrix.shape[:2]
    tiles = triton.cdiv(n, SQUARE)
    partial = torch.empty(K, tiles * tiles, 2, dtype=torch.float64, device=matrix.device)
    options = {**tuning.parameters("squares", SQUARE, matrix), "TILE": SQUARE}
    launch(_norms, (K * tiles * tiles,), matrix, n, scale, weight, partial, options=options)
    return partial.sum(dim=1)


def inverse(
    matrix: Tensor, damping: float, padding: Tensor | int, condition: Tensor, amplification: Tensor
) -> None:
    """What the op spd_inverse_ does, for blocks that do not fit on a chip.

    padding: how many weights without gradient at the end of each block the estimates leave out, int64 [K] or 0.
    """
    K, n = matrix.shape[:2]
    diagonal = matrix.diagonal(dim1=1, dim2=2)  # [K, n]
    f = diagonal.to(torch.float64, copy=True)
    diagonal.add_(damping)
    root = diagonal.double().sqrt()
    weight = f.sqrt()
    norm = _measure(matrix, 1 / root, weight)[:, 0] - padding
    failed = _eliminate(matrix, n, 1, sweep=True)
    tiles = triton.cdiv(n, SQUARE)
    options = {**tuning.parameters("squares", SQUARE, matrix), "TILE": SQUARE}
    launch(_finish, (K * tiles * tiles,), matrix, n, failed, options=options)
    both, columns = _measure(matrix, root, weight).unbind(1)
    infinite = torch.full_like(condition, torch.inf)
    for out, value in (
        (condition, (norm * (both - padding)).sqrt()),
        (amplification, (norm * columns * f.amax(dim=1)).sqrt()),
    ):
        out.copy_(torch.where((failed == 0) & (value < torch.inf), value, infinite))


@triton.jit
def _solve(factor, x, k: tl.int32, columns: tl.int32, KP: tl.constexpr):
    """x ← C⁻¹ x for C = Uᵀ U: one column x [k] of one matrix, held on chip while the rows of U stream past twice."""
    b = (tl.program_id(0) // columns).to(tl.int64)
    column = tl.program_id(0) % columns
    i = tl.arange(0, KP)
    U = factor + b * k * k
    at = x + (b * k + i) * columns + column
    y = tl.load(at, mask=i < k, other=0.0)
    row = tl.load(U + i, mask=i < k, other=0.0)
    for j in range(k):  # Uᵀ z = x
        ahead = tl.load(U + (j + 1) * k + i, mask=i < tl.where(j + 1 < k, k, 0), other=0.0)
        z = tl.sum(tl.where(i == j, y, 0.0)) / tl.sum(tl.where(i == j, row, 0.0))
        y = tl.where(i == j, z, y - tl.where(i > j, row, 0.0) * z)
        row = ahead
    row = tl.load(U + (k - 1) * k + i, mask=i < k, other=0.0)
    for step in range(k):  # U y = z
        j = k - 1 - step
        ahead = tl.load(U + (j - 1) * k + i, mask=i < tl.where(j > 0, k, 0), other=0.0)
        rest = tl.sum(tl.where(i > j, row * y, 0.0))
        z = (tl.sum(tl.where(i == j, y, 0.0)) - rest) / tl.sum(tl.where(i == j, row, 0.0))
        y = tl.where(i == j, z, y)
        row = ahead
    tl.store(at, y, mask=i < k)


def solve(factor: Tensor, x: Tensor) -> None:
    """x ← C⁻¹ x with C = Uᵀ U.   factor: U, float64 [K, k, k].   x: float64 [K, k, n], contiguous, overwritten."""
    K, k, columns = x.shape
    options = {**tuning.parameters("solve", k, x), "KP": power_of_two(k, 16)}
    launch(_solve, (K * columns,), factor, x, k, columns, options=options)


@triton.jit
def _square_inverses(factor, k: tl.int32, squares, TILE: tl.constexpr):
    """L⁻¹ of every square on the diagonal of L = Uᵀ.   squares: [K, tiles, TILE, TILE]."""
    tiles = tl.cdiv(k, TILE)
    b, J = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * TILE
    i = tl.arange(0, TILE)
    at = factor + b * k * k + (J + i)[None, :] * k + (J + i)[:, None]
    L = tl.load(at, mask=(J + i < k)[:, None] & (i[:, None] >= i[None, :]), other=0.0)
    L = tl.where((i[:, None] == i[None, :]) & (J + i >= k)[:, None], 1.0, L)
    to = squares + tl.program_id(0).to(tl.int64) * TILE * TILE + i[:, None] * TILE + i[None, :]
    tl.store(to, triangular_inverse(L, TILE))


@triton.jit
def _inverse_rows(factor, k: tl.int32, squares, out, R: tl.int32, TILE: tl.constexpr):
    """Row R of tiles of X = L⁻¹, from the rows above: X_RJ = L_RR⁻¹ (1 − Σ_M L_RM X_MJ), J <= M < R."""
    b, J = (tl.program_id(0) // (R + 1)).to(tl.int64), tl.program_id(0) % (R + 1)
    tiles = tl.cdiv(k, TILE)
    i = tl.arange(0, TILE)
    X = tl.load(squares + (b * tiles + R) * TILE * TILE + i[:, None] * TILE + i[None, :])
    rows, columns = R * TILE + i, J * TILE + i
    if J < R:
        total = tl.zeros([TILE, TILE], X.dtype)
        for M in range(J, R):
            m = M * TILE + i
            L = tl.load(
                factor + b * k * k + m[None, :] * k + rows[:, None],
                mask=(rows < k)[:, None] & (m < k)[None, :],
                other=0.0,
            )
            above = tl.load(
                out + b * k * k + m[:, None] * k + columns[None, :], mask=(m < k)[:, None], other=0.0
            )
            total += matmul(L, above, "ieee")
        X = -matmul(X, total, "ieee")
    tl.store(
        out + b * k * k + rows[:, None] * k + columns[None, :],
        X,
        mask=(rows < k)[:, None] & (columns < k)[None, :],
    )


def factor_inverse(factor: Tensor, out: Tensor) -> None:
    """The lower triangle of L⁻¹, L = Uᵀ; what lies above is left as it is.   factor, out: float64 [K, k, k]."""
    K, k = factor.shape[:2]
    options = tuning.parameters("factor_inverse", k, factor)
    tile = options["TILE"] = min(options["TILE"], power_of_two(k, 16))
    tiles = triton.cdiv(k, tile)
    squares = torch.empty(K, tiles, tile, tile, dtype=factor.dtype, device=factor.device)
    launch(_square_inverses, (K * tiles,), factor, k, squares, options=options)
    for R in range(tiles):
        launch(_inverse_rows, (K * (R + 1),), factor, k, squares, out, R, options=options)
