"""Floating-point operations of one forward pass, in all and per layer, two per multiply-add."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastfisher.fisher.batches import Samples
from fastfisher.fisher.objective import Objective


def count_flops(objective: Objective, model: nn.Module, samples: Samples) -> tuple[float, dict[str, float]]:
    """Operations of a forward per sample: the total, and those of each module without children by its name."""
    counter = FlopCounterMode(display=False)
    with counter:
        objective.batch_loss(samples)
    counts = {
        name: float(sum(ops.values())) / len(samples) for name, ops in counter.get_flop_counts().items()
    }
    # the counter names a module by the root's class and the path below it, where the model is the attribute `model`
    named = {name.partition(".model.")[2]: count for name, count in counts.items() if ".model." in name}
    leaves = {
        name for name, module in model.named_modules() if name and not any(True for _ in module.children())
    }
    return counts.get("Global", 0.0), {name: count for name, count in named.items() if name in leaves}
