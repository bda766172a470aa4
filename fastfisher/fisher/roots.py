"""The blocks of FishLeg's inverse: Q = R Rᵀ, learned by stochastic Newton-Schulz steps that are exact in u.

Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FisherError
from fastfisher.fisher.blocks import BlockLayout, padded

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

    @property
    def single(self) -> bool:
        """Whether every weight stands alone, and all there is to do is elementwise."""
        return self.root.shape[1] == 1

    def _second(self, grads: Tensor) -> Tensor:
        """diag F of single weights [K]."""
        return grads[:, self.blocks[:, 0]].to(self.root.dtype).square().mean(dim=0)

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
        if self.single:
            root = self.root.view(-1)
            largest = root.square() * (self._second(grads) + damping)  # M
            change = rate / 2 / (1.1 * largest).clamp(min=1) * (root * largest - root)
            root -= torch.where(largest.isfinite(), change, 0)
        else:
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
        if self.single:
            squares = self.root.view(-1).square()  # Q
            return float((squares * (squares * (self._second(grads) + damping) / 2 - 1)).double().sum())
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
