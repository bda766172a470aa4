"""Tuning parameters of the Triton kernels: one table by op, size and architecture; nothing is tuned at run time.

`size` is the largest that a row is for: the block size B, or what the op's file says.  The first row that fits is
taken, so that within an op rows stand by growing size, those of newer architectures and wider numbers first.
`python -m benchmarks.tune` tries other parameters on a GPU and prints the rows that win.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

ANY = math.inf


@dataclass(frozen=True)
class Row:
    """Parameters of an op up to a size, for numbers of at least `itemsize` bytes on architectures from `since` on."""

    op: str
    size: float
    parameters: dict[str, Any]
    itemsize: int = 4
    since: int = 80


def _row(op: str, size: float, itemsize: int = 4, since: int = 80, **parameters: Any) -> Row:
    return Row(op, size, parameters, itemsize, since)


# ENTRIES: of matrices a program holds; ROWS, COLUMNS: of gradients a step, PIXELS: of an image; TILE: edge of a tile;
# W: panel on chip;
# PRECISION: of float32 products in a Gram matrix, whose error tests/kernels/test_precision.py bounds
TABLE = (
    _row("inverse_from_grads", 32, num_warps=4, num_stages=3, ROWS=32, W=16, PRECISION="tf32x3"),
    _row("inverse_from_grads", 64, itemsize=8, num_warps=8, num_stages=1, ROWS=16, W=16, PRECISION="ieee"),
    _row("inverse_from_grads", 64, since=90, num_warps=4, num_stages=3, ROWS=32, W=16, PRECISION="tf32x3"),
    _row("inverse_from_grads", 64, num_warps=8, num_stages=3, ROWS=32, W=16, PRECISION="tf32x3"),
    _row("inverse_from_grads", 128, since=90, num_warps=8, num_stages=3, ROWS=32, W=16, PRECISION="tf32x3"),
    _row("inverse_from_grads", 128, num_warps=8, num_stages=2, ROWS=32, W=16, PRECISION="ieee"),
    _row("spd_inverse", 32, itemsize=8, num_warps=8, num_stages=1, W=16),
    _row("spd_inverse", 32, num_warps=4, num_stages=1, W=16),
    _row("spd_inverse", 64, itemsize=8, num_warps=8, num_stages=1, W=16),
    _row("spd_inverse", 64, num_warps=4, num_stages=1, W=16),
    _row("spd_inverse", 128, num_warps=8, num_stages=1, W=16),
    _row("sherman_morrison", 32, num_warps=2, num_stages=1),
    _row("sherman_morrison", 64, num_warps=4, num_stages=1),
    _row("sherman_morrison", 128, num_warps=8, num_stages=1),
    _row("woodbury", 32, num_warps=2, num_stages=1, ROWS=16),
    _row("woodbury", 64, itemsize=8, num_warps=8, num_stages=1, ROWS=16),
    _row("woodbury", 64, num_warps=4, num_stages=1, ROWS=16),
    _row(
        "fisher_accumulate",
        64,
        itemsize=8,
        since=100,
        num_warps=8,
        num_stages=3,
        TILE=64,
        ROWS=16,
        PRECISION="ieee",
    ),
    _row("fisher_accumulate", 64, itemsize=8, num_warps=4, num_stages=3, TILE=64, ROWS=16, PRECISION="ieee"),
    _row("fisher_accumulate", ANY, itemsize=8, num_warps=8, num_stages=3, TILE=64, ROWS=16, PRECISION="ieee"),
    _row("fisher_accumulate", 64, num_warps=4, num_stages=3, TILE=64, ROWS=32, PRECISION="tf32x3"),
    _row(
        "fisher_accumulate", ANY, since=90, num_warps=8, num_stages=3, TILE=128, ROWS=32, PRECISION="tf32x3"
    ),
    _row("fisher_accumulate", ANY, num_warps=8, num_stages=3, TILE=128, ROWS=16, PRECISION="tf32x3"),
    _row("fishleg_block_step", 16, num_warps=1, num_stages=1, ROWS=16, PRECISION="ieee"),
    _row("fishleg_block_step", 32, num_warps=4, num_stages=1, ROWS=16, PRECISION="ieee"),
    _row(
        "fishleg_block_step",
        ANY,
        itemsize=8,
        since=100,
        num_warps=8,
        num_stages=1,
        TILE=32,
        ROWS=16,
        PRECISION="ieee",
    ),
    _row(
        "fishleg_block_step",
        ANY,
        itemsize=8,
        num_warps=4,
        num_stages=1,
        TILE=32,
        ROWS=32,
        PRECISION="ieee",
    ),
    _row("fishleg_block_step", 64, num_warps=16, num_stages=1, ROWS=16, PRECISION="ieee"),
    _row("fishleg_block_step", ANY, num_warps=8, num_stages=1, TILE=64, ROWS=32, PRECISION="ieee"),
    _row("factor", 64, num_warps=4, num_stages=1, ENTRIES=2048),
    _row("factor", ANY, num_warps=8, num_stages=1, ENTRIES=2048),
    _row("kron_matvec", ANY, itemsize=8, num_warps=4, num_stages=1, TILE=32, PRECISION="ieee"),
    _row("kron_matvec", 32, num_warps=4, num_stages=1, TILE=32, PRECISION="ieee"),
    _row("kron_matvec", ANY, num_warps=8, num_stages=1, TILE=64, PRECISION="ieee"),
    _row(
        "conv_weight_grads", ANY, itemsize=8, num_warps=4, num_stages=1, TILE=32, PIXELS=32, PRECISION="ieee"
    ),
    _row("conv_weight_grads", ANY, num_warps=8, num_stages=2, TILE=64, PIXELS=32, PRECISION="ieee"),
    _row("dual_factor", ANY, since=100, num_warps=8, num_stages=3, TILE=32, COLUMNS=32),
    _row("dual_factor", ANY, num_warps=4, num_stages=3, TILE=64, COLUMNS=16),
    _row("inverse_diagonal", ANY, since=100, num_warps=8, num_stages=1, TILE=16, COLUMNS=32),
    _row("inverse_diagonal", ANY, since=90, num_warps=8, num_stages=1, TILE=32, COLUMNS=64),
    _row("inverse_diagonal", ANY, num_warps=8, num_stages=2, TILE=32, COLUMNS=64),
    _row("obs_eliminate", 64, num_warps=1, num_stages=1, ROWS=8),
    _row("obs_eliminate", 256, num_warps=4, num_stages=1, ROWS=8),
    _row("obs_eliminate", ANY, num_warps=8, num_stages=1, ROWS=4),
    _row("obs_solve", ANY, num_warps=8, num_stages=1, W=16),
    _row("block_matvec", 64, since=90, num_warps=8, num_stages=1, COLUMNS=64, ENTRIES=4096),
    _row("block_matvec", ANY, num_warps=4, num_stages=1, COLUMNS=128, ENTRIES=2048),
    _row("project", ANY, num_warps=4, num_stages=1, ROWS=16, COLUMNS=128),
    _row("expand", ANY, num_warps=4, num_stages=1, ROWS=16, COLUMNS=128),
    _row("blocked_pivot", ANY, num_warps=8, num_stages=1),
    _row("blocked_panel", ANY, itemsize=8, num_warps=4, num_stages=1),
    _row("blocked_panel", ANY, num_warps=16, num_stages=1),
    _row("blocked", ANY, itemsize=8, num_warps=4, num_stages=1, TILE=32),
    _row("blocked", ANY, num_warps=8, num_stages=1, TILE=64),
    _row("squares", ANY, num_warps=8, num_stages=1),
    _row("factor_inverse", ANY, since=100, num_warps=8, num_stages=1, TILE=32),
    _row("factor_inverse", ANY, num_warps=4, num_stages=1, TILE=32),
    _row("rank_updates", ANY, itemsize=8, num_warps=4, num_stages=1, TILE=32, ROWS=32),
    _row("rank_updates", ANY, num_warps=8, num_stages=1, TILE=64, ROWS=32),
    _row("solve", 256, num_warps=1, num_stages=1),
    _row("solve", 1024, num_warps=4, num_stages=1),
    _row("solve", ANY, num_warps=8, num_stages=1),
    _row("small", ANY, itemsize=8, num_warps=4, num_stages=1, ENTRIES=1024),
    _row("small", ANY, num_warps=4, num_stages=1, ENTRIES=2048),
)

_override: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("fastfisher_tuning", default=None)


@contextlib.contextmanager
def override(op: str, **parameters: Any) -> Iterator[None]:
    """Use other parameters for an op inside the `with` block; what is not named stays as the table says."""
    token = _override.set({**(_override.get() or {}), op: parameters})
    try:
        yield
    finally:
        _override.reset(token)


@cache
def architecture(device: torch.device) -> int:
    """10 times major plus minor of the compute capability; without a GPU, in the interpreter, the oldest supported."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def parameters(op: str, size: int, tensor: Tensor) -> dict[str, Any]:
    """The parameters for an op of this size on the numbers and the device of a tensor."""
    arch, itemsize = architecture(tensor.device), max(4, tensor.itemsize)
    for row in TABLE:
        if row.op == op and size <= row.size and itemsize >= row.itemsize and arch >= row.since:
            return {**row.parameters, **(_override.get() or {}).get(op, {})}
    raise LookupError(f"the tuning table has no row for {op} of size {size} in {tensor.dtype}")
