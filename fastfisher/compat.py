"""F⁻¹ = (λ I + (1/m) Σ g gᵀ)⁻¹ in blocks, under the names and calls of existing pruning scripts.

`EmpiricalBlockFisherInverse` stands in for the class of SparseML and of the oBERT and CAP scripts, `HInvFastBlock` for
that of M-FAC; a script changes its import and nothing else.  `importance_scores` gives what
torch.nn.utils.prune.global_unstructured takes.  The results are those of the scripts' own loops in exact arithmetic,
and stay right where float32 loops go wrong: at gradients large against the damping.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.errors import FastFisherError
from fastfisher.fisher import parts as _parts
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.inverse import FisherInverse
from fastfisher.ops.memory import empty_state, zero_state

# So many gradients, or B where that is more, are kept and taken in at once where not all are: enough to run near full
# speed.  A script that is short of memory may lower it before it makes an inverse.
BUFFERED = 128


class _HasDiagonal(Protocol):
    def diag(self) -> Tensor: ...


def _whole(name: str, value: Any) -> int:
    """The value as an int, where it is a whole number of at least 1."""
    if not hasattr(value, "__index__") or operator.index(value) < 1:
        raise FastFisherError(f"{name} must be a whole number of at least 1, got {value!r}")
    return operator.index(value)


class EmpiricalBlockFisherInverse:
    """F⁻¹ of one tensor's weights in blocks of B, valid whenever it is read, from gradients that come one at a time.

    num_grads: m, the divisor, and the most gradients that may come.   fisher_block_size: B.   num_weights: d.
    damp: λ.   device: where everything lies.
    Attributes as in the original: m, B, d, damp, dev, num_blocks = ⌈d / B⌉, and f_inv (or F_inv).

    `add_grad` only copies.  The inverse is made when `diag`, `mul` or `f_inv` is read after it, and kept until the next
    gradient: reading once at the end is what makes this fast.  Reading after every gradient is right too, but builds
    the inverse each time.  What was read before never changes what is read later.
    Memory: max(128, B) gradients, and F in float64 [K, B, B] where more than these come, or as many more gradients as
    F would take; all of it is freed by the first reading after the last gradient, which leaves the inverse.
    Raises FastFisherError on bad input, FisherError (on reading) where float64 cannot hold a block.
    Source: WoodFisher, eqs. 3.1 to 3.5.
    """

    def __init__(
        self,
        num_grads: int,
        fisher_block_size: int,
        num_weights: int,
        damp: float,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (damp > 0 and math.isfinite(damp)):
            raise FastFisherError(f"damp must be positive and finite, got {damp}")
        self.m = _whole("num_grads", num_grads)
        self.B = _whole("fisher_block_size", fisher_block_size)
        self.d = _whole("num_weights", num_weights)
        self.damp = damp
        self.dev = torch.device(device)
        self.num_blocks = math.ceil(self.d / self.B)
        self.count = 0
        self._layout = BlockLayout.from_sizes([self.d], min(self.B, self.d))
        self._buffer: Tensor | None = None  # [k, d], in the dtype of the gradients
        self._pending = 0  # rows of it that are not in the Fisher yet
        self._fisher: list[Tensor] = []  # (1/m) Σ g gᵀ so far, float64, per group of blocks [g, B, B]
        self._inverse: FisherInverse | None = None
        self._state: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"EmpiricalBlockFisherInverse({self.count} of {self.m} gradients, {self.d} weights, "
            f"{self.num_blocks} blocks of {self.B}, damp={self.damp:g})"
        )

    @torch.no_grad()
    def add_grad(self, g: Tensor) -> None:
        """F += g gᵀ / m.   g: d numbers in any shape, float dtype and on any device, copied; or K · B with padding.

        Raises FastFisherError on another size or dtype, and when more than num_grads come.
        """
        if self.count == self.m:
            raise FastFisherError(f"num_grads={self.m} gradients have come already, got one more")
        row = self._flat("g", g)
        if self._buffer is None:
            self._buffer = empty_state((self._rows(g.dtype), self.d), g.dtype, self.dev)
        elif g.dtype != self._buffer.dtype:
            raise FastFisherError(f"g must be {self._buffer.dtype} as before, got {g.dtype}")
        if self._pending == len(self._buffer):
            self._flush(self._buffer)
        self._buffer[self._pending] = row
        self._pending += 1
        self.count += 1
        self._inverse = self._state = None

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, a new [d]."""
        inverse = self._built()
        return self._like_damping(self.d) if inverse is None else inverse.diag()

    def mul(self, v: Tensor) -> Tensor:
        """F⁻¹ v, a new [d].   v: d numbers in any shape, or K · B with padding, on the device of the inverse.

        float32 and float64 are kept, half precision comes back as float32.
        """
        x = self._flat("v", v)
        inverse = self._built()
        if inverse is not None:
            result: Tensor = inverse.mul(x)
            return result
        return x.to(torch.promote_types(x.dtype, torch.float32)) / self.damp

    @property
    def f_inv(self) -> Tensor:
        """F⁻¹ itself, [K, B, B]; where B does not divide d, the last block ends in I/λ.

        It is for reading only, and the next gradient does not change it but leaves another one here.
        """
        if self._state is None:
            self._state = self._stored(self._built())
        return self._state

    @property
    def F_inv(self) -> Tensor:
        """The same, as newer scripts call it."""
        return self.f_inv

    def _flat(self, name: str, x: Tensor) -> Tensor:
        """A vector of d or K · B numbers as [d]."""
        if x.numel() not in (self.d, self.num_blocks * self.B):
            raise FastFisherError(f"{name} must hold num_weights={self.d} numbers, got {list(x.shape)}")
        if not x.is_floating_point():
            raise FastFisherError(f"{name} must be of a float dtype, got {x.dtype}")
        return x.detach().reshape(-1)[: self.d]

    def _like_damping(self, *shape: int) -> Tensor:
        """1/λ everywhere, in the dtype that a script without gradients gets."""
        return torch.full(shape, 1 / self.damp, device=self.dev)

    def _rows(self, dtype: torch.dtype) -> int:
        """How many gradients to keep: all, unless taking some into a Fisher needs less memory."""
        rows = max(BUFFERED, self.B)
        return self.m if (self.m - rows) * dtype.itemsize <= self.B * torch.float64.itemsize else rows

    def _flush(self, buffer: Tensor) -> None:
        """Take the pending gradients into the Fisher.

        It adds up in float64: a block that float32 cannot invert is then inverted in float64, as in FisherAccumulator.
        """
        blocks = self._layout.blocks.to(self.dev)
        groups = list(_parts.groups(self._layout, torch.float64, self.dev))
        if not self._fisher:
            size = self._layout.block_size
            for first, last in groups:
                state = empty_state((last - first, size, size), torch.float64, self.dev)
                self._fisher.append(zero_state(state))
        if self._pending:
            for fisher, (first, last) in zip(self._fisher, groups, strict=True):
                ops.fisher_accumulate_(fisher, buffer[: self._pending], blocks[first:last], self.m)
        self._pending = 0

    def _built(self) -> FisherInverse | None:
        """The inverse of all gradients so far; None before the first."""
        if self._inverse is not None or self._buffer is None:
            return self._inverse
        if self._fisher:
            self._flush(self._buffer)
            dtype = _parts.state_dtype(self._buffer.dtype)
            # a copy of the list: the source empties it, and gradients may still come, or this fail and be asked again
            source = _parts.stored_source(list(self._fisher), self._layout, self.damp)
            parts, condition = _parts.primal_parts(
                source, self._layout, num_grads=self.m, damping=self.damp, dtype=dtype, device=self.dev
            )
            self._inverse = FisherInverse(
                self._layout,
                parts,
                form="primal",
                damping=self.damp,
                num_grads=self.m,
                condition=condition,
                dtype=dtype,
            )
        else:
            self._inverse = FisherInverse.from_grads(
                self._buffer[: self._pending],
                block_size=self._layout.block_size,
                damping=self.damp,
                num_grads=self.m,
            )
        if self.count == self.m:
            self._buffer, self._fisher = None, []
        return self._inverse

    def _stored(self, inverse: FisherInverse | None) -> Tensor:
        """[K, B, B] of an inverse in whatever form."""
        size, n = self.B, self._layout.block_size
        if inverse is None:
            state = torch.zeros(self.num_blocks, size, size, device=self.dev)
            state.diagonal(dim1=1, dim2=2).fill_(1 / self.damp)
            return state
        part = inverse.parts[0]
        if (
            len(inverse.parts) == 1
            and part.kind == "primal"
            and part.state.dtype == inverse.dtype
            and n == size
        ):
            return part.state
        state = torch.zeros(self.num_blocks, size, size, dtype=inverse.dtype, device=self.dev)
        state.diagonal(dim1=1, dim2=2).fill_(1 / self.damp)
        # F⁻¹ times the columns that hold one unit vector of every block gives the columns of all blocks at once
        place = torch.arange(self.d, device=self.dev)
        columns = torch.zeros(self.d, n, dtype=inverse.dtype, device=self.dev)
        columns[place, place % n] = 1
        columns = inverse.mul(columns)  # [d, n], the rows of the blocks below one another
        full = self.d // n
        state[:full, :n, :n] = columns[: full * n].view(full, n, n)
        rest = self.d - full * n
        if rest:
            state[full, :rest, :rest] = columns[full * n :, :rest]
        return state


