"""Running statistics of BatchNorm layers for the weights as they are now: model + data -> new buffers.

Pruning moves the means and variances of what the layers see, and the stored ones are those of the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import SampleReader


def reestimate_batchnorm(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_samples: int | None = None,
    batch_size: int = 128,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Replace running mean and variance of every BatchNorm layer by those of the data; returns how many layers.

    data: batches (input, label) or dicts, as for `prune`; regrouped into batches of batch_size.
    num_samples: of the data to use; None for all.
    forward: forward(model, batch) calls the model; by default model(input) or model(**dict).
    Every batch counts alike.  All other layers are in eval mode meanwhile, weights and gradients stay as they are.  On
    any error the statistics are as they were.   Raises FastFisherError on bad input or where there is no sample.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if num_samples is not None and num_samples < 1:
        raise FastFisherError(f"num_samples must be None or at least 1; got {num_samples}")
    if batch_size < 2:
        raise FastFisherError(f"batch_size must be at least 2, for a variance; got {batch_size}")
    if not layers:
        return 0
    flags = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    old = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    done = False
    try:
        for module, _ in flags:
            module.training = False
        for layer in layers:
            layer.training = True
            layer.momentum = None  # the plain mean over the batches
            layer.reset_running_stats()
        _run(model, data, num_samples, batch_size, forward or _call)
        done = True
    finally:
        for module, training in flags:
            module.training = training
        for layer, momentum, buffers in zip(layers, momenta, old, strict=True):
            layer.momentum = momentum
            for name, buffer in layer.named_buffers():
                if not done or name == "num_batches_tracked":
                    buffer.copy_(buffers[name])
    return len(layers)


def _run(
    model: nn.Module,
    data: Iterable[Any],
    num_samples: int | None,
    batch_size: int,
    forward: Callable[[nn.Module, Any], Any],
) -> None:
    """Call the model on the data, without gradients."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    reader = SampleReader(data, device)
    with torch.no_grad():
        for samples in reader.groups(batch_size, num_samples):
            if len(samples) > 1 or reader.seen == 1:  # one sample left over has no variance
                forward(model, samples.batch())
    if not reader.seen:
        raise FastFisherError("the data yield no sample to take statistics from")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)
