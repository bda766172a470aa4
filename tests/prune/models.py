"""Small networks and data that the pipeline's tests share, and the picture of a model that must not change."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def classifier(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolution (plain and grouped), batch norm with its own statistics, dropout, two linear layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8 * 9, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model.to(dtype)


def images(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs [count, 2, 5, 5] and labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 5, 5, generator=generator, dtype=torch.float32).to(dtype)
    return inputs, torch.randint(3, (count,), generator=generator)


def batches(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The samples in batches of `size`, the last one short."""
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def train(model: nn.Module, inputs: Tensor, labels: Tensor, *, epochs: int, seed: int = 0) -> None:
    """A few epochs of Adam in batches of 64."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a call may not change: bits, identities, flags, gradients, generator state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {
            name: copy.deepcopy(t.detach()).contiguous().view(-1).view(torch.uint8)
            for name, t in tensors.items()
        },
        "places": {name: (id(t), t.data_ptr(), t.dtype, t.stride()) for name, t in tensors.items()},
        "training": [module.training for module in model.modules()],
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in model.named_parameters()},
        "generator": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any], *, weights: bool = True) -> None:
    """Two pictures agree bit for bit; without `weights` the parameters' bits may differ."""
    for key in ("places", "training", "requires_grad"):
        assert before[key] == after[key], key
    assert torch.equal(before["generator"], after["generator"])
    for name, grad in before["grads"].items():
        assert (grad is None) == (after["grads"][name] is None), name
        assert grad is None or torch.equal(grad, after["grads"][name]), name
    for name, bits in before["bits"].items():
        if weights or name not in before["grads"]:
            assert torch.equal(bits, after["bits"][name]), name
