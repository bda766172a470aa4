"""Which weights to remove: the threshold by radix selection, 11 bits a pass, and equal saliencies by index.

Everything stays on the device: a pass counts the digits of the candidates, one small program picks the digit of the
threshold, and the next pass looks only at what begins with it.  Floor: the saliencies read once a digit (3 times in
float32, 6 in float64) and twice to decide; no sort, no copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton.launch import launch

DIGIT = 11
PIECE = 2048  # weights at a time
PIECES = 16  # pieces of a program

# what `progress` holds, int64
LEFT = tl.constexpr(0)  # how many of the candidates are still to be removed, from the smallest on
PREFIX = tl.constexpr(1)  # the digits of the threshold found so far
DEAD = tl.constexpr(2)  # dead weights


@triton.jit
def _keys(saliency, q, inside):
    """Unsigned integers in the order of the saliencies, which are finite; both zeros have one."""
    x = tl.load(saliency + q, mask=inside, other=0.0) + 0.0
    if x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000).to(tl.uint64)
    else:
        bits = x.to(tl.uint64, bitcast=True)
        return tl.where((bits >> 63) != 0, bits ^ 0xFFFFFFFFFFFFFFFF, bits | 0x8000000000000000)


@triton.jit
def _look(
    mask, invalid, progress, saliency, dead, num_weights: tl.int64, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """mask ← the weights that are alive; counts the dead ones, finds the first saliency that is not finite."""
    base = tl.program_id(0).to(tl.int64) * PIECE * PIECES
    bad = base * 0 + num_weights
    count = base * 0
    for piece in range(PIECES):
        q = base + piece * PIECE + tl.arange(0, PIECE)
        inside = q < num_weights
        gone = tl.load(dead + q, mask=inside, other=0) != 0
        x = tl.load(saliency + q, mask=inside, other=0.0)
        finite = (x == x) & (tl.abs(x) < float("inf"))
        tl.store(mask + q, (~gone).to(tl.uint8), mask=inside)
        count += tl.sum(tl.where(inside & gone, 1, 0))
        bad = tl.minimum(bad, tl.min(tl.where(inside & ~gone & ~finite, q, num_weights)))
    tl.atomic_add(progress + DEAD, count)
    tl.atomic_min(invalid, bad)


@triton.jit
def _begin(invalid, progress, num_weights: tl.int64, num_zeros: tl.int64):
    """How many weights go beside the dead ones; none where a saliency is not finite."""
    first = tl.load(invalid)
    left = num_zeros - tl.load(progress + DEAD)
    tl.store(progress + LEFT, tl.where(first < num_weights, 0, left))
    tl.store(invalid, tl.where(first < num_weights, first, -1))


@triton.jit
def _count(
    histogram,
    progress,
    saliency,
    dead,
    num_weights: tl.int64,
    shift: tl.int32,
    known: tl.uint64,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """How many candidates have which digit next: a candidate is alive and begins with the digits found so far."""
    base = tl.program_id(0).to(tl.int64) * PIECE * PIECES
    prefix = tl.load(progress + PREFIX).to(tl.uint64, bitcast=True)
    counts = tl.zeros([BINS], tl.int32)
    for piece in range(PIECES):
        q = base + piece * PIECE + tl.arange(0, PIECE)
        inside = q < num_weights
        alive = tl.load(dead + q, mask=inside, other=1) == 0
        key = _keys(saliency, q, inside)
        candidate = inside & alive & ((key & known.to(tl.uint64)) == prefix)
        digit = ((key >> shift.to(tl.uint64)) & (BINS - 1)).to(tl.int32)
        counts += tl.histogram(digit, BINS, mask=candidate)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts, mask=counts > 0)


@triton.jit
def _pick(histogram, progress, shift: tl.int32, BINS: tl.constexpr):
    """The digit below which fewer candidates lie than are left to remove."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    left = tl.load(progress + LEFT)
    upto = tl.cumsum(counts.to(tl.int64), axis=0)
    digit = tl.sum(tl.where(upto < left, 1, 0)).to(tl.int64)
    tl.store(progress + LEFT, left - tl.sum(tl.where(bins < digit, counts, 0)))
    tl.store(progress + PREFIX, tl.load(progress + PREFIX) | (digit << shift))
    tl.store(histogram + bins, tl.zeros([BINS], tl.int32))


