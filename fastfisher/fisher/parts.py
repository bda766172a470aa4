"""Building the states behind an inverse Fisher, and deciding per block whether float32 can be trusted.

Whatever the form, a block whose estimated error exceeds TOLERANCE is redone in float64, and what float64 cannot hold
either is an error that names parameter, block and damping.  `_invert` states the estimate for an inverse by Cholesky,
`_check_dual` the one for the dual form.  The running inverse of the rank-1 and rank-k forms comes with no estimate, so
a `Probe` compares F⁻¹ (F p) with p for a random vector p.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError
from fastfisher.fisher.blocks import BlockLayout

TOLERANCE = 1e-4  # largest relative error of diag F⁻¹ and of F⁻¹v that a block may be estimated to have
GROUP_BYTES = 4 << 20  # states are filled and inverted in groups of this size, so that a group stays in cache

Fill = Callable[[Tensor, Tensor], None]
Source = Iterable[tuple[int, int, Fill]]


@dataclass
class Part:
    """Some blocks of an inverse and the state that holds them.

    state: primal [K, B, B], or with factor the gradients [k, d].   factor: None, or float64 [K, k, k].
    blocks: int64 [K, 2].   block_ids: int64 [K], which blocks of the layout these are.
    """

    state: Tensor
    factor: Tensor | None
    blocks: Tensor
    block_ids: Tensor

    @property
    def kind(self) -> str:
        """Which of the two states it is."""
        return "primal" if self.factor is None else "dual"


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state built from gradients of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def groups(layout: BlockLayout, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """The blocks of a layout in ranges whose state takes about GROUP_BYTES."""
    size = max(1, GROUP_BYTES // (layout.block_size**2 * dtype.itemsize))
    for first in range(0, layout.num_blocks, size):
        yield first, min(first + size, layout.num_blocks)


def block_ids(first: int, last: int) -> Tensor:
    """The indices of the blocks [first, last)."""
    return torch.arange(first, last)


def select(blocks: Tensor, ids: Tensor) -> Tensor:
    """The ranges of some blocks, [len(ids), 2]."""
    return blocks[ids.to(blocks.device)]


def gram_source(grads: Tensor, layout: BlockLayout, num_grads: int) -> Source:
    """Groups of blocks whose Fisher comes straight from gradients [k, d]."""
    blocks = layout.blocks.to(grads.device)

    def fill(state: Tensor, ids: Tensor) -> None:
        ops.fisher_accumulate_(state.zero_(), grads, select(blocks, ids), num_grads)

    for first, last in groups(layout, state_dtype(grads.dtype)):
        yield first, last, fill


def stored_source(stored: list[Tensor], layout: BlockLayout) -> Source:
    """Groups of blocks whose Fisher was accumulated before; `stored` is emptied on the way to free its memory."""
    for first, last in list(groups(layout, stored[0].dtype)):
        fisher = stored.pop(0)
        yield first, last, functools.partial(_copy, fisher, first)


def _copy(fisher: Tensor, first: int, state: Tensor, ids: Tensor) -> None:
    state.copy_(fisher if len(ids) == len(fisher) else fisher[ids - first])


def primal_parts(
    source: Source,
    layout: BlockLayout,
    *,
    num_grads: int,
    damping: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Part], Tensor]:
    """Invert F = λ I + (1/m) Σ g gᵀ of every block in `dtype`, and once more in float64 where that is not
    enough.

    Returns the parts, one per dtype in use, and the scaled condition [K] of all blocks.
    Raises FisherError where float64 fails too.
    """
    shelves = _shelves(layout, dtype, device)
    condition = torch.empty(layout.num_blocks, dtype=torch.float64)
    for first, last, fill in source:
        left = block_ids(first, last)
        for shelf in shelves:
            if len(left):
                left = _invert(shelf, fill, left, damping, condition)
        if len(left):
            raise broken(layout, int(left[0]), damping, num_grads)
    return [shelf.part() for shelf in shelves if shelf.count], condition


def _invert(shelf: _Shelf, fill: Fill, ids: Tensor, damping: float, condition: Tensor) -> Tensor:
    """Fill the next room of a shelf with F and invert it there; returns the blocks that did not pass."""
    state = shelf.room(len(ids))
    scaled = torch.empty(len(ids), dtype=torch.float64, device=state.device)  # ‖A⁻¹‖_F
    fill(state, ids)
    diagonal = state.diagonal(dim1=1, dim2=2)
    gram = diagonal.to(torch.float64, copy=True)  # diag F without the damping, [g, B]
    diagonal.add_(damping)
    ops.spd_inverse_(state, scaled)
    condition[ids] = scaled.cpu()
    good = (_cholesky_error(state, gram, damping, scaled) <= TOLERANCE).cpu()
    shelf.keep(ids, good)
    return ids[~good]


def _cholesky_error(f_inv: Tensor, gram: Tensor, damping: float, scaled: Tensor) -> Tensor:
    """Estimate the relative error of F⁻¹v, for the worst v, of inverses that came from a Gram matrix by Cholesky.

    Rounding changes F by E with |E_jk| about u sqrt(f_j f_k), f = diag(F) without the damping: a weight whose gradient
    is zero is decoupled exactly.  With v = F y the error is F⁻¹ E y, so it is at most about
    u sqrt(B) ‖F⁻¹ diag(f)^½‖_F sqrt(max f); sqrt(B) for roundings that do not average out.  As
    F⁻¹ = D^-½ A⁻¹ D^-½, that is at most u sqrt(B) ‖A⁻¹‖_F sqrt(max f / min D), which settles most blocks.
    f_inv: [g, B, B].   gram: f, [g, B].   scaled: ‖A⁻¹‖_F, [g].   Returns float64 [g], not finite where F⁻¹ is not.
    """
    largest = gram.amax(dim=1)
    smallest = gram.masked_fill(gram == 0, torch.inf).amin(dim=1) + damping
    roundoff = torch.finfo(f_inv.dtype).eps / 2 * math.sqrt(f_inv.shape[1])
    error = roundoff * scaled * (largest / smallest).sqrt()
    doubtful = (error > TOLERANCE) & scaled.isfinite()
    if doubtful.any():
        columns = f_inv[doubtful].double() * gram[doubtful].sqrt()[:, None, :]
        error[doubtful] = roundoff * columns.norm(dim=(1, 2)) * largest[doubtful].sqrt()
    return error


def running_parts(
    grads: Tensor, layout: BlockLayout, *, form: str, num_grads: int, damping: float
) -> tuple[list[Part], Tensor]:
    """Build F⁻¹ from I/λ by rank-1 steps or one rank-k step, prove every block by a probe, and mend those
    that fail.

    A failed block is inverted from its Gram matrix in float64.  Returns the parts and the condition [K], NaN
    where the running form was good enough, for it has no estimate.
    """
    dtype, device = state_dtype(grads.dtype), grads.device
    probe = Probe(layout, device)
    probe.add(grads, num_grads)
    shelves = _shelves(layout, dtype, device)
    condition = torch.full((layout.num_blocks,), torch.nan, dtype=torch.float64)
    blocks = layout.blocks.to(device)
    for first, last, fill in gram_source(grads, layout, num_grads):
        ids = block_ids(first, last)
        state = shelves[0].room(len(ids))
        start_from_damping(state, damping)
        running_step(form, state, grads, select(blocks, ids), num_grads)
        good = probe.passes(state, select(blocks, ids), damping)
        shelves[0].keep(ids, good)
        left = ids[~good]
        if len(left):
            left = _invert(shelves[-1], fill, left, damping, condition)
        if len(left):
            raise broken(layout, int(left[0]), damping, num_grads)
    return [shelf.part() for shelf in shelves if shelf.count], condition


def start_from_damping(state: Tensor, damping: float) -> None:
    """F⁻¹ = I / λ, the inverse before the first gradient.   state: [K, B, B], overwritten."""
    state.zero_().diagonal(dim1=1, dim2=2).fill_(1 / damping)


def running_step(form: str, state: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Take k gradients into the running inverse, one by one or all at once."""
    step = ops.sherman_morrison_ if form == "rank1" else ops.woodbury_
    step(state, grads, blocks, num_grads)


