"""Optimal Brain Surgeon one weight at a time: a program for each block.

Removing q takes v vᵀ from F⁻¹, v = F⁻¹e_q / √[F⁻¹]_qq.  Registers cannot be indexed and shared memory not be read by a
place found on the way, so F⁻¹ stays in memory as it is, and so do the rows v: a column is one of F⁻¹ less its part in
those, n³/2 multiply-adds in all from the nearest cache.  Weights and diagonal are vectors in registers.
A dual inverse is written out first, by torch's batched routines, a group of blocks at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfisher.kernels.triton import tuning
from fastfisher.kernels.triton.launch import block_groups, launch, power_of_two
from fastfisher.kernels.triton.tiles import block_range, square_root


@triton.jit
def _remove(q, w, d, rows, base, t, i, n, order, loss, start, B: tl.constexpr, ROWS: tl.constexpr):
    """Take weight q of the block out as its t-th; returns v, the new w and d, and whether the pivot was usable."""
    col = tl.load(base + q * B + i, mask=i < n, other=0.0).to(tl.float64)
    for first in range(0, t, ROWS):
        s = first + tl.arange(0, ROWS)
        at_q = tl.load(rows + s * B + q, mask=s < t, other=0.0, volatile=True)
        inside = (s < t)[:, None] & (i < n)[None, :]
        tile = tl.load(rows + s[:, None] * B + i[None, :], mask=inside, other=0.0, volatile=True)
        col -= tl.sum(tile * at_q[:, None], axis=0)
    pivot = tl.sum(tl.where(i == q, col, 0.0))
    usable = (pivot > 0) & (pivot < float("inf"))
    root = square_root(tl.where(usable, pivot, 1.0))
    v = tl.where(usable, col / root, 0.0)
    step = tl.sum(tl.where(i == q, w, 0.0)) / root
    tl.store(rows + t * B + i, v, mask=i < n)
    if usable:
        tl.store(order + start + t, start + q)
        tl.store(loss + start + t, step * step / 2)
    tl.debug_barrier()  # the next column is read from what all threads have written
    return v, w - v * step, d - v * v, usable


@triton.jit
def _complete(order, loss, failed, b, start, count, there, open, sound, i, n):
    """Weights that stay come last; a candidate among them is one whose loss is no number."""
    place = start + count + tl.cumsum(there.to(tl.int32), axis=0) - 1
    tl.store(order + place, start + i, mask=there)
    tl.store(loss + place, tl.full(i.shape, float("nan"), tl.float64), mask=there)
    stuck = tl.sum((there & open).to(tl.int32)) > 0
    tl.store(failed + b, ((sound == 0) | stuck).to(tl.uint8))


@triton.jit
def _singles(
    order,
    loss,
    failed,
    rows,
    weight,
    state,
    blocks,
    groups,
    room,
    B: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """One weight at a time; with groups, while `room` is left in that of the weight."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.arange(0, BP)
    rows += b * B * B
    base = state + b * B * B
    w = tl.load(weight + start + i, mask=i < n, other=0.0).to(tl.float64)
    d = tl.load(base + i * (B + 1), mask=i < n, other=1.0).to(tl.float64)
    there = i < n
    open = there
    if GROUPED:
        group = tl.load(groups + start + i, mask=i < n, other=-1)
        left = tl.load(room + start + i, mask=i < n, other=0)
        open = there & (left > 0)
    count, sound, going = 0, 1, 1
    while going != 0:
        cost = w * w / (2 * tl.where(there, d, 1.0))
        cost = tl.where(there & open & (cost == cost), cost, float("inf"))
        least = tl.min(cost)
        if least < float("inf"):
            q = tl.min(tl.where(cost == least, i, BP))
            _v, w, d, usable = _remove(q, w, d, rows, base, count, i, n, order, loss, start, B, ROWS)
            if usable:
                there = there & (i != q)
                count += 1
                if GROUPED:
                    left -= (group == tl.load(groups + start + q)).to(left.dtype)
                    open = left > 0
            else:
                sound, going = 0, 0
        else:
            going = 0
    _complete(order, loss, failed, b, start, count, there, open, sound, i, n)


@triton.jit
def _set_losses(parts, values, g, n, C: tl.constexpr, CP: tl.constexpr):
    """½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q of the sets g, +inf where that has a pivot that is not positive.

    parts: [n, C], the rows of the sets' blocks of F⁻¹; values: [n], the weights.
    """
    a = tl.arange(0, CP)
    member = g[:, None] * C + a[None, :]  # [sets, CP]
    inside = (a < C)[None, :] & (member < n)
    w = tl.load(values + member, mask=inside, other=0.0, volatile=True)
    both = inside[:, :, None] & inside[:, None, :]
    at = member[:, :, None] * C + a[None, None, :]
    S = tl.load(parts + at, mask=both, other=0.0, volatile=True)
    S = tl.where((a[:, None] == a[None, :])[None, :, :] & ~inside[:, :, None], 1.0, S)
    loss = tl.zeros(g.shape, tl.float64)
    sound = g >= 0
    for j in tl.static_range(C):
        row = tl.sum(tl.where((a == j)[None, :, None], S, 0.0), axis=1)  # [sets, CP]
        pivot = tl.sum(tl.where((a == j)[None, :], row, 0.0), axis=1)
        at_j = tl.sum(tl.where((a == j)[None, :], w, 0.0), axis=1)
        usable = (pivot > 0) & (pivot < float("inf"))
        sound = sound & usable
        pivot = tl.where(usable, pivot, 1.0)
        loss += at_j * at_j / (2 * pivot)
        scaled = row / pivot[:, None]
        w -= scaled * at_j[:, None]
        S -= row[:, :, None] * scaled[:, None, :]
    return tl.where(sound & (loss == loss), loss, float("inf"))


