// matrix [K, B, B] <- its inverse, from the lower triangle: U^T U = A, X = L^-1, A^-1 = X^T X; B^3 / 2 multiply-adds a
// block in three parts of B^3 / 6, all inside the cache for B <= IN_CACHE.
#pragma once
#include "blocked.h"
#include "fisher_accumulate.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t IN_CACHE = 256;

template <class T>
inline void fill_nan(T* p, int64_t n) {
    const T nan = T(0) / T(0);
    for (int64_t i = 0; i < n; ++i) p[i] = nan;
}

// Up to this size both triangles of the inverse are computed: cheaper than mirroring one entry by entry.
constexpr int64_t MIRRORED_BY_PRODUCT = 64;

// ||s C s||_F of a symmetric C [n, n], of which the lower triangle is read.
template <class T>
inline double scaled_norm(int64_t n, const T* C, int64_t ld, const T* s) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) {
        const T* row = C + i * ld;
        Vec<T> sums = {};
        int64_t j = 0;
        for (; j + W<T> <= i; j += W<T>) {
            Vec<T> c;
            std::memcpy(&c, row + j, sizeof c);
            const Vec<T> scaled = c * (s[i] * vec(s + j));
            sums += scaled * scaled;
        }
        double sum = 0;
        for (int64_t l = 0; l < W<T>; ++l) sum += static_cast<double>(sums[l]);
        for (; j < i; ++j) {
            const double scaled = static_cast<double>(row[j] * (s[i] * s[j]));
            sum += scaled * scaled;
        }
        const double diagonal = static_cast<double>(row[i] * (s[i] * s[i]));
        squares += 2 * sum + diagonal * diagonal;
    }
    return std::sqrt(squares);
}

// s <- the square roots of the diagonal of a matrix [n, n]; returns the norm of the matrix scaled to unit diagonal.
template <class T>
inline double scale_of(int64_t n, const T* matrix, T* s) {
    for (int64_t i = 0; i < n; ++i) s[i] = T(1) / std::sqrt(matrix[i * n + i]);
    const double norm = scaled_norm<T>(n, matrix, n, s);
    for (int64_t i = 0; i < n; ++i) s[i] = T(1) / s[i];
    return norm;
}

// ||A||_F ||A^-1||_F from its factors; +inf where it is not a number.
FF_INLINE double condition_number(double norm, double inverse_norm) {
    const double product = norm * inverse_norm;
    return product < 1.0 / 0.0 ? product : 1.0 / 0.0;
}

// out [n, n] <- the symmetric matrix whose lower triangle is at C, in small squares so that the mirrored columns stay
// in cache while the rows are written.
template <class T>
inline void mirror(int64_t n, const T* C, int64_t ld, T* out) {
    for (int64_t i0 = 0; i0 < n; i0 += 16)
        for (int64_t j0 = 0; j0 <= i0; j0 += 16)
            for (int64_t i = i0; i < min(i0 + 16, n); ++i)
                for (int64_t j = j0; j < min(j0 + 16, i + 1); ++j) out[j * n + i] = out[i * n + j] = C[i * ld + j];
}

template <class T>
inline double invert_in_cache(T* matrix, int64_t n, T* U, T* X, int64_t ld, T* s) {
    const int64_t np = padded<T>(n);
    fill_zero(U, np * ld);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) U[j * ld + i] = matrix[i * n + j];
    for (int64_t i = n; i < np; ++i) U[i * ld + i] = T(1);
    const double norm = scale_of<T>(n, matrix, s);
    if (!cholesky<T>(n, U, ld)) return 1.0 / 0.0;
    triangular_inverse<T>(n, U, ld, X, ld);
    if (n <= MIRRORED_BY_PRODUCT) {
        triangular_gram<T, true>(n, X, ld, U, ld);
        for (int64_t i = 0; i < n; ++i) std::memcpy(matrix + i * n, U + i * ld, static_cast<size_t>(n) * sizeof(T));
    } else {
        triangular_gram<T, false>(n, X, ld, U, ld);
        mirror<T>(n, U, ld, matrix);
    }
    return condition_number(norm, scaled_norm<T>(n, U, ld, s));
}

template <class T>
inline double invert_large(T* matrix, int64_t n, int threads) {
    Scratch<T> X(n * n), s(n);
    const double norm = scale_of<T>(n, matrix, s);
    mirror<T>(n, matrix, n, matrix);
    if (!blocked_cholesky<T>(n, matrix, n, threads)) return 1.0 / 0.0;
    blocked_inverse<T>(n, matrix, n, X, threads);
    mirror<T>(n, matrix, n, matrix);
    return condition_number(norm, scaled_norm<T>(n, matrix, n, s));
}

template <class T>
void spd_inverse(T* matrix, int64_t num_blocks, int64_t B, double* condition, int threads) {
    auto settle = [&](int64_t b, double value) {
        condition[b] = value;
        if (!(value < 1.0 / 0.0)) fill_nan(matrix + b * B * B, B * B);
    };
    if (B <= IN_CACHE) {
        const int64_t per_task = blocks_per_task(num_blocks, threads);
        auto task = [&](int64_t t) {
            const int64_t ld = leading<T>(B), np = padded<T>(B);
            Scratch<T> U(np * ld), X(np * ld), s(B);
            for (int64_t b = t * per_task; b < min(num_blocks, (t + 1) * per_task); ++b)
                settle(b, invert_in_cache<T>(matrix + b * B * B, B, U, X, ld, s));
        };
        return parallel(ceil_div(num_blocks, per_task), threads, task);
    }
    // Either whole blocks to threads, or the tiles of one block after the other: the same arithmetic both ways.
    const bool spread_blocks = num_blocks >= threads;
    auto task = [&](int64_t b) { settle(b, invert_large<T>(matrix + b * B * B, B, spread_blocks ? 1 : threads)); };
    parallel(num_blocks, spread_blocks ? threads : 1, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
