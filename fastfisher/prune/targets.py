"""Which parameters are pruned: names, module names and globs -> tensors, each stored once, none of them frozen.

By default the targets are the weights of Linear and convolution layers, and of the Conv1D of transformers.
A pattern, with or without ".weight", picks
* the parameter of exactly that name, whatever its kind;
* otherwise every weight (two or more dimensions) whose own name, module, or enclosing module it names or globs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn

from fastfisher.errors import FastFisherError
from fastfisher.fisher.conv1d import is_conv1d
from fastfisher.fisher.objective import parameter_aliases
from fastfisher.fisher.sharded import local
from fastfisher.prune.patterns import Pattern, input_dims

PRUNED_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass
class Targets:
    """parameters: first name -> parameter, in the model's order.   aliases: first name -> all its names.

    frozen: names that were matched and are left alone because they do not require a gradient.
    unfit: names that cannot take the pattern, with the reason.   last: name -> dimension along which the pattern runs.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def take(self, model: nn.Module, pattern: Pattern) -> None:
        """Leave out what cannot take the pattern.  Raises FastFisherError where nothing is left."""
        if pattern.size == 1:
            return
        dims = input_dims(model, self.aliases)
        for name, dim in dims.items():
            reason = pattern.why_not(self.parameters[name].shape, dim)
            if reason is None:
                self.last[name] = dim
            else:
                self.unfit[name] = reason
                del self.parameters[name], self.aliases[name]
        if not self.parameters:
            name, reason = next(iter(self.unfit.items()))
            raise FastFisherError(
                f"none of {len(self.unfit)} tensors can take the pattern {pattern.name!r}; {name!r}: {reason}"
            )

    @property
    def num_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def _without_weight(name: str) -> str:
    return name.removesuffix(".weight")


def _picks(pattern: str, name: str, parameter: nn.Parameter) -> bool:
    if pattern == name:
        return True
    if parameter.dim() < 2:
        return False
    pattern = _without_weight(pattern)
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _as_patterns(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _check_matched(argument: str, patterns: list[str], parameters: dict[str, nn.Parameter]) -> None:
    for pattern in patterns:
        if any(_picks(pattern, name, parameter) for name, parameter in parameters.items()):
            continue
        names = [_without_weight(name) for name, parameter in parameters.items() if parameter.dim() >= 2]
        close = difflib.get_close_matches(_without_weight(pattern), names, n=3, cutoff=0.0)
        raise FastFisherError(
            f"{argument}={[pattern]} matched none of {len(parameters)} tensors. Closest: {', '.join(map(repr, close))}."
        )


def _check_memory(targets: Targets, everything: dict[str, nn.Parameter]) -> None:
    """Refuse a target that shares bytes with another parameter without being the same tensor."""
    spans = []
    for name, parameter in everything.items():
        held = local(parameter)
        if held.numel():
            extent = sum((n - 1) * s for n, s in zip(held.shape, held.stride(), strict=True)) + 1
            start = held.data_ptr()
            spans.append((str(parameter.device), start, start + extent * parameter.element_size(), name))
    spans.sort()
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(spans):
        if (
            device == other_device
            and start < stop
            and (name in targets.parameters or other in targets.parameters)
        ):
            raise FastFisherError(
                f"{name!r} and {other!r} share memory in different layouts; name one of them in ignore"
            )


def find_targets(
    model: nn.Module, targets: str | Sequence[str] | None = None, ignore: str | Sequence[str] | None = None
) -> Targets:
    """The parameters to prune.

    Raises FastFisherError on a pattern that matches nothing (with the nearest names), on targets that are all frozen,
    lie on several devices, are not floating point, or overlap in memory.
    """
    if not isinstance(model, nn.Module):
        raise FastFisherError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    everything = dict(model.named_parameters(remove_duplicate=False))
    if not everything:
        raise FastFisherError(f"the model {type(model).__name__} has no parameters")
    wanted = None if targets is None else _as_patterns(targets)
    unwanted = [] if ignore is None else _as_patterns(ignore)
    _check_matched("targets", wanted or [], everything)
    _check_matched("ignore", unwanted, everything)
    modules = dict(model.named_modules(remove_duplicate=False))

    def is_wanted(name: str) -> bool:
        if wanted is None:
            module, _, local = name.rpartition(".")
            owner = modules[module]
            return local == "weight" and (isinstance(owner, PRUNED_LAYERS) or is_conv1d(owner))
        return any(_picks(pattern, name, everything[name]) for pattern in wanted)

    found = Targets()
    for first, names in parameter_aliases(model).items():
        if not any(map(is_wanted, names)) or any(
            _picks(p, n, everything[n]) for n in names for p in unwanted
        ):
            continue
        if not everything[first].numel():
            continue
        if not all(everything[name].requires_grad for name in names):
            found.frozen.append(first)
            continue
        found.parameters[first] = everything[first]
        found.aliases[first] = names
    if not found.parameters:
        if found.frozen:
            raise FastFisherError(
                f"all {len(found.frozen)} matched tensors are frozen (requires_grad=False); "
                f"the first is {found.frozen[0]!r}"
            )
        raise FastFisherError(
            f"none of the {len(everything)} tensors is to be pruned; give targets=... "
            f"(by default the weights of Linear and convolution layers)"
        )
    for name, parameter in found.parameters.items():
        if not parameter.is_floating_point():
            raise FastFisherError(
                f"{name!r} has dtype {parameter.dtype}; only floating-point tensors can be pruned"
            )
    devices = {str(parameter.device): name for name, parameter in found.parameters.items()}
    if len(devices) > 1:
        places = " and ".join(f"{device} ({name!r})" for device, name in devices.items())
        raise FastFisherError(f"the targets lie on {places}; move the model to one device")
    _check_memory(found, {first: everything[first] for first in parameter_aliases(model)})
    return found
