// f_inv [K, B, B] <- (damping I + G^T G / m)^-1, or only its diagonal [d]. The Fisher of a block is summed in cache,
// inverted there and leaves it once.
//
// Floor: read every gradient once, write the state once (the diagonal: nothing but the gradients moves).
#pragma once
#include "spd_inverse.h"

namespace ff {
namespace FF_NAMESPACE {

// What lies outside [n, n] of a block [B, B] <- that of I / damping.
template <class T>
inline void fill_padding(T* block, int64_t n, int64_t B, T damping) {
    for (int64_t i = 0; i < B; ++i) {
        const int64_t first = i < n ? n : 0;
        fill_zero(block + i * B + first, B - first);
        if (i >= n) block[i * B + i] = T(1) / damping;
    }
}

// One of f_inv and inv_diag is null.
template <class T>
void inverse_from_grads(T* f_inv, T* inv_diag, Gradients g, Blocks blocks, double num_grads, double damping,
                        double* condition, double* amplification, int threads) {
    const int64_t B = blocks.size, area = B * B;
    const T ridge = static_cast<T>(damping), factor = static_cast<T>(1.0 / num_grads);
    // The inverse of block b, at `state`, is finished: padding or NaN around it, or its diagonal taken out of it.
    auto settle = [&](int64_t b, Estimates found, T* state) {
        const int64_t n = blocks.length(b);
        const bool failed = !(found.condition < INFINITE);
        condition[b] = found.condition;
        amplification[b] = found.amplification;
        if (f_inv && failed) fill_nan(state, area);
        if (f_inv && !failed) fill_padding(state, n, B, ridge);
        if (inv_diag && failed) fill_nan(inv_diag + blocks.start(b), n);
        if (inv_diag && !failed)
            for (int64_t i = 0; i < n; ++i) inv_diag[blocks.start(b) + i] = state[i * B + i];
    };
    if (B > NARROW && B <= IN_CACHE) {
        const int64_t per_task = blocks_per_task(blocks.count, threads);
        auto task = [&](int64_t t) {
            InverseScratch<T> s(B);
            const int64_t ld = s.ld, rows = panel_rows<T>(ld, g.rows);
            Scratch<T> panel(rows * ld), sum(padded<T>(B) * ld), state(inv_diag ? area : 1);
            for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b) {
                const int64_t n = blocks.length(b);
                sum_block<T>(g, blocks.start(b), n, panel, sum, ld, rows,
                             b + 1 < blocks.count ? blocks.length(b + 1) : 0);
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = 0; j <= i; ++j) sum[i * ld + j] *= factor;
                T* out = f_inv ? f_inv + b * area : static_cast<T*>(state);
                settle(b, invert_in_cache<T>(n, sum, ld, ridge, out, B, s), out);
            }
        };
        return parallel(ceil_div(blocks.count, per_task), threads, task);
    }
    // Narrow and large blocks go through memory, in groups that stay in the second-level cache where one block does.
    const int64_t per_group = max<int64_t>(1, (int64_t(1) << 19) / (area * static_cast<int64_t>(sizeof(T))));
    Scratch<T> room(inv_diag ? min(per_group, blocks.count) * area : 1);
    for (int64_t first = 0; first < blocks.count; first += per_group) {
        const Blocks group = {blocks.range + 2 * first, min(per_group, blocks.count - first), B};
        T* state = f_inv ? f_inv + first * area : static_cast<T*>(room);
        fill_zero(state, group.count * area);
        fisher_accumulate<T>(state, g, group, num_grads, threads);
        invert_blocks<T>(
            state, group.count, B, ridge, threads, [&](int64_t b) { return group.length(b); },
            [&](int64_t b, Estimates found) { settle(first + b, found, state + b * area); });
    }
}

}  // namespace FF_NAMESPACE
}  // namespace ff
