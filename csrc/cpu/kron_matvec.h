// out <- D o (T (D o x) S) for matrices x [o, i]: T [o, o] and S [i, i] symmetric, D [o, i]. Either order of the two
// products takes o i (o + i) multiply-adds; T comes first, because then a strip of rows goes through both in cache.
#pragma once
#include "dense.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t KRON_ROWS = 64;  // rows of a task

// panel [rows, ld] <- matrix [rows, columns] (row stride `from`), or its product with another, entry by entry; zeros
// in the padded columns.
template <class T>
FF_INLINE void pack_product(const T* matrix, const T* factor, int64_t from, int64_t rows, int64_t columns, T* panel,
                            int64_t ld) {
    for (int64_t r = 0; r < rows; ++r) {
        const T *a = matrix + r * from, *f = factor ? factor + r * from : nullptr;
        T* __restrict__ to = panel + r * ld;
        for (int64_t c = 0; c < columns; ++c) to[c] = f ? a[c] * f[c] : a[c];
        fill_zero(to + columns, padded<T>(columns) - columns);
    }
}

template <class T>
void kron_matvec(T* out, const T* left, const T* right, const T* scale, const T* x, int64_t columns, int64_t tiles,
                 int64_t o, int64_t i, int threads) {
    const int64_t strips = ceil_div(o, KRON_ROWS), ld = leading<T>(i), ldt = leading<T>(KRON_ROWS);
    auto task = [&](int64_t t) {
        const int64_t first = t % strips * KRON_ROWS, rows = min(KRON_ROWS, o - first);
        const int64_t matrix = t / strips, tile = matrix % tiles;
        const T *D = scale + tile * o * i, *X = x + matrix * o * i;
        Scratch<T> L(o * ldt), W(o * ld), S(i * ld), Y(KRON_ROWS * ld), Z(KRON_ROWS * ld);
        pack_product<T>(left + tile * o * o + first, nullptr, o, o, rows, L, ldt);
        pack_product<T>(X, D, i, o, i, W, ld);
        pack_product<T>(right + tile * i * i, nullptr, i, i, i, S, ld);
        for (int64_t r = 0; r < rows; r += MR) {
            tile_row<T, 0>(o, L + r, ldt, W, ld, Y + r * ld, ld, i);
            tile_row<T, 0, true>(i, Y + r * ld, ld, S, ld, Z + r * ld, ld, i);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const T *d = D + (first + r) * i, *z = Z + r * ld;
            T* __restrict__ to = out + matrix * o * i + (first + r) * i;
            for (int64_t c = 0; c < i; ++c) to[c] = d[c] * z[c];
        }
    };
    parallel(columns * tiles * strips, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
