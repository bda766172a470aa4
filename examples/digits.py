"""Train a small network on scikit-learn's digits, prune it at several sparsities, and compare with magnitude pruning.

python examples/digits.py [folder]    writes table, plot and the last report; to demo_output/ by default
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastfisher as ff

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels [n] to train on, and the same to test on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels[order])
    return x[:1200], y[:1200], x[1200:], y[1200:]


def network() -> nn.Sequential:
    """A small convolutional network for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def main(folder: Path, epochs: int = 20, sparsities: Sequence[float] = SPARSITIES) -> list[tuple[float, ...]]:
    """Write everything to the folder; rows of sparsity and test accuracy, dense, by magnitude and by WoodFisher."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = network()
    train(model, x, y, epochs)

    def accuracy(model: nn.Module) -> float:
        return float((model(x_test).argmax(1) == y_test).double().mean())

    rows: list[tuple[float, ...]] = []
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        report = ff.prune(
            pruned,
            [(x, y)],  # any iterable of batches, such as a DataLoader
            sparsity=sparsity,
            block_size=128,
            num_grads=1024,
            update="joint",
            eval_fn=accuracy,  # also called for the dense network, and for magnitude pruning at the same sparsity
        )
        rows.append((sparsity, report.dense, report.control, report.pruned))
    report.print()
    report.save(folder)

    table = ["sparsity     dense  magnitude  woodfisher"]
    table += [f"{s:8.2f}  {dense:8.4f}  {magnitude:9.4f}  {ours:10.4f}" for s, dense, magnitude, ours in rows]
    text = "\n".join(table)
    print(f"\nTest accuracy after one shot, without retraining:\n{text}\n\nThe files are in {folder}/")
    (folder / "accuracy.txt").write_text(text + "\n")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="sparsity", ylabel="test accuracy", title="Digits, one-shot pruning")
    for column, label in ((1, "dense"), (2, "magnitude"), (3, "WoodFisher")):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], marker="o", label=label)
    axes.legend()
    figure.savefig(folder / "accuracy.png", dpi=150)
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
