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

# The op, and where in its arguments B is found; the dtype that counts is that of the first argument.
BLOCK_SIZE: dict[str, Callable[..., int]] = {
    "spd_inverse_": lambda matrix, *_: matrix.shape[-1],
    "sherman_morrison_": lambda f_inv, *_: f_inv.shape[-1],
    "inverse_from_grads": lambda f_inv, *_: f_inv.shape[-1],
    "inverse_diagonal_from_grads": lambda inv_diag, grads, blocks, block_size, *_: block_size,
}
LARGEST = {torch.float32: 256, torch.float64: 176}  # ff::cuda::LARGEST_BLOCK
SUMS_BYTES = (
    160 << 10
)  # shared memory of a multiprocessor that lets a block keep its sums of many gradients there
LEFT_TO_TRITON = 128  # up to this B its kernels of the streaming ops hold a block on chip as well


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
    if block_size <= LARGEST[dtype]:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"a block of {name} fits on chip up to B = {LARGEST[dtype]}, got {block_size}"


def why_not(op: str, *args: object) -> str | None:
    """None when the kernel of an op can run on these arguments, which lie on a GPU, else the reason."""
    if op != "spd_inverse_" and BLOCK_SIZE[op](*args) <= LEFT_TO_TRITON:
        return f"it is for B > {LEFT_TO_TRITON}, got {BLOCK_SIZE[op](*args)}"
    device = args[0].device  # type: ignore[attr-defined]
    reason = too_large(op, *args) or _device_reason(device)
    return reason or (_sums_reason(device) if op.startswith("inverse_") else None)


def kernel(name: str, device: torch.device) -> Callable[..., None]:
    """The function that launches a kernel, bound to a device and its current stream."""
    stream = torch.cuda.current_stream(device)
    return partial(getattr(_native, f"cuda_{name}"), stream.device_index, stream.cuda_stream)
