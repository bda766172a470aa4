"""Gradual pruning in the Trainer of Hugging Face's transformers.

    callback = PruningCallback(schedule=ff.CubicSchedule(0.3, 0.9, begin=1, end=8))
    Trainer(model, args, train_dataset=samples, callbacks=[callback]).train()

Epochs and checkpoints are the Trainer's; a Pruner does the work.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastfisher.errors import FastFisherError
from fastfisher.integrations.loop import PruningLoop
from fastfisher.prune.gradual import Pruner

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"PruningCallback needs the Trainer of transformers ({error}): pip install 'fastfisher[hf]'"
    ) from error

# The file in every checkpoint folder, beside optimizer.pt.
STATE = "pruner.pt"


class PruningCallback(TrainerCallback):
    """Prune at the times of a schedule while the Trainer trains, and keep zeros at zero in between.

    pruner: a Pruner of the Trainer's model, or nothing and the keywords of one, such as schedule and method.
    data: batches to take gradients from, by default the training samples through the Trainer's collator.
    by: "epoch" or "step", what the schedule counts; steps are those of the optimizer.
    checkpoint: the folder of train(resume_from_checkpoint=...), to be told only where it is not in the Trainer's
        output_dir under its own name.

    Every checkpoint folder gets a `pruner.pt`, and a run that goes on from it ends with the same bits.  With
    load_best_model_at_end the masks are those of the best checkpoint, which may be of an earlier, less sparse time.
    transformers 5 renames the weights of some models (ViT) in checkpoints, and its Trainer then resumes without them:
    make the model by from_pretrained(checkpoint) there.  Masks that do not fit the weights are refused.
    `callback.pruner` has masks, reports and sparsity.
    Raises FastFisherError on bad input.
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        *,
        data: Iterable[Any] | None = None,
        by: str = "epoch",
        checkpoint: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self._loop = PruningLoop(pruner, data, by, options)
        self._checkpoint = checkpoint

    @property
    def pruner(self) -> Pruner | None:
        """The Pruner, from the beginning of training on."""
        return self._loop.pruner

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Make and attach the Pruner; weights and optimizer are loaded already where a run is resumed."""
        saved, path = None, self._folder(args, state) / STATE
        if state.global_step:
            if path.is_file():
                saved = _read(path)
            else:
                warnings.warn(
                    f"training goes on at step {state.global_step}, but there is no {str(path)!r}: zeros are held and "
                    f"the schedule is taken up here; where the checkpoint is elsewhere, give PruningCallback "
                    f"checkpoint=...",
                    stacklevel=2,
                )
        self._loop.begin(model, [optimizer], saved, repr(str(path)))

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any
    ) -> None:
        """Prune if it is due."""
        if self._loop.by == "epoch":
            # a run resumed within an epoch begins it a second time, with a fraction
            self._loop.step(train_dataloader, int(state.epoch or 0))

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any
    ) -> None:
        """Prune if it is due."""
        if self._loop.by == "step":
            self._loop.step(train_dataloader, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state into the checkpoint."""
        # the trials of a search keep theirs in other folders, and are not resumed
        if self.pruner is not None and args.should_save and not state.is_hyper_param_search:
            _write(self.pruner, _own_folder(args, state) / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the masks of the best checkpoint if its weights were loaded, and let go of the optimizer."""
        if args.load_best_model_at_end and state.best_model_checkpoint and self.pruner is not None:
            path = Path(state.best_model_checkpoint) / STATE
            if path.is_file():
                self.pruner.load_state_dict(_read(path))
        self._loop.finish()

    def _folder(self, args: Any, state: Any) -> Path:
        """The checkpoint that a run is resumed from, which the Trainer tells no callback."""
        if self._checkpoint is not None:
            if not Path(self._checkpoint).is_dir():
                raise FastFisherError(f"checkpoint: there is no folder {str(self._checkpoint)!r}")
            return Path(self._checkpoint)
        return _own_folder(args, state)


def _own_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _write(pruner: Pruner, path: Path) -> None:
    """At once or not at all."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        torch.save(pruner.state_dict(), beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
