// The kernels on the emulated GPU as C functions, for emulated.py: arguments as in csrc/bindings.cpp.
#include "cuda/kernels.h"
#include "emulate.h"

using ff::Blocks;
using ff::DType;
using ff::Gradients;
using ff::cuda::Estimates;

namespace {

constexpr ff::cuda::Where HERE = {0, nullptr};

}  // namespace

extern "C" {

void set_seed(uint32_t seed) { emulate::machine.seed = seed; }

void last_launch(int64_t* threads, int64_t* shared_bytes) {
    *threads = emulate::machine.threads;
    *shared_bytes = static_cast<int64_t>(emulate::machine.shared_bytes);
}

int spd_inverse(bool is_double, void* matrix, int64_t count, int64_t size, double damping, double* condition,
                double* amplification) {
    const Estimates estimates = {condition, amplification};
    return is_double ? ff::cuda::spd_inverse(static_cast<double*>(matrix), count, size, damping, estimates, HERE)
                     : ff::cuda::spd_inverse(static_cast<float*>(matrix), count, size, damping, estimates, HERE);
}

int inverse_from_grads(bool is_double, void* f_inv, void* inv_diag, const void* grads, int dtype, int64_t rows,
                       int64_t row_stride, const int64_t* range, int64_t count, int64_t size, double num_grads,
                       double damping, double* condition, double* amplification) {
    const Gradients g = {grads, static_cast<DType>(dtype), rows, row_stride};
    const Blocks blocks = {range, count, size};
    const Estimates estimates = {condition, amplification};
    return is_double ? ff::cuda::inverse_from_grads(static_cast<double*>(f_inv), static_cast<double*>(inv_diag), g,
                                                    blocks, num_grads, damping, estimates, HERE)
                     : ff::cuda::inverse_from_grads(static_cast<float*>(f_inv), static_cast<float*>(inv_diag), g,
                                                    blocks, num_grads, damping, estimates, HERE);
}

int sherman_morrison(bool is_double, void* f_inv, const void* grads, int dtype, int64_t rows, int64_t row_stride,
                     const int64_t* range, int64_t count, int64_t size, double num_grads) {
    const Gradients g = {grads, static_cast<DType>(dtype), rows, row_stride};
    const Blocks blocks = {range, count, size};
    return is_double ? ff::cuda::sherman_morrison(static_cast<double*>(f_inv), g, blocks, num_grads, HERE)
                     : ff::cuda::sherman_morrison(static_cast<float*>(f_inv), g, blocks, num_grads, HERE);
}

int fisher_accumulate(void* fisher, const void* grads, int dtype, int64_t rows, int64_t row_stride,
                      const int64_t* range, int64_t count, int64_t size, double num_grads) {
    return ff::cuda::fisher_accumulate(static_cast<float*>(fisher),
                                       {grads, static_cast<DType>(dtype), rows, row_stride}, {range, count, size},
                                       num_grads, HERE);
}

int fishleg_block_step(bool is_double, void* root, void* top, const void* grads, int dtype, int64_t rows,
                       int64_t row_stride, const int64_t* range, int64_t count, int64_t size, double num_grads,
                       double damping, double rate, double* loss, double* largest) {
    const Gradients g = {grads, static_cast<DType>(dtype), rows, row_stride};
    const Blocks blocks = {range, count, size};
    return is_double ? ff::cuda::fishleg_block_step(static_cast<double*>(root), static_cast<double*>(top), g, blocks,
                                                    num_grads, damping, rate, loss, largest, HERE)
                     : ff::cuda::fishleg_block_step(static_cast<float*>(root), static_cast<float*>(top), g, blocks,
                                                    num_grads, damping, rate, loss, largest, HERE);
}

int obs_solve(bool is_double, void* weight, const void* f_inv, const int64_t* range, int64_t count, int64_t size,
              const uint8_t* mask, uint8_t* failed) {
    const Blocks blocks = {range, count, size};
    return is_double ? ff::cuda::obs_solve(static_cast<double*>(weight), static_cast<const double*>(f_inv), blocks,
                                           mask, failed, HERE)
                     : ff::cuda::obs_solve(static_cast<float*>(weight), static_cast<const float*>(f_inv), blocks, mask,
                                           failed, HERE);
}

}  // extern "C"
