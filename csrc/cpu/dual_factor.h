// factor [K, k, k] <- U = L^T with C = m damping I + G G^T = L L^T, per block, in float64 whatever the gradients are:
// products of two float32 values are exact in float64, so the small eigenvalues of C survive any gradient-to-damping
// ratio.
#pragma once
#include "spd_inverse.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t REACH = 2048;  // weights looked at to gather DEPTH kept ones

// Upper triangle of one tile of C: rows i0.., columns j0.. >= i0, of sum_q G[i, q] G[j, q] over the weights that `keep`
// (if given) does not exclude; only those are packed and multiplied.
inline void dual_gram_tile(double* C, int64_t k, const Gradients& g, int64_t start, int64_t n, const uint8_t* keep,
                           double ridge, int64_t i0, int64_t j0) {
    const int64_t rows = min(SPAN, k - i0), columns = min(SPAN, k - j0);
    TileScratch<double> s;
    Scratch<double> lines(MR * REACH);
    Scratch<int64_t> kept(DEPTH);
    const int64_t* picked = keep ? static_cast<int64_t*>(kept) : nullptr;
    fill_zero<double>(s.c, padded<double>(rows) * s.ld);
    for (int64_t q = 0, span; q < n; q += span) {
        int64_t depth = 0;
        if (keep) {
            for (span = 0; span < min(REACH, n - q) && depth < DEPTH; ++span)
                if (keep[start + q + span]) kept[depth++] = span;
        } else {
            span = depth = min(DEPTH, n - q);
        }
        if (depth == 0) continue;
        pack_transposed<double>(g, i0, rows, start + q, depth, s.a, s.ld, padded<double>(rows), lines, picked, span);
        if (i0 == j0) {
            gram_lower<double, 1>(depth, s.a, s.ld, rows, s.c, s.ld);
        } else {
            pack_transposed<double>(g, j0, columns, start + q, depth, s.b, s.ld, padded<double>(columns), lines, picked,
                                    span);
            product<double, 1>(depth, s.a, s.ld, rows, s.b, s.ld, columns, s.c, s.ld);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        if (i0 != j0) {
            std::memcpy(C + (i0 + i) * k + j0, s.c + i * s.ld, static_cast<size_t>(columns) * sizeof(double));
            continue;
        }
        for (int64_t j = i; j < columns; ++j) C[(i0 + i) * k + j0 + j] = s.c[j * s.ld + i];
        C[(i0 + i) * k + i0 + i] += ridge;
    }
}

// C [k, k], upper triangle <- the Gram matrix with its ridge; tiles over threads.
inline void dual_gram(double* C, const Gradients& g, int64_t start, int64_t n, const uint8_t* keep, double ridge,
                      int threads) {
    const int64_t k = g.rows, tiles = ceil_div(k, SPAN);
    auto task = [&](int64_t t) {
        const int64_t i = t / tiles, j = t % tiles;
        if (j >= i) dual_gram_tile(C, k, g, start, n, keep, ridge, i * SPAN, j * SPAN);
    };
    parallel(tiles * tiles, threads, task);
}

// ||A^-1||_2 for A = D C D with unit diagonal, by a few power iterations from a fixed start; `diagonal` is that of C.
inline double inverse_norm(int64_t k, const double* U, const double* diagonal) {
    Scratch<double> x(k);
    for (int64_t i = 0; i < k; ++i) x[i] = (i * 2654435761u >> 7 & 1) ? 1.0 : -1.0;
    double norm = std::sqrt(static_cast<double>(k));
    double estimate = 1;
    for (int iteration = 0; iteration < 3; ++iteration) {
        for (int64_t i = 0; i < k; ++i) x[i] *= std::sqrt(diagonal[i]) / norm;
        solve_vectors<double>(k, U, k, x, 1);
        double squares = 0;
        for (int64_t i = 0; i < k; ++i) {
            x[i] *= std::sqrt(diagonal[i]);
            squares += x[i] * x[i];
        }
        norm = std::sqrt(squares);
        estimate = norm;
    }
    return estimate < 1.0 / 0.0 ? estimate : 1.0 / 0.0;
}

// All of it for k <= IN_CACHE: the matrix is summed and factored in scratch memory that a task sets up once. Matrix and
// panel share the second-level cache, so the panel is shallow beside a large matrix.
struct DualScratch {
    explicit DualScratch(int64_t k)
        : depth(k <= DEPTH ? DEPTH : DEPTH / 2),
          ld(leading<double>(k)),
          panel(depth * ld),
          C(padded<double>(k) * ld),
          lines(MR * depth),
          diagonal(k) {}
    const int64_t depth, ld;
    Scratch<double> panel, C, lines, diagonal;
};

inline double factor_in_cache(double* U, const Gradients& g, int64_t start, int64_t n, double ridge, DualScratch& s) {
    const int64_t k = g.rows, kp = padded<double>(k);
    fill_zero<double>(s.C, kp * s.ld);
    for (int64_t q = 0; q < n; q += s.depth) {
        const int64_t depth = min(s.depth, n - q);
        pack_transposed<double>(g, 0, k, start + q, depth, s.panel, s.ld, kp, s.lines);
        gram_upper<double>(depth, s.panel, s.ld, k, s.C, s.ld);
    }
    for (int64_t i = 0; i < kp; ++i) s.C[i * s.ld + i] += i < k ? ridge : 1.0;
    for (int64_t i = 0; i < k; ++i) s.diagonal[i] = s.C[i * s.ld + i];
    if (!cholesky<double>(k, s.C, s.ld)) return 1.0 / 0.0;
    for (int64_t i = 0; i < k; ++i) {
        fill_zero(U + i * k, i);
        std::memcpy(U + i * k + i, s.C + i * s.ld + i, static_cast<size_t>(k - i) * sizeof(double));
    }
    return inverse_norm(k, U, s.diagonal);
}

inline double factor_large(double* C, const Gradients& g, int64_t start, int64_t n, double ridge, int threads) {
    const int64_t k = g.rows;
    dual_gram(C, g, start, n, nullptr, ridge, threads);
    Scratch<double> diagonal(k);
    for (int64_t i = 0; i < k; ++i) diagonal[i] = C[i * k + i];
    if (!blocked_cholesky<double>(k, C, k, threads)) return 1.0 / 0.0;
    return inverse_norm(k, C, diagonal);
}

inline void dual_factor(double* factor, Gradients g, Blocks blocks, double num_grads, double damping, double* condition,
                        int threads) {
    const int64_t k = g.rows;
    auto settle = [&](int64_t b, double value) {
        condition[b] = value;
        if (!(value < 1.0 / 0.0)) fill_nan(factor + b * k * k, k * k);
    };
    if (k <= IN_CACHE) {
        const int64_t per_task = blocks_per_task(blocks.count, threads);
        auto task = [&](int64_t t) {
            DualScratch s(k);
            for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
                settle(b, factor_in_cache(factor + b * k * k, g, blocks.start(b), blocks.length(b), num_grads * damping,
                                          s));
        };
        return parallel(ceil_div(blocks.count, per_task), threads, task);
    }
    const bool spread_blocks = blocks.count >= threads;
    auto task = [&](int64_t b) {
        settle(b, factor_large(factor + b * k * k, g, blocks.start(b), blocks.length(b), num_grads * damping,
                               spread_blocks ? 1 : threads));
    };
    parallel(blocks.count, spread_blocks ? threads : 1, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
