"""Checks that several ops share: each raises FastFisherError in one sentence that holds the offending value.

They run on real tensors and on fake ones (torch.compile, meta tensors); what needs the values of a tensor is
looked at on real CPU tensors only, because a look at a GPU tensor would wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastfisher.errors import FastFisherError

STATE_DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_text(tensor: Tensor) -> str:
    """The shape of a tensor as it stands in a message, for example [48, 12]."""
    return str(list(tensor.shape))


def dims(name: str, tensor: Tensor, expected: str, ndim: int) -> None:
    """Raise unless a tensor has `ndim` dimensions, none of them empty; `expected` names them."""
    if tensor.ndim != ndim:
        raise FastFisherError(f"{name} must be {expected}, got {shape_text(tensor)}")
    if 0 in tensor.shape:
        raise FastFisherError(
            f"{name} must be {expected} with every size at least 1, got {shape_text(tensor)}"
        )


def exact_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise FastFisherError(f"{name} must be {list(shape)}, got {shape_text(tensor)}")


def dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise unless the dtype of a tensor is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise FastFisherError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is contiguous."""
    if not tensor.is_contiguous():
        raise FastFisherError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise unless the first tensor and all others are dense and on one device."""
    for name, tensor in {first_name: first, **others}.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise FastFisherError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.device != first.device:
            raise FastFisherError(f"{name} must be on {first.device} as {first_name} is, got {tensor.device}")


def state(name: str, tensor: Tensor) -> tuple[int, int]:
    """Check a primal state [K, B, B], float32 or float64, contiguous, and return (K, B)."""
    dims(name, tensor, "[K, B, B]", 3)
    if tensor.shape[1] != tensor.shape[2]:
        raise FastFisherError(f"{name} must be [K, B, B], got {shape_text(tensor)}")
    dtype(name, tensor, STATE_DTYPES)
    contiguous(name, tensor)
    return tensor.shape[0], tensor.shape[1]


def grads(name: str, tensor: Tensor, num_weights: int | None = None) -> tuple[int, int]:
    """Check gradients [k, d] of any float dtype, inner stride 1, any row stride; return (k, d).

    num_weights: the d that another argument has, None where any will do.
    """
    dims(name, tensor, "[k, d]", 2)
    if num_weights is not None and tensor.shape[1] != num_weights:
        raise FastFisherError(f"{name} must be [k, {num_weights}], got {shape_text(tensor)}")
    dtype(name, tensor, GRAD_DTYPES)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise FastFisherError(
            f"{name} must have inner stride 1 (any row stride), got strides {list(tensor.stride())}"
        )
    return tensor.shape[0], tensor.shape[1]


def vector(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = STATE_DTYPES) -> int:
    """Check a contiguous vector [d] and return d."""
    dims(name, tensor, "[d]", 1)
    dtype(name, tensor, allowed)
    contiguous(name, tensor)
    return tensor.shape[0]


def blocks(tensor: Tensor, num_blocks: int | None, num_weights: int, block_size: int | None) -> int:
    """Check block ranges int64 [K, 2], increasing and disjoint within [0, d), of 1 to B weights; return K.

    num_blocks: the K that the state has, None where any will do.   block_size: B, None where blocks may have
    any size.
    """
    dims("blocks", tensor, "[K, 2]", 2)
    if tensor.shape[1] != 2:
        raise FastFisherError(f"blocks must be [K, 2], got {shape_text(tensor)}")
    if num_blocks is not None and tensor.shape[0] != num_blocks:
        raise FastFisherError(f"blocks must be [{num_blocks}, 2], got {shape_text(tensor)}")
    dtype("blocks", tensor, (torch.int64,))
    contiguous("blocks", tensor)
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):
        _block_ranges(tensor, num_weights, block_size)
    return tensor.shape[0]


def _block_ranges(tensor: Tensor, num_weights: int, block_size: int | None) -> None:
    ranges = (
        tensor.numpy()
    )  # NumPy, because this runs before every call and its calls cost a third of torch's
    edges = ranges.ravel()  # [2K] start, stop, start, stop, ...
    steps = edges[1:] - edges[:-1]  # [2K-1] length, gap, length, gap, ...
    lengths, gaps = steps[::2], steps[1::2]
    longest = num_weights if block_size is None else block_size
    if lengths.min() < 1 or lengths.max() > longest:
        wrong = int(((lengths < 1) | (lengths > longest)).argmax())
        raise FastFisherError(
            f"blocks[{wrong}] must hold 1 to {longest} weights, got {ranges[wrong].tolist()}"
        )
    if edges[0] < 0 or edges[-1] > num_weights:
        raise FastFisherError(f"blocks must lie within [0, {num_weights}), got [{edges[0]}, {edges[-1]})")
    if gaps.size and gaps.min() < 0:
        wrong = int((gaps < 0).argmax())
        raise FastFisherError(
            "blocks must be increasing and disjoint, got "
            f"{ranges[wrong].tolist()} before {ranges[wrong + 1].tolist()}"
        )


def num_grads(value: int) -> None:
    """Raise unless m, the divisor of the whole estimate, is at least 1; one of them may give several rows."""
    if value < 1:
        raise FastFisherError(f"num_grads must be at least 1, got {value}")


def block_size(value: int) -> None:
    """Raise unless a block may hold at least one weight."""
    if value < 1:
        raise FastFisherError(f"block_size must be at least 1, got {value}")


def damping(value: float, *, zero: bool = False) -> None:
    """Raise unless damping is positive and finite, or zero where `zero` allows it."""
    if not ((value > 0 or (zero and value == 0)) and math.isfinite(value)):
        allowed = "at least 0" if zero else "positive"
        raise FastFisherError(f"damping must be {allowed} and finite, got {value}")


def estimate(name: str, tensor: Tensor, num_blocks: int) -> None:
    """Check a float64 number per block [K], contiguous."""
    exact_shape(name, tensor, (num_blocks,))
    dtype(name, tensor, (torch.float64,))
    contiguous(name, tensor)


def columns(x: Tensor, out: Tensor) -> None:
    """Check x and out, contiguous [d, n] of the same shape and dtype, float32 or float64."""
    dims("x", x, "[d, n]", 2)
    dtype("x", x, STATE_DTYPES)
    contiguous("x", x)
    exact_shape("out", out, tuple(x.shape))
    dtype("out", out, (x.dtype,))
    contiguous("out", out)


def inverse(
    state_: Tensor, factor: Tensor | None, blocks_: Tensor, damping_: float, num_weights: int
) -> None:
    """Check either state of an inverse: primal [K, B, B], or dual grads [k, d] with factor [K, k, k]."""
    if factor is None:
        num_blocks, block_size = state("state", state_)
        blocks(blocks_, num_blocks, num_weights, block_size)
        return
    num_rows, state_weights = grads("state", state_)
    if state_weights != num_weights:
        raise FastFisherError(f"state must be [k, {num_weights}] in the dual form, got {shape_text(state_)}")
    num_blocks = blocks(blocks_, None, num_weights, None)
    exact_shape("factor", factor, (num_blocks, num_rows, num_rows))
    dtype("factor", factor, (torch.float64,))
    contiguous("factor", factor)
    damping(damping_)
