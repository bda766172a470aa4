// fisher [K, B, B] += G^T G / m, lower triangles.
//
// Floor: read every gradient once, write the state once; m n^2 / 2 multiply-adds a block. Gradients are packed in
// pieces that stay in the first-level cache, the block is summed in cache and added to memory once.
#pragma once
#include "blocked.h"
#include "gradients.h"

namespace ff {
namespace FF_NAMESPACE {

// Blocks up to this size are summed band by band, across block borders: a register tile would be mostly empty.
constexpr int64_t NARROW = 8;

// Rows of a panel of `width` columns that fit in about 32 KiB; wide panels live in the second-level cache instead.
template <class T>
FF_INLINE int64_t panel_rows(int64_t ld, int64_t k) {
    const int64_t fit = 32768 / (ld * static_cast<int64_t>(sizeof(T)));
    return min(max(fit, int64_t(64)), min(k, int64_t(256)));
}

// Number of consecutive blocks a task takes, so that scratch memory is set up seldom and threads stay balanced.
FF_INLINE int64_t blocks_per_task(int64_t num_blocks, int threads) {
    return max<int64_t>(1, min<int64_t>(64, num_blocks / (8 * threads)));
}

// sum [n, n] (scratch), lower triangle <- G^T G of one block whose panel fits into cache tiles of its own.
template <class T>
inline void sum_block(const Gradients& g, int64_t start, int64_t n, T* panel, T* sum, int64_t ld, int64_t rows_at_once,
                      int64_t ahead) {
    fill_zero(sum, padded<T>(n) * ld);
    for (int64_t k = 0; k < g.rows; k += rows_at_once) {
        const int64_t rows = min(rows_at_once, g.rows - k);
        pack_rows(g, k, rows, start, n, panel, ld, padded<T>(n), ahead);
        gram_lower<T, 1>(rows, panel, ld, n, sum, ld);
    }
}

template <class T>
inline void accumulate_block(T* fisher, int64_t B, const Gradients& g, int64_t start, int64_t n, T factor, T* panel,
                             T* sum, int64_t ld, int64_t rows_at_once, int64_t ahead) {
    sum_block(g, start, n, panel, sum, ld, rows_at_once, ahead);
    for (int64_t i = 0; i < n; ++i) {
        T* __restrict__ out = fisher + i * B;
        const T* __restrict__ in = sum + i * ld;
        for (int64_t j = 0; j <= i; ++j) out[j] += factor * in[j];
    }
}

// Columns start .. start + n, consecutive blocks of at most BANDS weights: band s holds sum_k g[q] g[q - s].
template <class T, int BANDS>
inline void accumulate_bands(const Gradients& g, int64_t start, int64_t n, T* panel, int64_t ld, int64_t rows_at_once,
                             T* bands) {
    const int64_t lead = PAD<T> > NARROW ? PAD<T> : NARROW;  // zeros before the first column
    const int64_t width = padded<T>(n);
    fill_zero(bands, BANDS * width);
    for (int64_t k = 0; k < g.rows; k += rows_at_once) {
        const int64_t rows = min(rows_at_once, g.rows - k);
        for (int64_t r = 0; r < rows; ++r) {
            fill_zero(panel + r * ld, lead);
            read_row(g, k + r, start, n, panel + r * ld + lead);
            fill_zero(panel + r * ld + lead + n, width - n);
        }
        for (int64_t c = 0; c < width; c += W<T>) {
            Vec<T> acc[BANDS] = {};
            for (int64_t r = 0; r < rows; ++r) {
                const T* row = panel + r * ld + lead + c;
                const Vec<T> here = vec(row);
#pragma GCC unroll 8
                for (int s = 0; s < BANDS; ++s) {
                    Vec<T> shifted;
                    std::memcpy(&shifted, row - s, sizeof shifted);
                    acc[s] += here * shifted;
                }
            }
            for (int s = 0; s < BANDS; ++s) vec(bands + s * width + c) += acc[s];
        }
    }
}

template <class T, int BANDS>
inline void accumulate_narrow(T* fisher, const Gradients& g, const Blocks& blocks, T factor, int threads) {
    const int64_t B = blocks.size;
    const int64_t per_task = max<int64_t>(1, 512 / B);
    const int64_t lead = PAD<T> > NARROW ? PAD<T> : NARROW;
    auto task = [&](int64_t t) {
        const int64_t ld = leading<T>(per_task * B + lead);
        const int64_t rows = panel_rows<T>(ld, g.rows);
        Scratch<T> panel(rows * ld), bands(BANDS * ld);
        const int64_t end = min(blocks.count, (t + 1) * per_task);
        for (int64_t first = t * per_task, last; first < end; first = last) {
            last = first + 1;
            while (last < end && blocks.start(last) == blocks.start(last - 1) + blocks.length(last - 1)) ++last;
            const int64_t start = blocks.start(first), stop = blocks.start(last - 1) + blocks.length(last - 1);
            accumulate_bands<T, BANDS>(g, start, stop - start, panel, ld, rows, bands);
            const int64_t width = padded<T>(stop - start);
            for (int64_t b = first; b < last; ++b) {
                const int64_t at = blocks.start(b) - start;
                for (int64_t i = 0; i < blocks.length(b); ++i)
                    for (int64_t j = 0; j <= i; ++j)
                        fisher[(b * B + i) * B + j] += factor * bands[(i - j) * width + at + i];
            }
        }
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

// One cache tile of a large block.
template <class T>
inline void accumulate_tile(T* fisher, int64_t B, const Gradients& g, int64_t start, int64_t i0, int64_t rows,
                            int64_t j0, int64_t columns, T factor) {
    TileScratch<T> s;
    fill_zero<T>(s.c, padded<T>(rows) * s.ld);
    for (int64_t k = 0; k < g.rows; k += DEPTH) {
        const int64_t depth = min(DEPTH, g.rows - k);
        pack_rows<T>(g, k, depth, start + i0, rows, s.a, s.ld, padded<T>(rows));
        if (i0 == j0) {
            gram_lower<T, 1>(depth, s.a, s.ld, rows, s.c, s.ld);
        } else {
            pack_rows<T>(g, k, depth, start + j0, columns, s.b, s.ld, padded<T>(columns));
            product<T, 1>(depth, s.a, s.ld, rows, s.b, s.ld, columns, s.c, s.ld);
        }
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < min(columns, i0 + i - j0 + 1); ++j)
            fisher[(i0 + i) * B + j0 + j] += factor * s.c[i * s.ld + j];
}

template <class T>
void fisher_accumulate(T* fisher, Gradients g, Blocks blocks, double num_grads, int threads) {
    const int64_t B = blocks.size;
    const T factor = static_cast<T>(1.0 / num_grads);
    switch (B) {
        case 1:
            return accumulate_narrow<T, 1>(fisher, g, blocks, factor, threads);
        case 2:
            return accumulate_narrow<T, 2>(fisher, g, blocks, factor, threads);
        case 3:
            return accumulate_narrow<T, 3>(fisher, g, blocks, factor, threads);
        case 4:
            return accumulate_narrow<T, 4>(fisher, g, blocks, factor, threads);
        case 5:
            return accumulate_narrow<T, 5>(fisher, g, blocks, factor, threads);
        case 6:
            return accumulate_narrow<T, 6>(fisher, g, blocks, factor, threads);
        case 7:
            return accumulate_narrow<T, 7>(fisher, g, blocks, factor, threads);
        case 8:
            return accumulate_narrow<T, 8>(fisher, g, blocks, factor, threads);
        default:
            break;
    }
    if (B <= 256) {
        const int64_t per_task = blocks_per_task(blocks.count, threads);
        auto task = [&](int64_t t) {
            const int64_t ld = leading<T>(B), rows = panel_rows<T>(ld, g.rows);
            Scratch<T> panel(rows * ld), sum(padded<T>(B) * ld);
            for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b)
                accumulate_block<T>(fisher + b * B * B, B, g, blocks.start(b), blocks.length(b), factor, panel, sum, ld,
                                    rows, b + 1 < blocks.count ? blocks.length(b + 1) : 0);
        };
        return parallel(ceil_div(blocks.count, per_task), threads, task);
    }
    const int64_t tiles = ceil_div(B, SPAN);
    auto task = [&](int64_t t) {
        const int64_t b = t / (tiles * tiles), i0 = t / tiles % tiles * SPAN, j0 = t % tiles * SPAN;
        const int64_t n = blocks.length(b);
        if (j0 > i0 || i0 >= n) return;
        accumulate_tile<T>(fisher + b * B * B, B, g, blocks.start(b), i0, min(SPAN, n - i0), j0, min(SPAN, n - j0),
                           factor);
    };
    parallel(blocks.count * tiles * tiles, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
