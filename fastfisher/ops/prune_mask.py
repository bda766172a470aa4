"""Which weights to remove: the least salient ones, exactly as many as asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError
from fastfisher.ops import _checks
from fastfisher.ops._blockwise import reference
from fastfisher.ops._registry import define


def _check(saliency: Tensor, dead: Tensor, num_zeros: int, mask: Tensor, invalid: Tensor) -> None:
    _checks.same_device("saliency", saliency, dead=dead, mask=mask, invalid=invalid)
    num_weights = _checks.vector("saliency", saliency)
    for name, tensor in (("dead", dead), ("mask", mask)):
        _checks.exact_shape(name, tensor, (num_weights,))
        _checks.dtype(name, tensor, (torch.bool,))
        _checks.contiguous(name, tensor)
    _checks.exact_shape("invalid", invalid, (1,))
    _checks.dtype("invalid", invalid, (torch.int64,))
    if not 0 <= num_zeros <= num_weights:
        raise FastFisherError(f"num_zeros must be 0 to {num_weights}, got {num_zeros}")


_op = define(
    "prune_mask(Tensor saliency, Tensor dead, int num_zeros, Tensor(a!) mask, Tensor(b!) invalid) -> ()",
    _check,
)


@reference("prune_mask")
def _reference(saliency: Tensor, dead: Tensor, num_zeros: int, mask: Tensor, invalid: Tensor) -> None:
    torch.logical_not(dead, out=mask)
    bad = (~saliency.isfinite() & mask).nonzero()
    invalid.fill_(int(bad[0]) if len(bad) else -1)
    more = num_zeros - int(dead.sum())
    if more <= 0 or len(bad):
        return
    threshold = torch.kthvalue(saliency[mask], more).values
    below = (saliency < threshold) & mask
    ties = ((saliency == threshold) & mask).nonzero().squeeze(1)[: more - int(below.sum())]
    mask &= ~below
    mask[ties] = False


def prune_mask(saliency: Tensor, dead: Tensor, num_zeros: int, *, mask: Tensor, invalid: Tensor) -> None:
    """Keep all weights but the dead ones and the least salient others, num_zeros removed in all; ties by index.

    saliency: [d] float32/float64, contiguous; what it says of a dead weight is not read.
    dead: bool [d], weights that are removed already.   num_zeros: 0 to d; where more are dead, all of them go.
    mask: bool [d], overwritten, True = keep.
    invalid: int64 [1], overwritten: -1, or the index of the first saliency that is not finite; then only the dead
    weights are removed.
    The threshold is found by selection in O(d), without sorting.
    Raises FastFisherError on wrong input.   Source: WoodFisher, section 2.2.1.
    """
    _op(saliency, dead, num_zeros, mask, invalid)
