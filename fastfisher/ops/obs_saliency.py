"""The Optimal Brain Surgeon saliency of every weight."""

from __future__ import annotations

from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import reference
from fastfisher.ops._registry import define


def _check(weight: Tensor, inv_diag: Tensor, out: Tensor) -> None:
    _checks.same_device("weight", weight, inv_diag=inv_diag, out=out)
    num_weights = _checks.vector("weight", weight)
    for name, tensor in (("inv_diag", inv_diag), ("out", out)):
        _checks.exact_shape(name, tensor, (num_weights,))
        _checks.dtype(name, tensor, _checks.STATE_DTYPES)
        _checks.contiguous(name, tensor)


_op = define("obs_saliency(Tensor weight, Tensor inv_diag, Tensor(a!) out) -> ()", _check)


@reference("obs_saliency")
def _reference(weight: Tensor, inv_diag: Tensor, out: Tensor) -> None:
    out.copy_(weight.square() / (2 * inv_diag))


def obs_saliency(weight: Tensor, inv_diag: Tensor, *, out: Tensor) -> None:
    """Write ρ = w² / (2 diag F⁻¹), the loss that removing each weight alone costs in the quadratic model.

    weight, inv_diag: [d] float32/float64, contiguous.   out: [d] float32/float64, contiguous, overwritten.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 2.13.
    """
    _op(weight, inv_diag, out)
