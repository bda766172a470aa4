"""`python -m benchmarks.worker`: check and time every row of a table on one device, a line of JSON as each is done.

On the CPU pytest-benchmark times the rows (test_kernels.py).  On a GPU it cannot: a kernel that goes astray takes the
whole process with it, and pytest-benchmark writes its report at the end.  Here every line is on disk when the next row
begins, and a second process goes on where the first ended.  What is begun, and timed, and checked is the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.contenders import contender, names, worst_error
from benchmarks.inputs import inputs_of
from benchmarks.memory import tensor_bytes
from benchmarks.problems import SWEEPS, TABLES, Problem
from fastfisher.errors import BackendError

USABLE = 0.96  # of the memory that is free at the beginning; the rest is for libraries and fragments
SECONDS_A_ROW = {"gpu": 0.4, "gpu-tiny": 0.005}  # a row is repeated for about this long
LONG = 2.0  # seconds; what takes longer is timed once
ROUNDS = (3, 50)
PROBE = {"gpu": (8192, 4 << 30), "gpu-tiny": (128, 1 << 20)}  # size of the matrices, bytes to copy


def problems_of(table: str) -> list[Problem]:
    """All rows of a table, those of its sweeps last, none twice."""
    swept = (problem for sweep in SWEEPS[table].values() for problem in sweep)
    return list(dict.fromkeys((*TABLES[table], *swept)))


class Clock:
    """How long a call takes: by events in the device's own stream, or by the processor's clock where there is none."""

    def __init__(self, device: str) -> None:
        self.ahead = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def time(self, run: Callable[..., Any], arguments: tuple) -> tuple[float, Any]:
        """Seconds of run(*arguments), and what it returned."""
        if self.ahead is None:
            started = time.perf_counter()
            returned = run(*arguments)
            return time.perf_counter() - started, returned
        # While the device is busy with this, the call is under way, so that the time to launch the first kernel does
        # not count; it leaves nothing of the arguments in the cache either.
        self.ahead.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        returned = run(*arguments)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3, returned


def measure(problem: Problem, name: str, device: str, clock: Clock, seconds: float) -> dict[str, Any]:
    """Times of one contender and its worst error; a first call, which may compile, is not timed."""
    chosen = contender(problem, name, device)
    if chosen.warm_up is not None:
        chosen.warm_up()
    if not chosen.once:
        chosen.run(*chosen.setup())
    times: list[float] = []
    least, most = ROUNDS
    while len(times) < most and (len(times) < least or sum(times) < seconds):
        arguments, returned = (), None  # the last result makes room for the next
        arguments = chosen.setup()
        taken, returned = clock.time(chosen.run, arguments)
        times.append(taken)
        if chosen.once or taken > LONG:
            break
    timed = problem.num_blocks if chosen.piece is None else len(chosen.piece.ids)
    scale = problem.num_blocks / timed
    return {
        "median": sorted(times)[len(times) // 2] * scale,
        "min": min(times) * scale,
        "max": max(times) * scale,
        "rounds": len(times),
        "timed_blocks": timed,
        "error": worst_error(problem, chosen, returned, arguments, device),
    }


def peak_memory(problem: Problem, device: str) -> dict[str, int]:
    """Of one build on a GPU: bytes of the gradients and of the state, and the peak above the gradients.

    The state is the inverse that is left, or the float64 Fisher in which calls are gathered, whichever is larger.
    """
    chosen = contender(problem, "ours", device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finv, _ = chosen.run()
    peak = torch.cuda.max_memory_allocated() - before
    grads = inputs_of(problem, device).grads
    left = tensor_bytes(finv.state_dict(), {grads.untyped_storage().data_ptr()}, device)
    gathered = 8 * problem.num_blocks * problem.block_size**2 if problem.per_call else 0
    return {"grads_bytes": grads.nbytes, "peak_bytes": peak, "state_bytes": max(left, gathered)}


def _peaks(table: str, device: str, clock: Clock) -> Iterator[dict[str, Any]]:
    for name, (run, work) in machine.peak_probes(*PROBE[table], device).items():
        best = min(clock.time(run, ())[0] for _ in range(8))
        yield {"kind": "peak", "name": name, "rate": work / best}


def _row(problem: Problem, name: str, device: str, clock: Clock, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "row", "problem": problem.name, "threads": 1, "name": name, "error": None}
    try:
        row |= measure(problem, name, device, clock, seconds)
        if name == "ours" and "memory" in problem.limits and device == "cuda":
            row["memory"] = peak_memory(problem, device)
    except BackendError as error:
        row["refused"] = str(error)
    except RuntimeError as error:  # of torch: no memory, a failed launch, what its compiler cannot do
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def work(table: str, device: str, lines: Path, seconds: float) -> None:
    """Measure what `lines` does not hold yet, and add it there, until the time is up."""
    started = time.perf_counter()
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    begun = {(line["problem"], line["name"]) for line in known if line["kind"] == "begin"}
    clock = Clock(device)
    with lines.open("a") as file, torch.no_grad():

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        usable = next((line["usable_bytes"] for line in known if line["kind"] == "device"), None)
        if usable is None:
            usable = USABLE * torch.cuda.mem_get_info()[0] if device == "cuda" else sys.maxsize
            write({"kind": "device", "usable_bytes": usable})
            for line in _peaks(table, device, clock):
                write(line)
        for whole in problems_of(table):
            problem = whole.fitted(usable)
            for name in names(problem):
                if time.perf_counter() - started > seconds:
                    return
                if (problem.name, name) in begun:
                    continue
                write({"kind": "begin", "problem": problem.name, "name": name})
                write(_row(problem, name, device, clock, SECONDS_A_ROW[table]))
                if device == "cuda":
                    torch.cuda.synchronize()  # what a failed launch has broken ends this process, not the next row
                    torch.cuda.empty_cache()
            inputs_of.cache_clear()
            gc.collect()  # inputs and their pieces know each other; they go before the next ones are made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=sorted(SWEEPS), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--lines", type=Path, required=True, help="the file to add to")
    parser.add_argument("--seconds", type=float, required=True, help="no row begins later than this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work(options.table, options.device, options.lines, options.seconds)


if __name__ == "__main__":
    main()
