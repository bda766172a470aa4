// Conversion of halves, by the compiler's own type.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half half) {
    _Float16 value;
    std::memcpy(&value, &half.bits, sizeof value);
    return static_cast<float>(value);
}
