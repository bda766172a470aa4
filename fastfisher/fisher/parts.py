"""Building the states behind an inverse Fisher, and deciding per block whether it can be trusted.

Whatever the form, a block whose estimated error exceeds TOLERANCE is redone as a float64 inverse of its Gram matrix,
and what float64 cannot hold either is an error that names parameter, block and damping.  `rounding_error` is the
estimate for a stored inverse, `_dual_errors` the one for the dual form.  A running inverse (rank-1, rank-k) may be
worse than its rounding, so a `Probe` compares F⁻¹ (F p) with p besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError
from fastfisher.fisher.blocks import BlockLayout, padded
from fastfisher.ops.memory import empty_state, zero_state
from fastfisher.ops.threads import torch_on_one_thread

TOLERANCE = 1e-4  # largest relative error of diag F⁻¹ and of F⁻¹v that a block may be estimated to have
REFINE = 1e-6  # a dual product with a larger estimated error is refined, see Part.refine
REFINABLE = 1e-2  # two steps of refinement take an error of this size below TOLERANCE
GROUP_COLUMNS = 4096  # of a dual block at a time; of a primal state, its square
LARGEST_MENDED_BLOCK = 4096  # a dual block of more weights than this is not worth B² float64 numbers
# States are filled and inverted in groups of this size: on a CPU a group stays in cache, on a GPU it fills the machine
# and bounds what a group needs beside it.
GROUP_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
# Groups that are allocated as one: pieces below 32 MiB stay with the C library when they are freed.
SLAB = {"cpu": 16, "cuda": 1}
# Of one of the four float64 copies that removal losses take.
LOSS_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

LAZY_MEMORY = ("cpu",)  # devices on which memory that was never written takes none

# Writes the inverse of the blocks `ids` into a state [g, B, B] in its dtype; returns condition and amplification [g].
Build = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Source = Iterable[tuple[int, int, Build]]


@dataclass
class Part:
    """Some blocks of an inverse and the state that holds them.

    state: primal [K, B, B], or with factor the gradients [k, d].   factor: None, or float64 [K, k, k].
    blocks: int64 [K, 2].   block_ids: int64 [K], which blocks of the layout these are.
    refine: gradients so much larger than the damping that F⁻¹v, for v in their span, needs iterative refinement.
    """

    state: Tensor
    factor: Tensor | None
    blocks: Tensor
    block_ids: Tensor
    refine: bool = False

    @property
    def kind(self) -> str:
        """Which of the two states it is."""
        return "primal" if self.factor is None else "dual"


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state built from gradients of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks_per_group(layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> int:
    """How many blocks of a layout have a state of about GROUP_BYTES."""
    group = GROUP_BYTES.get(device.type, GROUP_BYTES["cpu"])
    return max(1, group // (layout.block_size**2 * dtype.itemsize))


def groups(layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int]]:
    """The blocks of a layout in ranges whose state takes about GROUP_BYTES."""
    size = blocks_per_group(layout, dtype, device)
    for first in range(0, layout.num_blocks, size):
        yield first, min(first + size, layout.num_blocks)


def slab_bytes(device: torch.device) -> int:
    """Bytes of a Fisher in float64 that are freed together while it is inverted."""
    return GROUP_BYTES.get(device.type, GROUP_BYTES["cpu"]) * SLAB.get(device.type, 1)


def block_ids(first: int, last: int) -> Tensor:
    """The indices of the blocks [first, last)."""
    return torch.arange(first, last)


def select(blocks: Tensor, ids: Tensor) -> Tensor:
    """The ranges of some blocks, [len(ids), 2]."""
    return blocks[ids.to(blocks.device)]


def grads_build(grads: Tensor, blocks: Tensor, num_grads: int, damping: float) -> Build:
    """What inverts the Fisher of some of the blocks straight from gradients [k, d]."""

    def build(state: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        condition, amplification = _estimates(state)
        ops.inverse_from_grads(
            state, grads, select(blocks, ids), num_grads, condition, amplification, damping=damping
        )
        return condition, amplification

    return build


def grads_source(grads: Tensor, layout: BlockLayout, num_grads: int, damping: float) -> Source:
    """Groups of blocks whose inverse comes straight from gradients [k, d]."""
    build = grads_build(grads, layout.blocks.to(grads.device), num_grads, damping)
    for first, last in groups(layout, state_dtype(grads.dtype), grads.device):
        yield first, last, build


def stored_source(stored: list[Tensor], layout: BlockLayout, damping: float) -> Source:
    """Groups of blocks whose Fisher was accumulated before; `stored` is emptied on the way to free its memory."""
    for first, last in list(groups(layout, stored[0].dtype, stored[0].device)):
        yield first, last, functools.partial(_stored_build, stored.pop(0), first, damping)


def _stored_build(
    fisher: Tensor, first: int, damping: float, state: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    condition, amplification = _estimates(state)
    state.copy_(fisher if len(ids) == len(fisher) else fisher[(ids - first).to(fisher.device)])
    ops.spd_inverse_(state, condition, amplification, damping=damping)
    return condition, amplification


def _estimates(state: Tensor) -> Tensor:
    """Room for the condition and the amplification of every block, [2, g]."""
    return torch.empty(2, len(state), dtype=torch.float64, device=state.device)


@torch_on_one_thread()
def primal_parts(
    source: Source,
    layout: BlockLayout,
    *,
    num_grads: int,
    damping: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Part], Tensor]:
    """Invert F = λ I + (1/m) Σ g gᵀ of every block in `dtype`, and once more in float64 where that is not enough.

    Returns the parts, one for each dtype in use or more, and the scaled condition [K] of all blocks.
    Raises FisherError where float64 fails too.
    """
    shelf = _Shelf(layout, dtype, device)
    mender = _Mender(layout, num_grads, damping, device)
    condition = torch.empty(layout.num_blocks, dtype=torch.float64)
    for first, last, build in source:
        ids = block_ids(first, last)
        state = shelf.room(len(ids))
        good, condition[first:last] = _invert(state, build, ids)
        shelf.keep(state, ids, good)
        if not good.all():
            mender.mend(build, ids[~good], condition, hopeless=dtype == torch.float64)
    return [*shelf.parts(), *mender.parts()], condition


@torch_on_one_thread()
def primal_diagonal(
    grads: Tensor, layout: BlockLayout, ids: Tensor, *, num_grads: int, damping: float, out: Tensor
) -> None:
    """diag F⁻¹ of the blocks `ids` into out [d], in its dtype, and in float64 where that is not enough.

    Raises FisherError where float64 fails too.
    """
    blocks = select(layout.blocks.to(grads.device), ids)

    def build(diagonal: Tensor, some: Tensor) -> Tensor:
        ranges = select(blocks, some)
        condition, amplification = torch.empty(2, len(some), dtype=torch.float64, device=grads.device)
        ops.inverse_diagonal_from_grads(
            diagonal,
            grads,
            ranges,
            num_grads,
            condition,
            amplification,
            block_size=layout.block_size,
            damping=damping,
        )
        return (unit_roundoff(diagonal) * amplification > TOLERANCE).cpu()

    everything = torch.arange(len(ids))
    bad = everything[build(out, everything)]
    if len(bad) == 0:
        return
    wide = out if out.dtype == torch.float64 else out.double()
    hopeless = bad if wide is out else bad[build(wide, bad)]
    if len(hopeless):
        raise broken(layout, int(ids[hopeless[0]]), damping, num_grads)
    out.copy_(wide)


@torch_on_one_thread()
def dual_diagonal(grads: Tensor, layout: BlockLayout, *, num_grads: int, damping: float, out: Tensor) -> None:
    """diag F⁻¹ of all blocks into out [d] from their m x m factors, a group of blocks at a time.

    Blocks whose factor loses too much are computed in the primal form.   Raises FisherError where float64 fails too.
    """
    k = grads.shape[0]
    blocks = layout.blocks.to(grads.device)
    at_once = max(1, GROUP_BYTES.get(grads.device.type, GROUP_BYTES["cpu"]) // (8 * k * k))
    doubtful = []
    for first in range(0, layout.num_blocks, at_once):
        ids = block_ids(first, min(first + at_once, layout.num_blocks))
        ranges = select(blocks, ids)
        factor = empty_state((len(ids), k, k), torch.float64, grads.device)
        scaled = torch.empty(len(ids), dtype=torch.float64, device=grads.device)
        ops.dual_factor_(factor, grads, ranges, num_grads, damping, scaled)
        ops.inverse_diagonal(grads, ranges, out=out, factor=factor, damping=damping)
        error, _ = _dual_errors(grads, factor, ranges, layout.block_size, scaled, num_grads, damping)
        doubtful.append(ids[(~(error <= TOLERANCE)).cpu()])
    rest = torch.cat(doubtful)
    if len(rest):
        if layout.block_size > LARGEST_MENDED_BLOCK:
            raise broken(layout, int(rest[0]), damping, num_grads)
        primal_diagonal(grads, layout, rest, num_grads=num_grads, damping=damping, out=out)


@torch_on_one_thread()
def running_parts(
    grads: Tensor, layout: BlockLayout, *, form: str, num_grads: int, damping: float
) -> tuple[list[Part], Tensor]:
    """Build F⁻¹ from I/λ by rank-1 steps or one rank-k step, prove every block by a probe, and mend those that fail.

    Returns the parts and the condition [K], NaN where the running form was good enough, for it has no estimate.
    Raises FisherError where float64 fails too.
    """
    shelf = _Shelf(layout, state_dtype(grads.dtype), grads.device)
    mender = _Mender(layout, num_grads, damping, grads.device)
    condition = torch.full((layout.num_blocks,), torch.nan, dtype=torch.float64)
    probe = Probe(layout, grads.device)
    probe.add(grads, num_grads)
    blocks = layout.blocks.to(grads.device)
    for first, last, build in grads_source(grads, layout, num_grads, damping):
        ids = block_ids(first, last)
        state = shelf.room(len(ids))
        start_from_damping(state, damping)
        running_step(form, state, grads, blocks[first:last], num_grads)
        good = probe.passes(state, blocks[first:last], damping)
        shelf.keep(state, ids, good)
        if not good.all():
            mender.mend(build, ids[~good], condition)
    return [*shelf.parts(), *mender.parts()], condition


@torch_on_one_thread()
def dual_parts(
    grads: Tensor, layout: BlockLayout, *, num_grads: int, damping: float
) -> tuple[list[Part], Tensor]:
    """Factor the capacitance C = m λ I + G Gᵀ of every block in float64 and keep the gradients as they are.

    grads: [k, d], contiguous; they become part of the state.
    Returns the parts, a second one where blocks had to be inverted in the primal form, and the scaled condition [K].
    Raises FisherError where float64 is not enough.
    """
    k = grads.shape[0]
    blocks = layout.blocks.to(grads.device)
    factor = empty_state((layout.num_blocks, k, k), torch.float64, grads.device)
    scaled = torch.empty(layout.num_blocks, dtype=torch.float64, device=grads.device)
    ops.dual_factor_(factor, grads, blocks, num_grads, damping, scaled)
    diagonal_error, product_error = _dual_errors(
        grads, factor, blocks, layout.block_size, scaled, num_grads, damping
    )
    condition = scaled.cpu()
    good = ((diagonal_error <= TOLERANCE) & (product_error <= REFINABLE)).cpu()
    refine = bool((product_error > REFINE).any())
    ids = block_ids(0, layout.num_blocks)
    if good.all():
        return [Part(grads, factor, blocks, ids, refine)], condition
    mender = _Mender(layout, num_grads, damping, grads.device)
    build = grads_build(grads, blocks, num_grads, damping)
    for piece in ids[~good].split(blocks_per_group(layout, torch.float64, grads.device)):
        mender.mend(build, piece, condition, hopeless=layout.block_size > LARGEST_MENDED_BLOCK)
    kept = ids[good]
    dual = (
        [Part(grads, factor[good.to(factor.device)], select(blocks, kept), kept, refine)] if len(kept) else []
    )
    return [*dual, *mender.parts()], condition


def _invert(state: Tensor, build: Build, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Build the inverse of blocks; returns which of them can be trusted and their condition, both [g] on the CPU.

    The amplification of spd_inverse_ estimates the relative error of F⁻¹v for the worst v when the roundings of F are
    independent of each other.  Rounding changes F by E with |E_jk| about u sqrt(f_j f_k), f = diag(F) without the
    damping: a weight whose gradient is zero is decoupled exactly.  With v = F y the error is F⁻¹ E y, of about
    u ‖F⁻¹ diag(f)^½‖_F sqrt(max f).  Where the gradients are alike the roundings are too; times the coherence ‖A‖_F
    (sqrt(B) if independent, B if alike) this was never below 1.7 times the error.
    """
    condition, amplification = build(state, ids)
    return (unit_roundoff(state) * amplification <= TOLERANCE).cpu(), condition.cpu()


