// Gradient rows on their way into shared memory. They are asked for while the rows before them are worked on and rest
// in registers as stored, because a conversion would wait for them.
#pragma once
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "tile.cuh"

namespace ff {
namespace cuda {

template <class To, class From>
__device__ inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// One column of ROWS rows, in the registers of one thread.
template <class T, int ROWS>
class GradientColumn {
   public:
    // Rows [row, row + ROWS) at `column`; 0 beyond the last row, and everywhere without `inside`.
    __device__ void fetch(const Gradients& grads, int64_t row, int64_t column, bool inside) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) stored_[r] = 0;
        if (!inside) return;
        switch (grads.dtype) {
            case DType::f16:
            case DType::bf16:
                return read<uint16_t>(grads, row, column);
            case DType::f32:
                return read<uint32_t>(grads, row, column);
            case DType::f64:
                return read<double>(grads, row, column);
        }
    }

    // rows [ROWS, pitch] <- the column, converted to T.
    __device__ void put(T* rows, int pitch, DType dtype) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) rows[r * pitch] = value(stored_[r], dtype);
    }

   private:
    using Stored = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

    template <class Element>
    __device__ void read(const Gradients& grads, int64_t row, int64_t column) {
        const Element* from = static_cast<const Element*>(grads.data) + row * grads.row_stride + column;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (row + r < grads.rows) stored_[r] = store(from[r * grads.row_stride]);
    }
    static __device__ Stored store(uint16_t bits) { return bits; }
    static __device__ Stored store(uint32_t bits) { return bits; }
    static __device__ Stored store(double value) { return same_bits<Stored>(static_cast<T>(value)); }

    static __device__ T value(Stored stored, DType dtype) {
        switch (dtype) {
            case DType::f16:
                return __half2float(__ushort_as_half(static_cast<uint16_t>(stored)));
            case DType::bf16:
                return same_bits<float>(static_cast<uint32_t>(stored) << 16);
            case DType::f32:
                return same_bits<float>(static_cast<uint32_t>(stored));
            case DType::f64:
                break;
        }
        return same_bits<T>(stored);
    }

    Stored stored_[ROWS];
};

}  // namespace cuda
}  // namespace ff
