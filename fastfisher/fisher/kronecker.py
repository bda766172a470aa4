"""The Kronecker tiles of FishLeg's inverse: Q = D (T ⊗ S) D for tiles of a layer's matrix, or for all of it.

Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError
from fastfisher.fisher.conjugate import conjugate_gradients

# Of the joint update's constraint w_Q = 0, relative to w_Q, and how long it is pursued.
TOLERANCE = 1e-4
MAX_ITERATIONS = 3000


class KroneckerTiles:
    """Q = D (T ⊗ S) D, T = R Rᵀ, S = L Lᵀ, for the tiles of one tensor seen as a matrix [o, i].

    name: of the tensor.   start, stop: its range of the flat vector.   shape: of the tensor.   last: which of its
    dimensions runs fastest in that range.
    rows, columns: of the matrix; a convolution's columns are (channel, kernel), and its groups have tiles of their own.
    left: R [N, a, a].   right: L [N, b, b].   scale: D [N, a, b], 0 where a tile overhangs (`inside` is False).
    second: diag F as far as it is known, [N, a, b].   moments: those behind T and S, [N, a, a] and [N, b, b].

    A step exact in u has u from N(0, D⁻²), D = diag(F_γ)^-½, the gradients' own scale.  Then T ⊗ S is fitted to the
    inverse of D F_γ D, whose diagonal is 1, and each factor has a closed form for the other:

        T = tr(S) (E[X S² Xᵀ] + γ diag(Σ_i D²_oi (S²)_ii))⁻¹,   X = D∘g,   and S alike.

    Q stays that of the whole layer when weights are removed, since what is left of it would be no Kronecker product:
    gradients of removed weights are learned from too, and the joint update solves for all that were ever removed.
    """

    _TENSORS = ("left", "right", "scale", "second", "inside")

    def __init__(
        self,
        name: str,
        span: tuple[int, int],
        shape: Sequence[int],
        last: int,
        tile: tuple[int, int],
        *,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        second: Tensor,
        moments: tuple[Tensor, Tensor],
        inside: Tensor,
    ) -> None:
        self.name = name
        self.start, self.stop = span
        self.shape, self.last, self.tile = tuple(shape), last, tile
        self.left, self.right, self.scale = left, right, scale
        self.second, self.moments, self.inside = second, moments, inside

    @classmethod
    def start_at(
        cls,
        name: str,
        span: tuple[int, int],
        shape: Sequence[int],
        last: int,
        *,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        groups: int = 1,
        largest: int | None = None,
    ) -> KroneckerTiles:
        """Q = scale I.   largest: side of a tile, None for whole layers.   groups: of a convolution."""
        rows, columns = shape[0], math.prod(shape[1:])
        a, b = (tile_side(n, largest) for n in (rows // groups, columns))
        if groups > 1 and (rows // groups) % a:
            a = next(n for n in range(a, 0, -1) if (rows // groups) % n == 0)  # no tile may cross a group
        count = -(-rows // a) * -(-columns // b)

        def identity(n: int) -> Tensor:
            return torch.eye(n, dtype=dtype, device=device).repeat(count, 1, 1)

        zeros = torch.zeros(count, a, b, dtype=dtype, device=device)
        made = cls(
            name, span, shape, last, (a, b),
            left=identity(a), right=identity(b), scale=zeros, second=zeros.clone(),
            moments=(0 * identity(a), 0 * identity(b)), inside=zeros.bool(),
        )  # fmt: skip
        ones = torch.ones(span[1], dtype=dtype, device=device)
        made.scale = made.tiles(ones) * math.sqrt(scale)
        made.inside = made.scale > 0
        return made

    def tiles(self, x: Tensor) -> Tensor:
        """[*lead, d] -> [*lead, N, a, b], new, zeros where a tile overhangs."""
        x = x[..., self.start : self.stop]
        lead = x.shape[:-1]
        moved = [*self.shape[: self.last], *self.shape[self.last + 1 :], self.shape[self.last]]
        x = x.reshape(*lead, *moved).movedim(-1, len(lead) + self.last).reshape(*lead, self.shape[0], -1)
        (a, b), (rows, columns) = self.tile, x.shape[-2:]
        x = torch.nn.functional.pad(x, (0, -columns % b, 0, -rows % a))
        x = x.reshape(*lead, x.shape[-2] // a, a, x.shape[-1] // b, b)
        return x.transpose(-3, -2).reshape(*lead, -1, a, b).contiguous()

    def flat(self, x: Tensor) -> Tensor:
        """[*lead, N, a, b] -> [*lead, stop - start], the inverse of `tiles`."""
        (a, b), lead = self.tile, x.shape[:-3]
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        x = x.reshape(*lead, -(-rows // a), -1, a, b).transpose(-3, -2)
        x = x.reshape(*lead, x.shape[-4] * a, -1)[..., :rows, :columns].reshape(*lead, *self.shape)
        return x.movedim(len(lead) + self.last, -1).reshape(*lead, -1)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """T [N, a, a] and S [N, b, b]."""
        return self.left @ self.left.mT, self.right @ self.right.mT

    def times(self, x: Tensor) -> Tensor:
        """Q x.   x: [n, N, a, b]."""
        T, S = self.factors
        out = torch.empty_like(x)
        ops.kron_matvec(T, S, self.scale, x.contiguous(), out=out)
        return out

    def diag(self, out: Tensor) -> None:
        T, S = (factor.square().sum(dim=2) for factor in (self.left, self.right))
        out[self.start : self.stop] = self.flat(self.scale.square() * T[:, :, None] * S[:, None, :])

    def mul(self, x: Tensor, out: Tensor) -> None:
        product = self.flat(self.times(self.tiles(x.T.to(self.scale.dtype))))  # [n, stop - start]
        out[self.start : self.stop] = product.T

    def _moment(self, x: Tensor, other: Tensor, damping: float, *, left: bool) -> Tensor:
        """The matrix whose inverse is T (left) or S up to a factor.   x: [k, N, a, b], D∘g.   other: S or T."""
        scale = self.scale.square()
        if not left:
            x, scale = x.mT, scale.mT
        k, n, a, b = x.shape
        rows = (x @ other).permute(1, 2, 0, 3).reshape(n, a, k * b)
        moment = rows @ rows.mT / k  # [N, a, a]
        spread = other.square().sum(dim=2, keepdim=True)  # diag S², [N, b, 1]
        moment.diagonal(dim1=1, dim2=2).add_(damping * (scale @ spread).squeeze(2))
        return moment

    def _solve(self, moment: Tensor, damping: float) -> Tensor:
        """R with R Rᵀ = moment⁻¹; rows without a weight count as 1."""
        moment = moment.double()
        diagonal = moment.diagonal(dim1=1, dim2=2)
        diagonal += (diagonal == 0).double()
        L, info = torch.linalg.cholesky_ex(moment)
        if bool((info > 0).any()):
            raise FisherError(
                f"the Kronecker factors of {self.name!r} are not positive definite at damping={damping:g}; use a "
                f"larger damping"
            )
        identity = torch.eye(L.shape[1], dtype=L.dtype, device=L.device).expand_as(L)
        return torch.linalg.solve_triangular(L, identity, upper=False).mT

    def step(self, grads: Tensor, damping: float, rate: float) -> None:
        """T and S once each in closed form.   rate: the share of these gradients in the moments."""
        g = self.tiles(grads.to(self.scale.dtype))  # [k, N, a, b]
        second = torch.lerp(self.second, g.square().mean(dim=0), rate)
        self.scale = self.inside / (second + damping).sqrt()
        x = self.scale * g
        T, _ = _unit(self.factors[0])
        right = torch.lerp(self.moments[1], self._moment(x, T, damping, left=False), rate)
        root = self._solve(right, damping)
        S, mean = _unit(root @ root.mT)
        self.right = (root / mean.sqrt()).to(g.dtype)
        left = torch.lerp(self.moments[0], self._moment(x, S.to(g.dtype), damping, left=True), rate)
        self.left = (self._solve(left, damping) * math.sqrt(S.shape[1])).to(g.dtype)  # tr S is its side
        self._next = second, (left, right)

    def keep(self) -> None:
        """Take the moments of the last step as what is known."""
        self.second, self.moments = self._next

    def loss(self, grads: Tensor, damping: float) -> float:
        """The auxiliary loss with u from N(0, D⁻²)."""
        T, S = self.factors
        image = T @ (self.scale * self.tiles(grads.to(self.scale.dtype))) @ S
        spread = (
            (T * T).sum(dim=1, keepdim=True) @ self.scale.square() @ (S * S).sum(dim=2, keepdim=True)
        )  # [N, 1, 1]
        trace = T.diagonal(dim1=1, dim2=2).sum(dim=1) * S.diagonal(dim1=1, dim2=2).sum(dim=1)
        total = image.square().sum(dtype=torch.float64) / len(grads) + damping * spread.sum(
            dtype=torch.float64
        )
        return float(total) / 2 - float(trace.sum(dtype=torch.float64))

    def fisher_times(self, grads: Tensor, x: Tensor, out: Tensor) -> None:
        """F x within each tile, without γ.   x: [d, n]."""
        g, x = self.tiles(grads).flatten(2), self.tiles(x.T).flatten(2)  # [k, N, a b], [n, N, a b]
        product = torch.einsum("kts,knt->nts", g, torch.einsum("kts,nts->knt", g, x)) / len(g)
        out[self.start : self.stop] = self.flat(product.view(*product.shape[:2], *self.tile)).T

    def downdate(self, mask: Tensor) -> None:
        """Nothing to do: Q is that of the whole layer."""

    def joint(self, weight: Tensor, mask: Tensor, out: Tensor) -> None:
        """w − Q[:, P] (Q[P, P])⁻¹ w_P, P all weights outside the mask, by conjugate gradients on every tile, with Q's
        diagonal as the preconditioner.
        """
        w = self.tiles(weight.double())[None]
        gone = self.inside & (self.tiles(mask.double()) == 0)
        T, S = (root.double() @ root.double().mT for root in (self.left, self.right))
        scale = self.scale.double()
        diagonal = (
            scale.square() * T.diagonal(dim1=1, dim2=2)[:, :, None] * S.diagonal(dim1=1, dim2=2)[:, None]
        )
        diagonal = torch.where(self.inside, diagonal, 1)[None]

        def product(x: Tensor) -> Tensor:
            return scale * (T @ (scale * x) @ S)

        y, residual = conjugate_gradients(
            lambda x: torch.where(gone, product(x), 0),
            torch.where(gone, w, 0),
            dims=(2, 3),
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
            diagonal=diagonal,
        )
        if not residual <= TOLERANCE:
            raise FisherError(
                f"the joint update of {self.name!r} does not converge in {MAX_ITERATIONS} conjugate gradients "
                f"(relative residual {residual:.2g}); use update='sum' or a larger damping"
            )
        change = torch.where(self.inside & ~gone, -product(y), 0)
        out[self.start : self.stop] = self.flat(torch.where(gone, 0, w + change))[0].to(out.dtype)

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        return tensors | {
            "name": self.name,
            "span": [self.start, self.stop],
            "shape": list(self.shape),
            "last": self.last,
            "tile": list(self.tile),
            "moments": list(self.moments),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KroneckerTiles:
        """The tiles that `state_dict` described; the tensors are copied."""
        (start, stop), (a, b) = state["span"], state["tile"]
        first, second = (moment.clone() for moment in state["moments"])
        tensors = {name: state[name].clone() for name in cls._TENSORS}
        return cls(
            state["name"],
            (start, stop),
            state["shape"],
            state["last"],
            (a, b),
            moments=(first, second),
            **tensors,
        )

    def variables(self) -> list[Tensor]:
        return [self.left, self.right, self.scale]

    def slopes(self, r: Tensor, u: Tensor) -> list[Tensor]:
        """The gradients of rᵀQu = <D∘r, T (D∘u) S> in R, L and D."""
        T, S = self.factors
        r, u = (self.tiles(x.to(self.scale.dtype)) for x in (r, u))
        x, y = self.scale * r, self.scale * u
        by_left, by_right = x @ S @ y.mT, x.mT @ T @ y
        by_scale = r * (T @ y @ S) + u * (T @ x @ S)
        return [
            (by_left + by_left.mT) @ self.left,
            (by_right + by_right.mT) @ self.right,
            by_scale * self.inside,
        ]


def tile_side(length: int, largest: int | None) -> int:
    """The side of tiles that cut a length as evenly as they get, into as few as `largest` allows."""
    return -(-length // -(-length // min(length, largest or length)))


def _unit(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [N, n, n] with a mean diagonal of 1, and what they were divided by [N, 1, 1]."""
    mean = factors.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    return factors / mean, mean
