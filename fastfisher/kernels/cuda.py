"""The CUDA half of the `native` backend: which calls the kernels of csrc/cuda take, and on which stream they run.

A kernel holds a whole block in the registers of one thread block, which limits B; the limits stand in
csrc/cuda/kernels.h.  Nothing here touches torch.cuda before a tensor lies on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor


def _edge(state: Tensor, *_: object) -> int:
    return state.shape[-1]


# The op, and where in its arguments B is found; the dtype that counts is that of the first argument.
BLOCK_SIZE: dict[str, Callable[..., int]] = {
    "spd_inverse_": _edge,
    "sherman_morrison_": _edge,
    "woodbury_": _edge,
    "fisher_accumulate_": _edge,
    "fishleg_block_step_": _edge,
    "inverse_from_grads": _edge,
    "inverse_diagonal_from_grads": lambda inv_diag, grads, blocks, block_size, *_: block_size,
    "obs_solve_": lambda weight, state, *_: state.shape[-1],
}
LARGEST = {torch.float32: 256, torch.float64: 176}  # ff::cuda::LARGEST_BLOCK
LARGEST_STEP = 64  # ff::cuda::LARGEST_STEP
SMALLEST = {"spd_inverse_": 5}
SUMS_BYTES = (
    160 << 10
)  # shared memory of a multiprocessor that lets a large block keep sums of many gradients there
LARGE = {torch.float32: 128, torch.float64: 64}  # up to this B the sums fit anywhere
SUMMING = ("inverse_from_grads", "inverse_diagonal_from_grads", "fisher_accumulate_")


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fastfisher.{name}")
    except ImportError:
        return None


_native = _import("_native")
_build_info = _import("_build_info")


def build_reason() -> str:
    """Why there are no CUDA kernels in this build, "" where there are."""
    if _native is not None and hasattr(_native, "cuda_spd_inverse"):
        return ""
    recorded: str = getattr(_build_info, "CUDA_REASON", "")
    return f"the extension has no CUDA kernels ({recorded or 'it is missing or of an older build'})"


@lru_cache(maxsize=64)
def _device_reason(device: torch.device) -> str | None:
    reason = build_reason()
    if reason:
        return reason
    if torch.version.hip is not None:
        return "it runs on GPUs of NVIDIA"
    archs: tuple[str, ...] = getattr(_build_info, "CUDA_ARCHS", ())
    lowest = min(int(arch.rstrip("af")) for arch in archs)
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < lowest:
        return (
            f"it was built for compute capability {lowest // 10}.{lowest % 10}, this GPU has {major}.{minor}"
        )
    return None


def _sums_reason(device: torch.device) -> str | None:
    has = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    if has >= SUMS_BYTES:
        return None
    return f"it takes {SUMS_BYTES >> 10} KiB of shared memory, a multiprocessor of this GPU has {has >> 10}"


def too_large(op: str, *args: object) -> str | None:
    """Why a block of this call does not fit on chip, or None."""
    dtype, block_size = args[0].dtype, BLOCK_SIZE[op](*args)  # type: ignore[attr-defined]
    if op == "obs_solve_":
        dtype = torch.float64  # it computes in it
    largest = LARGEST_STEP if op == "fishleg_block_step_" else LARGEST[dtype]
    if block_size <= largest:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"a block of {name} fits on chip up to B = {largest}, got {block_size}"


def _form_reason(op: str, *args: object) -> str | None:
    if op == "fisher_accumulate_" and args[0].dtype != torch.float32:  # type: ignore[attr-defined]
        return "it is for float32, the matrix units of float64 are Triton's"
    if op != "obs_solve_":
        return None
    weight, state, factor, *_ = args
    if factor is not None:
        return "it has no kernel for the dual form"
    if weight.dtype != state.dtype:  # type: ignore[attr-defined]
        return f"it takes weights of the dtype of the inverse, got {weight.dtype} and {state.dtype}"  # type: ignore[attr-defined]
    return None


def too_small(op: str, *args: object) -> str | None:
    """Why the Triton kernel, which takes several blocks at a time, is the better one, or None; found on an H200."""
    smallest, block_size = SMALLEST.get(op, 9), BLOCK_SIZE[op](*args)
    return f"it is for B >= {smallest}, got {block_size}" if block_size < smallest else None


def unfit(op: str, *args: object) -> str | None:
    """Why the kernels cannot take this call, on whatever GPU, or None."""
    return _form_reason(op, *args) or too_large(op, *args)


def why_not(op: str, *args: object) -> str | None:
    """None when the kernel of an op can run on these arguments, which lie on a GPU, else the reason."""
    device = args[0].device  # type: ignore[attr-defined]
    reason = unfit(op, *args) or too_small(op, *args) or _device_reason(device)
    if reason is None and op in SUMMING and BLOCK_SIZE[op](*args) > LARGE[args[0].dtype]:  # type: ignore[attr-defined]
        return _sums_reason(device)
    return reason


def kernel(name: str, device: torch.device) -> Callable[..., None]:
    """The function that launches a kernel, bound to a device and its current stream."""
    stream = torch.cuda.current_stream(device)
    return partial(getattr(_native, f"cuda_{name}"), stream.device_index, stream.cuda_stream)
