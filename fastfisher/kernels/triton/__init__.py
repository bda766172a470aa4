"""The `triton` backend: kernels for GPU tensors, one file per op.

Nothing here imports triton before an op meets a GPU tensor: on a machine without a GPU the backend costs nothing and
may be absent.  TRITON_INTERPRET=1 runs the same kernels in Triton's interpreter on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fastfisher import environment
from fastfisher.ops._registry import Implementation, implement

# op -> the file of its kernels; the function there is called like the op, without the underscore at its end
FILES = {
    "sherman_morrison_": "rank_updates",
    "woodbury_": "rank_updates",
    "fisher_accumulate_": "fisher_accumulate",
    "spd_inverse_": "spd_inverse",
    "inverse_from_grads": "inverse_from_grads",
    "inverse_diagonal_from_grads": "inverse_from_grads",
    "fisher_vector_product": "block_matvec",
    "dual_factor_": "dual_factor",
    "inverse_diagonal": "inverse_diagonal",
    "block_matvec": "block_matvec",
    "fishleg_block_step_": "fishleg_block_step",
    "factor_diagonal": "factor",
    "block_factor_matvec": "factor",
    "factor_downdate_": "factor",
    "kron_matvec": "kron_matvec",
    "conv_weight_grads": "conv_weight_grads",
    "obs_eliminate": "obs_eliminate",
    "obs_saliency": "obs",
    "prune_mask": "prune_mask",
    "obs_update_": "obs",
    "obs_solve_": "obs",
}


@lru_cache(maxsize=1)
def load_error() -> str:
    """Why triton cannot be imported, "" where it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return ""


def why_not(*args: object) -> str | None:
    """None when Triton can run a kernel on these arguments, else the reason."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if environment.triton_interpret():
        if device.type != "cpu":
            return f"{environment.TRITON_INTERPRET.name}=1 runs on CPU tensors, got one on {device}"
    elif device.type != "cuda":
        return f"it runs on GPU tensors, got one on {device}"
    elif torch.version.hip is not None:
        return "its kernels are written for and tested on NVIDIA GPUs"
    return load_error() or None


def _lazy(op: str, file: str) -> Implementation:
    """The kernel of an op, imported with triton when it is first called."""

    def run(*args: object) -> None:
        module = importlib.import_module(f"fastfisher.kernels.triton.{file}")
        function: Callable[..., None] = getattr(module, op.rstrip("_"))
        function(*args)

    return run


for _op, _file in FILES.items():
    implement(_op, "triton", why_not)(_lazy(_op, _file))
