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
// ldb]. With LANES every lane is a group of its own, and A holds vectors.
template <class T, int VECTORS, bool LANES = false>
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
                for (int v = 0; v < VECTORS; ++v) {
                    if constexpr (LANES) {
                        acc[r][v] += vec(a[r] + i) * b[v];
                    } else {
                        acc[r][v] += a[r][i] * b[v];
                    }
                }
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

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define FF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define FF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#endif

// to [4, ldt] <- the transpose of from [4, lda].
FF_INLINE void transpose_four(const float* from, int64_t lda, float* to, int64_t ldt) {
    const auto row = [&](int64_t r) { return *reinterpret_cast<const Four*>(from + r * lda); };
    const Four a = row(0), b = row(1), c = row(2), d = row(3);
    const Four ab = FF_SHUFFLE(a, b, 0, 4, 1, 5), cd = FF_SHUFFLE(c, d, 0, 4, 1, 5);
    const Four high_ab = FF_SHUFFLE(a, b, 2, 6, 3, 7), high_cd = FF_SHUFFLE(c, d, 2, 6, 3, 7);
    const auto put = [&](int64_t r, Four value) { *reinterpret_cast<Four*>(to + r * ldt) = value; };
    put(0, FF_SHUFFLE(ab, cd, 0, 1, 4, 5));
    put(1, FF_SHUFFLE(ab, cd, 2, 3, 6, 7));
    put(2, FF_SHUFFLE(high_ab, high_cd, 0, 1, 4, 5));
    put(3, FF_SHUFFLE(high_ab, high_cd, 2, 3, 6, 7));
}
FF_INLINE void transpose_four(const double* from, int64_t lda, double* to, int64_t ldt) {
    for (int64_t c = 0; c < 4; ++c)
        for (int64_t r = 0; r < 4; ++r) to[c * ldt + r] = from[r * lda + c];
}

// to [columns, ldt] <- the transpose of from [rows, lda].
template <class T>
inline void transpose(const T* from, int64_t lda, int64_t rows, int64_t columns, T* to, int64_t ldt) {
    constexpr int64_t SIDE = 16;  // a square of them stays in cache
    for (int64_t c0 = 0; c0 < columns; c0 += SIDE) {
        const int64_t c1 = min(c0 + SIDE, columns);
        for (int64_t r = 0; r < rows; r += 4) {
            int64_t c = c0;
            if (r + 4 <= rows)
                for (; c + 4 <= c1; c += 4) transpose_four(from + r * lda + c, lda, to + c * ldt + r, ldt);
            for (; c < c1; ++c)
                for (int64_t i = r; i < min(r + 4, rows); ++i) to[c * ldt + i] = from[i * lda + c];
        }
    }
}

// What a register tile walks over: channel c of pixel (y, x) at data[c * channel + (y * width + x) * pixel].
template <class T>
struct Pixels {
    const T* data;
    int64_t channel, pixel, width;
};

// `channels` channels from `first` on of one group of one sample, x [matrix = (sample, group)].
template <class T>
FF_INLINE Pixels<T> pixels(const T* x, const Convolution& conv, int64_t matrix, int64_t first) {
    const int64_t plane = conv.size[0] * conv.size[1], width = conv.size[1];
    if (!conv.x_last) return {x + (matrix * conv.in + first) * plane, plane, 1, width};
    const int64_t sample = matrix / conv.groups, group = matrix % conv.groups, all = conv.groups * conv.in;
    return {x + sample * all * plane + group * conv.in + first, 1, all, width};
}

// The same with the padding around it, in `to`.
template <class T>
inline Pixels<T> with_padding(const Pixels<T>& from, const Convolution& conv, int64_t channels, T* to) {
    const int64_t high = conv.size[0] + 2 * conv.padding[0], wide = conv.size[1] + 2 * conv.padding[1];
    const Pixels<T> out = conv.x_last ? Pixels<T>{to, 1, channels, wide} : Pixels<T>{to, high * wide, 1, wide};
    fill_zero(to, channels * high * wide);
    const auto copy = [](T* into, const T* what, int64_t count) {
        std::memcpy(into, what, static_cast<size_t>(count) * sizeof(T));
    };
    for (int64_t y = 0; y < conv.size[0]; ++y) {
        T* row = to + ((y + conv.padding[0]) * wide + conv.padding[1]) * out.pixel;
        const T* what = from.data + y * from.width * from.pixel;
        if (!conv.x_last) {
            for (int64_t c = 0; c < channels; ++c) copy(row + c * out.channel, what + c * from.channel, conv.size[1]);
        } else if (from.pixel == channels) {
            copy(row, what, conv.size[1] * channels);
        } else {
            for (int64_t x = 0; x < conv.size[1]; ++x) copy(row + x * channels, what + x * from.pixel, channels);
        }
    }
    return out;
}

