// Vectors of the instruction set this translation unit is compiled for, scratch memory, and the small helpers on them.
//
// Every kernels_<isa>.cpp includes the kernels inside its own namespace FF_NAMESPACE, and nothing here instantiates a
// standard template: a function shared between translation units could otherwise be linked from the one compiled for a
// processor that this machine is not.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "parallel.h"

#define FF_INLINE inline __attribute__((always_inline))

namespace ff {
namespace FF_NAMESPACE {

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float type __attribute__((vector_size(FF_VECTOR_BYTES), may_alias));
};
template <>
struct Simd<double> {
    typedef double type __attribute__((vector_size(FF_VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename Simd<T>::type;

template <class T>
constexpr int64_t W = FF_VECTOR_BYTES / sizeof(T);  // elements of a vector
constexpr int64_t MR = FF_TILE_ROWS;                // rows of a register tile
constexpr int NV = FF_TILE_VECTORS;                 // vectors in a row of it
template <class T>
constexpr int64_t PAD = W<T> > MR ? W<T> : MR;  // rows and columns of scratch matrices are multiples of this

template <class T>
FF_INLINE Vec<T>& vec(T* p) {
    return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
FF_INLINE const Vec<T>& vec(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}

template <class I>
FF_INLINE I min(I a, I b) {
    return a < b ? a : b;
}
template <class I>
FF_INLINE I max(I a, I b) {
    return a > b ? a : b;
}
FF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
FF_INLINE int64_t padded(int64_t n) {
    return ceil_div(n, PAD<T>) * PAD<T>;
}
// Row stride of a scratch matrix: an odd number of cache lines, so that a column does not fall into a few cache sets.
template <class T>
FF_INLINE int64_t leading(int64_t n) {
    const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    return (ceil_div(padded<T>(n), line) | 1) * line;
}

// 64-byte aligned memory of one task, with anything in it.
template <class T>
class Scratch {
   public:
    explicit Scratch(int64_t count)
        : bytes_((static_cast<size_t>(max<int64_t>(count, 1)) * sizeof(T) + 63) / 64 * 64),
          data_(static_cast<T*>(take_scratch(bytes_))) {}
    ~Scratch() { give_scratch(data_, bytes_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() { return data_; }

   private:
    size_t bytes_;
    T* data_;
};

template <class T>
FF_INLINE void fill_zero(T* p, int64_t n) {
    std::memset(static_cast<void*>(p), 0, static_cast<size_t>(n) * sizeof(T));
}

// parallel_for over a callable.
template <class F>
FF_INLINE void parallel(int64_t tasks, int threads, F& body) {
    parallel_for(tasks, threads, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &body);
}

template <class T>
FF_INLINE bool usable_pivot(T x) {
    return x > T(0) && x < T(1) / T(0);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
