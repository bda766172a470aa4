"""How much the loss rises when a weight is removed: weight [d] (and an inverse Fisher) -> saliency [d].

All return float32 or float64, are non-negative, and rank weights across layers.  With a pattern of whole blocks each
weight has the saliency of its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.fisher.blocks import padded
from fastfisher.fisher.inverse import FisherInverse
from fastfisher.prune.patterns import Pattern

# Above every loss: what must stay.  Not the largest number, because `in_order` counts upwards from it.
_STAYS = 1e300
# Weights whose ranks are looked at together.
_AT_ONCE = 1 << 20


def magnitude(weight: Tensor) -> Tensor:
    """½ w_q² in float64, where no square of a float32 number underflows.   Source: WoodFisher, eq. 2.21."""
    return weight.double().square() / 2


def obs(weight: Tensor, finv: FisherInverse, pattern: Pattern) -> Tensor:
    """w_q² / (2 [F⁻¹]_qq), the rise of the quadratic model after the best update; for whole blocks Q
    ½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q.

    With blocks of one weight it is the diagonal Fisher, ½ w_q² (F_qq + λ) (eq. 2.20); with w − u in place of w, u the
    `newton_step`, that of WoodTaylor (eq. 5.8).   Source: WoodFisher, eq. 2.13.
    """
    if pattern.whole:
        return finv.group_saliency(weight, pattern.size).repeat_interleave(pattern.size)
    return finv.saliency(weight)


def greedy(weight: Tensor, finv: FisherInverse, pattern: Pattern) -> Tensor:
    """What each removal costs when the weights of a block go one by one, and never less than those before it; float64.

    So every threshold cuts the blocks along the order of removal.   Source: see ops.obs_eliminate.
    """
    order, loss = finv.eliminate(weight, keep=pattern.keep, together=pattern.together)
    loss = loss.nan_to_num(_STAYS)
    if pattern.whole:
        loss = loss.view(-1, pattern.size).sum(dim=1).repeat_interleave(pattern.size)
    saliency = torch.empty_like(loss)
    saliency[order] = in_order(loss, finv.layout.blocks.to(loss.device), finv.block_size)
    return saliency


def no_worse(mask: Tensor, weight: Tensor, finv: FisherInverse) -> Tensor:
    """In each block the cheaper of two sets of equally many weights: those outside the mask, and the least salient.

    Taking the cheapest weight each time nearly always ends below what was cheapest at the outset, but is no guarantee.
    """
    scores, other = finv.saliency(weight), torch.empty_like(mask)
    for blocks in finv.layout.blocks.split(max(1, _AT_ONCE // finv.block_size)):
        start, stop = int(blocks[0, 0]), int(blocks[-1, 1])
        places = (blocks - start).to(mask.device)
        inside = padded(torch.ones_like(mask[start:stop]), places, finv.block_size, False)  # [K, B]
        removed = inside & ~padded(mask[start:stop], places, finv.block_size, True)
        rank = padded(scores[start:stop], places, finv.block_size, torch.inf).argsort(dim=1, stable=True)
        other[start:stop] = (rank.argsort(dim=1) >= removed.sum(dim=1, keepdim=True))[inside]
    cheaper = finv.removal_loss(weight, other) < finv.removal_loss(weight, mask)  # [K]
    lengths = (finv.layout.blocks[:, 1] - finv.layout.blocks[:, 0]).to(mask.device)
    return torch.where(cheaper.to(mask.device).repeat_interleave(lengths), other, mask)


def in_order(loss: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """The running maximum inside each block, and the next larger number where it does not grow: strictly increasing.

    loss: [d] float64, not negative.   blocks: int64 [K, 2], which cover all d.
    """
    # as integers such numbers have the same order, and one more is the next number
    step, found = torch.arange(block_size, device=loss.device), torch.empty_like(loss)
    for some in blocks.split(max(1, _AT_ONCE // block_size)):
        start, stop = int(some[0, 0]), int(some[-1, 1])
        rows = padded(loss[start:stop].view(torch.int64), some - start, block_size, 0) - step  # [K, B]
        rows = rows.cummax(dim=1).values + step
        found[start:stop] = rows[step < (some[:, 1] - some[:, 0])[:, None]].view(torch.float64)
    return found


def newton_step(finv: FisherInverse) -> Tensor:
    """u = F⁻¹ ∇L, float64 [d]; w − u is the minimiser of the quadratic model with its gradient term.

    What the updates add to w − u is eq. 5.6.   finv holds ∇L as its `mean`.   Source: WoodFisher, section 5.
    """
    if finv.mean is None:
        raise ValueError("the inverse holds no mean gradient; accumulate with mean=True")
    return finv.mul(finv.mean)
