"""FishLeg Surgeon: one learned inverse through all prunings of a run, moved on by fresh gradients and never made anew.

A pruning takes the gradients of its step, fits Q to them, ranks by w² / (2 diag Q), corrects by Q's columns, and takes
the removed weights out of Q.  Between prunings a `Pruner` moves Q by small steps.
No code of the paper is public, and it does not give the loop in full; this one is a reconstruction.
Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.errors import FastFisherError
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.fisher.inverse import _absolute
from fastfisher.prune.settings import Settings

# Gradients that are held at once; more come in several batches, each of which Q is fitted to in turn.
BATCH_BYTES = 1 << 30


class Surgeon:
    """The learned inverse of a run, from its first gradients on.

    inverse: None until then.   conv_groups: name -> groups of a convolution with more than one.
    """

    def __init__(self, layout: BlockLayout, settings: Settings, conv_groups: Mapping[str, int]) -> None:
        self.layout = layout
        self.settings = settings
        self.conv_groups = dict(conv_groups)
        self.inverse: FishLegInverse | None = None

    def copy(self) -> Surgeon:
        """Another one with the same state."""
        return copy.deepcopy(self)

    def learn(self, pieces: Iterator[Tensor], live: Tensor, *, limit: int = BATCH_BYTES) -> FishLegInverse:
        """Fit Q to gradients [k, d] as they come.   live: bool [d], the weights that are left."""
        for grads in _batches(pieces, limit):
            if self.inverse is None:
                self.inverse = self._start(grads, live)
            elif not torch.equal(self.inverse.live, live):
                self.inverse.downdate(live)
            self.inverse.fit(grads, max_steps=self.settings.options.max_aux_steps)
        if self.inverse is None:
            raise FastFisherError("no gradient came to learn from")
        return self.inverse

    def _start(self, grads: Tensor, live: Tensor) -> FishLegInverse:
        settings, options = self.settings, self.settings.options
        damping = settings.damping
        if settings.damping_mode == "relative":
            damping = _absolute(damping, float(grads.double().square().mean()))
        return FishLegInverse.start(
            self.layout,
            damping=damping,
            parameterization=options.parameterization,
            horizon=options.horizon or settings.num_grads,
            tile=options.tile,
            conv_groups=self.conv_groups,
            live=live.clone(),
            dtype=grads.dtype,
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"inverse": None if self.inverse is None else self.inverse.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        kept = state["inverse"]
        self.inverse = None if kept is None else FishLegInverse.from_state_dict(kept)


def _batches(pieces: Iterator[Tensor], limit: int) -> Iterator[Tensor]:
    """Pieces joined into batches of up to `limit` bytes, at least one piece each; new memory."""
    held: list[Tensor] = []
    size = 0
    for piece in pieces:
        nbytes = piece.numel() * piece.element_size()
        if held and size + nbytes > limit:
            yield torch.cat(held)
            held, size = [], 0
        held.append(piece.clone())
        size += nbytes
    if held:
        yield torch.cat(held)


def conv_groups(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """The groups of those weights that belong to a convolution with more than one."""
    found = {}
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        groups = getattr(module, "groups", 1)
        if isinstance(groups, int) and groups > 1:
            found[name] = groups
    return found