def unit_roundoff(state: Tensor) -> float:
    """u, half the distance from 1 to the next number."""
    return torch.finfo(state.dtype).eps / 2


def rounding_error(f_inv: Tensor, gram: Tensor) -> Tensor:
    """u ‖F⁻¹ diag(f)^½‖_F sqrt(max f), the estimate that `_invert` explains, without the coherence.

    f_inv: [K, B, B].   gram: f, float64 [K, B].   Returns float64 [K].
    """
    columns = f_inv.double() * gram.sqrt()[:, None, :]
    return unit_roundoff(f_inv) * _norm(columns) * gram.amax(dim=1).sqrt()


def _norm(x: Tensor) -> Tensor:
    """‖x‖_F of every matrix, [g], row by row: one sum over a matrix would be cut into as many pieces as threads."""
    return _length(torch.linalg.vector_norm(x, dim=2))


def _dual_errors(
    grads: Tensor,
    factor: Tensor,
    blocks: Tensor,
    block_size: int,
    scaled: Tensor,
    num_grads: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Estimate the relative errors of diag F⁻¹ and of F⁻¹v in the dual form, both [K].

    1 − Σᵢ Vᵢ², which is λ diag F⁻¹, is known to about eps ‖A⁻¹‖, A = C scaled to a unit diagonal; its smallest entry is
    at least m λ / trace C, which settles most blocks without computing it.  F⁻¹v loses to cancellation, at worst for v
    along the strongest gradients; eps ‖A⁻¹‖ sqrt(trace C / (m λ)) is what was measured.
    """
    error = torch.finfo(torch.float64).eps * scaled  # [K]
    strength = _norm(factor) ** 2 / (num_grads * damping)  # trace C / (m λ), [K]
    diagonal_error = error * strength
    doubtful = (diagonal_error > TOLERANCE) & scaled.isfinite()
    if doubtful.any():
        inv_diag = torch.empty(grads.shape[1], dtype=torch.float64, device=grads.device)
        ranges = blocks[doubtful]
        ops.inverse_diagonal(grads, ranges, out=inv_diag, factor=factor[doubtful], damping=damping)
        smallest = padded(inv_diag, ranges, block_size, torch.inf).amin(dim=1) * damping
        diagonal_error[doubtful] = torch.where(smallest > 0, error[doubtful] / smallest, torch.inf)
    return diagonal_error, error * strength.sqrt()


def start_from_damping(state: Tensor, damping: float) -> None:
    """F⁻¹ = I / λ, the inverse before the first gradient.   state: [K, B, B], overwritten."""
    zero_state(state).diagonal(dim1=1, dim2=2).fill_(1 / damping)


def running_step(form: str, state: Tensor, grads: Tensor, blocks: Tensor, num_grads: int) -> None:
    """Take k gradients into the running inverse, one by one or all at once."""
    step = ops.sherman_morrison_ if form == "rank1" else ops.woodbury_
    step(state, grads, blocks, num_grads)


def broken(layout: BlockLayout, b: int, damping: float, num_grads: int) -> FisherError:
    """The error for a block that float64 cannot invert."""
    return FisherError(
        f"the inverse Fisher of {layout.describe_block(b)} (block {b} of {layout.num_blocks}) cannot be computed in "
        f"float64 from {num_grads} gradients at damping={damping:g}: a gradient is not finite, or the damping is too "
        f"small for gradients of this size"
    )


class Probe:
    """A random vector p, F p and diag F, gathered beside a running inverse to test it.

    The residual of F⁻¹ (F p) = p is the relative error of F⁻¹v for a v = F p in the span of the gradients.
    """

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(layout.num_weights, dtype=torch.float64, generator=generator)
        self.p = p.to(device)  # [d]
        self.fisher_p = torch.zeros_like(self.p)  # (1/m) Σ g gᵀp without the damping, [d]
        self.gram = torch.zeros_like(self.p)  # (1/m) Σ g², [d]
        self.blocks = layout.blocks.to(device)

    @torch_on_one_thread()
    def add(self, grads: Tensor, num_grads: int) -> None:
        """Take k gradients in."""
        product = torch.empty_like(self.p)
        ops.fisher_vector_product(grads, self.blocks, num_grads, self.p[:, None], out=product[:, None])
        self.fisher_p += product
        self.gram += torch.linalg.vector_norm(grads, dim=0, dtype=torch.float64).square() / num_grads

    @torch_on_one_thread()
    def passes(self, state: Tensor, blocks: Tensor, damping: float) -> Tensor:
        """Which blocks [K] of a primal state are positive, at most I/λ, take F p back to p, and survive rounding."""
        first, last = blocks[[0, -1], [0, 1]].tolist()
        blocks = blocks - first  # a group of blocks is one range of weights; only that range is looked at
        p, gram = self.p[first:last], self.gram[first:last]
        v = self.fisher_p[first:last] + damping * p
        back, inv_diag = torch.full_like(v, torch.nan), torch.full_like(v, torch.nan)
        ops.block_matvec(state, blocks, v[:, None], out=back[:, None])
        ops.inverse_diagonal(state, blocks, out=inv_diag)

        def rows(x: Tensor, fill: float) -> Tensor:
            return padded(x, blocks, state.shape[1], fill)  # [K, B]

        residual = _length(rows(back - p, 0)) / _length(rows(p, 0))
        lengths = (blocks[:, 1] - blocks[:, 0]).double()
        rounding = lengths.sqrt() * rounding_error(state, rows(gram, 0))
        scaled = inv_diag * damping
        positive = (rows(scaled, 1) > 0).all(dim=1) & (rows(scaled, 1) <= 1 + TOLERANCE).all(dim=1)
        # the factor 3 is measured: the probe sees one vector, and sqrt(n) lies below some coherences
        return (positive & (3 * (residual + rounding) <= TOLERANCE)).cpu()


def _length(x: Tensor) -> Tensor:
    """The Euclidean length of every row, [K]."""
    return torch.linalg.vector_norm(x, dim=1)


def group_blocks(part: Part, size: int, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The diagonal blocks [size, size] of F⁻¹, float64, with the numbers of their groups in [0, d / size).

    Groups are `size` consecutive weights; every block of the part holds a multiple of it.
    """
    if part.factor is not None:
        for b, (start, stop) in enumerate(part.blocks.tolist()):
            for first in range(start, stop, GROUP_COLUMNS // size * size):
                last = min(stop, first + GROUP_COLUMNS // size * size)
                G = part.state[:, first:last].double()  # [m, n]
                V = torch.linalg.solve_triangular(part.factor[b].mT, G, upper=False)
                V = V.view(len(V), -1, size).transpose(0, 1)  # [n / size, m, size]
                eye = torch.eye(size, dtype=torch.float64, device=V.device).expand(len(V), size, size)
                ids = torch.arange(first // size, last // size, device=V.device)
                yield ids, torch.baddbmm(eye, V.mT, V, beta=1 / damping, alpha=-1 / damping)
        return
    inside = torch.arange(size, device=part.state.device)
    at_once = max(1, GROUP_COLUMNS * GROUP_COLUMNS // part.state.shape[1])  # blocks
    for first in range(0, len(part.blocks), at_once):
        blocks = part.blocks[first : first + at_once]
        counts = (blocks[:, 1] - blocks[:, 0]) // size
        owner = torch.repeat_interleave(
            torch.arange(len(blocks), device=blocks.device), counts
        )  # block of each group
        place = (
            torch.arange(len(owner), device=blocks.device) - (counts.cumsum(0) - counts)[owner]
        )  # in that block
        at = (place[:, None] * size + inside)[:, :, None]
        yield blocks[owner, 0] // size + place, part.state[first + owner[:, None, None], at, at.mT].double()


def primal_losses(part: Part, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q of each block of a primal part, float64 [K], and where F⁻¹[Q, Q] is not definite."""
    size = part.state.shape[1]
    at_once = max(1, LOSS_BYTES.get(part.state.device.type, LOSS_BYTES["cpu"]) // (8 * size**2))  # blocks
    losses, failed = [], []
    for chunk in range(0, len(part.blocks), at_once):
        blocks = part.blocks[chunk : chunk + at_once]
        keep = padded(mask, blocks, size, True)  # [K, B]
        both = ~(keep[:, :, None] | keep[:, None, :])
        S = torch.where(both, part.state[chunk : chunk + len(blocks)].double(), 0)
        S.diagonal(dim1=1, dim2=2).add_(keep)  # kept weights stand for rows and columns of the identity
        L, info = torch.linalg.cholesky_ex(S)
        x = torch.where(keep, 0, padded(weight.detach().double(), blocks, size, 0))
        half = torch.linalg.solve_triangular(L, x[:, :, None], upper=False)
        losses.append(half.square().sum(dim=(1, 2)) / 2)
        failed.append(info > 0)
    return torch.cat(losses), torch.cat(failed)


def dual_losses(part: Part, step: Tensor, num_grads: int, damping: float) -> Tensor:
    """½ δᵀ(λ I + GᵀG / m) δ of each block of a dual part, float64 [K].   step: δ, float64 [d]."""
    losses = []
    for start, stop in part.blocks.tolist():
        squares = damping * step[start:stop].square().sum()
        slopes = torch.zeros(len(part.state), dtype=torch.float64, device=step.device)  # [m]
        for first in range(start, stop, GROUP_COLUMNS):
            tile = slice(first, min(stop, first + GROUP_COLUMNS))
            slopes += part.state[:, tile].double() @ step[tile]
        losses.append((squares + slopes.square().sum() / num_grads) / 2)
    return torch.stack(losses)


class _Shelf:
    """A primal state that is filled from the front; blocks that did not pass leave no gap.

    On a CPU one buffer has room for every block: its pages that are never written take no memory.  On a GPU all of a
    buffer is taken at once, so each group has its own, while the Fisher of the groups before is freed.
    """

    def __init__(self, layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.one_buffer = device.type in LAZY_MEMORY
        self.blocks = layout.blocks.to(device)
        self.buffers: list[Tensor] = []
        self.ids: list[list[Tensor]] = []  # per buffer, what was kept in it
        self.count = 0  # in the last buffer

    def room(self, num_blocks: int) -> Tensor:
        """The next free blocks, [num_blocks, B, B], with anything in them."""
        if not (self.buffers and self.one_buffer):
            rows = self.layout.num_blocks if self.one_buffer else num_blocks
            shape = (rows, self.layout.block_size, self.layout.block_size)
            self.buffers.append(empty_state(shape, self.dtype, self.device))
            self.ids.append([])
            self.count = 0
        return self.buffers[-1][self.count : self.count + num_blocks]

    def keep(self, state: Tensor, ids: Tensor, good: Tensor) -> None:
        """Keep those of the blocks `ids`, just written into `state` from `room`, that are good."""
        kept = good.nonzero().squeeze(1)
        stay = int((kept == torch.arange(len(kept))).sum())  # blocks before the first gap
        if stay < len(kept):
            state[stay : len(kept)] = state[kept[stay:].to(state.device)]
        self.ids[-1].append(ids[good])
        self.count += len(kept)

    def parts(self) -> list[Part]:
        """What was kept, a part for every buffer that holds anything."""
        found = []
        for buffer, pieces in zip(self.buffers, self.ids, strict=True):
            ids = torch.cat(pieces)
            if len(ids):
                found.append(Part(buffer[: len(ids)], None, select(self.blocks, ids), ids))
        return found


class _Mender:
    """Redoes single blocks as float64 inverses of their Gram matrices."""

    def __init__(self, layout: BlockLayout, num_grads: int, damping: float, device: torch.device) -> None:
        self.layout, self.num_grads, self.damping, self.device = layout, num_grads, damping, device
        self.states: list[Tensor] = []
        self.ids: list[Tensor] = []

    def mend(self, build: Build, ids: Tensor, condition: Tensor, *, hopeless: bool = False) -> None:
        """Invert the blocks `ids` and write their condition.   Raises FisherError where that fails, or is hopeless."""
        if hopeless:
            raise broken(self.layout, int(ids[0]), self.damping, self.num_grads)
        size = self.layout.block_size
        state = torch.empty(len(ids), size, size, dtype=torch.float64, device=self.device)
        good, condition[ids] = _invert(state, build, ids)
        if not good.all():
            raise broken(self.layout, int(ids[~good][0]), self.damping, self.num_grads)
        self.states.append(state)
        self.ids.append(ids)

    def parts(self) -> list[Part]:
        """What was mended, as one part or none; the pieces are freed while they are put together."""
        if not self.ids:
            return []
        ids = torch.cat(self.ids)
        state = torch.empty(len(ids), *self.states[0].shape[1:], dtype=torch.float64, device=self.device)
        first = 0
        while self.states:
            piece = self.states.pop(0)
            state[first : first + len(piece)] = piece
            first += len(piece)
        return [Part(state, None, select(self.layout.blocks.to(self.device), ids), ids)]
