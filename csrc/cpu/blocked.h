// The same dense algebra for matrices too large for the cache: panels of SPAN rows, products of packed tiles, the tiles
// of one product spread over threads. Matrices here are plain row-major memory with any row stride, no padding.
#pragma once
#include "dense.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t SPAN = 192;  // rows and columns of a cache tile: a multiple of PAD for every type and instruction set
constexpr int64_t DEPTH = 128;  // contracted rows packed at a time

// to [rows, ld] <- from [rows, columns], columns zero-padded to a vector.
template <class T>
FF_INLINE void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t ld) {
    const int64_t width = padded<T>(columns);
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * ld, from + r * stride, static_cast<size_t>(columns) * sizeof(T));
        fill_zero(to + r * ld + columns, width - columns);
    }
}

// Scratch of one thread for products of tiles.
template <class T>
struct TileScratch {
    const int64_t ld = leading<T>(SPAN);
    Scratch<T> a{DEPTH * leading<T>(SPAN)}, b{DEPTH * leading<T>(SPAN)}, c{SPAN * leading<T>(SPAN)};
};

// s.c [M, N] += SIGN * A^T B over K rows; M, N <= SPAN.
template <class T, int SIGN>
inline void packed_product(TileScratch<T>& s, int64_t K, const T* A, int64_t lda, int64_t M, const T* B, int64_t ldb,
                           int64_t N) {
    const bool same = A == B && M == N;
    for (int64_t k = 0; k < K; k += DEPTH) {
        const int64_t depth = min(DEPTH, K - k);
        pack<T>(A + k * lda, lda, depth, M, s.a, s.ld);
        if (!same) pack<T>(B + k * ldb, ldb, depth, N, s.b, s.ld);
        product<T, SIGN>(depth, s.a, s.ld, M, same ? s.a : s.b, s.ld, N, s.c, s.ld);
    }
}

// Scratch <-> memory for a tile.
template <class T>
FF_INLINE void load_tile(TileScratch<T>& s, const T* from, int64_t stride, int64_t rows, int64_t columns) {
    fill_zero<T>(s.c, padded<T>(rows) * s.ld);
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(s.c + r * s.ld, from + r * stride, static_cast<size_t>(columns) * sizeof(T));
}
template <class T>
FF_INLINE void store_tile(TileScratch<T>& s, T* to, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * stride, s.c + r * s.ld, static_cast<size_t>(columns) * sizeof(T));
}

// Rows p .. p + rows of R [., columns], freed of all rows above, <- L^-1 R there: multiplication with the small inverse
// factor Xt [rows, rows] (transposed, scratch). One column tile per task.
template <class T>
inline void solve_panel(TileScratch<T>& s, int64_t rows, T* Xt, T* R, int64_t ldr, int64_t columns) {
    for (int64_t k = 0; k < rows; k += DEPTH) {
        const int64_t depth = min(DEPTH, rows - k);
        pack<T>(R + k * ldr, ldr, depth, columns, s.b, s.ld);
        if (k == 0) fill_zero<T>(s.c, padded<T>(rows) * s.ld);
        product<T, 1>(depth, Xt + k * s.ld, s.ld, rows, s.b, s.ld, columns, s.c, s.ld);
    }
    store_tile(s, R, ldr, rows, columns);
}

// Xt [rows, rows] (scratch, row stride leading(SPAN)) <- (L^-1)^T of the diagonal panel U [rows, rows].
template <class T>
inline void panel_inverse(int64_t rows, const T* U, int64_t ldu, T* Xt) {
    const int64_t ld = leading<T>(SPAN), np = padded<T>(rows);
    Scratch<T> u(np * ld), x(np * ld);
    fill_zero<T>(u, np * ld);
    for (int64_t r = 0; r < np; ++r) {
        if (r < rows) std::memcpy(u + r * ld + r, U + r * ldu + r, static_cast<size_t>(rows - r) * sizeof(T));
        if (r >= rows) u[r * ld + r] = T(1);
    }
    triangular_inverse<T>(rows, u, ld, x, ld);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < np; ++c) Xt[r * ld + c] = c < rows ? x[c * ld + r] : T(0);
}