def dual_parts(
    grads: Tensor, layout: BlockLayout, *, num_grads: int, damping: float
) -> tuple[list[Part], Tensor]:
    """Factor the capacitance C = m λ I + G Gᵀ of every block in float64 and keep the gradients as they are.

    grads: [k, d], contiguous; they become part of the state.
    Returns one part and the scaled condition [K].   Raises FisherError where float64 is not enough.
    """
    k = grads.shape[0]
    blocks = layout.blocks.to(grads.device)
    factor = torch.empty(layout.num_blocks, k, k, dtype=torch.float64, device=grads.device)
    condition = torch.empty(layout.num_blocks, dtype=torch.float64, device=grads.device)
    ops.dual_factor_(factor, grads, blocks, num_grads, damping, condition)
    part = Part(grads, factor, blocks, block_ids(0, layout.num_blocks))
    _check_dual(part, layout, condition, num_grads, damping)
    return [part], condition.cpu()


def _check_dual(part: Part, layout: BlockLayout, condition: Tensor, num_grads: int, damping: float) -> None:
    """Raise unless 1 − Σᵢ Vᵢ², which is λ diag F⁻¹, is known to TOLERANCE: its error is about eps times
    condition.

    λ diag F⁻¹ >= m λ / trace C settles most cases without computing it.
    """
    assert part.factor is not None
    error = torch.finfo(torch.float64).eps * condition  # [K]
    trace = part.factor.square().sum(dim=(1, 2))  # [K]
    doubtful = ~(error * trace / (num_grads * damping) <= TOLERANCE)
    if not doubtful.any():
        return
    ids = doubtful.nonzero().squeeze(1)
    diagonal = torch.empty(part.state.shape[1], dtype=torch.float64, device=part.state.device)
    ranges = part.blocks[ids]
    ops.inverse_diagonal(part.state, ranges, out=diagonal, factor=part.factor[ids], damping=damping)
    for b, (start, stop) in zip(ids.tolist(), ranges.tolist(), strict=True):
        smallest = float(diagonal[start:stop].min()) * damping
        if not float(error[b]) <= TOLERANCE * smallest:
            raise broken(layout, b, damping, num_grads)


