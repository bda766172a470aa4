"""From a mask to new weights: the corrected values of the kept weights, in the model's own precision.

None leaves the kept weights; "sum" adds the single-weight updates of all removed ones (WoodFisher, section 2.2.2);
"joint" is the minimiser of the quadratic model for the whole set.  Removed weights are exactly 0, kept ones never.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastfisher.errors import FisherError
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.fisher.inverse import FisherInverse
from fastfisher.fisher.kfac import KFACInverse


def updated(
    weight: Tensor,
    mask: Tensor,
    finv: FisherInverse | FishLegInverse | KFACInverse | None,
    update: str | None,
) -> Tensor:
    """New weights [d] after removing ~mask; weight [d] is not changed."""
    if update is None or finv is None:
        return torch.where(mask, weight, 0)
    return finv.prune_update(weight, mask, update=update)


def as_parameters(
    new: Tensor, mask: Tensor, layout: BlockLayout, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """new [d] as tensors in the parameters' shapes and dtypes, with exactly the zeros of the mask.

    A kept weight that rounds to 0 keeps its old value.   Raises FisherError where a value is not finite in the dtype.
    """
    keep = layout.unflatten(mask)
    tensors = {}
    for name, value in layout.unflatten(new).items():
        old = parameters[name].detach()
        cast = value.to(old.dtype)
        if not bool(torch.isfinite(cast).all()):
            worst = float(value.abs().max())
            raise FisherError(
                f"the update of {name!r} reaches {worst:.3g}, beyond {old.dtype}; use a larger damping"
            )
        tensors[name] = torch.where(keep[name] & (cast == 0), old, cast)
    return tensors


@contextmanager
def written(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], *, keep: bool
) -> Iterator[None]:
    """Hold `values` in the parameters inside; the old bits return after an exception, and always unless `keep`."""
    old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    done = False
    try:
        _write(parameters, values)
        yield
        done = True
    finally:
        if not (done and keep):
            _write(parameters, old)


def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
