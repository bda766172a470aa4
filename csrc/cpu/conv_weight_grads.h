// Weight gradients of a convolution, sample by sample: dw[o, j] = sum_p g[o, p] x[p of j] with j = (channel, tap) and p
// over the output's pixels. Output channels lie in the vectors, so g is transposed once; a row of the register tile is
// any j, a pointer into the planes of x, so that no patch is written out.
#pragma once
#include "dense.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t CONV_SUMS = 1 << 18;   // numbers of dw in a task
constexpr int64_t CONV_STRIP = 1 << 16;  // numbers of g that are transposed at once

// C[MR, VECTORS * W] += A B, or <- if `first`: A[r, (y, x)] = source[r][y * step_y + x * step_x], B [height * width,
// ldb].
template <class T, int VECTORS>
FF_INLINE void tap_tile(const T* const* source, int64_t height, int64_t width, int64_t step_y, int64_t step_x,
                        const T* B, int64_t ldb, T* C, int64_t ldc, bool first) {
    Vec<T> acc[MR][VECTORS] = {};
    const T* a[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) a[r] = source[r];
    for (int64_t y = 0; y < height; ++y) {
        const int64_t end = y * step_y + width * step_x;
        for (int64_t i = y * step_y; i < end; i += step_x, B += ldb) {
            Vec<T> b[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) b[v] = vec(B + v * W<T>);
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) acc[r][v] += a[r][i] * b[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            Vec<T>& c = vec(C + r * ldc + v * W<T>);
            c = first ? acc[r][v] : c + acc[r][v];
        }
    }
}

// to [columns, ldt] <- the transpose of from [rows, lda].
template <class T>
inline void transpose(const T* from, int64_t lda, int64_t rows, int64_t columns, T* to, int64_t ldt) {
    constexpr int64_t SIDE = 16;
    for (int64_t c = 0; c < columns; c += SIDE)
        for (int64_t r = 0; r < rows; r += SIDE) {
            const int64_t wide = min(SIDE, columns - c), high = min(SIDE, rows - r);
            for (int64_t j = 0; j < wide; ++j) {
                const T* f = from + r * lda + c + j;
                T* __restrict__ t = to + (c + j) * ldt + r;
                for (int64_t i = 0; i < high; ++i) t[i] = f[i * lda];
            }
        }
}

template <class T>
void conv_weight_grads(T* rows, int64_t row_stride, const T* x, const T* g, Convolution conv, int threads) {
    const int64_t taps = conv.kernel[0] * conv.kernel[1], out = conv.out, ld = ceil_div(out, W<T>) * W<T>;
    const int64_t pixels = conv.out_size[0] * conv.out_size[1], plane = conv.size[0] * conv.size[1];
    const int64_t high = conv.size[0] + 2 * conv.padding[0], wide = conv.size[1] + 2 * conv.padding[1];
    const bool padded_planes = high * wide > plane;
    const int64_t width = min(conv.in, max<int64_t>(1, CONV_SUMS / (taps * ld))), pieces = ceil_div(conv.in, width);
    const int64_t strip = min(conv.out_size[0], max<int64_t>(1, CONV_STRIP / (conv.out_size[1] * ld)));
    auto task = [&](int64_t t) {
        const int64_t first = t % pieces * width, channels = min(width, conv.in - first), matrix = t / pieces;
        const int64_t count = channels * taps, rounded = ceil_div(count, MR) * MR;
        const T *X = x + (matrix * conv.in + first) * plane, *G = g + matrix * out * pixels;
        Scratch<T> planes(padded_planes ? channels * high * wide : 1), B(strip * conv.out_size[1] * ld),
            sum(rounded * ld);
        if (padded_planes) {
            fill_zero<T>(planes, channels * high * wide);
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t y = 0; y < conv.size[0]; ++y)
                    std::memcpy(planes + c * high * wide + (y + conv.padding[0]) * wide + conv.padding[1],
                                X + c * plane + y * conv.size[1], static_cast<size_t>(conv.size[1]) * sizeof(T));
        }
        const T* base = padded_planes ? planes : X;
        Scratch<const T*> source(rounded);
        for (int64_t j = 0; j < rounded; ++j) {
            const int64_t c = j / taps, tap = j % taps;
            const int64_t ky = tap / conv.kernel[1] * conv.dilation[0], kx = tap % conv.kernel[1] * conv.dilation[1];
            source[j] = base + (j < count ? c * high * wide + ky * wide + kx : 0);  // the others come to nothing
        }
        for (int64_t o = out; o < ld; ++o)
            for (int64_t p = 0; p < strip * conv.out_size[1]; ++p) B[p * ld + o] = T(0);
        const int64_t step_x = conv.stride[1], step_y = conv.stride[0] * wide;
        for (int64_t y = 0; y < conv.out_size[0]; y += strip) {
            const int64_t height = min(strip, conv.out_size[0] - y), columns = conv.out_size[1];
            transpose<T>(G + y * columns, pixels, out, height * columns, B, ld);
            for (int64_t j = 0; j < rounded; j += MR) {
                for (int64_t o = 0, left = ld / W<T>; left > 0;) {
                    T* C = sum + j * ld + o;
                    const int64_t vectors = left == NV + 1 ? 2 : min<int64_t>(NV, left);
                    const T* const* from = source + j;
                    if (vectors == 1) tap_tile<T, 1>(from, height, columns, step_y, step_x, B + o, ld, C, ld, y == 0);
                    if (vectors == 2) tap_tile<T, 2>(from, height, columns, step_y, step_x, B + o, ld, C, ld, y == 0);
                    if (NV > 2 && vectors == 3)
                        tap_tile<T, 3>(from, height, columns, step_y, step_x, B + o, ld, C, ld, y == 0);
                    if (NV > 3 && vectors == 4)
                        tap_tile<T, 4>(from, height, columns, step_y, step_x, B + o, ld, C, ld, y == 0);
                    left -= vectors;
                    o += vectors * W<T>;
                }
            }
            for (int64_t j = 0; j < rounded; ++j) source[j] += height * step_y;
        }
        T* to = rows + matrix / conv.groups * row_stride + matrix % conv.groups * out * conv.in * taps + first * taps;
        transpose<T>(sum, ld, count, out, to, conv.in * taps);
    };
    parallel(conv.samples * conv.groups * pieces, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
