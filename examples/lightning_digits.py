"""Prune a small network to 95 % while Lightning's Trainer trains it on scikit-learn's digits.

python examples/lightning_digits.py [folder]    goes on from the last checkpoint there; lightning_output/ by default

It needs pip install 'fastfisher[lightning]' scikit-learn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastfisher as ff
from fastfisher.integrations.lightning import PruningCallback


class Classifier(LightningModule):
    """A small convolutional network for images of 8 x 8; nothing in it knows of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images [n, 1, 8, 8], [n, 10]."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch (images, labels)."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The share of a batch that is classified rightly."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the callback attaches itself to it."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(folder: Path, epochs: int = 24) -> tuple[PruningCallback, float]:
    """Train, prune from a quarter of the epochs on, leave the last quarter to recovery; the accuracy at the end."""
    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    train, test = random_split(TensorDataset(x, torch.tensor(labels)), [1200, len(x) - 1200])

    callback = PruningCallback(
        schedule=ff.CubicSchedule(0.5, 0.95, begin=epochs // 4, end=3 * epochs // 4),
        method="woodtaylor",
        log=folder / "log.jsonl",
    )
    trainer = Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[callback, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        accelerator="cpu",
    )
    last = folder / "last.ckpt"
    trainer.fit(
        Classifier(),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(test, batch_size=len(test)),
        ckpt_path=last if last.exists() else None,
    )
    return callback, float(trainer.callback_metrics["accuracy"])


if __name__ == "__main__":
    callback, accuracy = main(Path(sys.argv[1] if sys.argv[1:] else "lightning_output"))
    if callback.pruner is not None:
        print(f"{callback.pruner.sparsity:.1%} of the weights are zero, test accuracy {accuracy:.4f}")
