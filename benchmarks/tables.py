"""From a result file to text: the bars, the rows and the floors, as markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import names
from benchmarks.problems import MEMORY_BAR, NATIVE_BAR, SWEEPS, TABLES, TOLERANCE, Floor, Problem
from fastfisher.ops import BACKENDS

Result = dict[str, Any]  # what run.py writes: machine, device, peaks, rows, memory, table, commit, command


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


def per_second(giga: float, unit: str) -> str:
    """Three digits of a rate in billions: 60.3 GFLOP/s, 3.02 TB/s."""
    return f"{giga / 1e3:.3g} T{unit}/s" if giga >= 999.5 else f"{giga:.3g} G{unit}/s"


def on_gpu(result: Result) -> bool:
    """Whether a result is of a GPU; those written before there was a choice are not."""
    return result.get("device", "cpu") != "cpu"


def problems_of(result: Result) -> list[Problem]:
    """The rows of a result's table, on as many tensors of a network as there was room for."""
    tensors = result.get("tensors", {})
    return [p.prefix(tensors[p.name]) if p.network else p for p in TABLES[result["table"]]]


def sweeps_of(result: Result) -> dict[str, tuple[Problem, ...]]:
    """The sweeps beside them, by the size that grows."""
    return SWEEPS.get(result["table"], {})


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


def over_roofline(result: Result, problem: Problem) -> float | None:
    """Our time in rooflines of the same run, None unless it passed its check."""
    ours = _row(result, problem, 1, "ours")
    if ours is None or not _passed(ours):
        return None
    median: float = ours["median"]
    return median / problem.floor.seconds(*_peaks(result, 1, problem.floor))


def _bar(what: str, least: float | None, most: float | None, value: float | None) -> dict[str, Any]:
    asked = f"at least {least:g}" if least is not None else f"at most {most:g}"
    passed = value is not None and (least is None or value >= least) and (most is None or value <= most)
    return {"what": what, "bar": asked, "measured": value, "passed": passed}


def _limit(result: Result, problem: Problem, limit: str, most: float) -> dict[str, Any]:
    """One of a problem's limits as a bar."""
    if limit == "floor":
        return _bar(f"{problem.name}: time over the roofline", None, most, over_roofline(result, problem))
    if limit == "seconds":
        ours = _row(result, problem, 1, "ours")
        value = 1e3 * ours["median"] if ours is not None and _passed(ours) else None
        return _bar(f"{problem.name}: milliseconds", None, 1e3 * most, value)
    used = result["memory"].get(problem.name)
    share = used and (used["grads_bytes"] + used["peak_bytes"]) / (used["grads_bytes"] + used["state_bytes"])
    return _bar(f"{problem.name}: peak memory over gradients and state", None, most, share)


def bars(result: Result) -> list[dict[str, Any]]:
    """Every bar of the table: what, bar, measured (None where a check failed or nothing was measured), passed."""
    found = []
    where = "" if on_gpu(result) else ", 1 thread"
    for problem in problems_of(result):
        for rival, least in problem.bars.items():
            value = ratio(result, problem, 1, rival)
            found.append(_bar(f"{problem.name}{where}: times as fast as {rival}", least, None, value))
        found += [_limit(result, problem, limit, most) for limit, most in problem.limits.items()]
        used = result["memory"].get(problem.name)
        if used and not problem.limits:
            what = f"{problem.name}: peak memory above the gradients over the state"
            found.append(_bar(what, None, MEMORY_BAR, used["peak_bytes"] / used["state_bytes"]))
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


def _verdict(row: dict[str, Any] | None) -> str:
    """Why a row shows no figure."""
    if row is None:
        return "not run"
    if "failed" in row:
        return "FAILED"
    return "–" if "refused" in row else f"WRONG ({row['error']:.1e})"


def rows_table(result: Result, threads: int) -> str:
    """One line a problem: our median time, rate, share of the peak, and the ratios to the rivals."""
    rows = []
    for problem in problems_of(result):
        ours = _row(result, problem, threads, "ours")
        if ours is None or not _passed(ours):
            rows.append([problem.name, _verdict(ours), *["–"] * 4])
            continue
        floor, time = problem.floor, ours["median"]
        peak_gflops, peak_gbs = _peaks(result, threads, floor)
        if floor.bound(peak_gflops, peak_gbs) == "flops":
            rate, peak, text, of = floor.flops / time / 1e9, peak_gflops, "FLOP", floor.dtype
        else:
            rate, peak, text, of = floor.bytes / time / 1e9, peak_gbs, "B", "copy"
        ratios = [ratio(result, problem, threads, rival) for rival in ("loop", "strong")]
        rows.append(
            [
                problem.name,
                seconds(time),
                per_second(rate, text),
                f"{rate / peak:.0%} {of}",
                *("–" if value is None else f"{value:.3g}x" for value in ratios),
            ]
        )
    return markdown_table(["problem", "median", "rate", "of peak", "vs loop", "vs strong"], rows)


def rivals_table(result: Result) -> str:
    """One line for each rival: its time, and from which part of the blocks it was scaled up."""
    rows = []
    for problem in problems_of(result):
        for name in names(problem):
            row = _row(result, problem, 1, name)
            if name == "ours" or name in BACKENDS:
                continue
            time, of = _verdict(row), "–"
            if row is not None and _passed(row):
                fraction = round(problem.num_blocks / row["timed_blocks"])
                time = seconds(row["median"])
                of = "all blocks" if fraction == 1 else f"scaled from 1/{fraction} of the blocks"
            rows.append([problem.name, name, time, of])
    return markdown_table(["problem", "rival", "median", "timed"], rows)


