"""The tuner, with kernels in Triton's interpreter and with invented ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from benchmarks import machine, tune
from benchmarks.problems import FLOORS
from fastfisher.kernels.triton import tuning


def test_every_op_of_the_tuning_table_can_be_tuned_at_sizes_that_it_has_rows_for() -> None:
    assert set(tune.SUBJECTS) == {row.op for row in tuning.TABLE}
    for op, subject in tune.SUBJECTS.items():
        assert (subject.op, subject.form) in FLOORS
        for size in subject.sizes:
            row = tune.present_row(op, size, 90)
            numbers = torch.empty(1, dtype=torch.float64 if subject.itemsize == 8 else torch.float32)
            assert tuning.parameters(op, size, numbers).keys() == row.parameters.keys()
            problem = subject.problem(size, tune.WEIGHTS)
            assert problem.num_weights % (problem.block_size * tune.CHECKED_BLOCKS) == 0


def test_candidates_begin_with_the_neighbours_of_the_present_row() -> None:
    present = {"num_warps": 4, "ROWS": 32, "PRECISION": "tf32x3"}
    found = tune.candidates(present)
    assert len(found) == len(tune.GRID["num_warps"]) * len(tune.GRID["ROWS"]) - 1
    assert present not in found
    changes = [sum(p[name] != value for name, value in present.items()) for p in found]
    assert changes == sorted(changes)
    assert {p["PRECISION"] for p in found} == {"tf32x3"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_a_kernel_is_checked_and_timed_with_its_parameters() -> None:
    found = tune.tune("block_matvec", 8, 0.5, "cpu", weights=0)
    assert 0 < found.tried < found.of
    assert 0 < found.best_seconds < math.inf
    assert found.best.keys() == found.present.parameters.keys()


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict], float]], tune.Found]:
    """Tune fisher_accumulate with a function from parameters to seconds in place of the kernel."""

    def run(seconds: Callable[[dict], float]) -> tune.Found:
        class Invented:
            def __init__(self, *args: object) -> None:
                pass

            def seconds(self, parameters: dict) -> float:
                return seconds(parameters)

        monkeypatch.setattr(tune, "Trial", Invented)
        return tune.tune("fisher_accumulate", 50, 60, "cpu")

    return run


def test_the_fastest_row_is_printed_as_source(trials: Callable[..., tune.Found]) -> None:
    found = trials(lambda p: 1e-3 / p["num_warps"] + (1.0 if p["ROWS"] != 32 or p["TILE"] != 64 else 0.0))
    text = tune.report("fisher_accumulate", 50, found, 90)
    assert "in force 250 µs, this one 62.5 µs" in text
    line = text.splitlines()[1].strip().rstrip(",")
    row = eval(line, {"_row": tuning._row, "ANY": tuning.ANY})
    assert row.parameters == {
        **found.present.parameters,
        "num_warps": 16,
        "num_stages": row.parameters["num_stages"],
    }
    assert (row.op, row.size, row.since) == ("fisher_accumulate", 64, 90)


def test_a_row_that_is_hardly_beaten_stays(trials: Callable[..., tune.Found]) -> None:
    found = trials(lambda p: 1.0 if p["num_warps"] == 4 else 0.99)
    assert "stays" in tune.report("fisher_accumulate", 50, found, 90)


def test_a_row_that_fails_loses_to_any_that_does_not(trials: Callable[..., tune.Found]) -> None:
    found = trials(lambda p: math.inf if p["num_warps"] == 4 else 1.0)
    assert "in force fails or is wrong, this one 1 s" in tune.report("fisher_accumulate", 50, found, 80)
    assert "since" not in tune.source(found, 80)
    nothing = trials(lambda p: math.inf)
    assert "stays" in tune.report("fisher_accumulate", 50, nothing, 90)


def test_a_wrong_kernel_takes_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tune.Trial("block_matvec", 8, "cpu", 0)
    monkeypatch.setattr(trial, "_error", lambda backend: math.nan)
    assert trial.seconds({}) == math.inf

    def too_large(backend: str) -> float:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(trial, "_error", too_large)
    assert trial.seconds({}) == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == f"{machine.gpu_reason()}\n"
    with pytest.raises(SystemExit) as left:
        tune.main(["convolution"])
    assert left.value.code == 2
    assert "unknown op 'convolution'" in capsys.readouterr().err
