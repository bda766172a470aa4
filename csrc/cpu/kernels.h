// What the CPU kernels compute, for callers that know nothing of SIMD: one table of functions per element type,
// filled once per instruction set (kernels_<isa>.cpp) and chosen at run time (dispatch.cpp).
// Letters as in types.h.
#pragma once
#include <cstdint>

#include "../types.h"

namespace ff {

// The dual state of the inverse: F^-1 = (I - G^T C^-1 G) / damping with C = L L^T per block.
// factor [K, k, k] holds U = L^T, row-major.
struct Dual {
    Gradients grads;
    const double* factor;
    double damping;
};

// Convolutions of samples with groups; dimensions are rows and columns. in and out are the channels of one group.
struct Convolution {
    int64_t samples, groups, in, out;
    int64_t size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
    bool x_last, g_last;  // whether channels come last in memory
};

// T is the type of the state (float or double). `threads` is the number of threads to use, this one included.
template <class T>
struct Kernels {
    // f_inv [K, B, B] <- f_inv - v v^T / (m + g.v), v = f_inv g, for every gradient in turn.
    void (*sherman_morrison)(T* f_inv, Gradients, Blocks, double num_grads, int threads);
    // The same for k gradients at once through the capacitance m I + G f_inv G^T; NaN where it is not definite.
    void (*woodbury)(T* f_inv, Gradients, Blocks, double num_grads, int threads);
    // One auxiliary step of FishLeg, R <- R - eta (R M - R) with M = (G R)^T (G R) / m + damping R^T R, for root
    // [K, B, B]; eta = rate / 2 / max(1, 1.1 largest). largest [K]: eigenvalue of M by power iterations from top [K,
    // B], which is overwritten. loss [K]: 1/2 <M, R^T R> - tr R^T R before. Both +inf for a block left untouched.
    void (*fishleg_block_step)(T* root, T* top, Gradients, Blocks, double num_grads, double damping, double rate,
                               double* loss, double* largest, int threads);
    // fisher [K, B, B] += G^T G / m, lower triangle only.
    void (*fisher_accumulate)(T* fisher, Gradients, Blocks, double num_grads, int threads);
    // matrix [K, B, B] <- F^-1, F = matrix + damping I from the lower triangle. condition [K]: ||A||_F ||A^-1||_F,
    // A = F scaled to unit diagonal. amplification [K]: ||A||_F ||F^-1 diag(f)^1/2||_F max(f)^1/2, f = diag(matrix).
    // Both +inf, and NaN in the block, where a pivot is not positive and finite.
    void (*spd_inverse)(T* matrix, int64_t num_blocks, int64_t block_size, double damping, double* condition,
                        double* amplification, int threads);
    // f_inv [K, B, B] <- (damping I + G^T G / m)^-1, I / damping outside of a short block; or, where f_inv is null,
    // inv_diag [d] (entries inside blocks) <- its diagonal. Estimates and failures as above.
    void (*inverse_from_grads)(T* f_inv, T* inv_diag, Gradients, Blocks, double num_grads, double damping,
                               double* condition, double* amplification, int threads);
    // out [d] (entries inside blocks) <- diag F^-1.
    void (*inverse_diagonal)(T* out, const T* f_inv, Blocks, int threads);
    void (*inverse_diagonal_dual)(T* out, Dual, Blocks, int threads);
    // out [d, n] (rows inside blocks) <- F^-1 x.
    void (*block_matvec)(T* out, const T* x, int64_t n, const T* f_inv, Blocks, int threads);
    void (*block_matvec_dual)(T* out, const T* x, int64_t n, Dual, Blocks, int threads);
    // out [d, n] (rows inside blocks) <- G^T (G x) / m, in float64.
    void (*fisher_vector_product)(T* out, const T* x, int64_t n, Gradients, Blocks, double num_grads, int threads);
    // The inverse as R R^T, root [K, B, B]. out [d] (entries inside blocks) <- its diagonal.
    void (*factor_diagonal)(T* out, const T* root, Blocks, int threads);
    // out [d, n] (rows inside blocks) <- R (R^T x).
    void (*block_factor_matvec)(T* out, const T* x, int64_t n, const T* root, Blocks, int threads);
    // R <- R (I - V V^T), V a basis of the rows whose weights have mask 0; those rows become 0. In float64.
    void (*factor_downdate)(T* root, Blocks, const uint8_t* mask, int threads);
    // out [columns, N, o, i] <- D o (T (D o x) S), left [N, o, o] and right [N, i, i] symmetric, scale [N, o, i].
    void (*kron_matvec)(T* out, const T* left, const T* right, const T* scale, const T* x, int64_t columns,
                        int64_t tiles, int64_t o, int64_t i, int threads);
    // rows (a sample every row_stride, then [groups out, in, *kernel]) <- gradients of a convolution's weight, from its
    // input x [samples, groups in, *size] and the gradient g [samples, groups out, *out_size] at its output.
    void (*conv_weight_grads)(T* rows, int64_t row_stride, const T* x, const T* g, Convolution, int threads);
    // out [d] <- w^2 / (2 inv_diag).
    void (*obs_saliency)(T* out, const T* weight, const T* inv_diag, int64_t d, int threads);
    // mask [d] <- 0 for the dead and the least salient others, num_zeros in all, ties by index. invalid <- -1, or the
    // first weight whose saliency is not finite; then only the dead ones are removed.
    void (*prune_mask)(uint8_t* mask, int64_t* invalid, const T* saliency, const uint8_t* dead, int64_t d,
                       int64_t num_zeros, int threads);
    // Summed removal of the weights with mask 0: w <- w - F^-1 (1_Q w / inv_diag), w_Q = 0, inside the blocks.
    void (*obs_update)(T* weight, const T* f_inv, const T* inv_diag, int64_t d, Blocks, const uint8_t* mask,
                       int threads);
    void (*obs_update_dual)(T* weight, Dual, const T* inv_diag, int64_t d, Blocks, const uint8_t* mask, int threads);
    // Removal one by one: order [d] (places of the weights, inside blocks), loss [d] of each removal, NaN for weights
    // that stay; failed [K] where a pivot is unusable. groups [d] or null: at least `keep` of each stay. together: so
    // many consecutive weights of a block leave at once.
    void (*obs_eliminate)(int64_t* order, double* loss, uint8_t* failed, const T* weight, const T* f_inv, Blocks,
                          const int64_t* groups, int64_t keep, int64_t together, int threads);
    void (*obs_eliminate_dual)(int64_t* order, double* loss, uint8_t* failed, const T* weight, Dual, Blocks,
                               const int64_t* groups, int64_t keep, int64_t together, int threads);
    // Exact joint removal of the weights with mask 0; failed [K] marks blocks left untouched.
    void (*obs_solve)(T* weight, const T* f_inv, Blocks, const uint8_t* mask, uint8_t* failed, int threads);
    void (*obs_solve_dual)(T* weight, Gradients, Blocks, double num_grads, double damping, const uint8_t* mask,
                           uint8_t* failed, int threads);
};

// factor [K, k, k] <- U with U^T U = m damping I + G G^T per block; condition [K] as a power-iteration estimate of
// ||A^-1||_2, A = that matrix scaled to unit diagonal; +inf (and NaN in the factor) at failure.
using DualFactor = void (*)(double* factor, Gradients, Blocks, double num_grads, double damping, double* condition,
                            int threads);

struct KernelTable {
    Kernels<float> f32;
    Kernels<double> f64;
    DualFactor dual_factor;
};

// The instruction sets compiled into this build, best first, that this processor can run; null-terminated.
const char* const* available_isas();
// The table for one of them; null for a name that is not available.
const KernelTable* kernel_table(const char* isa);

}  // namespace ff
