"""Models whose parameters are spread over processes (FSDP2, DTensor): a process's share, or all of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is spread over processes."""
    return dist.is_available() and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory and without a graph."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined,no-any-return]


def count_true(mask: Tensor) -> int:
    """How many entries of a bool tensor are True, on all processes that hold it; these call together."""
    total = mask.sum()
    return int(total.full_tensor() if is_sharded(total) else total)  # type: ignore[attr-defined]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters and no hooks of FSDP inside; afterwards each process holds its share again, of the new values.

    On an error the shares are as they were.   Every process of the model enters and leaves together, and holds all
    parameters meanwhile.
    """
    modules = list(model.modules())
    for module in modules:
        if dist.is_available() and isinstance(module, FSDPModule):
            module.reshard()
    shares = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    if not shares:
        yield
        return
    whole: dict[int, nn.Parameter] = {}
    for _, _, parameter in shares:
        if id(parameter) not in whole:
            full = parameter.detach().full_tensor()  # type: ignore[attr-defined]
            if full.data_ptr() == local(parameter).data_ptr():  # one process holds it all
                full = full.clone()
            whole[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    hooks = [_without_fsdp(module._forward_pre_hooks) for module in modules]
    hooks += [_without_fsdp(module._forward_hooks) for module in modules]
    try:
        for module, name, parameter in shares:
            module._parameters[name] = whole[id(parameter)]
        yield
        for _, _, parameter in shares:
            _scatter(whole[id(parameter)].detach(), parameter)
    finally:
        for module, name, parameter in shares:
            module._parameters[name] = parameter
        for registry, taken in hooks:
            others = dict(registry)
            registry.clear()
            registry.update(taken | others)


def _without_fsdp(registry: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Take the hooks of FSDP out of a module's; returns the registry and what was taken."""
    taken = {
        key: hook
        for key, hook in registry.items()
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
    }
    for key in taken:
        del registry[key]
    return registry, taken


def _scatter(value: Tensor, parameter: nn.Parameter) -> None:
    """This process's share of a whole value, into a parameter that is spread."""
    share: Any = parameter
    spread: Any = distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None)
    local(parameter).copy_(local(spread))
