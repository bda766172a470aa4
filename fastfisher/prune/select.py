"""Which weights become zero: saliency [d] -> mask [d], bool, True = keep.

Exactly round(sparsity · d) weights are removed, the least salient first, equal ones by index.  Weights that are already
zero go first, so that they stay zero and count.  A pattern and a cap for each layer take weights out of the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError
from fastfisher.prune.patterns import Pattern
from fastfisher.prune.ranks import Ranks

UNSTRUCTURED = Pattern("unstructured")


def num_zeros(sparsity: float, num_weights: int) -> int:
    """round(sparsity · d), the number of zeros after pruning."""
    return round(sparsity * num_weights)


def layer_zeros(sparsity: float, sizes: Sequence[int]) -> list[int]:
    """Zeros per layer that sum to round(sparsity · d): floor(sparsity · n) each, and one more for the layers with the
    largest remainders, earlier layers first among equals.
    """
    counts = [math.floor(sparsity * size) for size in sizes]
    remainders = [sparsity * size - count for size, count in zip(sizes, counts, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: num_zeros(sparsity, sum(sizes)) - sum(counts)]:
        counts[i] += 1
    return counts


def keep_mask(saliency: Tensor, dead: Tensor, zeros: int) -> Tensor:
    """The mask that removes the `zeros` least salient weights; all dead ones, where these are more.

    saliency [d] float, finite.   dead [d] bool: weights that are zero already.   Returns bool [d].
    Raises FisherError on a saliency that is not finite.
    """
    mask, invalid = torch.empty_like(dead), torch.empty(1, dtype=torch.int64, device=dead.device)
    ops.prune_mask(saliency, dead, zeros, mask=mask, invalid=invalid)
    bad = int(invalid)
    if bad >= 0:
        raise FisherError(f"the saliency of weight {bad} is {float(saliency[bad])}")
    return mask


def select(
    saliency: Tensor,
    dead: Tensor,
    sparsity: float,
    *,
    scope: str,
    ranges: Sequence[tuple[int, int]],
    pattern: Pattern = UNSTRUCTURED,
    most: Sequence[int] | None = None,
    ranks: Ranks | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """The mask for the whole network: one threshold (scope "global") or one per layer (scope "layer").

    ranges: start and stop of each layer in [d].   most: zeros that each layer may have; dead weights stay zero beyond.
    pattern: its groups are consecutive weights; with whole blocks, each weight has the saliency of its block.
    owner: int [d], with several ranks, each of which knows the saliencies of its own weights alone; see
    `Ranks.keep_mask`.  The mask is then right for the own weights, and what others own is kept.
    Raises FisherError on a saliency that is not finite.
    """
    size = pattern.together
    ranks = ranks or Ranks()
    if size > 1:
        whole = dead.view(-1, size)
        mask = select(
            saliency.view(-1, size).amax(dim=1),
            whole.all(dim=1),
            sparsity,
            scope=scope,
            ranges=[(start // size, stop // size) for start, stop in ranges],
            most=None if most is None else [count // size for count in most],
            ranks=ranks,
            owner=None if owner is None else owner.view(-1, size).amax(dim=1),
        )
        return (mask[:, None] & ~whole).view(-1)

    def keep(start: int, stop: int, zeros: int) -> Tensor:
        some = saliency[start:stop], dead[start:stop], zeros
        return keep_mask(*some) if owner is None else ranks.keep_mask(*some, owner[start:stop])

    counts = layer_zeros(sparsity, [stop - start for start, stop in ranges]) if scope == "layer" else []
    zeros = num_zeros(sparsity, len(saliency))
    if most is not None or pattern.keep:
        may_go = pattern.candidates(saliency, dead)
        if owner is not None:
            may_go &= (owner >= 0) & (owner % ranks.size == ranks.rank)
        saliency = torch.where(may_go | dead, saliency, torch.finfo(saliency.dtype).max)
        if most is not None:
            for (start, stop), count in zip(ranges, most, strict=True):
                may_go[start:stop] &= ~keep(start, stop, count)
            saliency = torch.where(may_go | dead, saliency, torch.finfo(saliency.dtype).max)
        # what must stay would be chosen last.  At the end of N:M all go that may: zeros that were there before can make
        # them more than asked for, or leave fewer
        done = pattern.sparsity is not None and sparsity >= pattern.sparsity
        free = ranks.count(*(int(may_go[start:stop].sum()) for start, stop in ranges))
        room = [n + int(dead[start:stop].sum()) for n, (start, stop) in zip(free, ranges, strict=True)]
        zeros = sum(room) if done else min(zeros, sum(room))
        counts = room if done else [min(pair) for pair in zip(counts, room, strict=scope == "layer")]
    if scope == "global":
        return keep(0, len(saliency), zeros)
    return torch.cat([keep(start, stop, count) for (start, stop), count in zip(ranges, counts, strict=True)])
