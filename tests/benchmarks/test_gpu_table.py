"""The GPU's table and all around it, as far as it goes without a GPU: run on the CPU, and on invented figures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import machine, run, tables, worker
from benchmarks.contenders import names
from benchmarks.problems import GPU_PROBLEMS, GPU_TINY, SWEEPS, Problem

pytestmark = pytest.mark.xdist_group("tiny table of a GPU")

INVENTED = "invented for a test"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tables.Result:
    """The tiny table, run from end to end on the CPU."""
    out = tmp_path_factory.mktemp("results")
    readme = run.README.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, the kernels would take minutes
        arguments = ["--table", "gpu-tiny", "--device", "cpu", "--out", str(out), "--commit", "abc"]
        assert run.main(arguments) == 0
    assert run.README.read_text() == readme
    (path,) = out.glob("*-abc.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())


def invented(table: str = "gpu") -> tables.Result:
    """A result with figures out of thin air: every op takes twice its roofline, every rival 50 times as long."""
    peaks = {"float32 mm": 50e12, "float64 mm": 60e12, "tf32 mm": 400e12, "bf16 mm": 700e12, "copy": 3e12}
    result: tables.Result = {
        "table": table,
        "device": "cuda",
        "machine": {
            **machine.describe(),
            "gpu": INVENTED,
            "gpu_memory_gib": 0,
            "capability": "0.0",
            "cuda": "0",
            "triton": "0",
            "cuda_kernels": "built",
        },
        "commit": INVENTED,
        "command": INVENTED,
        "date": "2000-01-01T00:00",
        "backend": INVENTED,
        "minutes": 0,
        "tensors": {p.name: p.tensors for p in GPU_PROBLEMS},
        "peaks": {"1": machine.attainable(peaks, "cuda")},
        "rates": {"1": peaks},
        "rows": [],
        "memory": {},
    }
    swept = (p for sweep in SWEEPS[table].values() for p in sweep)
    for problem in dict.fromkeys((*GPU_PROBLEMS, *swept)):
        peak = 60e3 if problem.floor.dtype == "float64" else 50e3
        ours = 2 * problem.floor.seconds(peak, 3e3)
        for name in names(problem):
            seconds = ours if name in ("ours", "native") else 1.5 * ours if name == "triton" else 50 * ours
            times = dict.fromkeys(("median", "min", "max"), seconds)
            row = {"problem": problem.name, "threads": 1, "name": name, "error": 1e-6, "rounds": 3}
            result["rows"].append({**row, **times, "timed_blocks": problem.num_blocks})
        if "memory" in problem.limits:
            used = {"grads_bytes": 4_000, "state_bytes": 1_000, "peak_bytes": 1_500}
            result["memory"][problem.name] = used
    result["bars"] = tables.bars(result)
    return result


def rows(result: tables.Result, problem: Problem, name: str) -> Iterator[dict]:
    return (r for r in result["rows"] if (r["problem"], r["name"]) == (problem.name, name))


def bar(result: tables.Result, what: str) -> dict:
    (found,) = (b for b in tables.bars(result) if b["what"] == what)
    return found


def test_tiny_table_runs_from_end_to_end_and_every_row_is_right(result: tables.Result) -> None:
    swept = {p for sweep in SWEEPS["gpu-tiny"].values() for p in sweep}
    expected = {(p.name, name) for p in (*GPU_TINY, *swept) for name in names(p)}
    assert {(r["problem"], r["name"]) for r in result["rows"]} == expected
    for row in result["rows"]:
        if row["name"] == "triton":
            assert "it runs on GPU tensors" in row["refused"]
        else:
            assert row["error"] <= 1e-4, row
            assert 0 < row["min"] <= row["median"] <= row["max"]
    assert result["peaks"]["1"]["copy_gbs"] > 0
    page = tables.page(result)
    assert "What is missing" not in page
    assert "CUDA against Triton" not in page  # no row has both here
    assert page.count("### Growth with") == 3


def test_bars_that_only_a_gpu_can_measure_are_not_cleared_elsewhere(result: tables.Result) -> None:
    asked = sum(len(p.bars) + len(p.limits) for p in GPU_TINY)
    assert len(result["bars"]) == asked
    unmeasured = [b for b in result["bars"] if b["measured"] is None]
    assert {b["what"].split(": ")[1] for b in unmeasured} == {"peak memory over gradients and state"}
    assert not any(b["passed"] for b in unmeasured)


def test_every_bar_of_the_issue_is_asked_for() -> None:
    asked = {(b["what"].split(": ")[1], b["bar"]) for b in invented()["bars"]}
    assert asked == {
        ("time over the roofline", "at most 2"),
        ("times as fast as loop", "at least 40"),
        ("times as fast as strong", "at least 4"),
        ("times as fast as loop", "at least 100"),
        ("times as fast as strong", "at least 2"),
        ("milliseconds", "at most 60"),
        ("milliseconds", "at most 15"),
        ("peak memory over gradients and state", "at most 1.15"),
    }


def test_bars_compare_with_their_own_side() -> None:
    fake = invented()
    build = GPU_PROBLEMS[0]
    floor, loop = f"{build.name}: time over the roofline", f"{build.name}: times as fast as loop"
    memory = f"{build.name}: peak memory over gradients and state"
    assert bar(fake, floor) == {"what": floor, "bar": "at most 2", "measured": 2.0, "passed": True}
    assert (bar(fake, loop)["measured"], bar(fake, loop)["passed"]) == (50, True)
    assert (bar(fake, memory)["measured"], bar(fake, memory)["passed"]) == (5_500 / 5_000, True)
    for row in rows(fake, build, "ours"):
        row["median"] *= 1.3
    assert not bar(fake, floor)["passed"]
    assert not bar(fake, loop)["passed"]
    fake["memory"][build.name]["peak_bytes"] = 1_800
    assert not bar(fake, memory)["passed"]
    prune = next(p for p in GPU_PROBLEMS if p.op == "prune")
    for row in rows(fake, prune, "ours"):
        row["median"] = 0.0149
    assert bar(fake, f"{prune.name}: milliseconds") == {
        "what": f"{prune.name}: milliseconds",
        "bar": "at most 15",
        "measured": pytest.approx(14.9),
        "passed": True,
    }


def test_compiled_rivals_count_and_the_fastest_of_a_kind_does() -> None:
    fake = invented()
    build = next(problem for problem in GPU_PROBLEMS if "loop compiled" in problem.contenders)
    for row in rows(fake, build, "loop compiled"):
        row["median"] /= 2
    assert tables.ratio(fake, build, 1, "loop") == pytest.approx(25)
    for row in rows(fake, build, "loop compiled"):
        row["error"], row["failed"] = None, "it does not compile"
    assert tables.ratio(fake, build, 1, "loop") == pytest.approx(50)
    assert "loop compiled: it does not compile" in tables.failures(fake)
    assert "FAILED" in tables.rivals_table(fake)


def test_no_figure_without_a_passing_check() -> None:
    fake = invented()
    build = GPU_PROBLEMS[0]
    for row in rows(fake, build, "ours"):
        row["error"] = 0.5
    assert all(not b["passed"] for b in tables.bars(fake) if b["what"].startswith(f"{build.name}: time"))
    line = next(line for line in tables.rows_table(fake, 1).splitlines() if build.name in line)
    assert "WRONG (5.0e-01)" in line
    for row in rows(fake, build, "ours"):
        row |= {"error": None, "failed": "an illegal memory access"}
    assert "FAILED" in tables.rows_table(fake, 1)


def test_share_names_its_peak_and_a_scaled_rival_says_so() -> None:
    fake = invented()
    table = tables.rows_table(fake, 1)
    assert "50% float32" in table
    assert "50% float64" in table
    assert "50% copy" in table
    build = GPU_PROBLEMS[0]
    for row in rows(fake, build, "loop"):
        row["timed_blocks"] = build.num_blocks // 8
    line = next(r for r in tables.rivals_table(fake).splitlines() if f"| {build.name} " in r)
    assert "scaled from 1/8 of the blocks" in line


def test_cuda_kernels_stay_or_go_by_their_ratio_to_triton() -> None:
    fake = invented()
    both = [p for p in GPU_PROBLEMS if "native" in names(p)]
    stays, goes, refused, wrong = both[:4]
    for row in rows(fake, goes, "triton"):
        row["median"] = next(rows(fake, goes, "native"))["median"] * 1.19
    for row in rows(fake, refused, "native"):
        row |= {"refused": "too large", "error": None}
    for row in rows(fake, wrong, "native"):
        row["error"] = 1.0
    lines = tables.backends_table(fake).splitlines()
    assert len(lines) == 2 + len(both) - 1
    verdicts = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines[2:]}
    assert verdicts[stays.name] == "stays"
    assert verdicts[goes.name] == "is to be deleted"
    assert verdicts[wrong.name] == "undecided"
    assert refused.name not in verdicts


def test_rows_that_were_not_reached_are_counted() -> None:
    fake = invented()
    fake["rows"] = fake["rows"][:-3]
    assert "not reached in the time allowed: 3 rows" in tables.page(fake)


def test_a_worker_that_dies_costs_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the worker, which dies in its second row and, when started again, in none."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, pathlib\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--lines') + 1])\n"
        "known = path.read_text() if path.exists() else ''\n"
        "with path.open('a') as f:\n"
        "    for i in range(3):\n"
        "        if f'row{i}' in known: continue\n"
        "        line = {'problem': f'row{i}', 'name': 'ours'}\n"
        "        print(json.dumps({**line, 'kind': 'begin'}), file=f, flush=True)\n"
        "        if i == 1: sys.exit('an illegal memory access')\n"
        "        print(json.dumps({**line, 'kind': 'row', 'error': 0.0}), file=f, flush=True)\n"
    )
    real = subprocess.run

    def stand_in(command: list[str], **options: object) -> subprocess.CompletedProcess:
        return real([sys.executable, str(script), *command[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", stand_in)
    lines = [line for line in run.run_workers("gpu", "cpu", tmp_path / "lines", 60) if line["kind"] == "row"]
    assert [line["problem"] for line in lines] == ["row0", "row1", "row2"]
    assert lines[1]["failed"] == "it ended its process: an illegal memory access"
    assert "failed" not in lines[2]
    script.write_text("import sys; sys.exit('no driver')")
    with pytest.raises(SystemExit, match="came to no row: it ended its process: no driver"):
        run.run_workers("gpu", "cpu", tmp_path / "other lines", 60)


def test_a_failing_row_is_a_line_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: object) -> None:
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setattr(worker, "measure", no_room)
    row = worker._row(GPU_TINY[0], "ours", "cpu", worker.Clock("cpu"), 0.1)
    assert (row["failed"], row["error"]) == ("OutOfMemoryError: no room", None)


def test_memory_is_compared_with_what_a_build_leaves_or_gathers_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000)
    once, dual = (
        next(p for p in GPU_TINY if p.op == "build" and p.form == form) for form in ("primal", "dual")
    )
    calls = next(p for p in GPU_TINY if p.per_call)
    state = once.num_blocks * once.block_size**2
    for problem, least in ((once, 4 * state), (calls, 8 * state), (dual, 4 * 24 * dual.num_weights)):
        used = worker.peak_memory(problem, "cpu")
        assert used["grads_bytes"] == 4 * problem.num_rows * problem.num_weights
        assert used["peak_bytes"] == 4_000
        assert least <= used["state_bytes"] < least + 600_000  # small tensors of the layout, and factors


def test_events_surround_the_call_while_the_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, other: object) -> float:
            return 2.0  # milliseconds

    class Busy:
        def zero_(self) -> None:
            happened.append("busy")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = worker.Clock("cpu")
    monkeypatch.setattr(clock, "ahead", Busy())
    assert clock.time(lambda x: happened.append("call") or x, (7,)) == (0.002, 7)
    assert happened == ["busy", "event", "call", "event", "wait"]


def test_worker_stops_when_its_time_is_up(tmp_path: Path) -> None:
    worker.work("gpu-tiny", "cpu", tmp_path / "lines", 0.0)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "lines").read_text().splitlines()]
    assert set(kinds) == {"device", "peak"}


def test_readme_part_comes_from_the_newest_result_or_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run.PARTS['gpu']}\nold\n{run.END}\nafter\n")
    monkeypatch.setattr(run, "README", readme)
    assert run.main(["--readme", "--out", str(tmp_path)]) == 0
    assert run.NO_GPU_RESULT in readme.read_text()
    older = invented()
    newer = {**copy.deepcopy(older), "date": "2000-01-02T00:00", "commit": "newer"}
    for name, fabricated in (("b", older), ("a", newer)):
        (tmp_path / f"{name}.json").write_text(json.dumps(fabricated))
    assert run.main(["--readme", "--out", str(tmp_path)]) == 0
    page = readme.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "commit newer" in page
    assert INVENTED in page
    assert "400 TFLOP/s in TF32" in page
    assert run.NO_GPU_RESULT not in page


def test_the_readme_of_the_repository_is_generated() -> None:
    part = run.README.read_text().split(run.PARTS["gpu"])[1].split(run.END)[0]
    assert part.strip() == run.gpu_part(run.README.parent / "results").strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence_and_exit_code_2() -> None:
    make = ["make", "--no-print-directory", "bench-gpu"]
    for command in (make, [sys.executable, "-m", "benchmarks.run", "--table", "gpu"]):
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert said == [machine.gpu_reason()]
        assert "finds no GPU here" in said[0]
