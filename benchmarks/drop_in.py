"""One changed import in an existing script: its loop of `add_grad`, then `diag` and `mul`, against the one it had.

Each runs on the same gradients and threads, several times in a row, after a first run whose answer is compared with
float64; the medians are printed.  `python -m benchmarks.drop_in` runs ResNet-20's 272,474 weights in
blocks of 50 with 256 gradients, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.machine import commit, describe
from benchmarks.problems import DAMPING, GRADIENT_SCALE, RESNET20, TOLERANCE
from fastfisher.compat import EmpiricalBlockFisherInverse

BAR = 8.0
CHECKED = 20  # blocks compared with float64


class Script(Protocol):
    """What the loop of a script calls."""

    def add_grad(self, g: Tensor) -> None: ...
    def diag(self) -> Tensor: ...
    def mul(self, v: Tensor) -> Tensor: ...


def run(make: Callable[[], Script], grads: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The loop that scripts have."""
    finv = make()
    for g in grads:
        finv.add_grad(g)
    return finv.diag(), finv.mul(v)


def error(found: tuple[Tensor, Tensor], grads: Tensor, v: Tensor, block_size: int) -> float:
    """The largest relative error in some blocks against float64, of diagonal entries and of the product by norm."""
    worst = 0.0
    d = grads.shape[1]
    starts = range(0, d, block_size)
    for start in [*starts[:: max(1, len(starts) // CHECKED)], starts[-1]]:
        block = slice(start, min(d, start + block_size))
        G = grads[:, block].double()
        F = G.T @ G / len(G) + DAMPING * torch.eye(G.shape[1], dtype=torch.float64)
        f_inv = torch.linalg.inv(F)
        diag, product = f_inv.diagonal(), f_inv @ v[block].double()
        worst = max(worst, float(((found[0][block] - diag) / diag).abs().max()))
        worst = max(worst, float((found[1][block] - product).norm() / product.norm()))
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Print both times and their ratio; 1 where an answer is wrong or the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=RESNET20)
    parser.add_argument("--block-size", type=int, default=50)
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    d, B, m = given.weights, given.block_size, given.num_grads
    generator = torch.Generator().manual_seed(0)
    grads = GRADIENT_SCALE * torch.randn(m, d, generator=generator)
    v = torch.randn(d, generator=generator)
    makers: dict[str, Callable[[], Script]] = {
        "script's loop": lambda: rivals.ScriptLoop(m, B, d, DAMPING),
        "fastfisher.compat": lambda: EmpiricalBlockFisherInverse(m, B, d, DAMPING, "cpu"),
    }
    print(f"{describe()['cpu']}, {given.threads} threads, commit {commit()}: d={d}, B={B}, m={m}")
    medians = {}
    for name, make in makers.items():
        # the first run also warms up: new memory, which a virtual machine gets from its host, costs as much as the work
        worst = error(run(make, grads, v), grads, v, B)
        if not worst <= TOLERANCE:
            print(f"{name} is WRONG by {worst:.1e}, so there is no ratio")
            return 1
        times = []
        for _ in range(given.repeats):
            start = time.perf_counter()
            run(make, grads, v)
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times)
        print(
            f"{name}: {medians[name]:.3f} s ({min(times):.3f} to {max(times):.3f}), worst error {worst:.1e}"
        )
    ratio = medians["script's loop"] / medians["fastfisher.compat"]
    print(f"{ratio:.1f}x (bar {BAR:g}x)")
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