class HInvFastBlock:
    """F⁻¹ in blocks from all gradients at once, in the call of M-FAC; without blocksize, one block over everything.

    grads: [m, d] of any float dtype, left as they are.   blocksize: B, the last block may be short.
    perbatch: taken for compatibility, memory is managed without it.   gpu: where the inverse is built and kept; by
    default, where the gradients are.   damp: λ.
    Attributes as in the original: m, d, dtype, damp, blocksize, perbatch, gpu.
    Raises FastFisherError on bad input, FisherError where float64 cannot hold a block.   Source: M-FAC (Frantar,
    Kurtic & Alistarh, 2021), section 3; WoodFisher, eqs. 3.1 to 3.5.
    """

    def __init__(
        self,
        grads: Tensor,
        blocksize: int | None = None,
        perbatch: int | None = None,
        gpu: torch.device | str | None = None,
        damp: float = 1e-5,
    ) -> None:
        if grads.ndim != 2 or grads.numel() == 0:
            raise FastFisherError(f"grads must be [m, d] with every size at least 1, got {list(grads.shape)}")
        self.m, self.d = grads.shape
        self.dtype = grads.dtype
        self.damp = damp
        self.blocksize = None if blocksize is None else _whole("blocksize", blocksize)
        self.perbatch = perbatch
        self.gpu = gpu
        self._home = grads.device
        self.inverse = FisherInverse.from_grads(
            grads.detach(),
            block_size=None if self.blocksize is None else min(self.blocksize, self.d),
            damping=damp,
            device=gpu,
        )

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹ x, a new [d] on the device of the gradients.   x: [d] on any device."""
        result: Tensor = self.inverse.mul(x.to(self.inverse.device))
        return result.to(self._home)

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, a new [d] on the device of the gradients."""
        return self.inverse.diag().to(self._home)


