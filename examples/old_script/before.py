"""A pruning script as there are many: train, gather the gradients of single samples, prune by optimal brain surgery.

before.py and after.py differ in one line, the import of EmpiricalBlockFisherInverse.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from original import EmpiricalBlockFisherInverse

NUM_GRADS, BLOCK_SIZE, DAMP, SPARSITY = 512, 50, 1e-4, 0.8


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def prune(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Remove the weights of least w^2 / (2 [F^-1]_ii) and correct the others; the seconds spent with the inverse."""
    params = [p for p in model.parameters() if p.dim() > 1]
    finvs = [EmpiricalBlockFisherInverse(NUM_GRADS, BLOCK_SIZE, p.numel(), DAMP, p.device) for p in params]
    seconds = 0.0
    for i in range(NUM_GRADS):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        start = time.perf_counter()
        for g, finv in zip(grads, finvs, strict=True):
            finv.add_grad(g.flatten())
        seconds += time.perf_counter() - start

    start = time.perf_counter()
    diags = [finv.diag().view(p.shape) for p, finv in zip(params, finvs, strict=True)]
    scores = [p.detach() ** 2 / (2 * diag) for p, diag in zip(params, diags, strict=True)]
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.kthvalue(round(SPARSITY * len(every))).values
    for p, finv, diag, score in zip(params, finvs, diags, scores, strict=True):
        mask = score > threshold
        p.data -= finv.mul((p.data * ~mask / diag).flatten()).view(p.shape)
        p.data *= mask
    return seconds + time.perf_counter() - start


def main(epochs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    model = train(x[:1200], y[:1200], epochs)
    seconds = prune(model, x[:1200], y[:1200])
    accuracy = float((model(x[1200:]).argmax(1) == y[1200:]).double().mean())
    print(f"{seconds:.2f} s with the inverse Fisher; {SPARSITY:.0%} zeros, test accuracy {accuracy:.4f}")
    return model


if __name__ == "__main__":
    main()
