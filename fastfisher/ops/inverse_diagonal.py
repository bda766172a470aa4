"""The diagonal of the inverse Fisher, from either state."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference, tiles
from fastfisher.ops._registry import define


def _check(state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, out: Tensor) -> None:
    _checks.same_device("state", state, factor=factor, blocks=blocks, out=out)
    num_weights = _checks.vector("out", out)
    _checks.inverse(state, factor, blocks, damping, num_weights)


_op = define(
    "inverse_diagonal(Tensor state, Tensor? factor, Tensor blocks, float damping, Tensor(a!) out) -> ()",
    _check,
)


@reference("inverse_diagonal")
def _reference(state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, out: Tensor) -> None:
    for b, start, stop in ranges(blocks):
        if factor is None:
            out[start:stop] = state[b].diagonal()[: stop - start]
            continue
        for tile in tiles(start, stop):
            G = state[:, tile].double()  # [k, tile]
            V = torch.linalg.solve_triangular(factor[b].T, G, upper=False)  # [k, tile]
            out[tile] = (1 - V.square().sum(0)) / damping


def inverse_diagonal(
    state: Tensor, blocks: Tensor, *, out: Tensor, factor: Tensor | None = None, damping: float = 0.0
) -> None:
    """Write the diagonal of every block of F⁻¹: diag(F⁻¹) itself, or (1 − Σᵢ Vᵢ²) / λ with V = U⁻ᵀ G.

    state: primal [K, B, B] float32/float64, or with `factor` the gradients [k, d] of any float dtype.
    factor: None, or float64 [K, k, k] from dual_factor_.   damping: λ, read in the dual form only.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    out: [d] float32/float64, overwritten inside the blocks, untouched outside; the dual form computes in
    float64.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.1, its diagonal.
    """
    _op(state, factor, blocks, damping, out)
