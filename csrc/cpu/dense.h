// Dense linear algebra on row-major matrices, all of it on one register tile: C += or -= A^T B, where A [K, M] and
// B [K, N] share their leading (contracted) index. Cholesky factors are kept as U = L^T, because then every step of
// factor, substitution, triangular inverse and Gram product contracts over rows and reads contiguous memory:
//
//   factor        U[I, :] = A[I, :] - sum_k U[k, I] U[k, :]      (k above the panel I of MR rows)
//   substitution  R[I, :] = R[I, :] - sum_k U[k, I] R[k, :]      gives L^-1 R
//   inverse       C = X^T X with X = L^-1
//
// "Scratch matrices" have a row stride `ld` from leading<T>() and rows and columns padded to PAD<T>; work on them needs
// no masks. What the padding of a result holds is never read as data.
#pragma once
#include "simd.h"

namespace ff {
namespace FF_NAMESPACE {

// C[MR, vectors * W] += SIGN * A^T B over K rows, or with SIGN = 0 C <- A^T B; with ROWS, A is [MR, K] and counts as it
// stands: A B.
template <class T, int VECTORS, int SIGN, bool ROWS = false>
FF_INLINE void tile(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc) {
    Vec<T> acc[MR][VECTORS] = {};
    for (int64_t k = 0; k < K; ++k, A += ROWS ? 1 : lda, B += ldb) {
        Vec<T> b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) b[v] = vec(B + v * W<T>);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) acc[r][v] += A[ROWS ? r * lda : r] * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            Vec<T>& c = vec(C + r * ldc + v * W<T>);
            if (SIGN == 0) {
                c = acc[r][v];
            } else if (SIGN > 0) {
                c += acc[r][v];
            } else {
                c -= acc[r][v];
            }
        }
    }
}

// One row of tiles: C[MR, columns] += SIGN * A^T B, or as above; columns is rounded up to a vector.
template <class T, int SIGN, bool ROWS = false>
inline void tile_row(int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, T* C, int64_t ldc, int64_t columns) {
    static_assert(NV >= 2 && NV <= 4, "tile_row spells out the tail widths");
    int64_t left = ceil_div(columns, W<T>);
    for (; left >= NV; left -= NV, B += NV * W<T>, C += NV * W<T>) tile<T, NV, SIGN, ROWS>(K, A, lda, B, ldb, C, ldc);
    if (left == 1) tile<T, 1, SIGN, ROWS>(K, A, lda, B, ldb, C, ldc);
    if (NV > 2 && left == 2) tile<T, 2, SIGN, ROWS>(K, A, lda, B, ldb, C, ldc);
    if (NV > 3 && left == 3) tile<T, 3, SIGN, ROWS>(K, A, lda, B, ldb, C, ldc);
}

// C[M, N] += SIGN * A^T B on scratch matrices.
template <class T, int SIGN>
inline void product(int64_t K, const T* A, int64_t lda, int64_t M, const T* B, int64_t ldb, int64_t N, T* C,
                    int64_t ldc) {
    for (int64_t i = 0; i < M; i += MR) tile_row<T, SIGN>(K, A + i, lda, B, ldb, C + i * ldc, ldc, N);
}

template <class T, int VECTORS, int SIGN>
FF_INLINE void vector_tile(int64_t K, const T* a, const T* B, int64_t ldb, T* c) {
    Vec<T> acc[VECTORS] = {};
    for (int64_t k = 0; k < K; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) acc[v] += a[k] * vec(B + k * ldb + v * W<T>);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        if (SIGN == 0) {
            vec(c + v * W<T>) = acc[v];
        } else {
            vec(c + v * W<T>) -= acc[v];
        }
    }
}

