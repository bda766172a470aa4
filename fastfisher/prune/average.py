"""WoodFisher with a moving average: F ← β F + (1 − β) F_new from one estimate of a run to the next.

The blocks are those of the whole layout throughout; rows and columns of weights that were removed are 0 in F, so that
nothing couples to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastfisher.fisher.auxiliary import Product
from fastfisher.fisher.blocks import BlockLayout, padded
from fastfisher.fisher.inverse import FisherAccumulator, FisherInverse
from fastfisher.fisher.parts import groups
from fastfisher.prune.settings import Settings


class AveragedFisher:
    """The average of a run, from its first gradients on.   states: F without damping, per group of blocks [g, B, B]."""

    def __init__(self, layout: BlockLayout, settings: Settings) -> None:
        self.layout = layout
        self.settings = settings
        self.states: list[Tensor] = []

    @property
    def last(self) -> None:
        """Nothing is fitted here."""

    def copy(self) -> AveragedFisher:
        """Another one with the same state, which neither of the two writes into."""
        other = AveragedFisher(self.layout, self.settings)
        other.states = list(self.states)
        return other

    def learn(
        self, pieces: Iterator[Tensor], live: Tensor, *, num_rows: int, product: Product | None = None
    ) -> FisherInverse:
        """The inverse with these gradients [k, d], num_rows of them in all.   live: bool [d], the weights left."""
        settings = self.settings
        accumulator = FisherAccumulator(
            self.layout,
            num_grads=settings.num_grads,
            num_rows=num_rows,
            damping=settings.damping,
            damping_mode=settings.damping_mode,
            form="primal",
        )
        for piece in pieces:
            accumulator.add(piece * live)
        if self.states:
            blocks = self.layout.blocks.to(live.device)
            ranges = groups(self.layout, self.states[0].dtype, live.device)
            for (first, last), old, new in zip(ranges, self.states, accumulator.states, strict=True):
                inside = padded(live, blocks[first:last], self.layout.block_size, False)  # [g, B]
                pairs = inside[:, :, None] & inside[:, None, :]
                new.lerp_(torch.where(pairs, old, 0), settings.fisher_average)
        self.states = [state.clone() for state in accumulator.states]
        return accumulator.finish()

    def remove(self, live: Tensor) -> None:
        """Nothing to do: `learn` is told what is left."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"states": list(self.states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self.states = list(state["states"])
