"""One table of problems for every op and every backend, the gradients in it, and a float64 inverse to compare with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfisher.fisher.blocks import BlockLayout

KINDS = (
    "independent",
    "correlated",
    "aligned",
    "decaying",
    "deficient",
    "zero",
    "duplicate",
    "scaled",
    "sparse",
)


def gradients(kind: str, m: int, d: int, *, rho: float, damping: float, seed: int = 0) -> Tensor:
    """Gradients [m, d] in float32 whose mean square is rho times the damping."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    G = normal(m, d)
    if kind == "correlated":  # three strong common factors and a little noise
        G = normal(m, 3) @ normal(3, d) + 0.01 * G
    elif kind == "aligned":  # all gradients nearly the same, all weights alike
        G = 1 + 1e-3 * G
    elif kind == "decaying":  # a spectrum over six decades
        G = G * torch.logspace(0, -6, d, dtype=torch.float64) @ torch.linalg.qr(normal(d, d)).Q
    elif kind == "deficient":
        rank = max(1, min(m, d) // 4)
        G = normal(m, rank) @ normal(rank, d)
    elif kind == "zero":  # every second gradient, and every third weight
        G[::2], G[:, 1::3] = 0, 0
        if m == 1:
            return G.float()
    elif kind == "duplicate":
        G[1::2] = G[::2][: m // 2]
    elif kind == "scaled":  # weights whose gradients differ by six decades
        G = G * 10 ** (6 * torch.rand(d, dtype=torch.float64, generator=generator) - 3)
    elif kind == "sparse":
        G = G * (torch.rand(m, d, dtype=torch.float64, generator=generator) < 0.05)
    mean_square = float(G.square().mean())
    return (G * math.sqrt(rho * damping / mean_square) if mean_square > 0 else G).float()


def dense_inverse(grads: Tensor, num_grads: int, damping: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The diagonal [d] of F⁻¹ and the product v -> F⁻¹v of one block in float64, from the singular vectors of G.

    F⁻¹ = Σ_j w_j w_jᵀ / (λ + s_j² / m) is a sum of positive terms: nothing cancels, however large s² / (m λ) is.
    """
    _, s, Wt = torch.linalg.svd(grads.double(), full_matrices=True)  # [d, d]
    eigenvalues = torch.zeros(grads.shape[1], dtype=torch.float64)
    eigenvalues[: len(s)] = s.square() / num_grads
    inverse = 1 / (damping + eigenvalues)  # [d]
    return Wt.T.square() @ inverse, lambda v: Wt.T @ (inverse[:, None] * (Wt @ v.double()))


@dataclass(frozen=True)
class Case:
    """One problem: k gradients of the given kind over tensors of the given sizes, in blocks.

    num_rows: k.   num_grads: m.   rho: mean square of the gradients over the damping.   dtype: of the gradients.
    stride: elements from one gradient to the next beyond d (a misaligned view when odd); -1 repeats one row.
    gap: leaves out the second block, so that some weights belong to none.
    """

    name: str
    sizes: tuple[int, ...]
    block_size: int | None
    num_rows: int = 5
    num_grads: int = 8
    kind: str = "independent"
    rho: float = 10.0
    damping: float = 0.01
    dtype: torch.dtype = torch.float32
    stride: int = 0
    gap: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def seed(self) -> int:
        """A seed of its own for every case."""
        return zlib.crc32(self.name.encode())

    @property
    def num_weights(self) -> int:
        """d."""
        return sum(self.sizes)

    def layout(self) -> BlockLayout:
        """The blocks."""
        return BlockLayout.from_sizes(self.sizes, self.block_size)

    def blocks(self) -> Tensor:
        """Their ranges [K, 2], one missing if there is a gap."""
        blocks = self.layout().blocks
        return torch.cat([blocks[:1], blocks[2:]]) if self.gap else blocks

    def grads(self) -> Tensor:
        """The gradients [k, d] in the dtype, stride and alignment of the case."""
        d = self.num_weights
        values = gradients(
            self.kind, self.num_rows, d, rho=self.rho, damping=self.damping, seed=self.seed
        ).to(self.dtype)
        if self.stride == -1:
            return values[:1].expand(self.num_rows, d)
        if self.stride == 0:
            return values
        room = torch.full((self.num_rows, d + self.stride), torch.nan, dtype=self.dtype)
        view = room[:, self.stride // 2 : self.stride // 2 + d]
        view.copy_(values)
        return view


def _table() -> list[Case]:
    block_sizes = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 50, 64, 100, 128, 200, 256, 300)
    cases = [Case(f"B{B}", (2 * B + max(1, B // 3),), B) for B in block_sizes]
    few = Case("", (50, 20), 33)
    cases += [
        replace(few, name=f"k{k}", num_rows=k, num_grads=max(k, 8)) for k in (1, 2, 16, 33, 64, 100, 257)
    ]
    cases += [
        Case("one weight", (1,), 1, num_rows=1, num_grads=1),
        Case("one block", (50,), 50, num_rows=1, num_grads=3),
        Case("many blocks", (64 * 8 + 3,), 8, num_rows=16, num_grads=16),
        Case("two tiles", (140,), 130, num_rows=70, num_grads=70),
        Case("many tensors", (7, 50, 3, 120, 1), 50, num_rows=16, num_grads=20),
        Case("all in one block", (300, 100), None, num_rows=20, num_grads=20),
        Case("gap", (50, 50), 25, num_rows=7, gap=True),
        Case("row stride", (70,), 17, stride=2),
        Case("misaligned", (70,), 33, num_rows=9, num_grads=9, stride=7),
        Case("one row repeated", (70,), 33, stride=-1),
        Case("float16", (70,), 33, dtype=torch.float16),
        Case("bfloat16", (130,), 64, dtype=torch.bfloat16, num_rows=19, num_grads=19),
        Case("float64", (70,), 33, dtype=torch.float64),
        Case("float16 misaligned", (70,), 33, dtype=torch.float16, stride=5),
        Case("bfloat16 misaligned", (70,), 33, dtype=torch.bfloat16, stride=3),
        Case("strong", (60,), 20, num_rows=64, num_grads=64, rho=1e5),
        Case("weak", (60,), 20, rho=1e-5),
    ]
    cases += [
        Case(kind, (100,), 40, num_rows=50, num_grads=50, kind=kind)
        for kind in KINDS
        if kind != "independent"
    ]
    return cases


CASES = _table()

# What an interpreter that takes a tenth of a millisecond a line does not get through: large blocks cut in the same way
# as those of "two tiles", and most kinds of gradients where they make no difference to how a block is cut.
SLOW = ("B200", "B256", "B300", "all in one block", "many blocks", "k100", "k257")
SLOW_DUAL = ("two tiles", "correlated", "aligned", "deficient", "duplicate", "sparse", "decaying")
# Weights one at a time: what is left where even that is too much.
QUICK = ("B1", "B3", "B16", "B17", "k16", "gap", "float16 misaligned")