@triton.jit
def _count_ties(
    ties, progress, saliency, dead, num_weights: tl.int64, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """How many weights of this program's pieces equal the threshold, behind a 0."""
    base = tl.program_id(0).to(tl.int64) * PIECE * PIECES
    threshold = tl.load(progress + PREFIX).to(tl.uint64, bitcast=True)
    count = base * 0
    for piece in range(PIECES):
        q = base + piece * PIECE + tl.arange(0, PIECE)
        inside = q < num_weights
        alive = tl.load(dead + q, mask=inside, other=1) == 0
        count += tl.sum(tl.where(inside & alive & (_keys(saliency, q, inside) == threshold), 1, 0))
    tl.store(ties + 1 + tl.program_id(0), count)


@triton.jit
def _remove(
    mask, ties, progress, saliency, dead, num_weights: tl.int64, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """mask ← 0 below the threshold, and for the first of those that equal it.   ties: how many before each program.

    Where nothing is left to remove, the threshold is 0, which no key is below, and no rank is small enough.
    """
    base = tl.program_id(0).to(tl.int64) * PIECE * PIECES
    threshold = tl.load(progress + PREFIX).to(tl.uint64, bitcast=True)
    left = tl.load(progress + LEFT)
    before = tl.load(ties + tl.program_id(0))
    for piece in range(PIECES):
        q = base + piece * PIECE + tl.arange(0, PIECE)
        inside = q < num_weights
        alive = tl.load(dead + q, mask=inside, other=1) == 0
        key = _keys(saliency, q, inside)
        tie = inside & alive & (key == threshold)
        rank = before + tl.cumsum(tie.to(tl.int64), axis=0)
        gone = alive & ((key < threshold) | (tie & (rank <= left)))
        tl.store(mask + q, tl.zeros([PIECE], tl.uint8), mask=inside & gone)
        before += tl.sum(tie.to(tl.int64))


def prune_mask(saliency: Tensor, dead: Tensor, num_zeros: int, mask: Tensor, invalid: Tensor) -> None:
    """The op of this name."""
    n, device = saliency.numel(), saliency.device
    out, gone = mask.view(torch.uint8), dead.view(torch.uint8)
    grid = (triton.cdiv(n, PIECE * PIECES),)
    progress = torch.zeros(3, dtype=torch.int64, device=device)
    histogram = torch.zeros(1 << DIGIT, dtype=torch.int32, device=device)
    ties = torch.zeros(grid[0] + 1, dtype=torch.int64, device=device)
    options = {"PIECE": PIECE, "PIECES": PIECES, "num_warps": 8}
    invalid.fill_(n)
    launch(_look, grid, out, invalid, progress, saliency, gone, n, options=options)
    launch(_begin, (1,), invalid, progress, n, num_zeros, options={"num_warps": 1})
    width = 8 * saliency.itemsize
    shift, known = width, 0
    while shift > 0:
        bits = min(DIGIT, shift)
        shift -= bits
        args = (histogram, progress, saliency, gone, n, shift, known)
        launch(_count, grid, *args, options={**options, "BINS": 1 << bits})
        launch(_pick, (1,), histogram, progress, shift, options={"BINS": 1 << bits, "num_warps": 8})
        known |= ((1 << bits) - 1) << shift
    launch(_count_ties, grid, ties, progress, saliency, gone, n, options=options)
    before = ties.cumsum(0)
    launch(_remove, grid, out, before, progress, saliency, gone, n, options=options)
