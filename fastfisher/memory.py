"""Bytes: how many a text means, how to print them, how many are free, how many were used at most.

torch is imported only where a GPU is asked about, so that reading a saved report stays quick.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfisher.errors import FastFisherError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | float | str) -> int:
    """Bytes of a number or of a text like "8 GB" (10⁹) or "512 MiB" (2²⁰).  Raises FastFisherError on anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].lower() in _UNITS:
            value = float(match[1]) * _UNITS[match[2].lower()]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < float("inf"):
        return int(value)
    raise FastFisherError(
        f'a memory limit must be a positive number of bytes or a text like "8 GB"; got {value!r}'
    )


def format_bytes(count: float) -> str:
    """1234567 -> "1.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that the tensors made in a call take at once, on any device; what kernels take inside is not seen.

    They are counted operator by operator, so that the call takes longer.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    alive: dict[int, int] = {}
    most = 0

    def storages(tree: Any) -> dict[int, Any]:
        found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return {storage._cdata: storage for storage in found}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            given = storages((args, kwargs))
            result = func(*args, **(kwargs or {}))
            for key, storage in storages(result).items():
                if key not in given and key not in alive:
                    alive[key] = storage.nbytes()
                    weakref.finalize(storage, alive.pop, key, None)
            most = max(most, sum(alive.values()))
            return result

    with Counting():
        run()
    return most


def _cgroup_free() -> int | None:
    """What the control group of this process still allows, where there is one with a limit (containers)."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        cache = re.search(
            r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    if not limit.isdecimal():
        return None
    return max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device now, or None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if match is None:
        return None
    allowed = _cgroup_free()
    return min(int(match[1]) * 1024, allowed) if allowed is not None else int(match[1]) * 1024


def peak_bytes(device: torch.device) -> int | None:
    """The most memory this process has used so far: resident on a CPU, allocated by torch on a GPU; None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource  # a Unix module

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
