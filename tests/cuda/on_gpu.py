"""The CUDA kernels on small problems, for a checker to watch:  compute-sanitizer python -m tests.cuda.on_gpu"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastfisher import ops
from tests.cases import CASES
from tests.cuda import emulated
from tests.ops.test_conformance import DTYPES, ROWS

SIZES = ("B3", "B17", "B50", "B128", "B200", "B256", "gap", "misaligned", "float16", "bfloat16 misaligned")


def main() -> int:
    """Run every call that the native backend takes on the GPU; returns 1 where it takes none."""
    device, count = torch.device("cuda"), 0
    for row in ROWS:
        if row.op not in emulated.OPS:
            continue
        for case in CASES:
            if case.name not in SIZES:
                continue
            for dtype in DTYPES:
                args = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in row.make(case, dtype)]
                if ops.OPS[row.op].why_not("native", tuple(args)) is None:
                    with ops.use_backend("native"):
                        getattr(torch.ops.fastfisher, row.op)(*args)
                    count += 1
    torch.cuda.synchronize()
    print(f"{count} calls of CUDA kernels")
    return count == 0


if __name__ == "__main__":
    sys.exit(main())
