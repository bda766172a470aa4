// An inverse kept as Q = R R^T, R [n, n] in every block: its diagonal, its product with vectors, and the removal of
// weights from it.
//
// Floor: R is read once, by the removal also written once. Both passes of R (R^T x) over a block find it in cache.
#pragma once
#include "block_matvec.h"
#include "dense.h"

namespace ff {
namespace FF_NAMESPACE {

// Blocks of a task, about a quarter of a million numbers.
FF_INLINE int64_t factors_per_task(int64_t B) { return max<int64_t>(1, (1 << 18) / (B * B)); }

template <class T>
void factor_diagonal(T* out, const T* root, Blocks blocks, int threads) {
    const int64_t B = blocks.size, per_task = factors_per_task(B);
    auto task = [&](int64_t t) {
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b) {
            const int64_t n = blocks.length(b);
            for (int64_t i = 0; i < n; ++i) {
                const T* row = root + (b * B + i) * B;
                out[blocks.start(b) + i] = dot<T>(row, row, n);
            }
        }
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

// One column of x and out, `stride` apart.
template <class T>
inline void factor_times(T* out, const T* x, int64_t stride, const T* R, int64_t ld, int64_t n, T* y) {
    fill_zero(y, n);
    for (int64_t i = 0; i < n; ++i) add_scaled<T>(x[i * stride], R + i * ld, y, n);
    for (int64_t i = 0; i < n; ++i) out[i * stride] = dot<T>(R + i * ld, y, n);
}

template <class T>
void block_factor_matvec(T* out, const T* x, int64_t n, const T* root, Blocks blocks, int threads) {
    const int64_t B = blocks.size, per_task = factors_per_task(B);
    auto task = [&](int64_t t) {
        Scratch<T> y(B);
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
            for (int64_t c = 0; c < n; ++c) {
                const int64_t at = blocks.start(b) * n + c;
                factor_times<T>(out + at, x + at, n, root + b * B * B, B, blocks.length(b), y);
            }
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

// Of its length, what must be left of a row beyond the rows before it; less is rounding error of the state.
template <class T>
constexpr double DEPENDENT = 8 * std::numeric_limits<T>::epsilon();

struct DowndateScratch {
    explicit DowndateScratch(int64_t B)
        : ld(leading<double>(B)), R(MR * ld), V((B + MR) * ld), Vt((B + MR) * ld), C(MR * ld), kept(B), removed(B) {}
    const int64_t ld;
    Scratch<double> R, V, Vt, C;
    Scratch<int64_t> kept, removed;
};

// V [p, n] and its transpose <- an orthonormal basis of the removed rows, by Gram-Schmidt done twice; returns p.
template <class T>
inline int64_t removed_basis(DowndateScratch& s, const T* root, int64_t B, int64_t n, int64_t num_removed) {
    const int64_t np = padded<double>(n), ld = s.ld;
    int64_t p = 0;
    for (int64_t a = 0; a < num_removed; ++a) {
        const T* from = root + s.removed[a] * B;
        double *v = s.V + p * ld, *c = s.C;
        for (int64_t j = 0; j < n; ++j) v[j] = static_cast<double>(from[j]);
        fill_zero(v + n, np - n);
        const double before = std::sqrt(dot<double>(v, v, n));
        for (int twice = 0; twice < 2; ++twice) {
            vector_times<double, 0>(n, v, s.Vt, ld, c, p);
            vector_times<double, -1>(p, c, s.V, ld, v, n);
        }
        const double left = std::sqrt(dot<double>(v, v, n));
        if (!(left > DEPENDENT<T> * before)) continue;
        scale(1 / left, v, np);
        for (int64_t j = 0; j < n; ++j) s.Vt[j * ld + p] = v[j];
        ++p;
    }
    return p;
}

// R <- R (I - V V^T) for the kept rows, 0 for the others; in float64.
template <class T>
inline void downdate_block(DowndateScratch& s, T* root, int64_t B, const uint8_t* mask, int64_t n) {
    const int64_t np = padded<double>(n), ld = s.ld;
    int64_t num_kept = 0, num_removed = 0;
    for (int64_t i = 0; i < n; ++i) (mask[i] ? s.kept[num_kept++] : s.removed[num_removed++]) = i;
    const int64_t p = removed_basis<T>(s, root, B, n, num_removed);
    for (int64_t a = 0; a < num_removed; ++a) fill_zero(root + s.removed[a] * B, n);
    if (p == 0) return;
    for (int64_t i0 = 0; i0 < num_kept; i0 += MR) {
        const int64_t rows = min(MR, num_kept - i0);
        double *R = s.R, *C = s.C;
        for (int64_t r = 0; r < MR; ++r) {
            double* to = R + r * ld;
            fill_zero(to, np);
            if (r >= rows) continue;
            const T* from = root + s.kept[i0 + r] * B;
            for (int64_t j = 0; j < n; ++j) to[j] = static_cast<double>(from[j]);
        }
        tile_row<double, 0, true>(n, R, ld, s.Vt, ld, C, ld, p);
        tile_row<double, -1, true>(p, C, ld, s.V, ld, R, ld, n);
        for (int64_t r = 0; r < rows; ++r) {
            T* to = root + s.kept[i0 + r] * B;
            for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(R[r * ld + j]);
        }
    }
}

template <class T>
void factor_downdate(T* root, Blocks blocks, const uint8_t* mask, int threads) {
    const int64_t B = blocks.size, per_task = factors_per_task(B);
    auto task = [&](int64_t t) {
        DowndateScratch s(B);
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
            downdate_block<T>(s, root + b * B * B, B, mask + blocks.start(b), blocks.length(b));
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
