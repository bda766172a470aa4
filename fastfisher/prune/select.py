"""Which weights become zero: saliency [d] -> mask [d], bool, True = keep.

Exactly round(sparsity · d) weights are removed, the least salient first, equal ones by index.  Weights that are already
zero go first, so that they stay zero and count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError


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
    saliency: Tensor, dead: Tensor, sparsity: float, *, scope: str, ranges: Sequence[tuple[int, int]]
) -> Tensor:
    """The mask for the whole network: one threshold (scope "global") or one per layer (scope "layer").

    ranges: start and stop of each layer in [d].   Raises FisherError on a saliency that is not finite.
    """
    if scope == "global":
        return keep_mask(saliency, dead, num_zeros(sparsity, len(saliency)))
    counts = layer_zeros(sparsity, [stop - start for start, stop in ranges])
    return torch.cat(
        [
            keep_mask(saliency[start:stop], dead[start:stop], count)
            for (start, stop), count in zip(ranges, counts, strict=True)
        ]
    )