// A [n, n] <- U in its upper triangle, zeros below; A from its upper triangle. False where a pivot is unusable.
template <class T>
inline bool blocked_cholesky(int64_t n, T* A, int64_t lda, int threads) {
    const int64_t ld = leading<T>(SPAN);
    Scratch<T> diagonal(SPAN * ld), inverse(SPAN * ld);
    for (int64_t p = 0; p < n; p += SPAN) {
        const int64_t rows = min(SPAN, n - p), np = padded<T>(rows);
        const int64_t tiles = ceil_div(n - p, SPAN);
        auto update = [&](int64_t t) {
            const int64_t j = p + t * SPAN, columns = min(SPAN, n - j);
            TileScratch<T> s;
            load_tile(s, A + p * lda + j, lda, rows, columns);
            packed_product<T, -1>(s, p, A + p, lda, rows, A + j, lda, columns);
            store_tile(s, A + p * lda + j, lda, rows, columns);
        };
        if (p > 0) parallel(tiles, threads, update);

        fill_zero<T>(diagonal, np * ld);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(diagonal + r * ld + r, A + (p + r) * lda + p + r, static_cast<size_t>(rows - r) * sizeof(T));
        for (int64_t r = rows; r < np; ++r) diagonal[r * ld + r] = T(1);
        if (!cholesky<T>(rows, diagonal, ld)) return false;
        for (int64_t r = 0; r < rows; ++r) {
            fill_zero(A + (p + r) * lda, p + r);
            std::memcpy(A + (p + r) * lda + p + r, diagonal + r * ld + r, static_cast<size_t>(rows - r) * sizeof(T));
        }
        if (tiles == 1) break;
        panel_inverse<T>(rows, A + p * lda + p, lda, inverse);
        auto solve = [&](int64_t t) {
            const int64_t j = p + (t + 1) * SPAN;
            TileScratch<T> s;
            solve_panel<T>(s, rows, inverse, A + p * lda + j, lda, min(SPAN, n - j));
        };
        parallel(tiles - 1, threads, solve);
    }
    return true;
}

// A [n, n], lower triangle <- the lower triangle of (U^T U)^-1; U from the upper triangle of A, which is destroyed.
// X: memory for n * n values.
template <class T>
inline void blocked_inverse(int64_t n, T* A, int64_t lda, T* X, int threads) {
    const int64_t ld = leading<T>(SPAN);
    Scratch<T> inverse(SPAN * ld);
    for (int64_t p = 0; p < n; p += SPAN) {
        const int64_t rows = min(SPAN, n - p);
        panel_inverse<T>(rows, A + p * lda + p, lda, inverse);
        for (int64_t r = 0; r < rows; ++r) {
            fill_zero<T>(X + (p + r) * n, n);
            for (int64_t c = 0; c <= r; ++c) X[(p + r) * n + p + c] = inverse[c * ld + r];
        }
        auto task = [&](int64_t t) {
            const int64_t j = t * SPAN;
            TileScratch<T> s;
            fill_zero<T>(s.c, padded<T>(rows) * s.ld);
            packed_product<T, -1>(s, p - j, A + j * lda + p, lda, rows, X + j * n + j, n, SPAN);
            store_tile(s, X + p * n + j, n, rows, SPAN);
            solve_panel<T>(s, rows, inverse, X + p * n + j, n, SPAN);
        };
        parallel(p / SPAN, threads, task);
    }
    const int64_t tiles = ceil_div(n, SPAN);
    auto gram = [&](int64_t task) {
        const int64_t i = task / tiles * SPAN, j = task % tiles * SPAN;
        if (j > i) return;
        const int64_t rows = min(SPAN, n - i), columns = min(SPAN, n - j);
        TileScratch<T> s;
        fill_zero<T>(s.c, padded<T>(rows) * s.ld);
        packed_product<T, 1>(s, n - i, X + i * n + i, n, rows, X + i * n + j, n, columns);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(A + (i + r) * lda + j, s.c + r * s.ld,
                        static_cast<size_t>(min(columns, i + r - j + 1)) * sizeof(T));
    };
    parallel(tiles * tiles, threads, gram);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