def backends_table(result: Result) -> str:
    """CUDA against Triton for the ops that have both, and what follows for the CUDA kernel; "" where none has both."""
    rows = []
    for problem in problems_of(result):
        cuda, triton = (_row(result, problem, 1, name) for name in ("native", "triton"))
        if cuda is None or triton is None or "refused" in cuda or "refused" in triton:
            continue
        line = [problem.name, *(seconds(r["median"]) if _passed(r) else _verdict(r) for r in (cuda, triton))]
        if _passed(cuda) and _passed(triton):
            value = triton["median"] / cuda["median"]
            line += [f"{value:.2f}x", "stays" if value >= NATIVE_BAR else "is to be deleted"]
        rows.append([*line, "–", "undecided"][:5])
    head = ["problem", "CUDA", "Triton", "Triton over CUDA", "the CUDA kernel"]
    return markdown_table(head, rows) if rows else ""


def growth_table(result: Result, problems: tuple[Problem, ...]) -> str:
    """A sweep: the time of a build for each weight."""
    rows = []
    for problem in problems:
        row = _row(result, problem, 1, "ours")
        sizes = [f"{n:,}" for n in (problem.num_weights, problem.num_grads, problem.block_size)]
        if row is not None and _passed(row):
            each = f"{row['median'] / problem.num_weights * 1e9:.3g} ns"
            times = f"{over_roofline(result, problem):.2g}"
            rows.append([*sizes, problem.form, seconds(row["median"]), each, times])
        else:
            rows.append([*sizes, problem.form, _verdict(row), "–", "–"])
    return markdown_table(["d", "m", "B", "form", "median", "a weight", "rooflines"], rows)


def failures(result: Result) -> str:
    """What failed and what was not reached, as a list; "" where nothing was."""
    swept = (problem for sweep in sweeps_of(result).values() for problem in sweep)
    lines, missing = [], 0
    for problem in dict.fromkeys((*problems_of(result), *swept)):
        for name in names(problem):
            row = _row(result, problem, 1, name)
            missing += row is None
            if row is not None and "failed" in row:
                lines.append(f"* {problem.name}, {name}: {row['failed']}")
    if missing:
        lines.append(f"* not reached in the time allowed: {missing} rows")
    return "\n".join(lines)


def floors_table(result: Result, threads: int = 1) -> str:
    """Floor, roofline and prediction beside the measured time."""
    rows = []
    for problem in problems_of(result):
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
        [name, *(f"{used[key] / 1e6:,.1f}" for key in ("state_bytes", "peak_bytes"))]
        for name, used in result["memory"].items()
    ]
    return markdown_table(["build", "state, MB", "peak above the gradients, MB"], rows)


def _machine(machine: dict[str, Any]) -> str:
    gpu = ""
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, compute capability {machine['capability']}, CUDA "
            f"{machine['cuda']}, Triton {machine['triton']}, CUDA kernels {machine['cuda_kernels']}; on "
        )
    return (
        f"Machine: {gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"Python {machine['python']}, torch {machine['torch']} (BLAS: {machine['blas']}, vectors: "
        f"{machine['vectors']}); fastfisher {machine['fastfisher']}"
    )


def _attainable(result: Result, threads: str) -> str:
    peak, rates = result["peaks"][threads], result["rates"][threads]
    of = "" if on_gpu(result) else f" with {threads} thread{'s' if threads != '1' else ''}"
    more = "".join(
        f", {per_second(rates[f'{name} mm'] / 1e9, 'FLOP')} in {text}"
        for name, text in (("tf32", "TF32"), ("bf16", "bfloat16"))
        if f"{name} mm" in rates
    )
    return (
        f"Attainable{of}: {per_second(peak['float32_gflops'], 'FLOP')} in float32 ({peak['float32_source']}), "
        f"{per_second(peak['float64_gflops'], 'FLOP')} in float64 ({peak['float64_source']}){more}, "
        f"{per_second(peak['copy_gbs'], 'B')} (copy, read and write counted)."
    )


def page(result: Result) -> str:
    """Everything about one result, as markdown."""
    parts = [
        f"{_machine(result['machine'])}, commit {result['commit']}, backend {result['backend']}.  Command: "
        f"`{result['command']}`, {result['date']}, {result['minutes']:.1f} minutes.",
        *(_attainable(result, threads) for threads in result["peaks"]),
    ]
    sections = {"Bars": bars_table(result)}
    for threads in map(int, result["peaks"]):
        title = "Rows" if on_gpu(result) else f"{threads} thread{'s' if threads > 1 else ''}"
        sections[title] = rows_table(result, threads)
    one = "" if on_gpu(result) else ", 1 thread"
    if sweeps_of(result):
        sections["CUDA against Triton"] = backends_table(result)
        for size, problems in sweeps_of(result).items():
            sections[f"Growth with {size}"] = growth_table(result, problems)
        sections["Rivals"] = rivals_table(result)
    sections[f"Floors, predictions and results{one}"] = floors_table(result)
    sections[f"Memory of a build{one}"] = memory_table(result) if result["memory"] else ""
    if sweeps_of(result):
        sections["What is missing"] = failures(result)
    parts += [f"### {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"
