"""The product of the inverse Fisher with vectors, from either state."""

from __future__ import annotations

from torch import Tensor

from fastfisher.ops import _checks
from fastfisher.ops._blockwise import fisher_inverse_times, ranges, reference
from fastfisher.ops._registry import define


def _check(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, x: Tensor, out: Tensor
) -> None:
    _checks.same_device("state", state, factor=factor, blocks=blocks, x=x, out=out)
    _checks.columns(x, out)
    _checks.inverse(state, factor, blocks, damping, x.shape[0])


_op = define(
    "block_matvec(Tensor state, Tensor? factor, Tensor blocks, float damping, Tensor x, "
    "Tensor(a!) out) -> ()",
    _check,
)


@reference("block_matvec")
def _reference(
    state: Tensor, factor: Tensor | None, blocks: Tensor, damping: float, x: Tensor, out: Tensor
) -> None:
    for b, start, stop in ranges(blocks):
        fisher_inverse_times(state, factor, b, start, stop, damping, x[start:stop], out[start:stop])


def block_matvec(
    state: Tensor,
    blocks: Tensor,
    x: Tensor,
    *,
    out: Tensor,
    factor: Tensor | None = None,
    damping: float = 0.0,
) -> None:
    """Write F⁻¹ x of every block: the product itself, or (x − Gᵀ C⁻¹ G x) / λ with C = Uᵀ U.

    state: primal [K, B, B] float32/float64, or with `factor` the gradients [k, d] of any float dtype.
    factor: None, or float64 [K, k, k] from dual_factor_.   damping: λ, read in the dual form only.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    x: [d, n] float32/float64, contiguous.   out: like x, no memory shared with it, overwritten inside the
    blocks, untouched outside.  Sums run in the wider dtype of state and x, in float64 in the dual form.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 3.1.
    """
    _op(state, factor, blocks, damping, x, out)
