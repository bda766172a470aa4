"""FishLeg's learned inverse: Q ≈ F_γ⁻¹ = (F + γ I)⁻¹ in a fixed form, kept up to date by steps on fresh gradients.

Q is the minimiser of the auxiliary loss

    A(Q) = E_u[½ uᵀ Q F_γ Q u − uᵀ Q u] = ½ tr(Q F_γ Q) − tr Q,   u ~ N(0, I),

whose gradient needs products with F alone.  Among all matrices it is F_γ⁻¹, among block-diagonal ones the inverse of
the blocks, which is WoodFisher's.  Forms ("parameterizations"), all symmetric and positive definite by construction:

    diagonal, block, full   R Rᵀ in blocks of 1, of B, or one over everything; state d B
    kron                    D (T ⊗ S) D for each layer, T = R Rᵀ [o, o], S = L Lᵀ [i, i], D a diagonal [o, i]
    block-kron              the same in tiles of the layer's matrix, so that T and S stay small

Two ways to take a step: exact in u, where the expectation is taken analytically (`aux_step` and `fit`, the default:
nothing is drawn, and there is no learning rate), and with u drawn, as published (`SampledSteps`).
Vectors are those of the whole layout, [d] or [d, n], and every part of Q writes its own weights.
Source: FishLeg Surgeon (McGowan et al., 2024), on FishLeg (Garcia et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher.blocks import BlockLayout, padded
from fastfisher.fisher.inverse import UPDATES, FisherInverse, _absolute, check_weight, checked_vectors
from fastfisher.fisher.parts import Part, block_ids

AUX = ("exact", "sampled")
DRAWS = ("gaussian", "rademacher", "gradient")
PRODUCTS = ("rows", "antithetic")
PARAMETERIZATIONS = ("diagonal", "block", "kron", "block-kron", "full")
# Sides of the tiles of "block-kron": T and S of a tile take no more than a block of so many weights.
TILE = 256
# Of the gradients of a fit every eighth judges when to stop, and by how much the loss has to fall to go on.
HOLD_OUT = 8
FALLING = 1e-3
# A step after which it is this much higher, relatively, has gone astray: it is taken back, and halved down to this.
RISING = 1.0
SMALLEST_RATE = 1 / 64
# Of the joint update's constraint w_Q = 0, relative to w_Q, and how long it is pursued.
TOLERANCE = 1e-4
MAX_ITERATIONS = 1000
# Blocks whose products are looked at once, so that these stay in a cache.
CACHED_BYTES = 1 << 20


class BlockRoots:
    """Q = R Rᵀ in blocks.   root: R [K, B, B].   top: [K, B], where the largest eigenvector of RᵀF_γR was last.

    blocks: int64 [K, 2], ranges of the flat vector.   live: bool [d].
    """

    def __init__(self, layout: BlockLayout, root: Tensor, top: Tensor, blocks: Tensor, live: Tensor) -> None:
        self.layout, self.root, self.top, self.blocks, self.live = layout, root, top, blocks, live

    @classmethod
    def start(
        cls, layout: BlockLayout, blocks: Tensor, scale: float, live: Tensor, dtype: torch.dtype
    ) -> BlockRoots:
        """Q = scale I."""
        size = int((blocks[:, 1] - blocks[:, 0]).max())
        root = torch.zeros(len(blocks), size, size, dtype=dtype, device=live.device)
        root.diagonal(dim1=1, dim2=2).fill_(math.sqrt(scale))
        return cls(layout, root, torch.ones_like(root[:, 0]), blocks.to(live.device), live)

    def describe(self, b: int) -> str:
        """The weights of a block, by parameter."""
        return self.layout.describe_range(*self.blocks[b].tolist())

    def diag(self, out: Tensor) -> None:
        ops.factor_diagonal(self.root, self.blocks, out=out)

    def mul(self, x: Tensor, out: Tensor) -> None:
        ops.block_factor_matvec(self.root, self.blocks, x, out=out)

    def step(self, grads: Tensor, damping: float, rate: float) -> None:
        """One step on every block.   rate: the share of the step, 1 for all of it.

        Raises FisherError where a block diverged.
        """
        loss, largest = torch.empty(2, len(self.blocks), dtype=torch.float64, device=self.root.device)
        ops.fishleg_block_step_(
            self.root, self.top, grads, self.blocks, len(grads), damping, rate, loss, largest
        )
        if not bool(largest.isfinite().all()):
            b = int((~largest.isfinite()).nonzero()[0])
            raise FisherError(
                f"the learned inverse diverged in {self.describe(b)} at damping={damping:g}; use a larger damping"
            )

    def loss(self, grads: Tensor, damping: float) -> float:
        at_once = max(1, CACHED_BYTES // self.root[0].nbytes)
        total = 0.0
        for root in self.root.split(at_once):
            gram = root.mT @ root
            squares, trace = gram.square().sum(dim=(1, 2)), gram.diagonal(dim1=1, dim2=2).sum(dim=1)
            total += float((damping / 2 * squares.double() - trace.double()).sum())
        image = torch.zeros_like(
            grads.T, dtype=self.root.dtype, memory_format=torch.contiguous_format
        )  # [d, k]
        self.mul(grads.T.to(self.root.dtype).contiguous(), image)
        return total + float(image.square().sum(dtype=torch.float64)) / (2 * len(grads))

    def fisher_times(self, grads: Tensor, x: Tensor, out: Tensor) -> None:
        """F x within each block, without γ.   x: [d, n]."""
        ops.fisher_vector_product(grads, self.blocks, len(grads), x, out=out)

    def downdate(self, mask: Tensor) -> None:
        """Exact: what is left of Q is the inverse of what is left of F_γ, if Q was F_γ⁻¹."""
        ops.factor_downdate_(self.root, self.blocks, mask)

    def matrices(self, first: int, last: int) -> Tensor:
        """Q of some blocks [g, B, B], with 1 on the diagonal of weights that are gone."""
        root = self.root[first:last]
        q = root @ root.mT
        index = self.blocks[first:last, :1] + torch.arange(root.shape[1], device=root.device)
        gone = (index < self.blocks[first:last, 1:]) & ~self.live[index.clamp(max=len(self.live) - 1)]
        q.diagonal(dim1=1, dim2=2).add_(gone.to(q.dtype))
        return q

    def joint(self, weight: Tensor, mask: Tensor, out: Tensor) -> None:
        new = weight.contiguous().clone()
        for first in range(0, len(self.blocks), 4096):
            last = min(first + 4096, len(self.blocks))
            failed = torch.empty(last - first, dtype=torch.bool, device=weight.device)
            ops.obs_solve_(new, self.matrices(first, last), self.blocks[first:last], mask, failed)
            if bool(failed.any()):
                where = self.describe(first + int(failed.nonzero()[0]))
                raise FisherError(
                    f"the joint update of {where} breaks down in float64; use update='sum' or a larger damping"
                )
        for start, stop in self._ranges():
            out[start:stop] = new[start:stop]

    def _ranges(self) -> list[tuple[int, int]]:
        """The weights covered, as few ranges."""
        edges = self.blocks.cpu()
        cut = (edges[1:, 0] != edges[:-1, 1]).nonzero().squeeze(1) + 1
        firsts, lasts = [0, *cut.tolist()], [*cut.tolist(), len(edges)]
        return [(int(edges[a, 0]), int(edges[b - 1, 1])) for a, b in zip(firsts, lasts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"root": self.root, "top": self.top, "blocks": self.blocks}

    def variables(self) -> list[Tensor]:
        return [self.root]

    def slopes(self, r: Tensor, u: Tensor) -> list[Tensor]:
        """∂ rᵀQu / ∂R = r (Rᵀu)ᵀ + u (Rᵀr)ᵀ."""
        size = self.root.shape[1]
        r, u = (padded(x.to(self.root.dtype), self.blocks, size, 0)[:, :, None] for x in (r, u))  # [K, B, 1]
        return [r @ (u.mT @ self.root) + u @ (r.mT @ self.root)]


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

        def dot(x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(dim=(2, 3), keepdim=True)

        y, residual = torch.zeros_like(w), torch.where(gone, w, 0)
        goal = TOLERANCE**2 * dot(residual, residual / diagonal)
        ahead = residual / diagonal
        direction, square = ahead, dot(residual, ahead)
        for _ in range(MAX_ITERATIONS):
            if bool((square <= goal).all()):
                change = torch.where(self.inside & ~gone, -product(y), 0)
                out[self.start : self.stop] = self.flat(torch.where(gone, 0, w + change))[0].to(out.dtype)
                return
            image = torch.where(gone, product(direction), 0)
            step = square / dot(direction, image).clamp(min=1e-300)
            y = y + step * direction
            residual = residual - step * image
            ahead = residual / diagonal
            before, square = square, dot(residual, ahead)
            direction = ahead + (square / before.clamp(min=1e-300)) * direction
        raise FisherError(
            f"the joint update of {self.name!r} does not converge in {MAX_ITERATIONS} conjugate gradients; use "
            f"update='sum' or a larger damping"
        )

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


class FishLegInverse:
    """Q ≈ (F + γ I)⁻¹ of every weight, learned; behind the interface of `FisherInverse`.

    Made by `start` or `from_grads`, moved by `aux_step`, `fit` or `SampledSteps`.
    layout: the weights, and for "block" their blocks.   parameterization: of Q.   damping: γ, absolute.
    horizon: gradients that Q remembers; a batch of k replaces the share k / (seen + k) of what it knows, seen at most
    this many.   live: bool [d], False where a weight was removed; Q is 0 in its row and column.
    history: what every `fit` has logged.
    """

    form = "fishleg"
    mean: Tensor | None = None

    def __init__(
        self,
        layout: BlockLayout,
        forms: Sequence[BlockRoots | KroneckerTiles],
        *,
        parameterization: str,
        damping: float,
        horizon: float,
        live: Tensor,
        seen: float = 0.0,
    ) -> None:
        self.layout = layout
        self.forms = list(forms)
        self.parameterization = parameterization
        self.damping = damping
        self.horizon = horizon
        self.live = live
        self.seen = seen
        self.history: list[dict[str, float]] = []
        self._diagonal: Tensor | None = None

    @classmethod
    def start(
        cls,
        layout: BlockLayout,
        *,
        damping: float,
        parameterization: str = "block",
        scale: float | None = None,
        horizon: float = 2048,
        tile: int = TILE,
        conv_groups: Mapping[str, int] | None = None,
        live: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FishLegInverse:
        """Q = scale I, by default I / γ, where no direction is underestimated.

        layout: its blocks for "block"; "full" wants one block over everything, and the others do not look at them.
        tile: largest side of a tile of "block-kron".   conv_groups: name -> groups of a convolution with more than one.
        live: bool [d], by default all.   dtype: float32 or float64, of the state.
        Raises FastFisherError on anything else.
        """
        if parameterization not in PARAMETERIZATIONS:
            raise FastFisherError(
                f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}; got {parameterization!r}"
            )
        if not (damping > 0 and math.isfinite(damping)):
            raise FastFisherError(f"damping must be positive and finite, got {damping}")
        if parameterization == "full" and not layout.single_block:
            raise FastFisherError(f"parameterization='full' takes block_size=None, got {layout.block_size}")
        scale = 1 / damping if scale is None else scale
        if live is None:
            live = torch.ones(layout.num_weights, dtype=torch.bool, device=device)
        ranges = layout.parameter_ranges
        forms: list[BlockRoots | KroneckerTiles] = []
        single: list[tuple[int, int]] = []  # weights that stand alone
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            if parameterization == "diagonal" or ("kron" in parameterization and len(shape) < 2):
                single.append(ranges[name])
            elif "kron" in parameterization:
                tiles = KroneckerTiles.start_at(
                    name,
                    ranges[name],
                    shape,
                    layout.last.get(name, len(shape) - 1),
                    scale=scale,
                    dtype=dtype,
                    device=live.device,
                    groups=(conv_groups or {}).get(name, 1),
                    largest=tile if parameterization == "block-kron" else None,
                )
                forms.append(tiles)
        if parameterization in ("block", "full"):
            forms.append(BlockRoots.start(layout, layout.blocks, scale, live, dtype))
        elif single:
            places = torch.cat([torch.arange(a, b) for a, b in single])
            forms.append(
                BlockRoots.start(layout, torch.stack([places, places + 1], dim=1), scale, live, dtype)
            )
        made = cls(
            layout, forms, parameterization=parameterization, damping=damping, horizon=horizon, live=live
        )
        if not bool(live.all()):
            for form in forms:
                form.downdate(live)
        return made

    @classmethod
    def from_grads(
        cls,
        grads: Tensor,
        layout: BlockLayout,
        *,
        damping: float,
        damping_mode: str = "absolute",
        held_out: Tensor | None = None,
        max_steps: int = 30,
        **options: Any,
    ) -> FishLegInverse:
        """Start, and `fit` to gradients [k, d].   damping_mode: "relative" to the mean of their Fisher's diagonal.

        options: those of `start`.
        """
        if damping_mode == "relative":
            damping = _absolute(damping, float(grads.double().square().mean()))
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        made = cls.start(layout, damping=damping, dtype=dtype, device=grads.device, **options)
        made.fit(grads, held_out=held_out, max_steps=max_steps)
        return made

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.live.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return self.variables()[0].dtype

    @property
    def tiled(self) -> bool:
        """Whether Q consists of Kronecker products."""
        return "kron" in self.parameterization

    @property
    def state_bytes(self) -> int:
        """Bytes of everything that Q keeps between steps."""
        total = 0
        for form in self.forms:
            kept = [*form.variables()]
            kept += [form.second, *form.moments] if isinstance(form, KroneckerTiles) else [form.top]
            total += sum(x.numel() * x.element_size() for x in kept)
        return total

    def __repr__(self) -> str:
        return (
            f"FishLegInverse({self.layout.num_weights} weights, {self.parameterization}, "
            f"{self.state_bytes / 2**20:.1f} MiB, damping={self.damping:g})"
        )

    def variables(self) -> list[Tensor]:
        """What is learned: R of the blocks, or R, L and D of the tiles."""
        return [x for form in self.forms for x in form.variables()]

    def _inv_diag(self) -> Tensor:
        if self._diagonal is None:
            out = torch.zeros(self.layout.num_weights, dtype=self.dtype, device=self.device)
            for form in self.forms:
                form.diag(out)
            self._diagonal = out * self.live
        return self._diagonal

    def diag(self) -> Tensor:
        """The diagonal of Q, a new [d]; 0 where a weight was removed."""
        return self._inv_diag().clone()

    def mul(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """Q v, new.   v: [d], [d, n], or named tensors of the layout's shapes; the result has the same form."""
        if isinstance(v, Mapping):
            return self.layout.unflatten(self.mul(self.layout.flatten(v)))
        wide = checked_vectors(v, self.layout.num_weights)
        x = v.detach().to(self.dtype).reshape(self.layout.num_weights, -1) * self.live[:, None]  # [d, n]
        out = torch.zeros_like(x)
        for form in self.forms:
            form.mul(x, out)
        return (out * self.live[:, None]).to(wide).reshape(v.shape)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """Q @ v, the same as `mul`."""
        return self.mul(v)

    def columns(self, index: Tensor) -> Tensor:
        """Q[:, index], [d, n].   index: int64 [n]."""
        unit = torch.zeros(self.layout.num_weights, len(index), dtype=self.dtype, device=self.device)
        unit[index, torch.arange(len(index), device=index.device)] = 1
        product: Tensor = self.mul(unit)
        return product

    def saliency(self, weight: Tensor) -> Tensor:
        """ρ = w² / (2 diag Q), 0 for weights that are 0.   weight: [d] float32/float64; returns the like."""
        check_weight(weight, self.layout.num_weights)
        w, diagonal = weight.detach().double(), self._inv_diag().double()
        return torch.where(w == 0, 0, w.square() / (2 * diagonal)).to(weight.dtype)

    def blockwise(self) -> FisherInverse:
        """Q written out in blocks, for what goes through blocks; 1 on the diagonal of weights that were removed.

        Raises FastFisherError where the parameterization has no blocks.
        """
        roots = self.forms[0]
        if (
            not isinstance(roots, BlockRoots)
            or len(self.forms) > 1
            or len(roots.blocks) != self.layout.num_blocks
        ):
            raise FastFisherError(
                f"parameterization={self.parameterization!r} has no blocks of weights; use update='sum' or 'joint'"
            )
        state = roots.matrices(0, len(roots.blocks))
        part = Part(state, None, roots.blocks, block_ids(0, len(roots.blocks)))
        unknown = torch.full((len(roots.blocks),), torch.nan, dtype=torch.float64)
        return FisherInverse(
            self.layout,
            [part],
            form="primal",
            damping=self.damping,
            num_grads=1,
            condition=unknown,
            dtype=state.dtype,
        )

    def prune_update(self, weight: Tensor, mask: Tensor, update: str = "sum") -> Tensor:
        """The weights after removing those outside the mask and correcting the others; new, exactly 0 outside.

        weight: [d] float32/float64, left as it is.   mask: bool [d], True = keep.
        update: "sum" adds the corrections of all removed weights, −Q (1_P ∘ w / diag Q); "joint" solves for them
        together, −Q[:, P] (Q[P, P])⁻¹ w_P, block by block or tile by tile.
        Raises FastFisherError on wrong input, FisherError where a joint solve breaks down.
        """
        check_weight(weight, self.layout.num_weights)
        if update not in UPDATES:
            raise FastFisherError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        weight = weight.detach()
        if update == "sum":
            gone = ~mask & self.live
            ratio = torch.where(gone, weight.double() / self._inv_diag().double(), 0)
            return torch.where(mask, weight - self.mul(ratio).to(weight.dtype), 0)
        out = weight.clone(memory_format=torch.contiguous_format)
        for form in self.forms:
            form.joint(weight, mask, out)
        return torch.where(mask, out, 0)

    def downdate(self, mask: Tensor) -> None:
        """Take the weights outside the mask [d] out of Q: exactly for blocks, where Q becomes the inverse of what is
        left if it was that of all; tiles stay those of the whole layer, and `diag` and `mul` leave the weights out.
        """
        for form in self.forms:
            form.downdate(mask)
        self.live &= mask
        self._diagonal = None

    def aux_step(self, grads: Tensor) -> None:
        """One step, exact in u, on a mini-batch of gradients [k, d].

        Raises FisherError where a block diverges.
        """
        grads = self._masked(grads)
        share = len(grads) / (self.seen + len(grads))
        for form in self.forms:
            form.step(grads, self.damping, share)
        self._remember(len(grads))

    def _masked(self, grads: Tensor) -> Tensor:
        if grads.ndim != 2 or grads.shape[1] != self.layout.num_weights:
            raise FastFisherError(f"grads must be [k, {self.layout.num_weights}], got {list(grads.shape)}")
        grads = grads.detach().to(self.dtype)
        # tiles learn from removed weights too
        return grads if self.tiled or bool(self.live.all()) else grads * self.live

    def _remember(self, count: int) -> None:
        self.seen = min(self.seen + count, self.horizon)
        self._diagonal = None
        for form in self.forms:
            if isinstance(form, KroneckerTiles):
                form.keep()

    def moved(self) -> None:
        """To be called after `variables` were written to."""
        self._diagonal = None

    def loss(self, grads: Tensor) -> float:
        """The auxiliary loss A(Q) with the Fisher of gradients [k, d]; tiles measure theirs in units of their D."""
        return self._loss(self._masked(grads))

    def error(self, grads: Tensor, *, probes: int = 8, seed: int = 0) -> float:
        """‖Q F_γ − I‖_F / √d, estimated by random signs, F the Fisher of gradients [k, d] within blocks or tiles.

        Of gradients that Q was not fitted to it holds their own noise too.
        """
        grads = self._masked(grads)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (self.layout.num_weights, probes), generator=generator) * 2 - 1
        z = signs.to(self.device, self.dtype)
        if not self.tiled:
            z *= self.live[:, None]
        image, product = torch.zeros_like(z), torch.zeros_like(z)
        for form in self.forms:
            form.fisher_times(grads, z, image)
        image += self.damping * z
        for form in self.forms:
            form.mul(image, product)
        return float((product - z).norm() / z.norm())

    def fit(self, grads: Tensor, *, held_out: Tensor | None = None, max_steps: int = 30) -> int:
        """Steps on one batch [k, d] until the loss on the held-out gradients stops falling; returns how many.

        held_out: [h, d], by default every eighth of the batch, which is then left out of it.
        The last step is taken back where it raised that loss; one of blocks that doubled it is halved.
        Raises FisherError where halving does not help, and where a factor of a tile is not positive definite.
        """
        if held_out is None and len(grads) >= HOLD_OUT:
            last = torch.arange(len(grads)) % HOLD_OUT == HOLD_OUT - 1
            held_out, grads = grads[last], grads[~last]
        grads = self._masked(grads)
        judge = grads if held_out is None else self._masked(held_out)
        share = len(grads) / (self.seen + len(grads))
        best, done, rate = math.inf if self.tiled else self._loss(judge), 0, 1.0
        while done < max_steps:
            before = [x.clone() for x in self.variables()]
            for form in self.forms:
                # a closed form has no step to shorten
                form.step(grads, self.damping, share if isinstance(form, KroneckerTiles) else share * rate)
            done += 1
            loss = self._loss(judge)
            if loss < best - FALLING * abs(best) or (done == 1 and math.isfinite(loss) and self.tiled):
                best = loss  # the first step changes the D in whose units tiles tell their loss
                continue
            if not loss <= best:
                for x, old in zip(self.variables(), before, strict=True):
                    x.copy_(old)
            if self.tiled or loss <= best + RISING * abs(best):
                break
            rate /= 2
            if rate < SMALLEST_RATE:
                raise FisherError(
                    f"the learned inverse diverged after {done} steps, at a loss of {loss:g} after {best:g}, at "
                    f"damping={self.damping:g}; use a larger damping"
                )
        self._remember(len(grads))
        self.history.append(
            {
                "steps": done,
                "gradients": len(grads),
                "rate": share * rate,
                "loss": best,
                "error": self.error(judge),
            }
        )
        return done

    def _loss(self, grads: Tensor) -> float:
        return sum(form.loss(grads, self.damping) for form in self.forms)

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state_dict` needs: tensors, numbers and names that torch.load(weights_only=True) reads."""
        return {
            **self.layout.state_dict(),
            "parameterization": self.parameterization,
            "damping": self.damping,
            "horizon": self.horizon,
            "seen": self.seen,
            "live": self.live,
            "history": [dict(row) for row in self.history],
            "forms": [form.state_dict() for form in self.forms],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FishLegInverse:
        """The inverse that `state_dict` described; the tensors are copied."""
        layout = BlockLayout.from_state_dict(state)
        live = state["live"].clone()
        forms: list[BlockRoots | KroneckerTiles] = []
        for form in state["forms"]:
            if "root" in form:
                root, top, blocks = (form[key].clone() for key in ("root", "top", "blocks"))
                forms.append(BlockRoots(layout, root, top, blocks, live))
            else:
                forms.append(KroneckerTiles.from_state_dict(form))
        made = cls(
            layout, forms, live=live, seen=state["seen"],
            **{key: state[key] for key in ("parameterization", "damping", "horizon")},
        )  # fmt: skip
        made.history = [dict(row) for row in state["history"]]
        return made
