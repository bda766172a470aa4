"""The product of a scaled Kronecker inverse with matrices, tile by tile."""

from __future__ import annotations

from torch import Tensor

from fastfisher.errors import FastFisherError
from fastfisher.ops import _checks
from fastfisher.ops._blockwise import reference
from fastfisher.ops._registry import define


def _check(left: Tensor, right: Tensor, scale: Tensor, x: Tensor, out: Tensor) -> None:
    _checks.same_device("left", left, right=right, scale=scale, x=x, out=out)
    _checks.dims("scale", scale, "[N, o, i]", 3)
    N, o, i = scale.shape
    _checks.dims("x", x, "[n, N, o, i]", 4)
    if tuple(x.shape[1:]) != (N, o, i):
        raise FastFisherError(f"x must be [n, {N}, {o}, {i}], got {_checks.shape_text(x)}")
    _checks.exact_shape("left", left, (N, o, o))
    _checks.exact_shape("right", right, (N, i, i))
    _checks.exact_shape("out", out, tuple(x.shape))
    _checks.dtype("x", x, _checks.STATE_DTYPES)
    for name, tensor in (("left", left), ("right", right), ("scale", scale), ("x", x), ("out", out)):
        _checks.dtype(name, tensor, (x.dtype,))
        _checks.contiguous(name, tensor)


_op = define(
    "kron_matvec(Tensor left, Tensor right, Tensor scale, Tensor x, Tensor(a!) out) -> ()",
    _check,
)


@reference("kron_matvec")
def _reference(left: Tensor, right: Tensor, scale: Tensor, x: Tensor, out: Tensor) -> None:
    out.copy_(scale * (left @ (scale * x) @ right))


def kron_matvec(left: Tensor, right: Tensor, scale: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Write D∘(T (D∘x) S) for every tile: the product of D (T ⊗ S) D with the matrices x, read by rows.

    left: T, [N, o, o] float32/float64, symmetric.   right: S, [N, i, i], symmetric.   scale: D, [N, o, i].
    x: [n, N, o, i].   out: like x, no memory shared with it, overwritten.   All of one dtype, in which sums run, and
    contiguous.   o i (o + i) multiply-adds a tile, whichever product comes first.
    Raises FastFisherError on wrong input.   Source: FishLeg (Garcia et al., 2023), its Kronecker-factored inverse, with
    the diagonal scale of FishLeg Surgeon (McGowan et al., 2024).
    """
    _op(left, right, scale, x, out)
