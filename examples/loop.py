"""Prune a small network to 97 % while a plain PyTorch loop trains it on scikit-learn's digits: once by WoodTaylor, and
once by magnitude, with the same schedule, epochs and seed.

python examples/loop.py [folder]    a run that was killed goes on where it was; loop_output/ by default
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastfisher as ff


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


def run(folder: Path, method: str, epochs: int, sparsity: float) -> tuple[nn.Module, float]:
    """Train dense for a quarter of the epochs, prune in steps up to three quarters, and train on to recover.

    Returns the pruned network and its accuracy on the test images.
    """
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = ff.CubicSchedule(0.5, sparsity, begin=epochs // 4, end=3 * epochs // 4)
    pruner = ff.Pruner(model, schedule=schedule, method=method, log=folder / "log.jsonl")
    pruner.attach(optimizer)  # from here on zeros stay zero, in weights and in Adam's averages

    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "pruner": pruner}
    start, accuracy = 0, 0.0
    if (folder / "last.pt").exists():
        state = ff.load_checkpoint(folder / "last.pt")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        start, accuracy = state["epoch"], state["accuracy"]

    for epoch in range(start, epochs):
        pruner.step([(x, y)], epoch=epoch)  # any iterable of batches; prunes when the schedule says so
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = float((model(x_test).argmax(1) == y_test).double().mean())
        pruner.record({"accuracy": accuracy}, epoch=epoch)
        states = {name: part.state_dict() for name, part in parts.items()}
        ff.save_checkpoint(
            folder / "last.pt", **states, rng=torch.get_rng_state(), epoch=epoch + 1, accuracy=accuracy
        )
    pruner.finalize()
    ff.save(model, folder / "model.safetensors", report=pruner.reports[-1])
    return model, accuracy


def main(folder: Path, epochs: int = 40, sparsity: float = 0.97) -> dict[str, float]:
    """Both methods, and their accuracy on the test images."""
    found = {}
    for method in ("woodtaylor", "magnitude"):
        model, found[method] = run(folder / method, method, epochs, sparsity)
        weights = [p for p in model.parameters() if p.dim() > 1]
        zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
        print(f"{method:>10}: {zeros:.1%} of the weights are zero, test accuracy {found[method]:.4f}")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1] if sys.argv[1:] else "loop_output")
    main(folder)
    print(f"Both runs on one page: fastfisher report {folder}/*/log.jsonl --html {folder}/page.html")
