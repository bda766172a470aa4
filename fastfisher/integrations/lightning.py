"""Gradual pruning in the Trainer of Lightning.

    callback = PruningCallback(schedule=ff.CubicSchedule(0.3, 0.9, begin=1, end=8))
    Trainer(callbacks=[callback]).fit(module, loader)

Epochs and checkpoints are Lightning's; a Pruner does the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastfisher.integrations.loop import PruningLoop
from fastfisher.prune.gradual import Pruner

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        f"PruningCallback needs Lightning ({error}): pip install 'fastfisher[lightning]'"
    ) from error


class PruningCallback(Callback):
    """Prune at the times of a schedule while Lightning trains, and keep zeros at zero in between.

    pruner: a Pruner of the LightningModule, or nothing and the keywords of one, such as schedule and method.
        Batches (input, label) go through the module's forward; anything else needs loss_fn(module, batch).
    data: batches to take gradients from, by default the samples of the training loader.
    by: "epoch" or "step", what the schedule counts; steps are Lightning's global_step.

    All optimizers that hold pruned weights are attached.  The state is part of every checkpoint, and fit(ckpt_path=...)
    ends with the same bits.  `callback.pruner` has masks, reports and sparsity.
    Raises FastFisherError on bad input.
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        *,
        data: Iterable[Any] | None = None,
        by: str = "epoch",
        **options: Any,
    ) -> None:
        super().__init__()
        self._loop = PruningLoop(pruner, data, by, options)
        self._state: dict[str, Any] | None = None  # loaded, until there are weights that it belongs to

    @property
    def pruner(self) -> Pruner | None:
        """The Pruner, from the beginning of training on."""
        return self._loop.pruner

    def state_dict(self) -> dict[str, Any]:
        """That of the Pruner; empty before training."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from this state when training begins."""
        self._state = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make and attach the Pruner; weights and optimizers are loaded already where a run is resumed."""
        self._loop.begin(pl_module, trainer.optimizers, self._state)
        self._state = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Prune if it is due."""
        if self._loop.by == "epoch":
            self._loop.step(trainer.train_dataloader, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prune if it is due."""
        if self._loop.by == "step":
            self._loop.step(trainer.train_dataloader, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizers."""
        self._loop.finish()
