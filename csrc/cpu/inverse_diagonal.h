// out [d] <- diag F^-1. Primal: the stored diagonal. Dual: (1 - sum_a V[a, q]^2) / damping with V = L^-1 G formed in
// cache, a strip of columns at a time: k^2 / 2 multiply-adds a weight, no memory of its own.
#pragma once
#include "blocked.h"
#include "gradients.h"

namespace ff {
namespace FF_NAMESPACE {

template <class T>
void inverse_diagonal(T* out, const T* f_inv, Blocks blocks, int threads) {
    const int64_t B = blocks.size, per_task = max<int64_t>(1, 65536 / B);
    auto task = [&](int64_t t) {
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
            for (int64_t i = 0; i < blocks.length(b); ++i) out[blocks.start(b) + i] = f_inv[(b * B + i) * B + i];
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

constexpr int64_t STRIP = 192;  // columns of V at a time

// V [k, columns] (scratch, in place of G) <- L^-1 G, panels of SPAN rows; U is plain memory.
inline void substitute_strip(int64_t k, const double* U, double* V, int64_t ldv, int64_t columns, double* panel,
                             int64_t ld) {
    for (int64_t p = 0; p < k; p += SPAN) {
        const int64_t rows = min(SPAN, k - p), np = padded<double>(rows);
        for (int64_t q = 0; q < p; q += DEPTH) {
            const int64_t depth = min(DEPTH, p - q);
            pack<double>(U + q * k + p, k, depth, rows, panel, ld);
            product<double, -1>(depth, panel, ld, rows, V + q * ldv, ldv, columns, V + p * ldv, ldv);
        }
        fill_zero(panel, np * ld);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(panel + r * ld + r, U + (p + r) * k + p + r, static_cast<size_t>(rows - r) * sizeof(double));
        for (int64_t r = rows; r < np; ++r) panel[r * ld + r] = 1.0;
        substitute<double>(rows, panel, ld, V + p * ldv, ldv, columns);
    }
}

template <class T>
void inverse_diagonal_dual(T* out, Dual dual, Blocks blocks, int threads) {
    const int64_t k = dual.grads.rows;
    const int64_t strips = ceil_div(blocks.size, STRIP);
    auto task = [&](int64_t t) {
        const int64_t b = t / strips, offset = t % strips * STRIP, columns = min(STRIP, blocks.length(b) - offset);
        if (columns <= 0) return;
        const int64_t first = blocks.start(b) + offset, width = padded<double>(columns);
        const int64_t ldv = leading<double>(STRIP), ld = leading<double>(SPAN);
        Scratch<double> V((k + SPAN) * ldv), panel(SPAN * ld), squares(width);
        pack_rows<double>(dual.grads, 0, k, first, columns, V, ldv, width);
        for (int64_t r = k; r < ceil_div(k, MR) * MR; ++r) fill_zero(V + r * ldv, width);
        substitute_strip(k, dual.factor + b * k * k, V, ldv, columns, panel, ld);
        fill_zero<double>(squares, width);
        for (int64_t a = 0; a < k; ++a)
            for (int64_t c = 0; c < width; c += W<double>)
                vec(squares + c) += vec(V + a * ldv + c) * vec(V + a * ldv + c);
        for (int64_t c = 0; c < columns; ++c) out[first + c] = static_cast<T>((1.0 - squares[c]) / dual.damping);
    };
    parallel(blocks.count * strips, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
