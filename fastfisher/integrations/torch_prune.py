"""Plain zeros in plain weights <-> the masks of torch.nn.utils.prune, weight = weight_orig * weight_mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fastfisher.errors import FastFisherError
from fastfisher.prune.targets import find_targets


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, name in it) of every parameter under a mask, each module once."""
    for prefix, module in model.named_modules():
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        for original, _ in module.named_parameters(recurse=False):
            name = original.removesuffix("_orig")
            if name != original and f"{name}_mask" in buffers:
                yield f"{prefix}.{name}" if prefix else name, module, name


def to_torch_masks(
    model: nn.Module, targets: str | Sequence[str] | None = None, ignore: str | Sequence[str] | None = None
) -> list[str]:
    """weight -> weight_orig and weight_mask, which is 0 where the weight is, of every target that holds a zero.

    The model is changed in place; parameters stay the same objects, under their new names, and tied ones stay tied.
    targets, ignore: as in `prune`, by default the weights of linear and convolution layers.
    Returns the names of the tensors that got a mask.   Raises FastFisherError where the model holds masks already, and
    as `prune` does for targets.
    """
    for full_name, _, _ in _masked(model):
        raise FastFisherError(f"{full_name!r} has a mask already; ff.from_torch_masks(model) makes it plain")
    found = find_targets(model, targets, ignore)
    names = []
    masked: set[tuple[int, str]] = set()
    for first, aliases in found.aliases.items():
        mask = found.parameters[first].detach() != 0
        if bool(mask.all()):
            continue
        for alias in aliases:
            prefix, _, name = alias.rpartition(".")
            module = model.get_submodule(prefix)
            if (id(module), name) not in masked:
                masked.add((id(module), name))
                torch_prune.custom_from_mask(module, name, mask)
                names.append(alias)
    return names


def from_torch_masks(model: nn.Module) -> list[str]:
    """weight_orig and weight_mask -> weight, exactly 0 where the mask is; hooks and masks are gone.

    The model is changed in place; parameters stay the same objects in the same memory.
    Returns the names of the tensors that had a mask.   Raises FastFisherError, before anything is changed, where one
    parameter is under different masks in several modules.
    """
    found = list(_masked(model))
    masks: dict[int, tuple[str, Tensor]] = {}
    for full_name, module, name in found:
        mask = getattr(module, f"{name}_mask")
        first, other = masks.setdefault(id(getattr(module, f"{name}_orig")), (full_name, mask))
        if not torch.equal(mask, other):
            raise FastFisherError(f"{first!r} and {full_name!r} are one parameter under different masks")
    for _, module, name in found:
        parameter, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
        values = parameter.data
        # torch multiplies by the mask, which leaves -0.0 and turns infinite weights into NaN
        values.masked_fill_(mask == 0, 0)
        torch_prune.remove(module, name)
        parameter.data = values
    return [full_name for full_name, _, _ in found]
