"""A Pruner in a training loop that a library runs: what the callbacks for several libraries share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from fastfisher.errors import FastFisherError
from fastfisher.prune.gradual import Pruner
from fastfisher.prune.masks import unwrapped


class PruningLoop:
    """A Pruner that is made, or given, when the loop begins; `step` prunes when it is due, `finish` ends it.

    pruner: one made already, or None where `options`, the keywords of Pruner but the model, make one at the beginning.
    data: batches to take gradients from, by default the samples that the loop trains on.   by: "epoch" or "step".
    Raises FastFisherError on bad input.
    """

    def __init__(
        self, pruner: Pruner | None, data: Iterable[Any] | None, by: str, options: Mapping[str, Any]
    ) -> None:
        if by not in ("epoch", "step"):
            raise FastFisherError(f"by must be 'epoch' or 'step'; got {by!r}")
        if pruner is not None and not isinstance(pruner, Pruner):
            raise FastFisherError(
                f"PruningCallback takes a Pruner, or its keywords by name; got {pruner!r:.60}"
            )
        if pruner is not None and options:
            raise FastFisherError(
                f"PruningCallback takes a Pruner or the keywords to make one, not both; got {sorted(options)[0]!r} too"
            )
        if pruner is None and "schedule" not in options:
            raise FastFisherError(
                "PruningCallback needs a Pruner or the keywords to make one, at least schedule=..."
            )
        self.pruner = pruner
        self._data = data
        self.by = by
        self._options = dict(options)

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        state: Mapping[str, Any] | None = None,
        origin: str = "the checkpoint",
    ) -> None:
        """Make the Pruner if need be, go on from its state, and attach the optimizers.

        state: what another Pruner's state_dict() was when the weights were saved.   origin: where it is from.
        Raises FastFisherError where the Pruner or the state belong to other weights.
        """
        model = unwrapped(model)
        if self._options and (self.pruner is None or self.pruner.model is not model):
            self.pruner = Pruner(model, **self._options)
        if self.pruner is None or self.pruner.model is not model:
            raise FastFisherError(
                f"the Pruner was made for another model than the {type(model).__name__} that is trained; make it from "
                f"this object, or give PruningCallback the Pruner's keywords"
            )
        if state is not None:
            self.pruner.load_state_dict(state)
            for name, mask in self.pruner.masks.items():
                weight = model.get_parameter(name).detach()
                if count := int(((weight != 0) & ~mask.to(weight.device)).sum()):
                    raise FastFisherError(
                        f"the masks in {origin} belong to other weights: {count:,} of {name!r} are nonzero where its "
                        f"mask says zero; it is of another run, or its weights were not loaded into the model"
                    )
        if self.pruner.process_group is None and dist.is_available() and dist.is_initialized():
            self.pruner.process_group = dist.group.WORLD
        held = {id(model.get_parameter(name)) for name in self.pruner.masks}
        concerned = [
            optimizer
            for optimizer in optimizers
            if any(id(p) in held for group in optimizer.param_groups for p in group["params"])
        ]
        # where none is concerned, attach says so
        self.pruner.attach(*(concerned or optimizers))

    def step(self, loader: Any, when: float) -> None:
        """Prune if it is due by this epoch or step.   loader: what the loop trains on."""
        if self.pruner is not None:
            self.pruner.step(_Samples(loader) if self._data is None else self._data, **{self.by: when})

    def finish(self) -> None:
        """Let go of the optimizers, with zeros in place."""
        if self.pruner is not None:
            self.pruner.finalize()


class _Samples:
    """The samples of the loop's own loader, in an order that hangs on the Pruner's seed alone.

    The loop's loader is not read: it may be in the middle of an epoch, and it counts its passes and draws its order
    from a state that pruning should not change.  The samples are shuffled by torch's generator, which the Pruner seeds
    anew for every step; an IterableDataset is read from its beginning.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Any:
        loader = self._loader
        dataset, size = (getattr(loader, name, None) for name in ("dataset", "batch_size"))
        if dataset is None or not hasattr(loader, "collate_fn"):
            raise FastFisherError(
                f"no samples to prune by can be taken from a {type(loader).__name__}; give PruningCallback data=..., "
                f"such as a DataLoader"
            )
        if size is None:
            size = getattr(getattr(loader, "batch_sampler", None), "batch_size", 1)
        return iter(
            DataLoader(
                dataset,
                batch_size=size,
                shuffle=not isinstance(dataset, IterableDataset),
                collate_fn=loader.collate_fn,
            )
        )
