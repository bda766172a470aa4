// matrix [K, B, B] <- (M + damping I)^-1, from the lower triangle of M: U^T U = F, X = L^-1, F^-1 = X^T X; B^3 / 2
// multiply-adds a block in three parts of B^3 / 6, all inside the cache for B <= IN_CACHE. The norms behind the two
// estimates take another B^2 / 2 before and after.
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

// What kernels.h calls condition and amplification, of one block.
struct Estimates {
    double condition, amplification;
};
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr Estimates FAILED = {INFINITE, INFINITE};

// Up to this size both triangles of the inverse are computed: cheaper than mirroring one entry by entry.
constexpr int64_t MIRRORED_BY_PRODUCT = 64;

// Sums of squares over a row of a lower triangle, the diagonal aside: (c s_i s_j)^2, and with COLUMNS also
// (c r_i)^2 + (c r_j)^2, which is what c adds to the norm of C diag(r) from below and from above the diagonal.
struct RowSums {
    double both, columns;
};
template <class T, bool COLUMNS>
inline RowSums row_sums(int64_t i, const T* row, const T* s, const T* r) {
    Vec<T> both = {}, columns = {};
    int64_t j = 0;
    for (; j + W<T> <= i; j += W<T>) {
        Vec<T> c;
        std::memcpy(&c, row + j, sizeof c);
        const Vec<T> scaled = c * (s[i] * vec(s + j));
        both += scaled * scaled;
        if (COLUMNS) {
            const Vec<T> here = c * r[i], there = c * vec(r + j);
            columns += here * here + there * there;
        }
    }
    RowSums sums = {0, 0};
    for (int64_t l = 0; l < W<T>; ++l) {
        sums.both += static_cast<double>(both[l]);
        sums.columns += static_cast<double>(columns[l]);
    }
    for (; j < i; ++j) {
        const double c = static_cast<double>(row[j]), scaled = c * static_cast<double>(s[i] * s[j]);
        const double here = c * static_cast<double>(r[i]), there = c * static_cast<double>(r[j]);
        sums.both += scaled * scaled;
        sums.columns += here * here + there * there;
    }
    return sums;
}

// The scales of a matrix F = M + damping I and the norm of F scaled to unit diagonal, taken before F is overwritten.
template <class T>
struct Scales {
    explicit Scales(int64_t n) : root(padded<T>(n)), inverse_root(padded<T>(n)), f_root(padded<T>(n)) {}
    Scratch<T> root, inverse_root;  // diag(F)^1/2 and diag(F)^-1/2
    Scratch<T> f_root;              // diag(M)^1/2
    double norm = 0;                // ||A||_F
    T largest = 0;                  // max diag(M)

    void measure(int64_t n, const T* M, int64_t ld, T damping) {
        largest = T(0);
        for (int64_t i = 0; i < n; ++i) {
            const T f = M[i * ld + i];
            root[i] = std::sqrt(f + damping);
            inverse_root[i] = T(1) / root[i];
            f_root[i] = std::sqrt(f);
            largest = f > largest ? f : largest;
        }
        double squares = static_cast<double>(n);
        for (int64_t i = 0; i < n; ++i) squares += 2 * row_sums<T, false>(i, M + i * ld, inverse_root, f_root).both;
        norm = std::sqrt(squares);
    }

    // From the lower triangle of the inverse.
    Estimates estimates(int64_t n, const T* inverse, int64_t ld) {
        double both = 0, columns = 0;
        for (int64_t i = 0; i < n; ++i) {
            const RowSums sums = row_sums<T, true>(i, inverse + i * ld, root, f_root);
            const double c = static_cast<double>(inverse[i * ld + i]);
            const double scaled = c * static_cast<double>(root[i] * root[i]),
                         column = c * static_cast<double>(f_root[i]);
            both += 2 * sums.both + scaled * scaled;
            columns += sums.columns + column * column;
        }
        const double condition = norm * std::sqrt(both);
        const double amplification = norm * std::sqrt(columns * static_cast<double>(largest));
        if (!(condition < INFINITE)) return FAILED;
        return {condition, amplification < INFINITE ? amplification : INFINITE};
    }
};

