"""Gradients of single samples in the weight of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfisher.errors import FastFisherError
from fastfisher.ops import _checks
from fastfisher.ops._blockwise import reference
from fastfisher.ops._registry import define


def _check(
    rows: Tensor,
    x: Tensor,
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    _checks.same_device("rows", rows, x=x, grad=grad)
    _checks.dims("rows", rows, "[k, O, C / groups, *kernel]", 5)
    _checks.dims("x", x, "[k, C, H, W]", 4)
    pairs: dict[str, tuple[Sequence[int], int]] = {
        "stride": (stride, 1),
        "padding": (padding, 0),
        "dilation": (dilation, 1),
    }
    for name, (pair, least) in pairs.items():
        if len(pair) != 2 or min(pair) < least:
            raise FastFisherError(f"{name} must be two numbers of at least {least}, got {list(pair)}")
    k, out, channels, *kernel = rows.shape
    each = out * channels * math.prod(kernel)
    if rows.stride(0) < each:
        raise FastFisherError(
            f"rows must hold samples of {each} numbers, none over another, got {rows.stride(0)} numbers from one to "
            f"the next"
        )
    if groups < 1 or out % groups:
        raise FastFisherError(f"groups must divide the {out} output channels of rows, got {groups}")
    if tuple(x.shape[:2]) != (k, channels * groups):
        raise FastFisherError(f"x must be [{k}, {channels * groups}, H, W], got {_checks.shape_text(x)}")
    sizes = [
        (size + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for size, taps, jump, pad, step in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    _checks.exact_shape("grad", grad, (k, out, *sizes))
    _checks.dtype("x", x, _checks.STATE_DTYPES)
    for name, tensor in (("rows", rows), ("grad", grad)):
        _checks.dtype(name, tensor, (x.dtype,))
    _checks.contiguous("rows[0]", rows[0])
    for name, tensor in (("x", x), ("grad", grad)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            _checks.contiguous(name, tensor)


_op = define(
    "conv_weight_grads(Tensor(a!) rows, Tensor x, Tensor grad, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> ()",
    _check,
)


@reference("conv_weight_grads")
def _reference(
    rows: Tensor,
    x: Tensor,
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    k, out, channels, *kernel = rows.shape
    height, width = grad.shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    g = grad.reshape(k, groups, out // groups, -1)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            seen = x[
                :,
                :,
                top : top + stride[0] * (height - 1) + 1 : stride[0],
                left : left + stride[1] * (width - 1) + 1 : stride[1],
            ]
            tap = torch.einsum("kgop,kgcp->kgoc", g, seen.reshape(k, groups, channels, -1))
            rows[..., i, j] = tap.reshape(k, out, channels)


def conv_weight_grads(
    x: Tensor,
    grad: Tensor,
    *,
    out: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> None:
    """Write every sample's gradient of a convolution's weight, Σ_p g_p x_pᵀ over the pixels p of the output.

    x: the input, [k, C, H, W] float32/float64.   grad: the gradient at the output, [k, O, H', W'].   out: [k, O,
    C / groups, *kernel], overwritten; its samples may be any distance apart.   All of one dtype, in which sums run; x
    and grad contiguous, or with channels last.   stride, padding (zeros), dilation: rows and columns.
    k O C / groups H' W' multiply-adds a tap of the kernel.
    Raises FastFisherError on wrong input.   Source: Rochette et al., 2019 (per-sample gradients of convolutions).
    """
    _op(out, x, grad, stride, padding, dilation, groups)