@triton.jit
def _sets(
    order,
    loss,
    failed,
    rows,
    weight,
    state,
    blocks,
    parts,
    values,
    B: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    SETS: tl.constexpr,
):
    """C consecutive weights at a time; `parts` [K, B, C] and `values` [K, B] hold what the losses of sets need."""
    b = tl.program_id(0).to(tl.int64)
    start, n = block_range(blocks, b)
    i = tl.arange(0, BP)
    rows += b * B * B
    parts += b * B * C
    values += b * B
    base = state + b * B * B
    w = tl.load(weight + start + i, mask=i < n, other=0.0).to(tl.float64)
    d = tl.load(base + i * (B + 1), mask=i < n, other=1.0).to(tl.float64)
    c = tl.arange(0, CP)
    mate = (i // C * C)[:, None] + c[None, :]  # [BP, CP]
    inside = (i < n)[:, None] & (c < C)[None, :] & (mate < n)
    part = tl.load(base + i[:, None] * B + mate, mask=inside, other=0.0).to(tl.float64)
    there = i < n
    g = tl.arange(0, SETS)
    left = g * C < n
    count, sound, going = 0, 1, 1
    while going != 0:
        tl.store(parts + i[:, None] * C + c[None, :], part, mask=inside)
        tl.store(values + i, w, mask=i < n)
        tl.debug_barrier()
        cost = _set_losses(parts, values, g, n, C, CP)
        tl.debug_barrier()  # all of it is read before any of it is written again
        cost = tl.where(left, cost, float("inf"))
        least = tl.min(cost)
        if least < float("inf"):
            chosen = tl.min(tl.where(cost == least, g, SETS))
            left = left & (g != chosen)
            for e in range(C):
                q = chosen * C + e
                if (q < n) & (sound != 0):
                    v, w, d, usable = _remove(q, w, d, rows, base, count, i, n, order, loss, start, B, ROWS)
                    if usable:
                        there = there & (i != q)
                        mates = tl.load(rows + count * B + mate, mask=inside, other=0.0, volatile=True)
                        part -= v[:, None] * mates
                        count += 1
                    else:
                        sound, going = 0, 0
        else:
            going = 0
    _complete(order, loss, failed, b, start, count, there, there, sound, i, n)


def _dense(grads: Tensor, factor: Tensor, blocks: Tensor, size: int, damping: float) -> Tensor:
    """F⁻¹ = (I − Gᵀ C⁻¹ G) / λ of some blocks, float64 [K, B, B]; I / λ outside of a short one."""
    index = blocks[:, :1] + torch.arange(size, device=grads.device)  # [K, B]
    inside = (index < blocks[:, 1:])[:, None]
    G = grads[:, index.clamp(max=grads.shape[1] - 1)].double().transpose(0, 1)  # [K, k, B]
    V = torch.linalg.solve_triangular(factor.mT, torch.where(inside, G, 0), upper=False)
    eye = torch.eye(size, dtype=torch.float64, device=grads.device).expand(len(blocks), size, size)
    return torch.baddbmm(eye, V.mT, V, beta=1 / damping, alpha=-1 / damping)


def obs_eliminate(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    groups: Tensor | None,
    keep: int,
    together: int,
    order: Tensor,
    loss: Tensor,
    failed: Tensor,
) -> None:
    """The op of this name."""
    # the dual form does not know its largest block
    B = state.shape[-1] if factor is None else int((blocks[:, 1] - blocks[:, 0]).max())
    room = None
    if groups is not None:
        # equal numbers lie side by side: how often each occurs, less what must stay
        _, place, count = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
        room = count[place] - keep
    marks = failed.view(torch.uint8)
    for piece in block_groups(blocks.shape[0], 8 * B * (B + together) * (1 if factor is None else 2)):
        part = blocks[piece]
        inverse = state[piece] if factor is None else _dense(state, factor[piece], part, B, damping)
        rows = torch.empty(len(part), B, B, dtype=torch.float64, device=weight.device)
        BP = power_of_two(B, 16)
        options = {**tuning.parameters("obs_eliminate", B, inverse), "B": B, "BP": BP}
        if together == 1:
            extra = (weight, weight) if room is None else (groups, room)
            options["GROUPED"] = groups is not None
            launch(
                _singles,
                (len(part),),
                order,
                loss,
                marks[piece],
                rows,
                weight,
                inverse,
                part,
                *extra,
                options=options,
            )
            continue
        parts = torch.empty(len(part), B, together, dtype=torch.float64, device=weight.device)
        values = torch.empty(len(part), B, dtype=torch.float64, device=weight.device)
        options |= {
            "C": together,
            "CP": power_of_two(together),
            "SETS": power_of_two(triton.cdiv(B, together)),
        }
        launch(
            _sets,
            (len(part),),
            order,
            loss,
            marks[piece],
            rows,
            weight,
            inverse,
            part,
            parts,
            values,
            options=options,
        )
