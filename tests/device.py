"""The device that the tests of the ops run on, and how their arguments get there."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("FASTFISHER_TEST_DEVICE", "cpu"))


def on_device(tensor: Tensor) -> Tensor:
    """The tensor on DEVICE with the strides and the misalignment that it has here; on the CPU the tensor itself."""
    if DEVICE.type == tensor.device.type:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
