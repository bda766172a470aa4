"""Peak memory of a build above the gradients it reads, against the state it leaves: run in a process of its own.

The kernel's high-water mark of resident memory is reset when the gradients stand in memory and small builds have
loaded every library, so that the peak counts whatever the build touches, in Python, torch or a kernel.   Linux only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks.machine import ROOT
from benchmarks.problems import DAMPING, GRADIENT_SCALE, TABLES, Problem


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")
    return int(match.group(1)) * 1024


def tensor_bytes(value: object, seen: set[int], device: str = "cpu") -> int:
    """Bytes of all tensors on a device in nested dicts and lists, every storage once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or value.device.type != device:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(child, seen, device) for child in children)


def measure(problem: Problem) -> dict[str, int]:
    """Peak above the gradients and state, in bytes, of one build with one thread."""
    torch.set_num_threads(1)

    def build(grads: Tensor) -> ff.FisherInverse:
        return ff.FisherInverse.from_grads(grads, block_size=problem.block_size, damping=DAMPING)

    build(torch.randn(problem.num_grads, problem.block_size) * GRADIENT_SCALE)
    grads = torch.randn(problem.num_grads, problem.num_weights).mul_(GRADIENT_SCALE)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = _resident("VmRSS")
    finv = build(grads)
    peak = _resident("VmHWM") - before
    # A state that is the caller's own gradients takes no memory above them.
    state = tensor_bytes(finv.state_dict(), {grads.untyped_storage().data_ptr()})
    return {"peak_bytes": peak, "state_bytes": state}


def measure_all(table: str) -> dict[str, dict[str, int]]:
    """`measure` of every build of a table, each in a fresh process: problem name -> bytes.   Empty off Linux."""
    if sys.platform != "linux":
        return {}
    results = {}
    for index, problem in enumerate(TABLES[table]):
        if problem.op == "build":
            command = [sys.executable, "-m", "benchmarks.memory", table, str(index)]
            output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[problem.name] = json.loads(output)
    return results


if __name__ == "__main__":
    print(json.dumps(measure(TABLES[sys.argv[1]][int(sys.argv[2])])))
