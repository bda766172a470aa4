"""Tensors that wait outside the memory of the device: in pinned CPU memory, or in a file that is mapped into memory.

The operating system writes mapped pages to the file and drops them when memory runs short.  A file has no name once it
is mapped, so nothing of it is left however the process ends.  It lies in the folder of temporary files (TMPDIR).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastfisher.errors import DoesNotFitError
from fastfisher.memory import format_bytes, free_bytes

PROBE_BYTES = 32 << 20


def place_for(nbytes: int, device: torch.device) -> str | None:
    """Where so many bytes can wait: "memory", for a GPU alone, or "file"; None where there is room in neither."""
    free = free_bytes(torch.device("cpu"))
    if device.type == "cuda" and free is not None and nbytes <= free // 2:
        return "memory"
    return "file" if nbytes <= shutil.disk_usage(tempfile.gettempdir()).free else None


def waiting(shape: tuple[int, ...], dtype: torch.dtype, place: str) -> Tensor:
    """A tensor outside the memory of the device, of any contents.

    Raises DoesNotFitError where the disk is full.
    """
    size = torch.Size(shape).numel()
    if place == "memory":
        return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    nbytes = max(size * dtype.itemsize, 1)
    handle, path = tempfile.mkstemp(prefix="fastfisher-")
    try:
        # a mapped page without room on the disk would end the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, nbytes)
        else:
            os.truncate(handle, nbytes)
        return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise DoesNotFitError(
            f"{format_bytes(nbytes)} do not fit into {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger "
            f"folder, or raise memory_limit"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)


def put_away(tree: Any, place: str) -> Any:
    """A copy of nested mappings and lists whose tensors wait outside the memory of the device."""
    if isinstance(tree, Tensor):
        return waiting(tuple(tree.shape), tree.dtype, place).copy_(tree)
    if isinstance(tree, Mapping):
        return {key: put_away(value, place) for key, value in tree.items()}
    if isinstance(tree, list):
        return [put_away(value, place) for value in tree]
    return tree


def taken_back(tree: Any, device: torch.device) -> Any:
    """The same with its tensors on the device; on a CPU they are read where they lie."""
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: taken_back(value, device) for key, value in tree.items()}
    if isinstance(tree, list):
        return [taken_back(value, device) for value in tree]
    return tree


def seconds_per_byte(place: str, device: torch.device) -> tuple[float, float]:
    """Of putting away and of taking back, measured on 32 MiB."""
    source = torch.ones(PROBE_BYTES // 4, device=device)
    start = time.perf_counter()
    there = put_away(source, place)
    written = time.perf_counter()
    float(taken_back(there, device).sum())
    read = time.perf_counter()
    return (written - start) / PROBE_BYTES, (read - written) / PROBE_BYTES
