"""Plain 2:4 zeros -> the weights of torch.sparse.to_sparse_semi_structured, whose products skip them on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    to_sparse_semi_structured,
)

from fastfisher.errors import FastFisherError


@dataclass
class SemiStructured:
    """converted: names of the weights that are sparse now.   left: name -> why it stays as it was."""

    converted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} weights converted, {len(self.left)} left"]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.left.items())])


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """weight -> its 2:4 form, in place, of every nn.Linear on a GPU with at most 2 nonzeros in 4 consecutive inputs.

    It is for running the model: the weights lose requires_grad, and ff.save does not take them, so save first.
    What does not fit is left as it was, with the reason: weights of another dtype than float16 and bfloat16, of a shape
    that torch's kernels do not take, without the pattern, or shared with other layers.
    Raises FastFisherError, with nothing changed, where no layer fits, as on a CPU, or torch refuses a weight.
    """
    found = SemiStructured()
    users = Counter(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    new: list[tuple[nn.Linear, nn.Parameter]] = []
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        why = _why_not(module)
        if why is None and users[id(module.weight)] > 1:
            why = "it is shared with another layer"
        if why is not None:
            found.left[name] = why
            continue
        try:
            sparse = to_sparse_semi_structured(module.weight.detach())
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise FastFisherError(f"torch does not convert {name!r}: {reason:.200}") from error
        new.append((module, nn.Parameter(sparse, requires_grad=False)))
        found.converted.append(name)
    if not new:
        first = next(iter(found.left.items()), None)
        what = "the model has no nn.Linear" if first is None else f"first, {first[0]!r}: {first[1]}"
        raise FastFisherError(f"no weight can be made semi-structured; {what}")
    for module, parameter in new:
        module.weight = parameter
    return found


def _why_not(module: nn.Linear) -> str | None:
    """Why a layer cannot take a 2:4 weight, or None."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is no plain nn.Linear and may use its weight otherwise"
    weight = module.weight
    if isinstance(weight, SparseSemiStructuredTensor):
        return "it is semi-structured already"
    if not weight.is_cuda:
        return f"it is on {weight.device}, and torch has 2:4 products on CUDA GPUs only; call model.cuda()"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        # CUTLASS takes float32 as 1:2, and drops one of two neighbours without a word
        return f"it is {weight.dtype}, and 2:4 products need float16 or bfloat16; call model.half()"
    rows, cols = _multiples(weight.dtype)
    if not weight.numel() or weight.shape[0] % rows or weight.shape[1] % cols:
        return (
            f"its shape {list(weight.shape)} is no multiple of [{rows}, {cols}], which torch's kernels need"
        )
    if not weight.is_contiguous():
        return "it does not lie contiguously in memory"
    too_many = _groups_above_two(weight.detach())
    if too_many:
        return f"{too_many:,} of its {weight.numel() // 4:,} groups of 4 inputs hold more than 2 nonzeros"
    return None


def _multiples(dtype: torch.dtype) -> tuple[int, int]:
    """Of which outputs and inputs must be multiples, in the library that torch will call."""
    kind = (
        SparseSemiStructuredTensorCUTLASS
        if SparseSemiStructuredTensor._FORCE_CUTLASS
        else SparseSemiStructuredTensorCUSPARSELT
    )
    needed = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return needed.sparse_min_rows, needed.sparse_min_cols


def _groups_above_two(weight: Tensor) -> int:
    """How many groups of 4 consecutive inputs break the pattern.   weight: [outputs, inputs], inputs % 4 == 0."""
    return int(((weight != 0).view(-1, 4).sum(dim=1) > 2).sum())
