"""What the references share: how they are registered, and walking over blocks and over column tiles of one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastfisher.ops._registry import Implementation, implement
from fastfisher.ops.threads import torch_on_one_thread

# A block over a whole network has millions of columns; float64 copies of its gradients are made a tile at a
# time.
TILE = 4096


def reference(name: str) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as the reference of an op; it runs on one thread."""

    def register(function: Implementation) -> Implementation:
        return implement(name, "reference")(torch_on_one_thread()(function))

    return register


def ranges(blocks: Tensor) -> Iterator[tuple[int, int, int]]:
    """(index, start, stop) of every block."""
    for b, (start, stop) in enumerate(blocks.tolist()):
        yield b, start, stop


def tiles(start: int, stop: int) -> Iterator[slice]:
    """The columns [start, stop) in slices of at most TILE."""
    for first in range(start, stop, TILE):
        yield slice(first, min(first + TILE, stop))


def capacitance(grads: Tensor, start: int, stop: int, shift: float, keep: Tensor | None = None) -> Tensor:
    """C = shift I + G Gᵀ of one block in float64, G without the columns where `keep` is False.

    grads: [k, d].   keep: bool [d] or None.   Returns [k, k].
    """
    k = grads.shape[0]
    C = shift * torch.eye(k, dtype=torch.float64, device=grads.device)  # [k, k]
    for tile in tiles(start, stop):
        G = grads[:, tile].double()  # [k, tile]
        if keep is not None:
            G = G * keep[tile]
        C += G @ G.T
    return C


def inverse_with_estimates(M: Tensor, damping: float) -> tuple[Tensor, float, float]:
    """F⁻¹ of F = M + λ I, symmetric, with the condition and the amplification of rounding errors (see spd_inverse_).

    M: [n, n], of which the lower triangle is read.   Returns NaN, +inf, +inf where a pivot is not positive and finite.
    """
    lower = M.tril()  # the upper triangle may hold anything
    f = lower.diagonal().to(torch.float64, copy=True)  # diagonal without the damping, [n]
    lower.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(lower)
    if info.item() != 0 or not L.diagonal().isfinite().all():
        return torch.full_like(M, torch.nan), math.inf, math.inf
    inverse = torch.cholesky_inverse(L)
    inverse = (inverse + inverse.T) / 2
    scale = lower.diagonal().double().sqrt()  # D^½, [n]
    norm = ((lower + lower.tril(-1).T).double() / scale[:, None] / scale).norm()  # ‖A‖_F
    condition = norm * (scale[:, None] * inverse.double() * scale).norm()
    amplification = norm * (inverse.double() * f.sqrt()).norm() * f.max().sqrt()
    return inverse, float(condition), float(amplification)


def fisher_inverse_times(
    state: Tensor,
    factor: Tensor | None,
    b: int,
    start: int,
    stop: int,
    damping: float,
    x: Tensor,
    out: Tensor,
) -> None:
    """out = F⁻¹ x for one block, from either state.   x, out: [n, c], the block's rows only."""
    if factor is None:
        F_inv = state[b, : stop - start, : stop - start]
        wide = torch.promote_types(F_inv.dtype, x.dtype)
        out.copy_(F_inv.to(wide) @ x.to(wide))
        return
    projections = torch.zeros(state.shape[0], x.shape[1], dtype=torch.float64, device=x.device)  # [k, c]
    for tile in tiles(start, stop):
        projections += state[:, tile].double() @ x[tile.start - start : tile.stop - start].double()
    coefficients = torch.cholesky_solve(projections, factor[b], upper=True)  # C⁻¹ G x, [k, c]
    for tile in tiles(start, stop):
        rows = slice(tile.start - start, tile.stop - start)
        out[rows] = ((x[rows].double() - state[:, tile].double().T @ coefficients) / damping).to(out.dtype)
