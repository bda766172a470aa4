"""From a result file to text: the bars, the rows and the floors, as markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.problems import MEMORY_BAR, TABLES, TOLERANCE, Floor, Problem

Result = dict[str, Any]  # what run.py writes: machine, peaks, rows, memory, table, commit, command


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table with columns padded to one width, first column left, others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)])


def seconds(value: float) -> str:
    """Three digits and the unit that suits: 1.23 s, 45.6 ms, 789 µs."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _row(result: Result, problem: Problem, threads: int, name: str) -> dict[str, Any] | None:
    for row in result["rows"]:
        if (row["problem"], row["threads"], row["name"]) == (problem.name, threads, name):
            return row
    return None


def _passed(row: dict[str, Any] | None) -> bool:
    return row is not None and row["error"] is not None and row["error"] <= TOLERANCE


def _peaks(result: Result, threads: int, floor: Floor) -> tuple[float, float]:
    peaks = result["peaks"][str(threads)]
    return peaks[f"{floor.dtype}_gflops"], peaks["copy_gbs"]


def ratio(result: Result, problem: Problem, threads: int, rival: str) -> float | None:
    """The rival's median time over ours, None unless both passed their check.   "strong" is the fastest one of its
    kind.
    """
    ours = _row(result, problem, threads, "ours")
    rows = [
        row
        for row in result["rows"]
        if row["problem"] == problem.name and row["threads"] == threads and row["name"].startswith(rival)
    ]
    times = [row["median"] for row in rows if _passed(row)]
    if ours is None or not _passed(ours) or not times:
        return None
    return min(times) / ours["median"]


def bars(result: Result) -> list[dict[str, Any]]:
    """Every bar of the table: what, bar, measured (None where a check failed or nothing was measured), passed."""
    found = []
    for problem in TABLES[result["table"]]:
        for rival, bar in problem.bars.items():
            value = ratio(result, problem, 1, rival)
            found.append(
                {
                    "what": f"{problem.name}, 1 thread: times as fast as {rival}",
                    "bar": f"at least {bar:g}",
                    "measured": value,
                    "passed": value is not None and value >= bar,
                }
            )
        if problem.name in result["memory"]:
            used = result["memory"][problem.name]
            value = used["peak_bytes"] / used["state_bytes"]
            found.append(
                {
                    "what": f"{problem.name}: peak memory above the gradients over the state",
                    "bar": f"at most {MEMORY_BAR:g}",
                    "measured": value,
                    "passed": value <= MEMORY_BAR,
                }
            )
    return found


def bars_table(result: Result) -> str:
    rows = [
        [
            bar["what"],
            bar["bar"],
            "not measured" if bar["measured"] is None else f"{bar['measured']:.3g}",
            "yes" if bar["passed"] else "NO",
        ]
        for bar in result["bars"]
    ]
    return markdown_table(["bar", "asked", "measured", "cleared"], rows)


def rows_table(result: Result, threads: int) -> str:
    """One line a problem: our median time, rate, share of the peak, and the ratios to the rivals."""
    rows = []
    for problem in TABLES[result["table"]]:
        ours = _row(result, problem, threads, "ours")
        if not _passed(ours):
            error = "not run" if ours is None else f"WRONG ({ours['error']})"
            rows.append([problem.name, error, *["–"] * 4])
            continue
        assert ours is not None
        floor, time = problem.floor, ours["median"]
        peak_gflops, peak_gbs = _peaks(result, threads, floor)
        if floor.bound(peak_gflops, peak_gbs) == "flops":
            rate, share = floor.flops / time / 1e9, floor.flops / time / 1e9 / peak_gflops
            text = f"{rate:.3g} GFLOP/s"
        else:
            rate, share = floor.bytes / time / 1e9, floor.bytes / time / 1e9 / peak_gbs
            text = f"{rate:.3g} GB/s"
        ratios = [ratio(result, problem, threads, rival) for rival in ("loop", "strong")]
        rows.append(
            [
                problem.name,
                seconds(time),
                text,
                f"{share:.0%}",
                *("–" if value is None else f"{value:.3g}x" for value in ratios),
            ]
        )
    return markdown_table(["problem", "median", "rate", "of peak", "vs loop", "vs strong"], rows)


def floors_table(result: Result, threads: int = 1) -> str:
    """Floor, roofline and prediction beside the measured time."""
    rows = []
    for problem in TABLES[result["table"]]:
        ours, floor = _row(result, problem, threads, "ours"), problem.floor
        peaks = _peaks(result, threads, floor)
        rows.append(
            [
                problem.name,
                f"{floor.bytes / 1e6:,.1f}",
                f"{floor.flops / 1e9:,.3f}",
                floor.dtype,
                seconds(floor.seconds(*peaks)),
                seconds(problem.predicted_seconds(*peaks)),
                seconds(ours["median"]) if ours is not None and _passed(ours) else "–",
            ]
        )
    head = ["problem", "MB", "GFLOP", "format", "roofline", "predicted", "measured"]
    return markdown_table(head, rows)


def memory_table(result: Result) -> str:
    rows = [
        [name, f"{used['state_bytes'] / 1e6:,.1f}", f"{used['peak_bytes'] / 1e6:,.1f}"]
        for name, used in result["memory"].items()
    ]
    return markdown_table(["build", "state, MB", "peak above the gradients, MB"], rows)


def page(result: Result) -> str:
    """Everything about one result, as markdown."""
    machine = result["machine"]
    parts = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"Python {machine['python']}, torch {machine['torch']} (BLAS: {machine['blas']}, vectors: "
        f"{machine['vectors']}); fastfisher {machine['fastfisher']}, commit {result['commit']}, "
        f"backend {result['backend']}.  Command: `{result['command']}`, {result['date']}, "
        f"{result['minutes']:.1f} minutes.",
    ]
    for threads, peak in result["peaks"].items():
        parts.append(
            f"Attainable with {threads} thread{'s' if threads != '1' else ''}: "
            f"{peak['float32_gflops']:.0f} GFLOP/s in float32 ({peak['float32_source']}), "
            f"{peak['float64_gflops']:.0f} in float64 ({peak['float64_source']}), "
            f"{peak['copy_gbs']:.1f} GB/s (copy, read and write counted)."
        )
    parts += ["### Bars", bars_table(result)]
    for threads in map(int, result["peaks"]):
        parts += [f"### {threads} thread{'s' if threads > 1 else ''}", rows_table(result, threads)]
    parts += ["### Floors, predictions and results, 1 thread", floors_table(result)]
    if result["memory"]:
        parts += ["### Memory of a build, 1 thread", memory_table(result)]
    return "\n\n".join(parts) + "\n"
