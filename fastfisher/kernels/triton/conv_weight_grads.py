"""Weight gradients of a convolution, sample by sample: a product over the output's pixels, patches read in place.

Floor: input, gradient and rows go through memory once; k O C / groups H' W' multiply-adds a tap of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import launch
from fastfisher.kernels.triton.tiles import matmul


@triton.jit
def _conv(
    rows,
    x,
    grad,
    row_stride: tl.int64,
    x_sample: tl.int64,
    x_channel: tl.int32,
    x_row: tl.int32,
    x_column: tl.int32,
    g_sample: tl.int64,
    g_channel: tl.int32,
    g_pixel: tl.int32,
    groups: tl.int32,
    channels: tl.int32,
    outputs: tl.int32,
    height: tl.int32,
    width: tl.int32,
    pixels: tl.int32,
    out_width: tl.int32,
    taps: tl.int32,
    kernel_width: tl.int32,
    stride_y: tl.int32,
    stride_x: tl.int32,
    padding_y: tl.int32,
    padding_x: tl.int32,
    dilation_y: tl.int32,
    dilation_x: tl.int32,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [TILE outputs, TILE (channel, tap)] of one group of one sample."""
    T: tl.constexpr = rows.dtype.element_ty
    width_of_row = channels * taps
    down, across = tl.cdiv(outputs, TILE), tl.cdiv(width_of_row, TILE)
    column = tl.program_id(0) % across * TILE
    first = tl.program_id(0) // across % down * TILE
    matrix = tl.program_id(0) // (across * down)
    sample, group = (matrix // groups).to(tl.int64), matrix % groups
    j, o = column + tl.arange(0, TILE), first + tl.arange(0, TILE)
    c, tap = j // taps, j % taps
    y, z = tap // kernel_width * dilation_y - padding_y, tap % kernel_width * dilation_x - padding_x
    source = x + sample * x_sample + (group * channels + c)[None, :].to(tl.int64) * x_channel
    at = grad + sample * g_sample + (group * outputs + o)[:, None].to(tl.int64) * g_channel
    total = tl.zeros([TILE, TILE], T)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        g = tl.load(at + p[None, :] * g_pixel, mask=(o < outputs)[:, None] & (p < pixels)[None, :], other=0.0)
        row = (p // out_width * stride_y)[:, None] + y[None, :]
        place = (p % out_width * stride_x)[:, None] + z[None, :]
        inside = (row >= 0) & (row < height) & (place >= 0) & (place < width)
        inside &= (p < pixels)[:, None] & (j < width_of_row)[None, :]
        seen = tl.load(source + row * x_row + place * x_column, mask=inside, other=0.0)
        total += matmul(g, seen, PRECISION)
    to = rows + sample * row_stride + (group * outputs + o)[:, None].to(tl.int64) * width_of_row + j[None, :]
    tl.store(to, total, mask=(o < outputs)[:, None] & (j < width_of_row)[None, :])


def conv_weight_grads(
    rows: Tensor,
    x: Tensor,
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """The op of this name."""
    k, out, channels, kernel_height, kernel_width = rows.shape
    outputs, taps = out // groups, kernel_height * kernel_width
    options = tuning.parameters("conv_weight_grads", channels, x)
    tiles = triton.cdiv(outputs, options["TILE"]) * triton.cdiv(channels * taps, options["TILE"])
    args = (
        *(rows.stride(0), *x.stride(), *grad.stride()[:2], grad.stride(3)),
        *(groups, channels, outputs, *x.shape[2:], grad.shape[2] * grad.shape[3], grad.shape[3]),
        *(taps, kernel_width, *stride, *padding, *dilation),
    )
    launch(_conv, (k * groups * tiles,), rows, x, grad, *args, options=options)
