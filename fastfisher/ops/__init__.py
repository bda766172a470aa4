"""The operations on Fisher blocks: a reference in plain PyTorch each, and kernels that must agree with it.

Weights [d] and gradients [k, d] are flat, and blocks are ranges of the d weights; only conv_weight_grads sees images.
Every op writes into the tensors it is given and returns nothing.
"""

import importlib
from importlib.util import find_spec

from fastfisher.ops._registry import BACKENDS, OPS, explain, implement, use_backend
from fastfisher.ops.block_factor_matvec import block_factor_matvec
from fastfisher.ops.block_matvec import block_matvec
from fastfisher.ops.conv_weight_grads import conv_weight_grads
from fastfisher.ops.dual_factor import dual_factor_
from fastfisher.ops.factor_diagonal import factor_diagonal
from fastfisher.ops.factor_downdate import factor_downdate_
from fastfisher.ops.fisher_accumulate import fisher_accumulate_
from fastfisher.ops.fisher_vector_product import fisher_vector_product
from fastfisher.ops.fishleg_block_step import fishleg_block_step_
from fastfisher.ops.inverse_diagonal import inverse_diagonal
from fastfisher.ops.inverse_from_grads import inverse_diagonal_from_grads, inverse_from_grads
from fastfisher.ops.kron_matvec import kron_matvec
from fastfisher.ops.obs_eliminate import obs_eliminate
from fastfisher.ops.obs_saliency import obs_saliency
from fastfisher.ops.obs_solve import obs_solve_
from fastfisher.ops.obs_update import obs_update_
from fastfisher.ops.prune_mask import prune_mask
from fastfisher.ops.sherman_morrison import sherman_morrison_
from fastfisher.ops.spd_inverse import spd_inverse_
from fastfisher.ops.woodbury import woodbury_

for _backend in ("native", "triton"):
    if find_spec("fastfisher.kernels") and find_spec(f"fastfisher.kernels.{_backend}"):
        importlib.import_module(f"fastfisher.kernels.{_backend}")  # registers its kernels here

__all__ = [
    "sherman_morrison_",
    "woodbury_",
    "fisher_accumulate_",
    "spd_inverse_",
    "inverse_from_grads",
    "inverse_diagonal_from_grads",
    "fisher_vector_product",
    "fishleg_block_step_",
    "factor_diagonal",
    "block_factor_matvec",
    "factor_downdate_",
    "kron_matvec",
    "conv_weight_grads",
    "dual_factor_",
    "inverse_diagonal",
    "block_matvec",
    "obs_eliminate",
    "obs_saliency",
    "prune_mask",
    "obs_update_",
    "obs_solve_",
    "explain",
    "implement",
    "use_backend",
    "BACKENDS",
    "OPS",
]
