"""Memory for states: large, written once from end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.kernels import native


def empty_state(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with anything in it, on the CPU in huge pages where the system grants them."""
    state = torch.empty(shape, dtype=dtype, device=device)
    native.advise_huge_pages(state)
    return state


def zero_state(state: Tensor) -> Tensor:
    """Write zeros into a contiguous state and return it.

    torch's own zero_ would wake its thread pool, whose idle threads then spin on the cores that the kernels need.
    """
    if not native.fill_zero(state):
        state.zero_()
    return state