def broken(layout: BlockLayout, b: int, damping: float, num_grads: int) -> FisherError:
    """The error for a block that float64 cannot invert."""
    return FisherError(
        f"the inverse Fisher of {layout.describe_block(b)} (block {b} of {layout.num_blocks}) cannot be computed in "
        f"float64 from {num_grads} gradients at damping={damping:g}: a gradient is not finite, or the damping is too "
        f"small for gradients of this size"
    )


class Probe:
    """A random vector p and F p, gathered beside a running inverse to test it.

    The residual of F⁻¹ (F p) = p is the relative error of F⁻¹v for a v = F p in the span of the gradients.
    """

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(layout.num_weights, dtype=torch.float64, generator=generator)
        self.p = p.to(device)  # [d]
        self.fisher_p = torch.zeros_like(self.p)  # (1/m) Σ g gᵀp without the damping, [d]
        self.ranges = layout.blocks.tolist()

    def add(self, grads: Tensor, num_grads: int) -> None:
        """Take k gradients in."""
        for start, stop in self.ranges:
            G = grads[:, start:stop].double()  # [k, n]
            self.fisher_p[start:stop] += G.T @ (G @ self.p[start:stop]) / num_grads

    def passes(self, state: Tensor, blocks: Tensor, damping: float) -> Tensor:
        """Which blocks [K] of a primal state are finite, positive, at most I/λ, and take F p back to p."""
        v = self.fisher_p + damping * self.p  # [d]
        back = torch.full_like(v, torch.nan)
        diagonal = torch.full_like(v, torch.nan)
        ops.block_matvec(state, blocks, v[:, None], out=back[:, None])
        ops.inverse_diagonal(state, blocks, out=diagonal)
        good = torch.empty(len(blocks), dtype=torch.bool)
        for b, (start, stop) in enumerate(blocks.tolist()):
            p, diag = self.p[start:stop], diagonal[start:stop] * damping
            residual = (back[start:stop] - p).norm() / p.norm()
            positive = diag.min() > 0 and diag.max() <= 1 + 10 * TOLERANCE
            good[b] = bool(residual <= TOLERANCE / 4) and bool(positive)
        return good


class _Shelf:
    """A primal state that is filled from the front; blocks that did not pass leave no gap.

    The buffer has room for every block; the pages of it that are never written take no memory.
    """

    def __init__(self, layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.buffer: Tensor | None = None
        self.ids: list[Tensor] = []
        self.count = 0

    def room(self, num_blocks: int) -> Tensor:
        """The next free blocks, [num_blocks, B, B], with anything in them."""
        if self.buffer is None:
            shape = (self.layout.num_blocks, self.layout.block_size, self.layout.block_size)
            self.buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.buffer[self.count : self.count + num_blocks]

    def keep(self, ids: Tensor, good: Tensor) -> None:
        """Keep those of the blocks `ids`, just written into `room`, that are good."""
        state = self.room(len(ids))
        kept = good.nonzero().squeeze(1).tolist()
        for to, origin in enumerate(kept):
            if to != origin:
                state[to] = state[origin]
        self.ids.append(ids[good])
        self.count += len(kept)

    def part(self) -> Part:
        """What was kept."""
        assert self.buffer is not None
        ids = torch.cat(self.ids)
        return Part(self.buffer[: self.count], None, select(self.layout.blocks.to(self.device), ids), ids)


def _shelves(layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> list[_Shelf]:
    """One shelf for the dtype of the state, and one in float64 behind it for what that cannot hold."""
    dtypes = [dtype] if dtype == torch.float64 else [dtype, torch.float64]
    return [_Shelf(layout, one, device) for one in dtypes]
