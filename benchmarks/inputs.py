"""The tensors of one problem on one device, and the piece of them that a rival gets.

All contenders of a problem get the same inputs; what a rival needs in another layout is prepared outside the timed
call.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks import rivals
from benchmarks.problems import DAMPING, GRADIENT_SCALE, PIECE_BYTES, PRUNED_FRACTION, Problem
from fastfisher.fisher.blocks import padded

CHUNK = 4096  # blocks at a time where inputs are prepared
CORRELATIONS = 4  # vectors a a^T in the state that stands for an inverse


class Inputs:
    """The tensors of one problem, made from a fixed seed when they are first needed."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        self.device = torch.device(device)
        self.block_size, self.num_grads = problem.block_size, problem.num_grads
        self.generator = torch.Generator(self.device).manual_seed(0)
        d = problem.num_weights
        self.grads = self._normal(problem.num_rows, d).mul_(GRADIENT_SCALE)  # [k, d]
        self.x = self._normal(d, 1)  # [d, 1]
        self.weight = self._normal(d)  # [d]
        self.mask = self._uniform(d) >= PRUNED_FRACTION  # [d], True = keep
        self.dead = self._uniform(d) < PRUNED_FRACTION / 10  # [d]
        self.layout = ff.BlockLayout.from_sizes(problem.sizes, problem.block_size)
        self.blocks = self.layout.blocks.to(self.device)  # [K, 2]

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(*shape, device=self.device).normal_(generator=self.generator)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    @property
    def zeros(self) -> int:
        """How many weights a selection removes."""
        return round(PRUNED_FRACTION * self.problem.num_weights)

    @cached_property
    def f_inv(self) -> Tensor:
        """A primal state [K, B, B] for the ops that read one: not the inverse of any F, but as well conditioned."""
        state = self.identity()
        for chunk in state.split(CHUNK):
            a = self._normal(len(chunk), self.block_size, CORRELATIONS)
            chunk.baddbmm_(a, a.mT, alpha=1 / (DAMPING * CORRELATIONS))
        return state

    @cached_property
    def root(self) -> Tensor:
        """R [K, B, B] as after some steps: R R^T near the inverse Fisher, not symmetric; zeros in the padding."""
        size = (DAMPING + GRADIENT_SCALE**2) ** -0.5
        root = rivals.scaled_identity(len(self.blocks), self.block_size, size, self.grads)
        for chunk in root.split(CHUNK):
            chunk.add_(torch.empty_like(chunk).normal_(generator=self.generator), alpha=size / 32)
        return root.mul_(self.inside[:, :, None]).mul_(self.inside[:, None, :])

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Symmetric T and S, scale D and x of kron_matvec, [N, B, B] each, x with one dimension before."""
        N, B = self.problem.num_tiles, self.block_size
        left, right = self._normal(N, B, B), self._normal(N, B, B)
        return left + left.mT, right + right.mT, self._normal(N, B, B), self._normal(1, N, B, B)

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """Input and gradient at the output of a convolution, [m, C, side, side] each."""
        channels, out, side = self.problem.convolution
        return self._normal(self.num_grads, channels, side, side), self._normal(
            self.num_grads, out, side, side
        )

    @cached_property
    def inside(self) -> Tensor:
        """Which places of [K, B] are weights."""
        lengths = self.blocks[:, 1:] - self.blocks[:, :1]
        return torch.arange(self.block_size, device=self.device) < lengths

    @cached_property
    def top(self) -> Tensor:
        """Where power iterations start, [K, B]; zeros in the padding."""
        return self._normal(len(self.blocks), self.block_size).mul_(self.inside)

    @cached_property
    def inv_diag(self) -> Tensor:
        """The diagonal [d] of that state."""
        return self.flat(self.f_inv.diagonal(dim1=1, dim2=2), self.blocks)

    @cached_property
    def saliency(self) -> Tensor:
        """w^2 / (2 diag F^-1), [d]."""
        return self.weight.square() / (2 * self.inv_diag)

    @cached_property
    def fisher(self) -> Tensor:
        """F with its damping [K, B, B]; identities in the padding."""
        state = rivals.scaled_identity(len(self.blocks), self.block_size, DAMPING, self.grads)
        for ids in torch.arange(len(state)).split(CHUNK):
            G = self.gathered(ids)  # [chunk, k, B]
            state[ids[0] : ids[-1] + 1].baddbmm_(G.mT, G, alpha=1 / self.num_grads)
        return state

    @cached_property
    def factor(self) -> Tensor:
        """Factors of the capacitance, float64 [K, m, m]."""
        out = self.grads.new_empty(len(self.blocks), self.num_grads, self.num_grads, dtype=torch.float64)
        for ids in torch.arange(len(out)).split(CHUNK):
            out[ids[0] : ids[-1] + 1] = rivals.dual_factor(self.gathered(ids), DAMPING)
        return out

    @cached_property
    def exact_dual_diag(self) -> Tensor:
        """diag F^-1 from the gradients by the dual form, float64 [d]."""
        inv_diag = torch.empty_like(self.weight, dtype=torch.float64)
        for ids in torch.arange(len(self.blocks)).split(CHUNK):
            G = self.gathered(ids)
            rows = rivals.inverse_diagonal_dual(G, rivals.dual_factor(G, DAMPING), DAMPING)  # [chunk, B]
            blocks = self.blocks[ids[0] : ids[-1] + 1]
            inv_diag[blocks[0, 0] : blocks[-1, 1]] = self.flat(rows, blocks)
        return inv_diag

    @cached_property
    def dual_diag(self) -> Tensor:
        """The same in float32."""
        return self.exact_dual_diag.float()

    @cached_property
    def exact_saliency(self) -> tuple[Tensor, Tensor]:
        """Saliencies by that diagonal, float64 [d], and the largest of them that a selection removes."""
        saliency = self.weight.double() ** 2 / (2 * self.exact_dual_diag)
        return saliency, torch.kthvalue(saliency, self.zeros).values

    def identity(self) -> Tensor:
        """I / damping of every block, [K, B, B]."""
        return rivals.scaled_identity(len(self.blocks), self.block_size, 1 / DAMPING, self.grads)

    def padded(self, vector: Tensor, fill: float = 0) -> Tensor:
        """A vector [d] as a new [K, B], filled up; a mask is filled with True."""
        return padded(vector, self.blocks, self.block_size, fill)

    def flat(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """The weights of some blocks, one after the other, from rows [K, B] that are filled up."""
        lengths = blocks[:, 1:] - blocks[:, :1]
        return rows[torch.arange(self.block_size, device=self.device) < lengths]

    def gathered(self, ids: Tensor) -> Tensor:
        """Gradients of some blocks, copied and filled up with zeros: [len(ids), k, B]."""
        blocks = self.blocks[ids.to(self.device)]
        index = blocks[:, :1] + torch.arange(self.block_size, device=self.device)  # [len(ids), B]
        inside = index < blocks[:, 1:]
        index.clamp_(max=self.problem.num_weights - 1)
        G = self.grads[:, index.flatten()].unflatten(1, index.shape)  # [k, len(ids), B]
        return G.transpose(0, 1).contiguous().mul_(inside[:, None, :])

    def range(self, b: int) -> slice:
        start, stop = self.layout.blocks[b].tolist()
        return slice(start, stop)

    def length(self, b: int) -> int:
        """n, the weights of a block."""
        part = self.range(b)
        return part.stop - part.start

    def exact_inverse(self, b: int) -> Tensor:
        """F^-1 of one block in float64, from the gradients."""
        G = self.grads[:, self.range(b)].double()
        F = G.mT @ G * (self.problem.num_calls / self.num_grads)
        F.diagonal().add_(DAMPING)
        return torch.linalg.inv(F)

    @cached_property
    def piece(self) -> Piece:
        """For rivals whose matrices are [B, B]: gradients, Gram matrix, factor, inverse, and one to spare."""
        k, B = self.problem.num_rows, self.block_size
        return Piece(self, 4 * (k * B + 4 * B * B))

    @cached_property
    def dual_piece(self) -> Piece:
        """For rivals whose matrices are [m, m] and [m, B], in float64."""
        m, B = self.num_grads, self.block_size
        return Piece(self, 8 * (2 * m * B + 3 * m * m))


class Piece:
    """The blocks that a rival works on: all, or every so-manieth where its matrices of all blocks take too much memory.

    ids: which blocks of the problem.   parts: their gradients, [K, k, B] each: views for the full blocks of a single
    tensor and for its short one, else one copy in which short blocks are filled up.
    """

    def __init__(self, data: Inputs, bytes_per_block: int) -> None:
        self.data = data
        self.every = -(-len(data.blocks) * bytes_per_block // PIECE_BYTES)
        self.ids = torch.arange(0, len(data.blocks), self.every)
        self.views = self.every == 1 and len(data.problem.sizes) == 1

    @cached_property
    def parts(self) -> list[Tensor]:
        if self.views:
            return rivals.block_parts(self.data.grads, self.data.block_size)
        return [self.data.gathered(self.ids)]

    def pick(self, states: list[Tensor], b: int) -> Tensor:
        """What a list with one tensor for each part holds for block b of the problem."""
        i = b // self.every
        return states[0][i] if i < len(states[0]) else states[1][i - len(states[0])]

    def of(self, states: Tensor) -> Tensor:
        """Its blocks of a tensor [K, ...]."""
        return states if self.every == 1 else states[self.ids.to(states.device)]

    def split(self, states: Tensor) -> list[Tensor]:
        """The same, one for each part."""
        return list(self.of(states).split([len(part) for part in self.parts]))

    def rows(self, vector: Tensor, fill: float = 0) -> Tensor:
        """A vector [d] as a new [K, B], filled up."""
        return padded(vector, self.of(self.data.blocks), self.data.block_size, fill)

    def row_parts(self, vector: Tensor, fill: float = 0) -> list[Tensor]:
        """The same, one for each part, of its length of block."""
        rows = self.rows(vector, fill).split([len(part) for part in self.parts])
        return [row[:, : part.shape[2]].contiguous() for row, part in zip(rows, self.parts, strict=True)]

    def identities(self) -> list[Tensor]:
        """I / damping, one for each part."""
        return [rivals.scaled_identity(p.shape[0], p.shape[2], 1 / DAMPING, p) for p in self.parts]


@lru_cache(maxsize=1)
def inputs_of(problem: Problem, device: str = "cpu") -> Inputs:
    """The inputs of a problem; those of the last one are kept, so that its contenders share them."""
    return Inputs(problem, device)
