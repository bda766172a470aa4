// What the CUDA kernels compute, for callers that know nothing of CUDA. T is float or double; every pointer is memory
// of the device `where` names, with no more alignment than its elements have. Letters as in types.h.
//
// Nothing here waits for the device or allocates, so all of it can be captured in a CUDA graph. Results do not depend
// on timing: sums have a fixed order. Each function returns a cudaError_t, 0 for success.
#pragma once
#include <cstdint>

#include "../types.h"

namespace ff {
namespace cuda {

struct Where {
    int device;
    void* stream;  // a cudaStream_t
};

// The largest B that fits on chip: the state of a block is held in registers.
template <class T>
constexpr int64_t LARGEST_BLOCK = sizeof(T) == 4 ? 256 : 176;

// condition [K]: ||A||_F ||A^-1||_F, A = F scaled to unit diagonal. amplification [K]: ||A||_F ||F^-1 diag(f)^1/2||_F
// max(f)^1/2, f = the diagonal of F without the damping. Both +inf where a pivot was not positive and finite.
struct Estimates {
    double* condition;
    double* amplification;
};

// matrix [K, B, B] <- F^-1, F = matrix + damping I, from the lower triangle; NaN in a block that failed.
template <class T>
int spd_inverse(T* matrix, int64_t num_blocks, int64_t block_size, double damping, Estimates, Where);

// f_inv [K, B, B] <- (damping I + G^T G / m)^-1, I / damping outside of a short block; or, where f_inv is null,
// inv_diag [d] (entries inside blocks) <- its diagonal. NaN in a block that failed.
template <class T>
int inverse_from_grads(T* f_inv, T* inv_diag, Gradients, Blocks, double num_grads, double damping, Estimates, Where);

// f_inv [K, B, B] <- f_inv - v v^T / (m + g.v), v = f_inv g, for every gradient in turn.
template <class T>
int sherman_morrison(T* f_inv, Gradients, Blocks, double num_grads, Where);

// fisher [K, B, B], lower triangles, += G^T G / m.
int fisher_accumulate(float* fisher, Gradients, Blocks, double num_grads, Where);

// weight_R <- w_R - F^-1[R, Q] (F^-1[Q, Q])^-1 w_Q, weight_Q <- 0, where the mask of Q is 0; a block that failed, whose
// flag becomes 1, stays as it was. Blocks of float32 as well fit only where float64 ones do.
template <class T>
int obs_solve(T* weight, const T* f_inv, Blocks, const uint8_t* mask, uint8_t* failed, Where);

// The largest B that fishleg_block_step takes.
constexpr int64_t LARGEST_STEP = 64;

// R <- R - eta (R M - R), M = Z^T Z / m + damping R^T R, Z = G R, eta = rate / 2 / max(1, 1.1 lambda); root [K, B, B].
// top [K, B]: the vector that the power iteration for lambda begins and ends with. loss, largest [K]: the loss before
// the step and lambda, both +inf where one is not finite; root and top then stay as they were.
template <class T>
int fishleg_block_step(T* root, T* top, Gradients, Blocks, double num_grads, double damping, double rate, double* loss,
                       double* largest, Where);

// What went wrong, for a code returned by the functions above.
const char* error_text(int code);

}  // namespace cuda
}  // namespace ff
