// Reading gradients: convert a piece of a row to the state's type, pack pieces of many rows into cache-resident panels.
#pragma once
#include "simd.h"

namespace ff {
namespace FF_NAMESPACE {

FF_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
FF_INLINE float from_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
// The exponent of a half is rebased by one multiplication, which is exact and treats subnormals alike; inf and NaN are
// the one exponent that it would get wrong.
FF_INLINE float from_f16(uint16_t h) {
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const float finite = from_bits(magnitude) * from_bits(0x77800000u);  // 2^112
    uint32_t bits;
    std::memcpy(&bits, &finite, 4);
    bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits;
    return from_bits(bits | static_cast<uint32_t>(h & 0x8000) << 16);
}

// The value of a gradient as the arithmetic sees it, by the type it is stored in; the two halves are both uint16_t in
// memory and told apart by their own struct.
struct Half {
    uint16_t bits;
};
struct Brain {
    uint16_t bits;
};
FF_INLINE float value(float x) { return x; }
FF_INLINE double value(double x) { return x; }
FF_INLINE float value(Half x) { return from_f16(x.bits); }
FF_INLINE float value(Brain x) { return from_bf16(x.bits); }

// Calls body with a pointer to grads[row, column], typed as stored.
template <class F>
FF_INLINE void with_source(const Gradients& g, int64_t row, int64_t column, F body) {
    const int64_t at = row * g.row_stride + column;
    switch (g.dtype) {
        case DType::f32:
            return body(static_cast<const float*>(g.data) + at);
        case DType::f64:
            return body(static_cast<const double*>(g.data) + at);
        case DType::f16:
            return body(static_cast<const Half*>(g.data) + at);
        case DType::bf16:
            return body(static_cast<const Brain*>(g.data) + at);
    }
}

// out[0..n) <- grads[row, column .. column + n).
template <class T>
inline void read_row(const Gradients& g, int64_t row, int64_t column, int64_t n, T* __restrict__ out) {
    with_source(g, row, column, [=](const auto* source) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(value(source[i]));
    });
}

// panel [rows, ld] <- grads[row .. row + rows, column .. column + n), zero-padded to `width` columns. The next `ahead`
// columns of the same rows are asked for meanwhile: rows lie pages apart, which the hardware's own prefetcher does not
// follow.
template <class T>
inline void pack_rows(const Gradients& g, int64_t row, int64_t rows, int64_t column, int64_t n, T* panel, int64_t ld,
                      int64_t width, int64_t ahead = 0) {
    with_source(g, row, column, [=](const auto* source) {
        constexpr int64_t line = 64 / sizeof(*source);
        for (int64_t r = 0; r < rows; ++r) {
            const auto* __restrict__ from = source + r * g.row_stride;
            T* __restrict__ to = panel + r * ld;
            for (int64_t i = 0; i < ahead; i += line) __builtin_prefetch(from + n + i, 0, 2);
            for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(value(from[i]));
            for (int64_t i = n; i < width; ++i) to[i] = T(0);
        }
    });
}

// panel [columns, ld] <- the transpose of grads[row .. row + rows, column .. column + columns), zero-padded to `width`
// entries a row. With `picked`, the columns are column + picked[0 .. columns) instead, ascending and below column +
// span. lines: scratch for MR rows of `columns` (or `span`) entries.
template <class T>
inline void pack_transposed(const Gradients& g, int64_t row, int64_t rows, int64_t column, int64_t columns, T* panel,
                            int64_t ld, int64_t width, T* lines, const int64_t* picked = nullptr, int64_t span = 0) {
    const int64_t read = picked ? span : columns;
    for (int64_t r0 = 0; r0 < width; r0 += MR) {
        for (int64_t r = 0; r < MR; ++r) {
            T* line = lines + r * read;
            if (r0 + r >= rows) {
                fill_zero(line, columns);
                continue;
            }
            read_row(g, row + r0 + r, column, read, line);
            if (picked)
                for (int64_t c = 0; c < columns; ++c) line[c] = line[picked[c]];
        }
        for (int64_t c = 0; c < columns; ++c) {
#pragma GCC unroll 8
            for (int64_t r = 0; r < MR; ++r) panel[c * ld + r0 + r] = lines[r * read + c];
        }
    }
}

}  // namespace FF_NAMESPACE
}  // namespace ff
