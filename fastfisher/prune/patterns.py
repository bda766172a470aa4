"""Which sets of zeros are allowed: "unstructured", "2:4" and other N:M, or "block4" and other whole blocks.

N:M keeps at least N of every M consecutive weights along the input dimension (input channels of a convolution, at one
place of the kernel); after a full run exactly N.  "block4" removes runs of 4 such weights as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfisher.errors import FastFisherError
from fastfisher.fisher.conv1d import is_conv1d

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Pattern:
    """size: M, the weights of a group; 1 for unstructured.   keep: N, of which so many stay.   whole: all or none."""

    name: str
    size: int = 1
    keep: int = 0
    whole: bool = False

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """The pattern of that name.  Raises FastFisherError on any other."""
        if name == "unstructured":
            return cls(name)
        found = re.fullmatch(r"(\d+):(\d+)|block(\d+)", name) if isinstance(name, str) else None
        if found and found[3] and int(found[3]) >= 2:
            return cls(name, size=int(found[3]), whole=True)
        if found and found[2] and 1 <= int(found[1]) < int(found[2]):
            return cls(name, size=int(found[2]), keep=int(found[1]))
        raise FastFisherError(
            f"pattern must be 'unstructured', N:M with N < M such as '2:4', or blockN such as 'block4'; got {name!r}"
        )

    @property
    def sparsity(self) -> float | None:
        """What N:M amounts to; None where it is free."""
        return 1 - self.keep / self.size if self.keep else None

    @property
    def together(self) -> int:
        """How many weights leave at once."""
        return self.size if self.whole else 1

    def why_not(self, shape: torch.Size, dim: int) -> str | None:
        """Why a tensor with inputs along `dim` cannot take the pattern, or None."""
        if self.size == 1:
            return None
        if len(shape) < 2:
            return f"its shape {list(shape)} has no input dimension"
        if shape[dim] % self.size:
            return f"{shape[dim]} inputs are no multiple of {self.size}"
        return None

    def candidates(self, saliency: Tensor, dead: Tensor) -> Tensor:
        """Which weights may go: beside the dead ones, the least salient of each group until `keep` are left.

        saliency [d] float.   dead [d] bool.   Returns bool [d].
        """
        if not self.keep:
            return ~dead
        order = saliency.masked_fill(dead, -torch.inf).view(-1, self.size).argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        return (rank < self.size - self.keep).view(-1) & ~dead


def input_dims(model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The dimension of the inputs of each tensor: 1, but 0 in transposed convolutions and the Conv1D of transformers.

    names: with their aliases.
    """
    modules = dict(model.named_modules(remove_duplicate=False))

    def inputs(name: str) -> int:
        module = modules.get(name.rpartition(".")[0])
        return 0 if isinstance(module, _TRANSPOSED) or is_conv1d(module) else 1

    return {name: inputs(aliases[0]) for name, aliases in names.items()}