// c [columns] <- a B, or with SIGN = -1 c -= a B, for one row a [K]; columns is rounded up to a vector.
template <class T, int SIGN>
inline void vector_times(int64_t K, const T* a, const T* B, int64_t ldb, T* c, int64_t columns) {
    int64_t left = ceil_div(columns, W<T>);
    for (; left >= 4; left -= 4, B += 4 * W<T>, c += 4 * W<T>) vector_tile<T, 4, SIGN>(K, a, B, ldb, c);
    if (left == 1) vector_tile<T, 1, SIGN>(K, a, B, ldb, c);
    if (left == 2) vector_tile<T, 2, SIGN>(K, a, B, ldb, c);
    if (left == 3) vector_tile<T, 3, SIGN>(K, a, B, ldb, c);
}

// Lower triangle of C[n, n] += SIGN * P^T P, or <- with SIGN = 0, on scratch matrices; some entries above the diagonal
// are written too.
template <class T, int SIGN>
inline void gram_lower(int64_t K, const T* P, int64_t ldp, int64_t n, T* C, int64_t ldc) {
    for (int64_t i = 0; i < n; i += MR)
        tile_row<T, SIGN>(K, P + i, ldp, P, ldp, C + i * ldc, ldc, min(i + MR, padded<T>(n)));
}

// Upper triangle of C[n, n] += P^T P on scratch matrices; some entries below the diagonal are written too.
template <class T>
inline void gram_upper(int64_t K, const T* P, int64_t ldp, int64_t n, T* C, int64_t ldc) {
    for (int64_t i = 0; i < n; i += MR) {
        const int64_t j = i / W<T> * W<T>;
        tile_row<T, 1>(K, P + i, ldp, P + j, ldp, C + i * ldc + j, ldc, padded<T>(n) - j);
    }
}

// Dot product, summed as Sum in a fixed order of sixteen partial sums.
template <class Sum, class T>
FF_INLINE Sum dot(const T* a, const T* b, int64_t n) {
    Sum lanes[16] = {};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<Sum>(a[j + l]) * static_cast<Sum>(b[j + l]);
    for (int64_t l = 0; j < n; ++j, ++l) lanes[l] += static_cast<Sum>(a[j]) * static_cast<Sum>(b[j]);
    Sum sum = 0;
    for (Sum lane : lanes) sum += lane;
    return sum;
}

// y[0..n) -= a x[0..n), n rounded up to a vector.
template <class T>
FF_INLINE void subtract_scaled(T a, const T* x, T* y, int64_t n) {
    for (int64_t j = 0; j < n; j += W<T>) vec(y + j) -= a * vec(x + j);
}
template <class T>
FF_INLINE void scale(T a, T* x, int64_t n) {
    for (int64_t j = 0; j < n; j += W<T>) vec(x + j) *= a;
}

// Scratch matrix [n, n]: upper triangle <- U with A = U^T U, A from the upper triangle. The padding must hold a unit
// diagonal. False where a pivot is not positive and finite. What lies below the diagonal is destroyed.
template <class T>
inline bool cholesky(int64_t n, T* U, int64_t ld) {
    const int64_t np = padded<T>(n);
    for (int64_t i0 = 0; i0 < n; i0 += MR) {
        const int64_t j0 = i0 / W<T> * W<T>;
        tile_row<T, -1>(i0, U + i0, ld, U + j0, ld, U + i0 * ld + j0, ld, np - j0);
        for (int64_t i = i0; i < i0 + MR; ++i) {
            const T pivot = U[i * ld + i];
            if (!usable_pivot(pivot)) return false;
            const int64_t j = i / W<T> * W<T>;
            scale(T(1) / std::sqrt(pivot), U + i * ld + j, np - j);
            for (int64_t r = i + 1; r < i0 + MR; ++r)
                subtract_scaled(U[i * ld + r], U + i * ld + j, U + r * ld + j, np - j);
        }
    }
    return true;
}

// Rows i0 .. i0 + MR of R, already freed of the rows above, <- their part of L^-1 R; `columns` rounded up to a vector.
template <class T>
FF_INLINE void substitute_panel(int64_t i0, const T* U, int64_t ldu, T* R, int64_t ldr, int64_t columns) {
    for (int64_t i = i0; i < i0 + MR; ++i) {
        scale(T(1) / U[i * ldu + i], R + i * ldr, columns);
        for (int64_t r = i + 1; r < i0 + MR; ++r) subtract_scaled(U[i * ldu + r], R + i * ldr, R + r * ldr, columns);
    }
}

