// mask [d] <- which weights are kept when the least salient ones go, ties by index: radix selection, 11 bits of the
// threshold at a time. Reads the saliencies once per digit (3 times in float32, 6 in float64) and once to decide.
#pragma once
#include "simd.h"

namespace ff {
namespace FF_NAMESPACE {

template <class T>
struct Key;
template <>
struct Key<float> {
    using Bits = uint32_t;
};
template <>
struct Key<double> {
    using Bits = uint64_t;
};

// Unsigned integers in the order of the numbers, which are finite; both zeros have one.
template <class T>
FF_INLINE typename Key<T>::Bits key_of(T x) {
    using Bits = typename Key<T>::Bits;
    constexpr Bits SIGN = Bits(1) << (8 * sizeof(Bits) - 1);
    x += T(0);
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & SIGN ? ~bits : bits | SIGN;
}

constexpr int DIGIT = 11;
constexpr int64_t DIGITS = int64_t(1) << DIGIT;
constexpr int64_t SELECT_PIECE = 65536;  // weights of a task

// invalid <- the first weight that is not dead and whose saliency is not finite, else -1; then only the dead ones go.
template <class T>
void prune_mask(uint8_t* mask, int64_t* invalid, const T* saliency, const uint8_t* dead, int64_t d, int64_t num_zeros,
                int threads) {
    using Bits = typename Key<T>::Bits;
    const int64_t pieces = ceil_div(d, SELECT_PIECE);
    Scratch<int64_t> first_bad(pieces), num_dead(pieces), ties(pieces), counts(pieces * DIGITS);
    auto each = [&](int64_t piece, auto body) {
        for (int64_t q = piece * SELECT_PIECE; q < min(d, (piece + 1) * SELECT_PIECE); ++q) body(q);
    };
    auto look = [&](int64_t piece) {
        first_bad[piece] = -1;
        num_dead[piece] = 0;
        each(piece, [&](int64_t q) {
            mask[q] = !dead[q];
            num_dead[piece] += dead[q];
            if (!dead[q] && !std::isfinite(saliency[q]) && first_bad[piece] < 0) first_bad[piece] = q;
        });
    };
    parallel(pieces, threads, look);
    int64_t left = num_zeros;  // of the weights in the running, how many of the smallest go
    *invalid = -1;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        left -= num_dead[piece];
        if (*invalid < 0) *invalid = first_bad[piece];
    }
    if (*invalid >= 0 || left <= 0) return;

    Bits threshold = 0, known = 0;  // the leading digits found so far, and where they stand
    for (int shift = 8 * static_cast<int>(sizeof(Bits)); shift > 0;) {
        const int width = min(DIGIT, shift);
        shift -= width;
        const Bits digit = (Bits(1) << width) - 1;
        auto count = [&](int64_t piece) {
            int64_t* here = counts + piece * DIGITS;
            std::memset(here, 0, DIGITS * sizeof(int64_t));
            each(piece, [&](int64_t q) {
                const Bits key = key_of(saliency[q]);
                if (!dead[q] && (key & known) == threshold) ++here[key >> shift & digit];
            });
        };
        parallel(pieces, threads, count);
        Bits found = 0;
        for (;; ++found) {
            int64_t here = 0;
            for (int64_t piece = 0; piece < pieces; ++piece)
                here += counts[piece * DIGITS + static_cast<int64_t>(found)];
            if (here >= left) break;
            left -= here;
        }
        threshold |= found << shift;
        known |= digit << shift;
    }

    // What is below goes, and the first `left` that are equal.
    auto count_ties = [&](int64_t piece) {
        ties[piece] = 0;
        each(piece, [&](int64_t q) { ties[piece] += !dead[q] && key_of(saliency[q]) == threshold; });
    };
    parallel(pieces, threads, count_ties);
    for (int64_t piece = 0, before = 0; piece < pieces; ++piece) {
        const int64_t here = ties[piece];
        ties[piece] = left - before;
        before += here;
    }
    auto remove = [&](int64_t piece) {
        int64_t go = ties[piece];
        each(piece, [&](int64_t q) {
            const Bits key = key_of(saliency[q]);
            if (!dead[q] && (key < threshold || (key == threshold && go-- > 0))) mask[q] = 0;
        });
    };
    parallel(pieces, threads, remove);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
