"""FishLeg Surgeon: one learned inverse through all prunings of a run, moved on by fresh gradients and never made anew.

A pruning takes the gradients of its step, fits Q to them, ranks by w² / (2 diag Q), corrects by Q's columns, and takes
the removed weights out of Q.  Between prunings a `Pruner` moves Q by small steps.
No code of the paper is public, and it does not give the loop in full; this one is a reconstruction.
Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.errors import FastFisherError
from fastfisher.fisher.auxiliary import Product, SampledSteps
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.fisher.inverse import absolute_damping, mean_diagonal
from fastfisher.fisher.objective import LossFn, Objective, untouched
from fastfisher.prune.settings import Settings

# Gradients that are held at once; more come in several batches, each of which Q is fitted to in turn.
BATCH_BYTES = 1 << 30
# Prunings whose gradients Q remembers.
HORIZON = 4


class Surgeon:
    """The learned inverse of a run, from its first gradients on.

    inverse: None until then.   conv_groups: name -> groups of a convolution with more than one.
    """

    def __init__(self, layout: BlockLayout, settings: Settings, conv_groups: Mapping[str, int]) -> None:
        self.layout = layout
        self.settings = settings
        self.conv_groups = dict(conv_groups)
        self.inverse: FishLegInverse | None = None
        self.moves = 0  # mini-batches read by `move`
        self._data: Iterable[Any] | None = None
        self._reader: SampleReader | None = None
        self._adam: SampledSteps | None = None

    @property
    def last(self) -> dict[str, float] | None:
        """What the last fit came to."""
        return dict(self.inverse.history[-1]) if self.inverse is not None and self.inverse.history else None

    def copy(self) -> Surgeon:
        """Another one with the same state, which reads on from the same data."""
        other = Surgeon(self.layout, self.settings, self.conv_groups)
        other.load_state_dict(self.state_dict())
        other._data, other._reader = self._data, self._reader
        return other

    def learn(
        self,
        pieces: Iterator[Tensor],
        live: Tensor,
        *,
        num_rows: int | None = None,
        product: Product | None = None,
        limit: int = BATCH_BYTES,
    ) -> FishLegInverse:
        """Fit Q to gradients [k, d] as they come.   live: bool [d], the weights that are left.

        product: with the Fisher, for "sampled" steps where it does not come from the gradients.
        """
        options = self.settings.options
        for grads in _batches(pieces, limit):
            if self.inverse is None:
                self.inverse = self._start(grads, live)
            self.remove(live)
            if options.aux == "exact":
                self.inverse.fit(grads, max_steps=options.max_aux_steps)
            else:
                self._sampled(grads, options.max_aux_steps, product)
        if self.inverse is None:
            raise FastFisherError("no gradient came to learn from")
        return self.inverse

    def remove(self, live: Tensor) -> None:
        """Take weights out of Q.   live: bool [d], what is left."""
        assert self.inverse is not None
        if not torch.equal(self.inverse.live, live):
            self.inverse.downdate(live)
            self._adam = None  # its averages are of the old Q

    def _start(self, grads: Tensor, live: Tensor) -> FishLegInverse:
        settings, options = self.settings, self.settings.options
        damping = settings.damping
        if settings.damping_mode == "relative":
            damping = absolute_damping(damping, mean_diagonal(grads))
        return FishLegInverse.start(
            self.layout,
            damping=damping,
            parameterization=options.parameterization,
            horizon=options.horizon or HORIZON * settings.num_grads,
            tile=options.tile,
            conv_groups=self.conv_groups,
            live=live.clone(),
            dtype=grads.dtype,
        )

    def move(self, model: nn.Module, data: Iterable[Any], loss_fn: LossFn | None) -> None:
        """One auxiliary step on the next mini-batch of the data, read on from one call to the next and round and round.

        Every call has a seed of its own, so that after `load_state_dict` the same samples come: those of the calls
        before are read again and left out.
        """
        settings, inverse = self.settings, self.inverse
        if inverse is None:
            return
        names, count = list(self.layout.names), settings.options.aux_grads * settings.grad_batch_size
        if self._reader is None or self._data is not data:
            self.moves = self.moves if self._reader is None else 0
            self._data, self._reader = data, SampleReader(data, inverse.device, repeat=count)
            for i in range(self.moves):
                with untouched(model, settings.seed + i):
                    self._reader.take(count, exactly=False)
        with untouched(model, settings.seed + self.moves):
            self.moves += 1
            samples = self._reader.take(count, exactly=False)
            if samples is None or len(samples) < settings.grad_batch_size:
                return
            objective = Objective(
                model,
                names,
                loss_fn=loss_fn,
                grad_batch_size=settings.grad_batch_size,
                fisher_type=settings.fisher_type,
            )
            each = settings.grad_batch_size
            rows = []
            for first in range(0, len(samples), len(samples) if each == 1 else each):
                group = samples if each == 1 else samples.narrow(first, first + each)
                grads, losses = objective.gradients(group)
                flat = self.layout.flatten({name: grads[name] for name in names})
                # of fisher_type "exact" a sample has several, which add up
                rows.append(flat * (len(flat) / len(losses)) ** 0.5)
            batch = torch.cat(rows)
            batch = batch[torch.isfinite(batch).all(dim=1)]
            if not len(batch):
                return
            if settings.options.aux == "exact":
                inverse.aux_step(batch)
            else:
                self._sampled(batch, 1, product_of(self.layout, objective, [samples], settings))

    def _sampled(self, grads: Tensor, steps: int, product: Product | None = None) -> None:
        """Steps with u drawn, on one batch."""
        assert self.inverse is not None
        adam = self._sampler(self.inverse)
        grads = grads.to(self.inverse.dtype)
        loss = 0.0
        for _ in range(steps):
            loss = adam.step(product or (lambda v: grads.T @ (grads @ v) / len(grads)), grads.mean(dim=0))
        error = self.inverse.error(grads)
        self.inverse.history.append({"steps": steps, "gradients": len(grads), "loss": loss, "error": error})

    def _sampler(self, inverse: FishLegInverse) -> SampledSteps:
        """The steps with u drawn, made when they are first used."""
        options = self.settings.options
        if self._adam is None:
            self._adam = SampledSteps(
                inverse,
                u=options.u,
                lr=options.aux_lr,
                preconditioner=options.preconditioner,
                seed=self.settings.seed,
            )
        return self._adam

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {
            "inverse": None if self.inverse is None else self.inverse.state_dict(),
            "adam": None if self._adam is None else self._adam.state_dict(),
            "moves": self.moves,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        kept = state["inverse"]
        self.inverse = None if kept is None else FishLegInverse.from_state_dict(kept)
        self.moves, self._reader, self._adam = state["moves"], None, None
        if state["adam"] is not None and self.inverse is not None:
            self._sampler(self.inverse).load_state_dict(state["adam"])


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


def product_of(
    layout: BlockLayout, objective: Objective, groups: Sequence[Samples], settings: Settings
) -> Product | None:
    """v [d] -> F v by differences of gradients, on these groups of samples in turn; None where rows serve."""
    if settings.options.product != "antithetic":
        return None
    turns = itertools.count()

    def product(v: Tensor) -> Tensor:
        group = groups[next(turns) % len(groups)]
        return layout.flatten(objective.antithetic_product(layout.unflatten(v), group))

    return product


def conv_groups(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """The groups of those weights that belong to a convolution with more than one."""
    found = {}
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        groups = getattr(module, "groups", 1)
        if isinstance(groups, int) and groups > 1:
            found[name] = groups
    return found
