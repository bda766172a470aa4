// What the kernels of every device are handed: gradients and block ranges as pointers, sizes and strides.
//
// Letters: d weights, K blocks, B block size, n <= B the length of one block, k gradients handed over, m their divisor.
#pragma once
#include <cstdint>

namespace ff {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Gradients [k, d]: unit inner stride, any row stride (in elements).
struct Gradients {
    const void* data;
    DType dtype;
    int64_t rows;
    int64_t row_stride;
};

// Block b covers the weights range[2b] .. range[2b + 1] - 1; no block is longer than `size` (B).
struct Blocks {
    const int64_t* range;
    int64_t count;
    int64_t size;
    int64_t start(int64_t b) const { return range[2 * b]; }
    int64_t length(int64_t b) const { return range[2 * b + 1] - range[2 * b]; }
};

}  // namespace ff
