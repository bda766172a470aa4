"""What the Triton kernels share: reading gradients, products of tiles, and inverting a matrix held on chip.

A matrix [BP, BP] on chip is one tensor in registers; BP is B rounded up to a power of two, W the width of a panel.
Triton cannot index registers: a panel is taken out of a matrix by masking and summing, and put back by masking.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastfisher import environment

# Tiles of float64 go through the matrix units where Triton can, which it learned in 3.6.
# The interpreter would multiply the bits of bfloat16.
HALF_DOT = tl.constexpr(not environment.triton_interpret())
FLOAT64_DOT = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6))


@triton.jit
def by_columns(a, b):
    """a @ b of [M, K] and [K, N] in full precision, one column of a at a time: slower, and with few registers."""
    k = tl.arange(0, a.shape[1])
    c = tl.zeros([a.shape[0], b.shape[1]], a.dtype)
    for j in range(a.shape[1]):
        column = tl.sum(tl.where((k == j)[None, :], a, 0.0), axis=1)
        row = tl.sum(tl.where((k == j)[:, None], b, 0.0), axis=0)
        c += column[:, None] * row[None, :]
    return c


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a @ b of [M, K] and [K, N]; PRECISION is that of float32 products, "ieee" or "tf32x3"."""
    if a.dtype == tl.float64 and not FLOAT64_DOT:
        return by_columns(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def panel_matmul(a, b, BP: tl.constexpr):
    """a @ b beside a matrix [BP, BP] in float32 that leaves a large product no registers to read its factors into."""
    if a.dtype == tl.float64 or BP < 128:
        return matmul(a, b, "ieee")
    else:
        return by_columns(a, b)


@triton.jit
def block_range(blocks, b):
    """Start (int64) and length (int32) of block b."""
    start = tl.load(blocks + 2 * b)
    return start, (tl.load(blocks + 2 * b + 1) - start).to(tl.int32)


@triton.jit
def grads_tile(grads, stride, row0, num_rows, start, column0, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """grads[row0 : row0 + ROWS, start + column0 : ... + COLUMNS] as stored, 0 outside the rows and the block."""
    row = row0 + tl.arange(0, ROWS)
    column = column0 + tl.arange(0, COLUMNS)
    at = grads + row[:, None].to(tl.int64) * stride + start + column[None, :]
    return tl.load(at, mask=(row < num_rows)[:, None] & (column < n)[None, :], other=0.0)


@triton.jit
def as_float64(tile):
    """A tile of gradients as a factor of a float64 product.

    Triton lays a factor out by the narrowest numbers it was made from and cannot do that for halves in float64; a sum
    over one number hides them.
    """
    if tile.dtype == tl.float16 or tile.dtype == tl.bfloat16:
        wide = tl.reshape(tile.to(tl.float32), [tile.shape[0], tile.shape[1], 1])
        return tl.sum(wide, axis=2).to(tl.float64)
    else:
        return tile.to(tl.float64)


@triton.jit
def as_type(tile, T: tl.constexpr):
    """A tile of gradients as a factor of a product with numbers of type T."""
    if tl.float64 == T:
        return as_float64(tile)
    else:
        return tile.to(T)


@triton.jit
def as_operand(tile, T: tl.constexpr):
    """A tile of gradients as a factor of a product with gradients, summed in T.

    Products of half precision are exact in float32 and stay what they are: the matrix units take them as such.
    """
    if tl.float64 == T:
        return as_float64(tile)
    elif HALF_DOT and (tile.dtype == tl.float16 or tile.dtype == tl.bfloat16):
        return tile
    else:
        return tile.to(T)


@triton.jit
def usable(pivot):
    """Whether a pivot is positive and finite."""
    return (pivot > 0) & (pivot < float("inf"))


@triton.jit
def square_root(x):
    """The correctly rounded root."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def cholesky_and_inverse(D, W: tl.constexpr):
    """L and L⁻¹ of D = L Lᵀ [W, W], and how many pivots were unusable: elimination of D and I side by side."""
    i = tl.arange(0, W)
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(D.dtype)
    L = tl.zeros([W, W], D.dtype)
    failures = 0
    for j in range(W):
        column = tl.sum(tl.where((i == j)[None, :], D, 0.0), axis=1)  # D[:, j]
        row = tl.sum(
            tl.where((i == j)[:, None], D, 0.0), axis=0
        )  # D[j, :], the same numbers in the other layout
        x = tl.sum(tl.where((i == j)[:, None], X, 0.0), axis=0)  # X[j, :]
        pivot = tl.sum(tl.where(i == j, column, 0.0))
        failures += tl.where(usable(pivot), 0, 1)
        root = square_root(pivot)
        column, row, x = column / root, row / root, x / root
        L = tl.where((i == j)[None, :], tl.where(i >= j, column, 0.0)[:, None], L)
        below, beside = tl.where(i > j, column, 0.0), tl.where(i > j, row, 0.0)
        D -= below[:, None] * beside[None, :]
        X = tl.where((i == j)[:, None], x[None, :], X - below[:, None] * x[None, :])
    return L, X, failures


@triton.jit
def cholesky_inverse(D, W: tl.constexpr):
    """L⁻¹ of D = L Lᵀ [W, W], and how many pivots were unusable."""
    _, X, failures = cholesky_and_inverse(D, W)
    return X, failures


@triton.jit
def panel_of(A, J, BP: tl.constexpr, W: tl.constexpr):
    """A[:, J W : (J + 1) W] of a matrix [BP, BP]."""
    if BP == W:
        return A
    else:
        jb = tl.arange(0, BP // W)
        return tl.sum(tl.where((jb == J)[None, :, None], tl.reshape(A, [BP, BP // W, W]), 0.0), axis=1)


@triton.jit
def square_of(P, J, BP: tl.constexpr, W: tl.constexpr):
    """P[J W : (J + 1) W, :] of a panel [BP, W]."""
    if BP == W:
        return P
    else:
        ib = tl.arange(0, BP // W)
        return tl.sum(tl.where((ib == J)[:, None, None], tl.reshape(P, [BP // W, W, W]), 0.0), axis=0)


@triton.jit
def with_square(P, J, D, BP: tl.constexpr, W: tl.constexpr):
    """The panel P [BP, W] with D [W, W] as its rows J W : (J + 1) W."""
    if BP == W:
        return D
    else:
        ib = tl.arange(0, BP // W)
        return tl.reshape(
            tl.where((ib == J)[:, None, None], D[None, :, :], tl.reshape(P, [BP // W, W, W])), [BP, W]
        )


@triton.jit
def with_columns(A, J, P, BP: tl.constexpr, W: tl.constexpr):
    """The matrix A [BP, BP] with P [BP, W] as its columns J W : (J + 1) W."""
    if BP == W:
        return P
    else:
        jb = tl.arange(0, BP // W)
        return tl.reshape(
            tl.where((jb == J)[None, :, None], P[:, None, :], tl.reshape(A, [BP, BP // W, W])), [BP, BP]
        )


@triton.jit
def with_rows(A, J, R, BP: tl.constexpr, W: tl.constexpr):
    """The matrix A [BP, BP] with R [W, BP] as its rows J W : (J + 1) W."""
    if BP == W:
        return R
    else:
        ib = tl.arange(0, BP // W)
        return tl.reshape(
            tl.where((ib == J)[:, None, None], R[None, :, :], tl.reshape(A, [BP // W, W, BP])), [BP, BP]
        )


@triton.jit
def spd_inverse(A, n, BP: tl.constexpr, W: tl.constexpr):
    """A⁻¹ of a symmetric positive definite A [BP, BP] with the identity outside of [:n, :n], and the failed pivots.

    Only [:n, :n] of the result counts; it is symmetric to the bit, as both triangles are computed by the same sums.

    Gauss-Jordan elimination by panels: with D the pivot square, P its columns elsewhere and D = L Lᵀ, H = P L⁻ᵀ,
    A ← A − H Hᵀ outside of the panel, P ← H L⁻¹ and D ← −D⁻¹.   Once all panels are through, A holds −A⁻¹.   B³
    multiply-adds, half of which symmetry would save, against the same B³ / 2 in three sweeps by Cholesky factors; the
    forward error is that of Cholesky (Higham, ch. 14.4).
    """
    i = tl.arange(0, BP)
    failures = 0
    for J in range(tl.cdiv(n, W)):
        P = panel_of(A, J, BP, W)  # [BP, W]
        X, failed = cholesky_inverse(square_of(P, J, BP, W), W)  # L⁻¹
        failures += failed
        P = tl.where(((i >= J * W) & (i < J * W + W))[:, None], 0.0, P)
        H = matmul(P, tl.trans(X), "ieee")  # [BP, W]
        C = with_square(panel_matmul(H, X, BP), J, -matmul(tl.trans(X), X, "ieee"), BP, W)
        A -= panel_matmul(H, tl.trans(H), BP)
        A = with_rows(with_columns(A, J, C, BP, W), J, tl.trans(C), BP, W)
    return -A, failures


@triton.jit
def cholesky_inverse_by_panels(A, n, BP: tl.constexpr, W: tl.constexpr):
    """L⁻¹ of A = L Lᵀ [BP, BP], the identity outside of [:n, :n], and how many pivots were unusable."""
    i = tl.arange(0, BP)
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(A.dtype)
    failures = 0
    for J in range(tl.cdiv(n, W)):
        P = panel_of(A, J, BP, W)
        L_inverse, failed = cholesky_inverse(square_of(P, J, BP, W), W)
        failures += failed
        H = matmul(tl.where((i >= J * W + W)[:, None], P, 0.0), tl.trans(L_inverse), "ieee")
        R = matmul(L_inverse, tl.trans(panel_of(tl.trans(X), J, BP, W)), "ieee")  # rows of X, [W, BP]
        A -= panel_matmul(H, tl.trans(H), BP)
        X = with_rows(X - matmul(H, R, "ieee"), J, R, BP, W)
    return X, failures


@triton.jit
def triangular_inverse(L, W: tl.constexpr):
    """L⁻¹ of a lower triangular L [W, W]; what stands above its diagonal is not looked at."""
    i = tl.arange(0, W)
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(L.dtype)
    for j in range(W):
        column = tl.sum(tl.where((i == j)[None, :], L, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == j, column, 0.0))
        x = tl.sum(tl.where((i == j)[:, None], X, 0.0), axis=0) / pivot
        below = tl.where(i > j, column, 0.0)
        X = tl.where((i == j)[:, None], x[None, :], X - below[:, None] * x[None, :])
    return X


@triton.jit
def finite_or_inf(x):
    """x as float64, or +inf where it is no finite number."""
    x = x.to(tl.float64)
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def invert(M, n, damping, park, BP: tl.constexpr, W: tl.constexpr):
    """F⁻¹ of F = M + λ I with its condition and amplification, as the op spd_inverse_ defines them.

    M: [BP, BP], symmetric in [:n, :n], anything outside.   park: memory for n numbers of its type, overwritten: the
    diagonal waits there while the inverse needs the registers.
    Returns [BP, BP], zeros outside, all NaN where a pivot was unusable, and two float64 numbers.
    """
    i = tl.arange(0, BP)
    inside = (i < n)[:, None] & (i < n)[None, :]
    diagonal = i[:, None] == i[None, :]
    M = tl.where(inside, M, 0.0)
    ridge = tl.full([BP], damping, tl.float64).to(M.dtype)
    f = tl.sum(tl.where(diagonal, M, 0.0), axis=1)
    tl.store(park + i, f, mask=i < n)
    root = square_root(f + ridge)
    M = tl.where(diagonal, M + tl.where(i < n, ridge, 1.0)[:, None], M)
    A = tl.where(inside, M / root[:, None] / root[None, :], 0.0)
    norm = tl.sum(A * A)

    F, failures = spd_inverse(M, n, BP, W)

    tl.debug_barrier()
    f = tl.load(park + i, mask=i < n, other=0.0, volatile=True)
    F = tl.where(inside, F, 0.0)
    root = square_root(f + ridge)
    A = F * root[:, None] * root[None, :]
    condition = square_root(norm * tl.sum(A * A))
    columns = F * square_root(f)[None, :]
    amplification = square_root(norm * tl.sum(columns * columns)) * square_root(tl.max(f))
    failed = failures > 0
    condition = tl.where(failed, float("inf"), finite_or_inf(condition))
    amplification = tl.where(failed, float("inf"), finite_or_inf(amplification))
    return tl.where(failed, float("nan"), F), condition, amplification
