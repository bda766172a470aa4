"""The product of the empirical Fisher with vectors, from the gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference, tiles
from fastfisher.ops._registry import define


def _check(grads: Tensor, blocks: Tensor, num_grads: int, x: Tensor, out: Tensor) -> None:
    _checks.same_device("grads", grads, blocks=blocks, x=x, out=out)
    _checks.columns(x, out)
    _checks.grads("grads", grads, x.shape[0])
    _checks.blocks(blocks, None, x.shape[0], None)
    _checks.num_grads(num_grads)


_op = define(
    "fisher_vector_product(Tensor grads, Tensor blocks, int num_grads, Tensor x, Tensor(a!) out) -> ()",
    _check,
)


@reference("fisher_vector_product")
def _reference(grads: Tensor, blocks: Tensor, num_grads: int, x: Tensor, out: Tensor) -> None:
    for _, start, stop in ranges(blocks):
        projections = torch.zeros(
            grads.shape[0], x.shape[1], dtype=torch.float64, device=grads.device
        )  # G x, [k, n]
        for tile in tiles(start, stop):
            projections += grads[:, tile].double() @ x[tile].double()
        for tile in tiles(start, stop):
            out[tile] = grads[:, tile].double().T @ projections / num_grads


def fisher_vector_product(grads: Tensor, blocks: Tensor, num_grads: int, x: Tensor, *, out: Tensor) -> None:
    """Write Gᵀ(G x) / m of every block: the empirical Fisher, without damping, times x.

    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in float64.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint, of any size.
    num_grads: m of the whole estimate, not k.
    x: [d, n] float32/float64, contiguous.   out: like x, no memory shared with it, overwritten inside the blocks,
    untouched outside.   Sums run in float64.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.3.
    """
    _op(grads, blocks, num_grads, x, out)
