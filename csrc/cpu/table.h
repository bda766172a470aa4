// Fills the kernel table of the instruction set this translation unit is compiled for. A kernels_<isa>.cpp defines
// FF_NAMESPACE, FF_VECTOR_BYTES, FF_TILE_ROWS, FF_TILE_VECTORS and includes this file.
#pragma once
#include "block_matvec.h"
#include "conv_weight_grads.h"
#include "dual_factor.h"
#include "factor.h"
#include "fisher_accumulate.h"
#include "fishleg_block_step.h"
#include "inverse_diagonal.h"
#include "inverse_from_grads.h"
#include "kron_matvec.h"
#include "obs.h"
#include "obs_eliminate.h"
#include "prune_mask.h"
#include "sherman_morrison.h"
#include "woodbury.h"

namespace ff {
namespace FF_NAMESPACE {

template <class T>
constexpr Kernels<T> kernels() {
    return {
        sherman_morrison<T>,
        woodbury<T>,
        fishleg_block_step<T>,
        fisher_accumulate<T>,
        spd_inverse<T>,
        inverse_from_grads<T>,
        inverse_diagonal<T>,
        inverse_diagonal_dual<T>,
        block_matvec<T>,
        block_matvec_dual<T>,
        fisher_vector_product<T>,
        factor_diagonal<T>,
        block_factor_matvec<T>,
        factor_downdate<T>,
        kron_matvec<T>,
        conv_weight_grads<T>,
        obs_saliency<T>,
        prune_mask<T>,
        obs_update<T>,
        obs_update_dual<T>,
        obs_eliminate<T>,
        obs_eliminate_dual<T>,
        obs_solve<T>,
        obs_solve_dual<T>,
    };
}

extern const KernelTable table;
constexpr KernelTable table = {kernels<float>(), kernels<double>(), dual_factor};

}  // namespace FF_NAMESPACE
}  // namespace ff
