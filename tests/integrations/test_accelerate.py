"""The Pruner in a loop of accelerate, as it is: prepared model and optimizer, and its state in their checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfisher as ff
from tests.prune.models import classifier, images
from tests.prune.test_masks import assert_zero

accelerate = pytest.importorskip("accelerate")

RAMP = ff.CubicSchedule(0.3, 0.9, begin=1, end=4)
EPOCHS = 6


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Accelerate keeps its precision for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """A script of accelerate's: prepare, register, and train some epochs."""

    def __init__(self, *, compiled: bool = False, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.plain = classifier()
        model = torch.compile(self.plain, backend="eager") if compiled else self.plain
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(TensorDataset(*images(48)), 16, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.pruner = ff.Pruner(self.model, schedule=RAMP, num_grads=32, block_size=16, strict=True)
        self.pruner.attach(self.optimizer)
        self.accelerator.register_for_checkpointing(self.pruner)

    def train(self, epochs: range) -> list[float]:
        found = []
        for epoch in epochs:
            torch.manual_seed(epoch)
            self.pruner.step(self.loader, epoch=epoch)
            self.model.train()
            for inputs, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.cross_entropy(self.model(inputs), labels)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.pruner.sparsity:
                    assert_zero(self.plain, self.pruner.masks, self.optimizer.optimizer)
            found.append(self.pruner.sparsity)
        return found


def same(one: nn.Module, two: nn.Module) -> bool:
    theirs = two.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}, {"compiled": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_sparsity_is_reached_and_held(options: dict[str, Any]) -> None:
    loop = Loop(**options)
    assert type(loop.optimizer) is not torch.optim.AdamW
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(its mask says zero|no optimizer is attached)")
        assert loop.train(range(EPOCHS)) == pytest.approx([0, *map(RAMP, range(1, EPOCHS))], abs=1e-3)
        loop.pruner.finalize()
    assert not loop.optimizer.optimizer._optimizer_step_post_hooks
    assert list(loop.plain.state_dict()) == list(classifier().state_dict())


def test_a_loaded_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = Loop()
    whole.train(range(3))
    whole.accelerator.save_state(str(tmp_path))
    whole.train(range(3, EPOCHS))
    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.pruner.sparsity == pytest.approx(RAMP(2), abs=1e-3)
    resumed.train(range(3, EPOCHS))
    assert len(resumed.pruner.reports) == len(whole.pruner.reports) == 4
    assert all(torch.equal(mask, resumed.pruner.masks[name]) for name, mask in whole.pruner.masks.items())
    assert same(whole.plain, resumed.plain)


def test_hold_sparsity_takes_a_prepared_optimizer() -> None:
    loop = Loop()
    loop.pruner.finalize()
    ff.prune(loop.model, None, sparsity=0.5, method="magnitude")
    held = ff.hold_sparsity(loop.model, loop.optimizer)
    assert held.optimizers == [loop.optimizer.optimizer]
    loop.train(range(1))
    assert_zero(loop.plain, held.masks, loop.optimizer.optimizer)