// out [n, n] <- the symmetric matrix whose lower triangle is at C, in small squares so that the mirrored columns stay
// in cache while the rows are written.
template <class T>
inline void mirror(int64_t n, const T* C, int64_t ld, T* out, int64_t ldo) {
    for (int64_t i0 = 0; i0 < n; i0 += 16)
        for (int64_t j0 = 0; j0 <= i0; j0 += 16)
            for (int64_t i = i0; i < min(i0 + 16, n); ++i)
                for (int64_t j = j0; j < min(j0 + 16, i + 1); ++j) out[j * ldo + i] = out[i * ldo + j] = C[i * ld + j];
}

// Scratch for blocks of up to B <= IN_CACHE weights, set up once a task.
template <class T>
struct InverseScratch {
    explicit InverseScratch(int64_t B) : ld(leading<T>(B)), U(padded<T>(B) * ld), X(padded<T>(B) * ld), scales(B) {}
    const int64_t ld;
    Scratch<T> U, X;
    Scales<T> scales;
};

// out [n, n] <- (M + damping I)^-1; M and out may be the same memory.
template <class T>
inline Estimates invert_in_cache(int64_t n, const T* M, int64_t ldm, T damping, T* out, int64_t ldo,
                                 InverseScratch<T>& s) {
    const int64_t np = padded<T>(n), ld = s.ld;
    fill_zero<T>(s.U, np * ld);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) s.U[j * ld + i] = M[i * ldm + j];
        s.U[i * ld + i] = M[i * ldm + i] + damping;
    }
    for (int64_t i = n; i < np; ++i) s.U[i * ld + i] = T(1);
    s.scales.measure(n, M, ldm, damping);
    if (!cholesky<T>(n, s.U, ld)) return FAILED;
    triangular_inverse<T>(n, s.U, ld, s.X, ld);
    if (n <= MIRRORED_BY_PRODUCT) {
        triangular_gram<T, true>(n, s.X, ld, s.U, ld);
        for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * ldo, s.U + i * ld, static_cast<size_t>(n) * sizeof(T));
    } else {
        triangular_gram<T, false>(n, s.X, ld, s.U, ld);
        mirror<T>(n, s.U, ld, out, ldo);
    }
    return s.scales.estimates(n, s.U, ld);
}

template <class T>
inline Estimates invert_large(int64_t n, T* matrix, int64_t ld, T damping, int threads) {
    Scratch<T> X(n * n);
    Scales<T> scales(n);
    scales.measure(n, matrix, ld, damping);
    for (int64_t i = 0; i < n; ++i) matrix[i * ld + i] += damping;
    mirror<T>(n, matrix, ld, matrix, ld);
    if (!blocked_cholesky<T>(n, matrix, ld, threads)) return FAILED;
    blocked_inverse<T>(n, matrix, ld, X, threads);
    mirror<T>(n, matrix, ld, matrix, ld);
    return scales.estimates(n, matrix, ld);
}

// Inverts blocks of length(b) <= B weights that lie at state + b B B; settle(b, estimates) ends each.
template <class T, class Length, class Settle>
inline void invert_blocks(T* state, int64_t num_blocks, int64_t B, T damping, int threads, Length length,
                          Settle settle) {
    if (B <= IN_CACHE) {
        const int64_t per_task = blocks_per_task(num_blocks, threads);
        auto task = [&](int64_t t) {
            InverseScratch<T> s(B);
            for (int64_t b = t * per_task; b < min(num_blocks, (t + 1) * per_task); ++b)
                settle(b, invert_in_cache<T>(length(b), state + b * B * B, B, damping, state + b * B * B, B, s));
        };
        return parallel(ceil_div(num_blocks, per_task), threads, task);
    }
    // Either whole blocks to threads, or the tiles of one block after the other: the same arithmetic both ways.
    const bool spread_blocks = num_blocks >= threads;
    auto task = [&](int64_t b) {
        settle(b, invert_large<T>(length(b), state + b * B * B, B, damping, spread_blocks ? 1 : threads));
    };
    parallel(num_blocks, spread_blocks ? threads : 1, task);
}

template <class T>
void spd_inverse(T* matrix, int64_t num_blocks, int64_t B, double damping, double* condition, double* amplification,
                 int threads) {
    auto settle = [&](int64_t b, Estimates found) {
        condition[b] = found.condition;
        amplification[b] = found.amplification;
        if (!(found.condition < INFINITE)) fill_nan(matrix + b * B * B, B * B);
    };
    invert_blocks<T>(matrix, num_blocks, B, static_cast<T>(damping), threads, [=](int64_t) { return B; }, settle);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
