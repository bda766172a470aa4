"""`python -m benchmarks.tune`: try other parameters of the Triton kernels on a GPU, and print the rows that win.

For each op of the tuning table and each size, the row in force and as many others of a grid as there is time for are
checked against the reference backend and timed.  What wins is printed as a row of fastfisher/kernels/triton/tuning.py,
to be put in front of the one it beats; nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.contenders import contender, worst_error
from benchmarks.problems import Problem
from benchmarks.tables import seconds as text_of
from benchmarks.worker import Clock
from fastfisher.kernels.triton import tuning

Parameters = dict[str, Any]

GRID: dict[str, tuple[int, ...]] = {  # what is not here, such as the precision of products, is not for trying
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
    "ROWS": (16, 32, 64, 128),
    "COLUMNS": (16, 32, 64, 128, 256),
    "ENTRIES": (512, 1024, 2048, 4096),
    "TILE": (16, 32, 64, 128),
    "PIXELS": (16, 32, 64),
    "W": (16, 32),
}
WEIGHTS = 1 << 23
CHECKED_BLOCKS = 16  # and multiples of it are timed, so that Triton compiles one kernel for both
SLACK = 1e-6  # a few ulp of float32 beside twice the error of the reference
MARGIN = 0.97  # a winner takes less than this share of the time in force
ROUNDS = 7


@dataclass(frozen=True)
class Subject:
    """What puts a row of the tuning table to work: an op, and the sizes to look at.

    size: "B" or "m", which of the two it stands for; the other is as given.   itemsize: bytes of the numbers that the
    row is for.
    """

    op: str
    sizes: tuple[int, ...]
    form: str = "primal"
    size: str = "B"
    other: int = 64
    itemsize: int = 4

    def problem(self, size: int, weights: int) -> Problem:
        """The op at a size, on about so many weights: whole blocks, CHECKED_BLOCKS of them at least."""
        B, m = (size, self.other) if self.size == "B" else (self.other, size)
        blocks = CHECKED_BLOCKS * max(1, weights // (B * CHECKED_BLOCKS))
        return Problem(self.op, B * blocks, m, B, self.form, contenders=("triton",))


def _dual(op: str, *sizes: int) -> Subject:
    return Subject(op, sizes, "dual", "m", 1000, 8)


_LARGE = Subject("spd_inverse_", (200, 256))

SUBJECTS = {
    "inverse_from_grads": Subject("inverse_from_grads", (32, 50, 64, 100, 128), other=256),
    "spd_inverse": Subject("spd_inverse_", (32, 50, 64, 100, 128)),
    "sherman_morrison": Subject("sherman_morrison_", (32, 50, 64, 100, 128)),
    "woodbury": Subject("woodbury_", (32, 50, 64), other=32),
    "rank_updates": Subject("woodbury_", (100, 256), other=32),
    "fisher_accumulate": Subject("fisher_accumulate_", (50, 64, 100, 128, 256)),
    "small": Subject("inverse_from_grads", (1, 4, 8, 16)),
    "dual_factor": _dual("dual_factor_", 100, 256),
    "inverse_diagonal": _dual("inverse_diagonal", 100, 256),
    "factor_inverse": _dual("inverse_diagonal", 100, 256),
    "solve": _dual("block_matvec", 100, 512),
    "project": Subject("fisher_vector_product", (100,), "primal", "m", 1000),
    "expand": Subject("fisher_vector_product", (100,), "primal", "m", 1000),
    "block_matvec": Subject("block_matvec", (50, 128, 256)),
    "fishleg_block_step": Subject("fishleg_block_step_", (16, 32, 50, 128), other=32),
    "factor": Subject("factor_downdate_", (50, 128)),
    "kron_matvec": Subject("kron_matvec", (32, 64, 128)),
    "conv_weight_grads": Subject("conv_weight_grads", (64, 256), other=16),
    "obs_eliminate": Subject("obs_eliminate", (50, 128, 256)),
    "obs_solve": Subject("obs_solve_", (32, 50, 64), itemsize=8),
    "blocked": _LARGE,
    "blocked_pivot": _LARGE,
    "blocked_panel": _LARGE,
    "squares": _LARGE,
}


@dataclass(frozen=True)
class Found:
    """What trying came to: seconds with the row in force and with the best one, and how many of how many were tried."""

    present: tuning.Row
    present_seconds: float
    best: Parameters
    best_seconds: float
    tried: int
    of: int


def present_row(op: str, size: int, architecture: int) -> tuning.Row:
    """The row in force, as tuning.parameters finds it."""
    itemsize = SUBJECTS[op].itemsize
    return next(
        row
        for row in tuning.TABLE
        if row.op == op and size <= row.size and itemsize >= row.itemsize and architecture >= row.since
    )


def candidates(present: Parameters) -> list[Parameters]:
    """All other combinations of the grid: first those that differ in one parameter, then in two, and so on; among
    these in an order without a pattern, because there may not be time for all.
    """
    choices = [GRID.get(name, (value,)) for name, value in present.items()]
    found = [dict(zip(present, values, strict=True)) for values in itertools.product(*choices)]
    found = [parameters for parameters in found if parameters != present]
    random.Random(0).shuffle(found)
    return sorted(found, key=lambda p: sum(p[name] != value for name, value in present.items()))


class Trial:
    """One op at one size: checks and times parameters."""

    def __init__(self, op: str, size: int, device: str, weights: int) -> None:
        subject = SUBJECTS[op]
        self.op, self.device, self.clock = op, device, Clock(device)
        self.checked = subject.problem(size, 0)
        self.timed = contender(subject.problem(size, weights), "triton", device)
        self.allowed = 2 * self._error("reference") + SLACK

    def _error(self, backend: str) -> float:
        chosen = contender(self.checked, backend, self.device)
        arguments = chosen.setup()
        return worst_error(self.checked, chosen, chosen.run(*arguments), arguments, self.device)

    def seconds(self, parameters: Parameters) -> float:
        """Median time with these parameters; infinite where the kernel cannot run with them, or is further from
        float64 than the reference may be.
        """
        from triton import TritonError

        with tuning.override(self.op, **parameters):
            try:
                if not self._error("triton") <= self.allowed:
                    return math.inf
                times = [self.clock.time(self.timed.run, self.timed.setup())[0] for _ in range(ROUNDS + 1)]
            except (
                RuntimeError,
                TritonError,
            ):  # more registers or memory than there is, or tiles that do not fit
                return math.inf
        return statistics.median(times[1:])  # the first one warms up


def tune(op: str, size: int, seconds: float, device: str, weights: int = WEIGHTS) -> Found:
    """Try parameters of an op at a size for about so many seconds, then time the best against those in force again."""
    deadline = time.perf_counter() + seconds
    present = present_row(op, size, tuning.architecture(torch.device(device)))
    trial = Trial(op, size, device, weights)
    best, least, tried = present.parameters, trial.seconds(present.parameters), 0
    others = candidates(present.parameters)
    for parameters in others:
        if time.perf_counter() > deadline:
            break
        tried += 1
        taken = trial.seconds(parameters)
        if taken < least:
            best, least = parameters, taken
    # the fastest of many is partly the luckiest: what is printed is measured anew
    return Found(present, trial.seconds(present.parameters), best, trial.seconds(best), tried, len(others))


def source(found: Found, architecture: int) -> str:
    """The winning row as it stands in the tuning table."""
    row = found.present
    words = [json.dumps(row.op), "ANY" if row.size == tuning.ANY else f"{row.size:g}"]
    if row.itemsize != 4:
        words.append(f"itemsize={row.itemsize}")
    since = max(row.since, architecture // 10 * 10)
    if since != 80:
        words.append(f"since={since}")
    words += [f"{name}={json.dumps(value)}" for name, value in found.best.items()]
    return f"    _row({', '.join(words)}),"


def report(op: str, size: int, found: Found, architecture: int) -> str:
    """One line of what was tried, and the row where one wins."""
    present = "fails or is wrong" if found.present_seconds == math.inf else text_of(found.present_seconds)
    head = f"    # {op}, {SUBJECTS[op].size} = {size}: in force {present}"
    tail = f"{found.tried} of {found.of} others tried"
    if not found.best_seconds < MARGIN * found.present_seconds:
        return f"{head}; stays, {tail}"
    return f"{head}, this one {text_of(found.best_seconds)}, {tail}\n{source(found, architecture)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="*", help=f"of the tuning table: {', '.join(SUBJECTS)}; none means all")
    parser.add_argument("--sizes", type=int, nargs="+", help="B, or m for the ops of the dual form")
    parser.add_argument("--seconds", type=float, default=300, help="for everything together")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.op) - set(SUBJECTS))
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; they are {', '.join(SUBJECTS)}")
    reason = machine.gpu_reason()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    pairs = [(op, size) for op in options.op or SUBJECTS for size in options.sizes or SUBJECTS[op].sizes]
    deadline = time.perf_counter() + options.seconds
    architecture = tuning.architecture(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, compute capability {architecture / 10}")
    with torch.no_grad():
        for i, (op, size) in enumerate(pairs):
            share = (deadline - time.perf_counter()) / (len(pairs) - i)
            print(report(op, size, tune(op, size, share, "cuda"), architecture), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
