// f_inv <- f_inv - v v^T / (m + g.v), v = f_inv g: k rank-1 steps in one pass over each block.
//
// The block stays in cache while the gradients stream past, and every step touches it once: the update with v and the
// product with the next gradient share one load and one store.
#pragma once
#include "fisher_accumulate.h"

namespace ff {
namespace FF_NAMESPACE {

// Columns [j, j + VECTORS * W) of F [n, .]: with UPDATE, F -= u u^T; then with MULTIPLY, next = F^T g there.
template <class T, int VECTORS, bool UPDATE, bool MULTIPLY>
FF_INLINE void step_strip(T* F, int64_t ld, int64_t n, int64_t j, const T* u, const T* g, T* next) {
    Vec<T> acc[VECTORS] = {}, uj[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) uj[v] = vec(u + j + v * W<T>);
    for (int64_t i = 0; i < n; ++i) {
        T* row = F + i * ld + j;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            Vec<T> f = vec(row + v * W<T>);
            if (UPDATE) vec(row + v * W<T>) = f -= u[i] * uj[v];
            if (MULTIPLY) acc[v] += g[i] * f;
        }
    }
    if (!MULTIPLY) return;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) vec(next + j + v * W<T>) = acc[v];
}

template <class T, bool UPDATE, bool MULTIPLY>
inline void step(T* __restrict__ F, int64_t ld, int64_t n, const T* __restrict__ u, const T* __restrict__ g,
                 T* __restrict__ next) {
    const int64_t np = padded<T>(n), wide = 4 * W<T>;
    int64_t j = 0;
    for (; j + wide <= np; j += wide) step_strip<T, 4, UPDATE, MULTIPLY>(F, ld, n, j, u, g, next);
    for (; j < np; j += W<T>) step_strip<T, 1, UPDATE, MULTIPLY>(F, ld, n, j, u, g, next);
}

template <class T>
inline void sherman_morrison_block(T* f_inv, int64_t B, const Gradients& grads, int64_t start, int64_t n, T m, T* F,
                                   T* panel, int64_t ld, int64_t rows_at_once, T* v, T* u) {
    const int64_t np = padded<T>(n);
    for (int64_t i = 0; i < n; ++i) {
        std::memcpy(F + i * ld, f_inv + i * B, static_cast<size_t>(n) * sizeof(T));
        fill_zero(F + i * ld + n, np - n);
    }
    fill_zero(u, np);
    bool owed = false;  // the last gradient's update is applied together with the next gradient's product
    for (int64_t k = 0; k < grads.rows; k += rows_at_once) {
        const int64_t rows = min(rows_at_once, grads.rows - k);
        pack_rows(grads, k, rows, start, n, panel, ld, np);
        for (int64_t r = 0; r < rows; ++r) {
            const T* g = panel + r * ld;
            if (owed) {
                step<T, true, true>(F, ld, n, u, g, v);
            } else {
                step<T, false, true>(F, ld, n, u, g, v);
            }
            // One factor for both sides keeps F symmetric to the bit; a lost denominator turns the block into NaN.
            const T root = T(1) / std::sqrt(m + static_cast<T>(dot<double>(g, v, n)));
            for (int64_t i = 0; i < np; ++i) u[i] = v[i] * root;
            owed = true;
        }
    }
    step<T, true, false>(F, ld, n, u, u, v);
    for (int64_t i = 0; i < n; ++i) std::memcpy(f_inv + i * B, F + i * ld, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
void sherman_morrison(T* f_inv, Gradients g, Blocks blocks, double num_grads, int threads) {
    const int64_t B = blocks.size, per_task = blocks_per_task(blocks.count, threads);
    auto task = [&](int64_t t) {
        const int64_t ld = leading<T>(B), rows = panel_rows<T>(ld, g.rows);
        Scratch<T> F(padded<T>(B) * ld), panel(rows * ld), v(ld), u(ld);
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
            sherman_morrison_block<T>(f_inv + b * B * B, B, g, blocks.start(b), blocks.length(b),
                                      static_cast<T>(num_grads), F, panel, ld, rows, v, u);
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
