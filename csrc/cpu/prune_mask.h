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
constexpr int64_t LANES = 4;  // neighbours often have one digit: counted apart, they do not wait for each other

// invalid <- the first weight that is not dead and whose saliency is not finite, else -1; then only the dead ones go.
template <class T>
void prune_mask(uint8_t* mask, int64_t* invalid, const T* saliency, const uint8_t* dead, int64_t d, int64_t num_zeros,
                int threads) {
    using Bits = typename Key<T>::Bits;
    const int64_t pieces = ceil_div(d, SELECT_PIECE);
    Scratch<int64_t> bad(pieces), num_dead(pieces), ties(pieces);
    Scratch<int32_t> counts(pieces * DIGITS);
    auto first = [&](int64_t piece) { return piece * SELECT_PIECE; };
    auto last = [&](int64_t piece) { return min(d, (piece + 1) * SELECT_PIECE); };
    // What a loop uses is in local variables: a store through mask could change all else, and nothing would be
    // vectorised.
    auto look = [&](int64_t piece) {
        const T* x = saliency;
        const uint8_t* gone = dead;
        uint8_t* keep = mask;
        const int64_t stop = last(piece);
        int32_t sum_bad = 0, sum_dead = 0;
        for (int64_t q = first(piece); q < stop; ++q) {
            keep[q] = 1 - gone[q];
            sum_dead += gone[q];
            sum_bad += !gone[q] & !(std::fabs(x[q]) <= std::numeric_limits<T>::max());
        }
        bad[piece] = sum_bad;
        num_dead[piece] = sum_dead;
    };
    parallel(pieces, threads, look);
    int64_t left = num_zeros;  // of the weights in the running, how many of the smallest go
    *invalid = -1;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        left -= num_dead[piece];
        for (int64_t q = first(piece); *invalid < 0 && bad[piece] > 0; ++q)
            if (!dead[q] && !std::isfinite(saliency[q])) *invalid = q;
    }
    if (*invalid >= 0 || left <= 0) return;

    Bits threshold = 0, known = 0;  // the leading digits found so far, and where they stand
    for (int shift = 8 * static_cast<int>(sizeof(Bits)); shift > 0;) {
        const int width = min(DIGIT, shift);
        shift -= width;
        const Bits digit = (Bits(1) << width) - 1;
        auto count = [&](int64_t piece) {
            Scratch<int32_t> lanes(LANES * DIGITS);
            std::memset(lanes, 0, LANES * DIGITS * sizeof(int32_t));
            const int64_t stop = last(piece);
            for (int64_t q = first(piece); q < stop; ++q) {
                const Bits key = key_of(saliency[q]);
                if (!dead[q] & ((key & known) == threshold))
                    ++lanes[q % LANES * DIGITS + static_cast<int64_t>(key >> shift & digit)];
            }
            int32_t* here = counts + piece * DIGITS;
            for (int64_t i = 0; i < DIGITS; ++i) {
                here[i] = 0;
                for (int64_t lane = 0; lane < LANES; ++lane) here[i] += lanes[lane * DIGITS + i];
            }
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
    auto remove = [&](int64_t piece) {
        const T* x = saliency;
        const uint8_t* gone = dead;
        uint8_t* keep = mask;
        const int64_t stop = last(piece);
        const Bits limit = threshold;
        int32_t equal = 0;
        for (int64_t q = first(piece); q < stop; ++q) {
            const Bits key = key_of(x[q]);
            keep[q] = !gone[q] & (key >= limit);
            equal += !gone[q] & (key == limit);
        }
        ties[piece] = equal;
    };
    parallel(pieces, threads, remove);
    for (int64_t piece = 0; piece < pieces && left > 0; ++piece)
        for (int64_t q = first(piece); q < last(piece) && ties[piece] > 0 && left > 0; ++q)
            if (!dead[q] && key_of(saliency[q]) == threshold) {
                mask[q] = 0;
                --left;
            }
}

}  // namespace FF_NAMESPACE
}  // namespace ff
