"""The runner on the tiny table, and the tables it makes of results."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory, run, tables
from benchmarks.machine import attainable
from benchmarks.problems import TINY

pytestmark = pytest.mark.xdist_group("tiny table")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tables.Result:
    out = tmp_path_factory.mktemp("results")
    readme = run.README.read_text()
    with pytest.MonkeyPatch.context() as patch:
        # Where the tests are spread over processes, pytest-benchmark would refuse to measure.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        assert run.main(["--table", "tiny", "--out", str(out)]) == 0
    assert run.README.read_text() == readme
    (path,) = out.glob("*.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())


def test_runner_measures_every_row_and_finds_it_right(result: tables.Result) -> None:
    names = {problem.name for problem in TINY}
    assert {row["problem"] for row in result["rows"]} == names
    assert all(row["error"] is not None and row["error"] <= 1e-4 for row in result["rows"])
    assert all(row["median"] > 0 for row in result["rows"])
    assert {"cpu", "cores", "torch"} <= set(result["machine"])
    assert result["peaks"]["1"]["copy_gbs"] > 0


def test_runner_judges_every_bar(result: tables.Result) -> None:
    asked = sum(len(problem.bars) for problem in TINY)
    builds = sum(problem.op == "build" for problem in TINY) if sys.platform == "linux" else 0
    assert len(result["bars"]) == asked + builds
    assert all(bar["measured"] is not None for bar in result["bars"])


def test_no_ratio_without_a_passing_check(result: tables.Result) -> None:
    problem = next(p for p in TINY if p.op == "sherman_morrison_")
    for wrong in ("ours", "loop"):
        broken = copy.deepcopy(result)
        for row in broken["rows"]:
            if (row["problem"], row["name"]) == (problem.name, wrong):
                row["error"] = 0.5
        assert tables.ratio(result, problem, 1, "loop") is not None
        assert tables.ratio(broken, problem, 1, "loop") is None
        if wrong == "ours":
            assert "WRONG" in tables.rows_table(broken, 1)


def test_strong_is_the_faster_of_its_forms(result: tables.Result) -> None:
    problem = TINY[0]
    rows = {r["name"]: r for r in result["rows"] if (r["problem"], r["threads"]) == (problem.name, 1)}
    fastest = min(rows[name]["median"] for name in ("strong primal", "strong dual"))
    assert tables.ratio(result, problem, 1, "strong") == fastest / rows["ours"]["median"]


def test_readme_is_filled_between_its_markers(
    result: tables.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    cpu, gpu = run.PARTS["full"], run.PARTS["gpu"]
    page.write_text(f"before\n{cpu}\nold\n{run.END}\nbetween\n{gpu}\nold\n{run.END}\nafter\n")
    monkeypatch.setattr(run, "README", page)
    run.write_readme("full", "new")
    run.write_readme("gpu", "newer")
    assert page.read_text() == (
        f"before\n{cpu}\n\nnew\n{run.END}\nbetween\n{gpu}\n\nnewer\n{run.END}\nafter\n"
    )


def test_float64_peak_is_at_least_half_the_float32_one() -> None:
    rates = {"float32 mm": 1e11, "float32 oneDNN": 2e11, "float64 mm": 5e10, "copy": 3e10}
    peaks = attainable(rates)
    assert (peaks["float32_gflops"], peaks["float64_gflops"], peaks["copy_gbs"]) == (200, 100, 30)
    assert attainable({**rates, "float64 mm": 1.5e11})["float64_source"] == "float64 mm"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_memory_counts_what_is_allocated() -> None:
    found = memory.measure(TINY[0])
    assert found["state_bytes"] >= 4 * TINY[0].sum_over_blocks(2)
    assert found["peak_bytes"] >= 0