// Scratch matrices: R [n, columns] <- L^-1 R.
template <class T>
inline void substitute(int64_t n, const T* U, int64_t ldu, T* R, int64_t ldr, int64_t columns) {
    for (int64_t i0 = 0; i0 < n; i0 += MR) {
        tile_row<T, -1>(i0, U + i0, ldu, R, ldr, R + i0 * ldr, ldr, columns);
        substitute_panel(i0, U, ldu, R, ldr, columns);
    }
}

// Scratch matrices: X [n, n] <- L^-1 (lower triangle; zero above it).
template <class T>
inline void triangular_inverse(int64_t n, const T* U, int64_t ldu, T* X, int64_t ldx) {
    const int64_t np = padded<T>(n);
    for (int64_t i0 = 0; i0 < n; i0 += MR) {
        for (int64_t i = i0; i < i0 + MR; ++i) {
            fill_zero(X + i * ldx, np);
            X[i * ldx + i] = T(1);
        }
        // X[k, j] = 0 for k < j: the columns of a group of vectors need the rows from its first column on.
        const int64_t group = NV * W<T>;
        for (int64_t j = 0; j < i0; j += group)
            tile_row<T, -1>(i0 - j, U + j * ldu + i0, ldu, X + j * ldx + j, ldx, X + i0 * ldx + j, ldx,
                            min(group, padded<T>(i0) - j));
        substitute_panel(i0, U, ldu, X, ldx, min(i0 + MR, np));
    }
}

// Scratch matrices: C [n, n] <- X^T X for a lower triangular X, all of it or (FULL = false) the lower triangle with
// some entries above it. Both triangles come out equal to the bit: the same products in the same order, and exact
// zeros.
template <class T, bool FULL>
inline void triangular_gram(int64_t n, const T* X, int64_t ldx, T* C, int64_t ldc) {
    const int64_t np = padded<T>(n);
    for (int64_t i = 0; i < n; i += MR) {
        for (int64_t r = i; r < i + MR; ++r) fill_zero(C + r * ldc, np);
        tile_row<T, 1>(n - i, X + i * ldx + i, ldx, X + i * ldx, ldx, C + i * ldc, ldc, FULL ? np : min(i + MR, np));
    }
}

// L y = b and U x = y for `columns` right-hand sides b [n, columns], in place (any memory).
template <class T>
inline void solve_vectors(int64_t n, const T* U, int64_t ldu, T* b, int64_t columns) {
    if (columns == 1) {
        for (int64_t i = 0; i < n; ++i) {
            const T y = b[i] / U[i * ldu + i];
            b[i] = y;
            const T* __restrict__ u = U + i * ldu;
            for (int64_t j = i + 1; j < n; ++j) b[j] -= u[j] * y;
        }
        for (int64_t i = n - 1; i >= 0; --i) {
            const T* u = U + i * ldu;
            b[i] = (b[i] - dot<T>(u + i + 1, b + i + 1, n - i - 1)) / u[i];
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        T* bi = b + i * columns;
        for (int64_t c = 0; c < columns; ++c) bi[c] /= U[i * ldu + i];
        for (int64_t j = i + 1; j < n; ++j)
            for (int64_t c = 0; c < columns; ++c) b[j * columns + c] -= U[i * ldu + j] * bi[c];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
        T* bi = b + i * columns;
        for (int64_t j = i + 1; j < n; ++j)
            for (int64_t c = 0; c < columns; ++c) bi[c] -= U[i * ldu + j] * b[j * columns + c];
        for (int64_t c = 0; c < columns; ++c) bi[c] /= U[i * ldu + i];
    }
}

}  // namespace FF_NAMESPACE
}  // namespace ff
