"""How a Triton kernel is launched: on the device and current stream of its tensors, without waiting for either."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 256 << 20  # for what a group of blocks needs beside its state
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, grid: tuple[int, ...], *args: object, options: Mapping[str, Any]) -> None:
    """Run `grid` programs of a kernel on the device of its first tensor.

    options: constexpr arguments, num_warps and num_stages.   Fused multiply-adds are asked for by name, because later
    releases of Triton no longer make them by default.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options, enable_fp_fusion=True)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, triton.next_power_of_2(n))


def pieces(num_weights: int, num_blocks: int, num_programs: int, columns: int) -> int:
    """Into how many programs the columns of a block go, each taking every so-manieth piece of `columns` of them.

    Only the mean length of a block is known without waiting for the device.   num_weights, num_blocks: d and K, for the
    mean.   num_programs: how many there are before this split; it ends where they fill the machine many times over.
    """
    mean = triton.cdiv(num_weights, num_blocks)
    return max(1, min(triton.cdiv(mean, columns), triton.cdiv(1 << 16, num_programs)))


def block_groups(num_blocks: int, bytes_of_block: int) -> Iterator[slice]:
    """The blocks in groups whose scratch takes about SCRATCH_BYTES."""
    at_once = max(1, SCRATCH_BYTES // bytes_of_block)
    for first in range(0, num_blocks, at_once):
        yield slice(first, min(first + at_once, num_blocks))
