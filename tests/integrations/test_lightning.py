"""The callback in Lightning's Trainer: real runs, whole, and interrupted and resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastfisher as ff
from fastfisher import runlog
from fastfisher.errors import FastFisherError
from tests.prune.models import classifier, images

lightning = pytest.importorskip("lightning.pytorch")

from fastfisher.integrations.lightning import PruningCallback  # noqa: E402

RAMP = ff.CubicSchedule(0.3, 0.9, begin=1, end=4)
EPOCHS = 6
STEPS = 3  # in one epoch


class Interrupted(Exception):
    """The run was killed."""


class Kill(lightning.Callback):
    """Ends the process, as it were, at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


class Seeded(lightning.Callback):
    """Seeds every step, as Lightning keeps no generator's state in its checkpoints."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Watch(lightning.Callback):
    """Collects the sparsity at the end of every epoch, and asserts the zeros after every step."""

    def __init__(self, callback: PruningCallback) -> None:
        self.callback = callback
        self.sparsities: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        assert_zero(pl_module, self.callback)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.sparsities.append(sparsity(pl_module, self.callback))


class Classifier(lightning.LightningModule):
    """The network of the other tests, with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SeveralLoaders(Classifier):
    """Takes a dictionary of batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["one"], batch_idx)


class TwoOptimizers(Classifier):
    """Weights in one, biases in the other, which holds nothing that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        flat, deep = ([p for p in self.parameters() if (p.dim() == 1) is one] for one in (True, False))
        return torch.optim.SGD(flat, lr=1e-2), torch.optim.Adam(deep, lr=1e-2)


def loader(shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(*images(48)), 16, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Any, **changes: Any) -> Any:
    return lightning.Trainer(
        **{
            "default_root_dir": folder,
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **changes,
        },
        callbacks=list(callbacks),
    )


def pruning(**changes: Any) -> PruningCallback:
    return PruningCallback(**{"schedule": RAMP, "num_grads": 32, "block_size": 16, **changes})


def sparsity(model: nn.Module, callback: PruningCallback) -> float:
    weights = [model.get_parameter(name) for name in callback.pruner.masks]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def assert_zero(model: nn.Module, callback: PruningCallback) -> None:
    for name, mask in callback.pruner.masks.items():
        assert not bool(model.get_parameter(name).detach()[~mask].any()), name


@pytest.mark.parametrize("kind", [Classifier, TwoOptimizers])
def test_sparsity_is_reached_and_held(tmp_path: Path, kind: type[nn.Module]) -> None:
    model, callback = kind(), pruning(strict=True)
    watch = Watch(callback)
    run = trainer(tmp_path, callback, watch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(its mask says zero|schedule ends)")
        run.fit(model, loader())
    assert watch.sparsities == pytest.approx([0, *map(RAMP, (1, 2, 3, 4, 5))], abs=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert list(model.state_dict()) == list(kind().state_dict())


def test_pruning_changes_nothing_else_of_a_run(tmp_path: Path) -> None:
    """The order of the samples and the draws of dropout are those of a run without it."""
    plain, model = Classifier(), Classifier()
    callback = pruning(schedule=[(1, 1e-9)])  # takes gradients, and then removes no weight
    torch.manual_seed(0)
    trainer(tmp_path).fit(plain, loader())
    torch.manual_seed(0)
    trainer(tmp_path, callback).fit(model, loader())
    assert callback.pruner.reports[0].effective_grads
    assert [report.num_zeros for report in callback.pruner.reports] == [0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, by: str) -> None:
    schedule = RAMP if by == "epoch" else ff.LinearSchedule(0.2, 0.8, begin=2, end=14, every=4)
    options: dict[str, Any] = {"schedule": schedule, "by": by}
    whole, first = Classifier(), pruning(**options)
    trainer(tmp_path, first, Seeded()).fit(whole, loader(shuffle=False))
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(Interrupted):
        trainer(
            tmp_path, pruning(**options), saving, Seeded(), Kill(3 * STEPS + 1), enable_checkpointing=True
        ).fit(Classifier(), loader(shuffle=False))
    resumed, second = Classifier(), pruning(strict=True, **options)
    trainer(tmp_path, second, Seeded()).fit(
        resumed, loader(shuffle=False), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert len(second.pruner.reports) == len(first.pruner.reports) == 4
    assert all(torch.equal(mask, second.pruner.masks[name]) for name, mask in first.pruner.masks.items())
    theirs = resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.state_dict().items())


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, pruning(), max_epochs=2)
    with pytest.warns(UserWarning, match="schedule ends at a sparsity of 0.9, but training ended at 0.3"):
        run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(FastFisherError, match="the state was saved with block_size=16; this Pruner has 8"):
        trainer(tmp_path, pruning(block_size=8)).fit(Classifier(), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_a_pruner_made_before_a_loss_and_data_of_its_own(tmp_path: Path) -> None:
    model = SeveralLoaders()
    read = []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        read.append(True)
        return F.cross_entropy(module.net(batch["image"]), batch["label"])

    inputs, labels = images(32)
    gradual = ff.Pruner(model, schedule=[(0, 0.5)], num_grads=32, block_size=16, loss_fn=loss_fn)
    callback = PruningCallback(gradual, data=[{"image": inputs, "label": labels}])
    data = {"one": loader()}  # several loaders tell no samples, and here are not asked for any
    trainer(tmp_path, callback, max_epochs=1).fit(model, data)
    assert callback.pruner is gradual
    assert read
    assert gradual.sparsity == pytest.approx(0.5, abs=1e-3)
    assert_zero(model, callback)
    with pytest.raises(
        FastFisherError, match=r"no samples to prune by can be taken from a dict; give PruningCallback data="
    ):
        trainer(tmp_path, pruning(schedule=[(0, 0.6)]), max_epochs=1).fit(model, data)


def test_the_example_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from examples import lightning_digits

    train = lightning_digits.Classifier.training_step

    def killed(self: Any, *batch: Any) -> Tensor:
        if self.current_epoch == 5:
            raise Interrupted
        return train(self, *batch)

    monkeypatch.setattr(lightning_digits.Classifier, "training_step", killed)
    with pytest.raises(Interrupted):
        lightning_digits.main(tmp_path, epochs=8)
    monkeypatch.setattr(lightning_digits.Classifier, "training_step", train)
    callback, accuracy = lightning_digits.main(tmp_path, epochs=8)
    assert callback.pruner.sparsity == pytest.approx(0.95, abs=1e-3)
    assert accuracy > 0.8
    assert [when for when, _ in runlog.read(tmp_path / "log.jsonl").steps] == [2, 3, 4, 5, 6]
