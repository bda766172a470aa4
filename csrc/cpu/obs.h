// Optimal Brain Surgeon on the blocks: saliency of every weight, summed and exact joint removal of many.
#pragma once
#include "block_matvec.h"
#include "dual_factor.h"

namespace ff {
namespace FF_NAMESPACE {

template <class T>
void obs_saliency(T* out, const T* weight, const T* inv_diag, int64_t d, int threads) {
    constexpr int64_t PIECE = 65536;
    auto task = [&](int64_t t) {
        for (int64_t q = t * PIECE; q < min(d, (t + 1) * PIECE); ++q)
            out[q] = weight[q] * weight[q] / (T(2) * inv_diag[q]);
    };
    parallel(ceil_div(d, PIECE), threads, task);
}

// w <- w - F^-1 (1_Q w / inv_diag), w_Q = 0, inside the blocks; matvec(out, x) is the product with F^-1. The summed
// update is memory-bound in the product alone, so the two elementwise steps around it stay separate.
template <class T, class F>
inline void obs_update_with(T* weight, const T* inv_diag, int64_t d, const Blocks& blocks, const uint8_t* mask,
                            F& matvec) {
    Scratch<T> removed(d), delta(d);
    for (int64_t q = 0; q < d; ++q) removed[q] = mask[q] ? T(0) : weight[q] / inv_diag[q];
    matvec(static_cast<T*>(delta), static_cast<const T*>(removed));
    for (int64_t b = 0; b < blocks.count; ++b)
        for (int64_t q = blocks.start(b); q < blocks.start(b) + blocks.length(b); ++q)
            weight[q] = mask[q] ? weight[q] - delta[q] : T(0);
}

template <class T>
void obs_update(T* weight, const T* f_inv, const T* inv_diag, int64_t d, Blocks blocks, const uint8_t* mask,
                int threads) {
    auto matvec = [&](T* out, const T* x) { block_matvec<T>(out, x, 1, f_inv, blocks, threads); };
    obs_update_with(weight, inv_diag, d, blocks, mask, matvec);
}

template <class T>
void obs_update_dual(T* weight, Dual dual, const T* inv_diag, int64_t d, Blocks blocks, const uint8_t* mask,
                     int threads) {
    auto matvec = [&](T* out, const T* x) { block_matvec_dual<T>(out, x, 1, dual, blocks, threads); };
    obs_update_with(weight, inv_diag, d, blocks, mask, matvec);
}

// delta = -F^-1[:, Q] (F^-1[Q, Q])^-1 w_Q for one block, solved in float64; false where F^-1[Q, Q] is not definite.
template <class T>
inline bool solve_block(T* weight, const T* f_inv, int64_t B, int64_t n, const uint8_t* mask) {
    Scratch<int64_t> removed(n);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i)
        if (!mask[i]) removed[count++] = i;
    if (count == 0) return true;
    Scratch<double> S(count * count), y(count), delta(n);
    for (int64_t a = 0; a < count; ++a) {
        y[a] = static_cast<double>(weight[removed[a]]);
        for (int64_t c = a; c < count; ++c) S[a * count + c] = static_cast<double>(f_inv[removed[a] * B + removed[c]]);
    }
    if (!blocked_cholesky<double>(count, S, count, 1)) return false;
    solve_vectors<double>(count, S, count, y, 1);
    fill_zero<double>(delta, n);
    for (int64_t a = 0; a < count; ++a) add_scaled<double, T>(y[a], f_inv + removed[a] * B, delta, n);
    for (int64_t i = 0; i < n; ++i)
        if (!(delta[i] - delta[i] == 0.0)) return false;
    for (int64_t i = 0; i < n; ++i)
        weight[i] = mask[i] ? static_cast<T>(static_cast<double>(weight[i]) - delta[i]) : T(0);
    return true;
}

template <class T>
void obs_solve(T* weight, const T* f_inv, Blocks blocks, const uint8_t* mask, uint8_t* failed, int threads) {
    const int64_t B = blocks.size;
    auto task = [&](int64_t b) {
        const int64_t start = blocks.start(b);
        failed[b] = !solve_block<T>(weight + start, f_inv + b * B * B, B, blocks.length(b), mask + start);
    };
    parallel(blocks.count, threads, task);
}

// delta_R = G_R^T (m damping I + G_R G_R^T)^-1 (G_Q w_Q), R = kept weights: an m x m solve per block.
template <class T>
void obs_solve_dual(T* weight, Gradients g, Blocks blocks, double num_grads, double damping, const uint8_t* mask,
                    uint8_t* failed, int threads) {
    const int64_t k = g.rows;
    const bool spread_blocks = blocks.count >= threads;
    auto task = [&](int64_t b) {
        const int64_t start = blocks.start(b), n = blocks.length(b);
        const int inner = spread_blocks ? 1 : threads;
        const int64_t range[2] = {start, start + n};
        const Blocks one{range, 1, n};
        Scratch<double> C(k * k), y(k), removed(n);
        failed[b] = 0;
        bool any = false;
        for (int64_t q = 0; q < n; ++q) {
            removed[q] = mask[start + q] ? 0.0 : static_cast<double>(weight[start + q]);
            any |= removed[q] != 0.0;
        }
        if (any) {
            gradients_times<double>(y, g, one, removed, 1, inner, start);
            dual_gram(C, g, start, n, mask, num_grads * damping, inner);
            if (!blocked_cholesky<double>(k, C, k, inner)) {
                failed[b] = 1;
                return;
            }
            solve_vectors<double>(k, C, k, y, 1);
            for (int64_t a = 0; a < k; ++a)
                if (!(y[a] - y[a] == 0.0)) failed[b] = 1;
            if (failed[b]) return;
            auto finish = [&](int64_t q, int64_t columns, const double* sum) {
                for (int64_t c = 0; c < columns; ++c)
                    weight[q + c] = static_cast<T>(static_cast<double>(weight[q + c]) + sum[c]);
            };
            transposed_times(y, g, one, 1, inner, finish);
        }
        for (int64_t q = start; q < start + n; ++q)
            if (!mask[q]) weight[q] = T(0);
    };
    parallel(blocks.count, spread_blocks ? threads : 1, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
