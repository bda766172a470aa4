"""What a run keeps from one pruning to the next: nothing, FishLeg's inverse, or a moving average of the Fisher."""

from __future__ import annotations

from torch import nn

from fastfisher.fisher.blocks import BlockLayout
from fastfisher.prune.average import AveragedFisher
from fastfisher.prune.settings import Settings
from fastfisher.prune.surgeon import Surgeon, conv_groups

Learner = Surgeon | AveragedFisher


def learner_of(model: nn.Module, layout: BlockLayout, settings: Settings) -> Learner | None:
    """A new one, or None where every estimate stands for itself."""
    if settings.method == "fishleg":
        return Surgeon(layout, settings, conv_groups(model, layout.names))
    return AveragedFisher(layout, settings) if settings.fisher_average else None
