// f_inv <- f_inv - V C^-1 V^T,  V = f_inv G^T,  C = m I + G V (the capacitance), SLAB gradients at a time.
#pragma once
#include "spd_inverse.h"

namespace ff {
namespace FF_NAMESPACE {

// Gradients per capacitance: enough to fill the tiles; the work on the capacitance itself grows with it.
constexpr int64_t SLAB = 32;

template <class T>
struct WoodburyScratch {
    explicit WoodburyScratch(int64_t B, int64_t k)
        : ld(leading<T>(B)),
          ldk(leading<T>(k)),
          F(padded<T>(B) * ld),
          Gt(padded<T>(B) * ldk),
          V(padded<T>(B) * ldk),
          C(padded<T>(k) * ldk),
          R(padded<T>(k) * ld),
          lines(MR * B) {}
    const int64_t ld, ldk;
    Scratch<T> F, Gt, V, C, R, lines;
};

// F [n, n] (scratch, full) updated with k gradients; false where the capacitance is not positive definite.
template <class T>
inline bool woodbury_slab(WoodburyScratch<T>& s, const Gradients& g, int64_t row, int64_t k, int64_t start, int64_t n,
                          T m) {
    const int64_t kp = padded<T>(k), np = padded<T>(n);
    pack_transposed<T>(g, row, k, start, n, s.Gt, s.ldk, kp, s.lines);  // [n, k]
    fill_zero<T>(s.V, np * s.ldk);
    product<T, 1>(n, s.F, s.ld, n, s.Gt, s.ldk, k, s.V, s.ldk);  // F is symmetric: F^T G^T = V [n, k]
    fill_zero<T>(s.C, kp * s.ldk);
    product<T, 1>(n, s.V, s.ldk, k, s.Gt, s.ldk, k, s.C, s.ldk);  // [k, k]
    for (int64_t a = 0; a < kp; ++a) s.C[a * s.ldk + a] += a < k ? m : T(1);
    if (!cholesky<T>(k, s.C, s.ldk)) return false;
    fill_zero<T>(s.R, kp * s.ld);
    for (int64_t a = 0; a < k; ++a)
        for (int64_t i = 0; i < n; ++i) s.R[a * s.ld + i] = s.V[i * s.ldk + a];
    substitute<T>(k, s.C, s.ldk, s.R, s.ld, n);  // L^-1 V^T [k, n]
    gram_lower<T, -1>(k, s.R, s.ld, n, s.F, s.ld);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) s.F[j * s.ld + i] = s.F[i * s.ld + j];
    return true;
}

template <class T>
void woodbury(T* f_inv, Gradients g, Blocks blocks, double num_grads, int threads) {
    const int64_t B = blocks.size, per_task = blocks_per_task(blocks.count, threads);
    auto task = [&](int64_t t) {
        WoodburyScratch<T> s(B, min(SLAB, g.rows));
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b) {
            const int64_t n = blocks.length(b);
            T* block = f_inv + b * B * B;
            fill_zero<T>(s.F, padded<T>(n) * s.ld);
            for (int64_t i = 0; i < n; ++i)
                std::memcpy(s.F + i * s.ld, block + i * B, static_cast<size_t>(n) * sizeof(T));
            bool definite = true;
            for (int64_t k = 0; k < g.rows && definite; k += SLAB)
                definite =
                    woodbury_slab<T>(s, g, k, min(SLAB, g.rows - k), blocks.start(b), n, static_cast<T>(num_grads));
            if (!definite) {
                fill_nan(block, B * B);
                continue;
            }
            for (int64_t i = 0; i < n; ++i)
                std::memcpy(block + i * B, s.F + i * s.ld, static_cast<size_t>(n) * sizeof(T));
        }
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
