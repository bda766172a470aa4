"""pytest-benchmark entry points: every contender of every problem, with one thread and with all, and the peaks of the
machine.

`make bench` runs this file and prints the tables; to look at single rows:
`pytest benchmarks/test_kernels.py --benchmark-enable -k "sherman and 1-thread"`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders import contender, names, worst_error
from benchmarks.machine import peak_probes
from benchmarks.problems import TABLES, TOLERANCE, Problem

THREADS = sorted({1, os.cpu_count() or 1})
SECONDS_A_ROW = {"full": 1.0, "tiny": 0.02}  # a row is repeated for about this long, 3 to 200 times


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    table = TABLES[metafunc.config.getoption("--table")]
    thread_ids = [f"{n}-thread" if n == 1 else f"{n}-threads" for n in THREADS]
    if "problem" in metafunc.fixturenames:
        rows = [(problem, name) for problem in table for name in names(problem)]
        metafunc.parametrize("threads", THREADS, indirect=True, ids=thread_ids)
        metafunc.parametrize(("problem", "name"), rows, ids=[f"{p.name} {n}" for p, n in rows])
    elif "probe" in metafunc.fixturenames:
        full = metafunc.config.getoption("--table") == "full"
        probes = peak_probes(2048 if full else 128, 2**28 if full else 2**20)
        metafunc.parametrize("threads", THREADS, indirect=True, ids=thread_ids)
        metafunc.parametrize(("probe", "name"), [(p, n) for n, p in probes.items()], ids=list(probes))


def test_peak(benchmark: BenchmarkFixture, threads: int, probe: tuple, name: str) -> None:
    run, work = probe
    benchmark.extra_info.update(kind="peak", threads=threads, name=name, work=work)
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)


def test_contender(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, threads: int, problem: Problem, name: str
) -> None:
    chosen = contender(problem, name)
    last: tuple = ()

    def setup() -> tuple[tuple, dict]:
        nonlocal last
        last = chosen.setup()
        return last, {}

    rounds = 1
    if chosen.warm_up is not None:
        chosen.warm_up()
    if not chosen.once:
        arguments = chosen.setup()
        started = time.perf_counter()
        chosen.run(*arguments)
        seconds = SECONDS_A_ROW[pytestconfig.getoption("--table")]
        rounds = min(200, max(3, int(seconds / (time.perf_counter() - started))))
    benchmark.extra_info.update(kind="row", threads=threads, problem=problem.name, name=name)
    returned = benchmark.pedantic(chosen.run, setup=setup, rounds=rounds)
    error = worst_error(problem, chosen, returned, last)
    benchmark.extra_info["error"] = error
    assert error <= TOLERANCE, f"{name} is wrong on {problem.name}: relative error {error:.1e}"