def importance_scores(
    parameters: Sequence[tuple[nn.Module, str]], inverse: _HasDiagonal | Sequence[_HasDiagonal]
) -> dict[tuple[nn.Module, str], Tensor]:
    """ρ = w² / (2 diag F⁻¹), what removing each weight costs, as `global_unstructured` of torch takes it.

    parameters: (module, name) of each tensor, as for torch.nn.utils.prune.   inverse: anything with `diag()`: one over
    all these weights in this order, or one for each tensor.
    With pruning_method=L1Unstructured, which removes the smallest scores, that is the choice of WoodFisher.
    Raises FastFisherError where the diagonals do not have as many entries as the tensors.
    Source: WoodFisher, eq. 2.13.
    """
    weights = [getattr(module, name).detach() for module, name in parameters]
    sizes = [weight.numel() for weight in weights]
    diagonals: list[Any]
    if isinstance(inverse, Sequence):
        diagonals = [one.diag() for one in inverse]
        if [len(diagonal) for diagonal in diagonals] != sizes:
            raise FastFisherError(
                f"the tensors hold {sizes} weights, the inverses {[len(one) for one in diagonals]}"
            )
    else:
        diagonal = inverse.diag()
        if len(diagonal) != sum(sizes):
            raise FastFisherError(f"the tensors hold {sum(sizes)} weights, the inverse {len(diagonal)}")
        diagonals = list(diagonal.split(sizes))
    scores = {}
    for pair, weight, diagonal in zip(parameters, weights, diagonals, strict=True):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scores[pair] = wide.square() / (2 * diagonal.to(weight.device).view(weight.shape))
    return scores