// Channel `channel` of `lanes` groups, whose channels lie `between` apart, as [size + 2 padding, W] with zeros in the
// rest. x is one sample: [channels, *size], or [*size, channels] with `all` of them.
template <class T>
inline void pack_lanes(const T* x, bool last, int64_t channel, int64_t between, int64_t all, int64_t lanes,
                       const int64_t* size, const int64_t* padding, T* to) {
    const int64_t wide = size[1] + 2 * padding[1], plane = size[0] * size[1];
    if (lanes < W<T> || padding[0] > 0 || padding[1] > 0) fill_zero(to, (size[0] + 2 * padding[0]) * wide * W<T>);
    for (int64_t y = 0; y < size[0]; ++y) {
        T* row = to + ((y + padding[0]) * wide + padding[1]) * W<T>;
        if (!last) {
            transpose<T>(x + channel * plane + y * size[1], between * plane, lanes, size[1], row, W<T>);
            continue;
        }
        for (int64_t p = 0; p < size[1]; ++p)
            for (int64_t l = 0; l < lanes; ++l) row[p * W<T> + l] = x[(y * size[1] + p) * all + channel + l * between];
    }
}

// The same for groups of so few output channels that a vector would be mostly empty: W groups lie in it instead.
template <class T>
void narrow_groups(T* rows, int64_t row_stride, const T* x, const T* g, const Convolution& conv, int threads) {
    const int64_t taps = conv.kernel[0] * conv.kernel[1], count = conv.in * taps, rounded = ceil_div(count, MR) * MR;
    const int64_t wide = conv.size[1] + 2 * conv.padding[1], all = (conv.size[0] + 2 * conv.padding[0]) * wide;
    const int64_t plane = conv.size[0] * conv.size[1], outputs = conv.out_size[0] * conv.out_size[1];
    const int64_t pieces = ceil_div(conv.groups, W<T>), none[2] = {0, 0};
    auto task = [&](int64_t t) {
        const int64_t sample = t / pieces, first = t % pieces * W<T>, lanes = min(W<T>, conv.groups - first);
        Scratch<T> planes(conv.in * all * W<T>), B(outputs * W<T>), sum(rounded * W<T>);
        Scratch<const T*> source(rounded);
        for (int64_t c = 0; c < conv.in; ++c)
            pack_lanes<T>(x + sample * conv.groups * conv.in * plane, conv.x_last, first * conv.in + c, conv.in,
                          conv.groups * conv.in, lanes, conv.size, conv.padding, planes + c * all * W<T>);
        for (int64_t j = 0; j < rounded; ++j) {
            const int64_t y = j % taps / conv.kernel[1] * conv.dilation[0], x = j % conv.kernel[1] * conv.dilation[1];
            source[j] = planes + (j < count ? j / taps * all + y * wide + x : 0) * W<T>;
        }
        for (int64_t o = 0; o < conv.out; ++o) {
            pack_lanes<T>(g + sample * conv.groups * conv.out * outputs, conv.g_last, first * conv.out + o, conv.out,
                          conv.groups * conv.out, lanes, conv.out_size, none, B);
            for (int64_t j = 0; j < rounded; j += MR)
                tap_tile<T, 1, true>(source + j, conv.out_size[0], conv.out_size[1], conv.stride[0] * wide * W<T>,
                                     conv.stride[1] * W<T>, B, W<T>, sum + j * W<T>, W<T>, true);
            transpose<T>(sum, W<T>, count, lanes, rows + sample * row_stride + (first * conv.out + o) * count,
                         conv.out * count);
        }
    };
    parallel(conv.samples * pieces, threads, task);
}

