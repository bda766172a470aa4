"""What a run really takes beside what `ff.plan` foretells, in a process of its own.

    python -m tests.prune.plan_run CASE ATTEMPTS

Prints JSON: planned and real bytes and seconds.   Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

import fastfisher as ff

CASES: dict[str, dict[str, Any]] = {
    "dual": {"width": 700, "block_size": 1000, "num_grads": 64, "num_recomputations": 0},
    "groups": {
        "width": 700,
        "block_size": 64,
        "num_grads": 128,
        "num_recomputations": 0,
        "memory_limit": "250 MB",
    },
}


def anonymous() -> int:
    """Resident bytes of this process but for files that are mapped."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The largest of `anonymous` inside, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes, self.over = anonymous(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()


def main(case: str, attempts: int) -> None:
    """Plan and prune in turn; the first run is watched, and the others are timed."""
    torch.set_num_threads(1)
    options = dict(CASES[case])
    width = options.pop("width")
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(20, 20))
    data = [(torch.randn(80, 20), torch.randint(10, (80,)))]
    ff.prune(small, data, sparsity=0.5, block_size=16, num_grads=64)  # what a process loads once
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 10))
    x, y = torch.randn(256, width), torch.randint(10, (256,))
    loader = list(zip(x.split(64), y.split(64), strict=True))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[str, Any] = {"seconds": []}
    for attempt in range(attempts + 1):
        model.load_state_dict(dense)
        plan = ff.plan(model, loader, sparsity=0.8, **options)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        if attempt == 0:
            before = anonymous()
            with Peak() as peak:
                ff.prune(model, loader, sparsity=0.8, **options)
            found["bytes"] = plan.resident_bytes, peak.bytes - before
            found["groups"] = plan.storage.groups
        else:
            start = time.perf_counter()
            ff.prune(model, loader, sparsity=0.8, **options)
            found["seconds"].append((plan.seconds, time.perf_counter() - start))
            planned, real = found["seconds"][-1]
            if abs(planned - real) < 0.3 * real:
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
