// out [d, n] <- F^-1 x, block by block. Primal: one pass over f_inv. Dual: (x - G^T C^-1 G x) / damping, summed in
// float64: two passes over the gradients and two triangular solves. The product with F itself is those two passes.
#pragma once
#include "dense.h"
#include "fisher_accumulate.h"
#include "gradients.h"

namespace ff {
namespace FF_NAMESPACE {

// y[c] += a x[c].
template <class T, class S>
FF_INLINE void add_scaled(T a, const S* __restrict__ x, T* __restrict__ y, int64_t n) {
    for (int64_t c = 0; c < n; ++c) y[c] += a * static_cast<T>(x[c]);
}

template <class T>
void block_matvec(T* out, const T* x, int64_t n, const T* f_inv, Blocks blocks, int threads) {
    const int64_t B = blocks.size;
    const int64_t rows_per_task = max<int64_t>(1, 65536 / (B * n));
    const int64_t pieces = ceil_div(B, rows_per_task);
    const int64_t per_task = max<int64_t>(1, rows_per_task / B);
    // Small blocks: several to a task. Large blocks: several tasks to a block.
    auto task = [&](int64_t t) {
        const int64_t first = pieces > 1 ? t / pieces : t * per_task;
        const int64_t last = pieces > 1 ? first + 1 : min(blocks.count, first + per_task);
        for (int64_t b = first; b < last; ++b) {
            const int64_t length = blocks.length(b);
            const int64_t i0 = pieces > 1 ? t % pieces * rows_per_task : 0;
            const int64_t i1 = pieces > 1 ? min(length, i0 + rows_per_task) : length;
            const T* xb = x + blocks.start(b) * n;
            for (int64_t i = i0; i < i1; ++i) {
                const T* row = f_inv + (b * B + i) * B;
                T* o = out + (blocks.start(b) + i) * n;
                if (n == 1) {
                    *o = dot<T>(row, xb, length);
                    continue;
                }
                fill_zero(o, n);
                for (int64_t j = 0; j < length; ++j) add_scaled(row[j], xb + j * n, o, n);
            }
        }
    };
    parallel(pieces > 1 ? blocks.count * pieces : ceil_div(blocks.count, per_task), threads, task);
}

constexpr int64_t ROW_PIECE = 16;       // gradients of a task of G x
constexpr int64_t COLUMN_PIECE = 2048;  // weights of a task of x - G^T z

// y [K, k, n] <- G x per block; x begins at the weight `origin`.
template <class T>
inline void gradients_times(double* y, const Gradients& g, const Blocks& blocks, const T* x, int64_t n, int threads,
                            int64_t origin = 0) {
    const int64_t pieces = ceil_div(g.rows, ROW_PIECE);
    auto task = [&](int64_t t) {
        const int64_t b = t / pieces, a0 = t % pieces * ROW_PIECE;
        Scratch<double> row(COLUMN_PIECE), wide(n == 1 ? COLUMN_PIECE : 1);
        for (int64_t a = a0; a < min(g.rows, a0 + ROW_PIECE); ++a) fill_zero(y + (b * g.rows + a) * n, n);
        for (int64_t q = 0; q < blocks.length(b); q += COLUMN_PIECE) {
            const int64_t columns = min(COLUMN_PIECE, blocks.length(b) - q);
            const T* xq = x + (blocks.start(b) - origin + q) * n;
            if (n == 1)
                for (int64_t c = 0; c < columns; ++c) wide[c] = static_cast<double>(xq[c]);
            for (int64_t a = a0; a < min(g.rows, a0 + ROW_PIECE); ++a) {
                double* ya = y + (b * g.rows + a) * n;
                read_row<double>(g, a, blocks.start(b) + q, columns, row);
                if (n == 1) {
                    *ya += dot<double, double>(row, wide, columns);
                    continue;
                }
                for (int64_t c = 0; c < columns; ++c) add_scaled(row[c], xq + c * n, ya, n);
            }
        }
    };
    parallel(blocks.count * pieces, threads, task);
}

// finish(q, sum [columns, n]) for every piece of columns, sum = G^T z there, z [K, k, n].
template <class F>
inline void transposed_times(const double* z, const Gradients& g, const Blocks& blocks, int64_t n, int threads,
                             F& finish) {
    const int64_t width = max<int64_t>(1, COLUMN_PIECE / n), pieces = ceil_div(blocks.size, width);
    auto task = [&](int64_t t) {
        const int64_t b = t / pieces, q = t % pieces * width, columns = min(width, blocks.length(b) - q);
        if (columns <= 0) return;
        Scratch<double> row(columns), sum(columns * n);
        fill_zero<double>(sum, columns * n);
        for (int64_t a = 0; a < g.rows; ++a) {
            const double* za = z + (b * g.rows + a) * n;
            read_row<double>(g, a, blocks.start(b) + q, columns, row);
            if (n == 1) {
                add_scaled<double, double>(*za, row, sum, columns);
            } else {
                for (int64_t c = 0; c < columns; ++c) add_scaled(row[c], za, sum + c * n, n);
            }
        }
        finish(blocks.start(b) + q, columns, static_cast<const double*>(sum));
    };
    parallel(blocks.count * pieces, threads, task);
}

template <class T>
void block_matvec_dual(T* out, const T* x, int64_t n, Dual dual, Blocks blocks, int threads) {
    const int64_t k = dual.grads.rows;
    Scratch<double> y(blocks.count * k * n);
    gradients_times<T>(y, dual.grads, blocks, x, n, threads);
    auto solve = [&](int64_t b) { solve_vectors<double>(k, dual.factor + b * k * k, k, y + b * k * n, n); };
    parallel(blocks.count, threads, solve);
    auto finish = [&](int64_t q, int64_t columns, const double* sum) {
        for (int64_t i = 0; i < columns * n; ++i)
            out[q * n + i] = static_cast<T>((static_cast<double>(x[q * n + i]) - sum[i]) / dual.damping);
    };
    transposed_times(y, dual.grads, blocks, n, threads, finish);
}

// out [d, n] <- G^T (G x) / m per block, in float64.
template <class T>
void fisher_vector_product(T* out, const T* x, int64_t n, Gradients g, Blocks blocks, double num_grads, int threads) {
    Scratch<double> y(blocks.count * g.rows * n);
    gradients_times<T>(y, g, blocks, x, n, threads);
    auto finish = [&](int64_t q, int64_t columns, const double* sum) {
        for (int64_t i = 0; i < columns * n; ++i) out[q * n + i] = static_cast<T>(sum[i] / num_grads);
    };
    transposed_times(y, g, blocks, n, threads, finish);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