template <class T>
void conv_weight_grads(T* rows, int64_t row_stride, const T* x, const T* g, Convolution conv, int threads) {
    if (2 * conv.out <= W<T> && conv.groups > 1) return narrow_groups(rows, row_stride, x, g, conv, threads);
    const int64_t taps = conv.kernel[0] * conv.kernel[1], out = conv.out, columns = conv.out_size[1];
    const int64_t outputs = conv.out_size[0] * columns, ld = ceil_div(out, W<T>) * W<T>;
    const int64_t high = conv.size[0] + 2 * conv.padding[0], wide = conv.size[1] + 2 * conv.padding[1];
    const bool pads = conv.padding[0] > 0 || conv.padding[1] > 0;
    const int64_t width = min(conv.in, max<int64_t>(1, CONV_SUMS / (taps * ld))), pieces = ceil_div(conv.in, width);
    const int64_t strip = min(conv.out_size[0], max<int64_t>(1, CONV_STRIP / (columns * ld)));
    // channels that come last fill whole vectors where they stand
    const int64_t all = conv.groups * out;
    const bool direct = conv.g_last && out % W<T> == 0 && reinterpret_cast<uintptr_t>(g) % FF_VECTOR_BYTES == 0;
    const int64_t ldb = direct ? all : ld;
    auto task = [&](int64_t t) {
        const int64_t first = t % pieces * width, channels = min(width, conv.in - first), matrix = t / pieces;
        const int64_t sample = matrix / conv.groups, group = matrix % conv.groups;
        const int64_t count = channels * taps, rounded = ceil_div(count, MR) * MR;
        Scratch<T> padded_x(pads ? channels * high * wide : 0), packed(direct ? 0 : strip * columns * ld),
            sum(rounded * ld);
        Pixels<T> from = pixels<T>(x, conv, matrix, first);
        if (pads) from = with_padding<T>(from, conv, channels, padded_x);
        Scratch<const T*> source(rounded);
        for (int64_t j = 0; j < rounded; ++j) {
            const int64_t c = j / taps, y = j % taps / conv.kernel[1], x = j % conv.kernel[1];
            const int64_t offset = (y * conv.dilation[0] * from.width + x * conv.dilation[1]) * from.pixel;
            source[j] = from.data + (j < count ? c * from.channel + offset : 0);  // the others come to nothing
        }
        const T* G = g + (conv.g_last ? sample * all * outputs + group * out : matrix * out * outputs);
        if (!direct && ld > out) fill_zero<T>(packed, strip * columns * ld);
        const int64_t step_x = conv.stride[1] * from.pixel, step_y = conv.stride[0] * from.width * from.pixel;
        for (int64_t y = 0; y < conv.out_size[0]; y += strip) {
            const int64_t height = min(strip, conv.out_size[0] - y), now = height * columns;
            const T* B = packed;
            if (direct) {
                B = G + y * columns * all;
            } else if (conv.g_last) {
                for (int64_t p = 0; p < now; ++p)
                    for (int64_t o = 0; o < out; ++o) packed[p * ld + o] = G[(y * columns + p) * all + o];
            } else {
                transpose<T>(G + y * columns, outputs, out, now, packed, ld);
            }
            for (int64_t j = 0; j < rounded; j += MR) {
                for (int64_t o = 0, left = ld / W<T>; left > 0;) {
                    T* C = sum + j * ld + o;
                    const int64_t vectors = left == NV + 1 ? 2 : min<int64_t>(NV, left);
                    const T* const* a = source + j;
                    if (vectors == 1) tap_tile<T, 1>(a, height, columns, step_y, step_x, B + o, ldb, C, ld, y == 0);
                    if (vectors == 2) tap_tile<T, 2>(a, height, columns, step_y, step_x, B + o, ldb, C, ld, y == 0);
                    if (NV > 2 && vectors == 3)
                        tap_tile<T, 3>(a, height, columns, step_y, step_x, B + o, ldb, C, ld, y == 0);
                    if (NV > 3 && vectors == 4)
                        tap_tile<T, 4>(a, height, columns, step_y, step_x, B + o, ldb, C, ld, y == 0);
                    left -= vectors;
                    o += vectors * W<T>;
                }
            }
            for (int64_t j = 0; j < rounded; ++j) source[j] += height * step_y;
        }
        T* to = rows + sample * row_stride + (group * out * conv.in + first) * taps;
        transpose<T>(sum, ld, count, out, to, conv.in * taps);
    };
    parallel(conv.samples * conv.groups * pieces, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
