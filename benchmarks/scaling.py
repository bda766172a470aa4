"""How time and memory of a build grow with the weights, gradients and block size: `python -m benchmarks.scaling`.

Every point is a process of its own that builds an inverse with one thread: once for the peak of memory, then for the
time, of which the median counts; and runs the kernel alone into memory that was written before, since what a system
takes to hand out new pages may grow faster than their number.  Writes results/scaling-<machine>.json and .png and
prints a table with the fitted exponents, the bytes for each weight beside the fewest that suffice, and what the newest
GPU result makes of networks that no card holds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

import fastfisher as ff
from benchmarks import machine, memory
from benchmarks.problems import DAMPING, GPU_PROBLEMS, GRADIENT_SCALE, Problem
from benchmarks.run import newest

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
SIZES = ("d", "m", "B")
# What each sweep varies, and the other two sizes.
SWEEPS: dict[str, list[tuple[int, int, int]]] = {
    "d": [(d, 64, 50) for d in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 25_000_000)],
    "m": [(300_000, m, 50) for m in (64, 128, 256, 512, 1_024, 2_048)],
    "B": [(1_000_000, 256, B) for B in (8, 16, 32, 64, 128, 256)],
}
TINY = {"d": [(1_000, 8, 4), (4_000, 8, 4)]}
BARS = {"d": 1.03, "m": 1.05}
SECONDS, ROUNDS = 3.0, (3, 20)  # a point is repeated for about so long
ESTIMATED = (10**9, 10**10, 10**11)
GPUS = (1, 8, 64, 512, 1_024)
CARD_BYTES = 141e9  # of an H200
FOR_ESTIMATE = GPU_PROBLEMS[0]  # the build of ResNet-50


def problem_of(point: Sequence[int]) -> Problem:
    d, m, B = point
    return Problem("build", d, m, B)


def measure(point: Sequence[int]) -> dict[str, float]:
    """Seconds of a build, and the bytes it takes beside its gradients and leaves; in this process."""
    problem = problem_of(point)
    found: dict[str, float] = dict(memory.measure(problem))
    torch.set_num_threads(1)
    grads = torch.randn(problem.num_grads, problem.num_weights).mul_(GRADIENT_SCALE)
    times: list[float] = []
    least, most = ROUNDS
    while len(times) < most and (len(times) < least or sum(times) < SECONDS):
        started = time.perf_counter()
        ff.FisherInverse.from_grads(grads, block_size=problem.block_size, damping=DAMPING)
        times.append(time.perf_counter() - started)
    return {**found, "seconds": statistics.median(times), "kernel_seconds": _kernel(problem, grads)}


def _kernel(problem: Problem, grads: Tensor) -> float:
    """Seconds of the op behind the build, the second and third time it writes to the same memory; the less counts."""
    blocks = ff.BlockLayout.from_sizes([problem.num_weights], block_size=problem.block_size).blocks
    f_inv = torch.empty(len(blocks), problem.block_size, problem.block_size)
    estimates = torch.empty(2, len(blocks), dtype=torch.float64)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.ops.fastfisher.inverse_from_grads(f_inv, grads, blocks, len(grads), DAMPING, *estimates)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def run(point: Sequence[int]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", *map(str, point)]
    output = subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    middle, mean = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle) ** 2 for a in x)


def bytes_per_weight(row: Mapping[str, Any]) -> tuple[float, float]:
    """Held at the peak, gradients included, and the fewest: gradients and blocks."""
    d, m, _ = row["point"]
    fewest = problem_of(row["point"]).floor.bytes / d
    return 4 * m + row["peak_bytes"] / d, fewest


def estimate(result: Mapping[str, Any] | None) -> list[dict[str, float]]:
    """What networks would take on GPUs that do nothing but build: from one measured time for each weight.

    Every GPU owns its share of the blocks; the gradients of the others' samples come to it once.  Without the backward
    passes that make these, and without waiting for the network.
    """
    rows = [
        r for r in (result or {}).get("rows", []) if r["problem"] == FOR_ESTIMATE.name and r["name"] == "ours"
    ]
    if not rows or not rows[0].get("median"):
        return []
    each = rows[0]["median"] / FOR_ESTIMATE.num_weights
    m, B = FOR_ESTIMATE.num_grads, FOR_ESTIMATE.block_size
    return [
        {
            "weights": weights,
            "gpus": gpus,
            "state_bytes": 4 * B * weights / gpus,
            "received_bytes": 4 * m * weights / gpus * (gpus - 1) / gpus,
            "seconds": each * weights / gpus,
        }
        for weights in ESTIMATED
        for gpus in GPUS
    ]


def judge(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The exponents of time of every sweep, beside the most that is asked."""
    found = {}
    for name, measured in rows.items():
        sizes = [row["point"][SIZES.index(name)] for row in measured]
        asked = BARS.get(name)
        for key, what in (("seconds", name), ("kernel_seconds", f"{name}, kernel alone")):
            slope = exponent(sizes, [row[key] for row in measured])
            found[what] = {"exponent": slope, "asked": asked, "passed": asked is None or slope <= asked}
    return found


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Time over each size, both logarithmic, with the fitted exponent."""
    count = len(result["rows"])
    figure, grid = plt.subplots(1, count, figsize=(4.6 * count, 3.8), squeeze=False)
    axes = grid[0]
    words = {"d": "weights d", "m": "gradients m", "B": "block size B"}
    for axis, (name, rows) in zip(axes, result["rows"].items(), strict=True):
        sizes = [row["point"][SIZES.index(name)] for row in rows]
        axis.loglog(sizes, [row["seconds"] for row in rows], "o-", label="build")
        axis.loglog(sizes, [row["kernel_seconds"] for row in rows], "s--", label="kernel alone")
        axis.legend()
        others = ", ".join(
            f"{size} = {value:,}" for size, value in zip(SIZES, rows[0]["point"], strict=True) if size != name
        )
        axis.set_title(f"exponent {result['exponents'][name]['exponent']:.2f}   ({others})", fontsize=10)
        axis.set_xlabel(words[name])
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].set_ylabel("seconds, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(result: Mapping[str, Any]) -> str:
    """The tables as text."""
    lines = [
        "| d | m | B | seconds | ns a weight | of the kernel alone | bytes a weight at the peak | fewest |",
        "|--:" * 8 + "|",
    ]
    for rows in result["rows"].values():
        for row in rows:
            d, m, B = row["point"]
            held, fewest = bytes_per_weight(row)
            each, alone = (1e9 * row[key] / d for key in ("seconds", "kernel_seconds"))
            lines.append(
                f"| {d:,} | {m:,} | {B} | {row['seconds']:.3g} | {each:.3g} | {alone:.3g} | {held:.0f} | {fewest:.0f} |"
            )
    lines += ["", "| size | exponent of time | asked | cleared |", "|--:" * 4 + "|"]
    for name, found in result["exponents"].items():
        asked = "–" if found["asked"] is None else f"at most {found['asked']}"
        lines.append(f"| {name} | {found['exponent']:.3f} | {asked} | {'yes' if found['passed'] else 'NO'} |")
    if result["estimate"]:
        lines += ["", "| weights | GPUs | seconds | GB of blocks on each | GB of gradients to each |"]
        lines.append("|--:" * 5 + "|")
        for row in result["estimate"]:
            full = "" if row["state_bytes"] <= CARD_BYTES else " (do not fit)"
            state, received = row["state_bytes"] / 1e9, row["received_bytes"] / 1e9
            lines.append(
                f"| {row['weights']:,} | {row['gpus']:,} | {row['seconds']:.3g} | {state:,.3g}{full} "
                f"| {received:,.3g} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--point", type=int, nargs=3, metavar=SIZES, help="measure one point and print it")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.point:
        print(json.dumps(measure(options.point)))
        return 0
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, points in (TINY if options.tiny else SWEEPS).items():
        rows[name] = []
        for point in points:
            rows[name].append({"point": point, **run(point)})
            print(f"{name}: {point} {rows[name][-1]['seconds']:.3g} s", flush=True)
    found = {"rows": rows, "exponents": judge(rows), "estimate": estimate(newest("gpu", RESULTS))}
    target = machine.write_result(options.out, "scaling", found)
    draw(target.with_suffix(".png"), found)
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
