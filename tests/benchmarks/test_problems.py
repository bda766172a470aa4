"""The table of problems: floors that can be counted by hand, and rivals that say what float64 says."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from benchmarks import inputs
from benchmarks.contenders import contender, names, worst_error
from benchmarks.inputs import inputs_of
from benchmarks.networks import SHAPES, SIZES
from benchmarks.problems import (
    FLOORS,
    GPU_PROBLEMS,
    GPU_TINY,
    PROBLEMS,
    SWEEPS,
    TABLES,
    TINY,
    TOLERANCE,
    Problem,
)
from fastfisher import ops
from fastfisher.errors import BackendError

SWEPT = [problem for sweep in SWEEPS["gpu-tiny"].values() for problem in sweep]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Batched LU of MKL breaks down on several threads, and small blocks are slower on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_floors_of_one_block_of_two_weights_and_three_gradients() -> None:
    def floor(op: str, form: str = "primal") -> tuple[int, int]:
        found = Problem(op, 2, 3, 2, form).floor
        return found.bytes, found.flops

    grads, state, triangle, factor = 4 * 6, 4 * 4, 4 * 3, 8 * 6
    gram, inverse = 3 * 2 * 3, 2**3  # 3 products, a multiplication and an addition each, for 3 entries; n^3
    assert floor("fisher_accumulate_") == (grads + 2 * triangle, gram)
    assert floor("spd_inverse_") == (triangle + state, inverse)
    assert floor("build") == (grads + state, gram + inverse)
    assert floor("sherman_morrison_") == (grads + 2 * state, 3 * (8 + 4))
    assert floor("dual_factor_", "dual") == (grads + factor, 2 * 2 * 6 + 3**3 // 3)
    assert floor("obs_saliency") == (3 * 4 * 2, 3 * 2)
    # only the diagonal: Cholesky and its inverse, n^3 / 3 each, the squares of the latter added up
    assert floor("inverse_diagonal_from_grads") == (grads + 4 * 2, gram + 2 * 2**3 // 3 + 2**2)
    assert floor("fisher_vector_product") == (grads + 2 * 4 * 2, 2 * 2 * 3 * 2)
    assert floor("prune_mask") == (4 * 2 + 2 + 2, 0)


def test_floor_of_a_build_in_calls_moves_the_float64_triangle_in_and_out_of_each() -> None:
    once, called = Problem("build", 2, 6, 2).floor, Problem("build", 2, 6, 2, per_call=3).floor
    assert called.flops == once.flops
    # written by the first call, read and written by the second, read by the inversion
    assert called.bytes - once.bytes == 4 * 8 * 3
    assert called.dtype == "float64"


def test_floor_of_the_dual_diagonal_reads_the_gradients_once_and_keeps_nothing() -> None:
    problem = Problem("diagonal", 4, 2, 4, "dual")
    factor, columns = 2 * 3 * 4 + 2**3 // 3, (2**2 + 2 * 2) * 4
    assert (problem.floor.bytes, problem.floor.flops) == (4 * 2 * 4 + 4 * 4, factor + columns)


def test_sums_over_blocks_count_the_short_blocks_of_every_tensor() -> None:
    problem = Problem("build", 10, 4, 4)
    assert problem.num_blocks == 3
    assert [problem.sum_over_blocks(power) for power in (1, 2, 3)] == [10, 16 + 16 + 4, 64 + 64 + 8]
    two = Problem("build", 0, 4, 5_000, network="ResNet-50").prefix(2)  # 9,408 and 4,096 weights
    assert (two.num_weights, two.num_blocks) == (13_504, 3)
    assert two.sum_over_blocks(2) == 5_000**2 + 4_408**2 + 4_096**2


def test_networks_have_the_weights_of_the_papers() -> None:
    # convolutions: the stem, then per stage the first bottleneck with its projection and the others
    resnet = 64 * 3 * 49
    for width, channels, count in ((64, 64, 3), (128, 256, 4), (256, 512, 6), (512, 1024, 3)):
        first = channels * width + 9 * width**2 + 4 * width**2 + 4 * channels * width
        resnet += first + (count - 1) * (4 * width**2 + 9 * width**2 + 4 * width**2)
    assert sum(SIZES["ResNet-50"]) == resnet + 2048 * 1000 == 25_502_912
    assert len(SHAPES["ResNet-50"]) == 54
    assert sum(SIZES["BERT-base encoder"]) == 12 * (4 * 768**2 + 2 * 768 * 3072) == 84_934_656
    assert sum(SIZES["ViT-B"]) == 84_934_656 + 3 * 16 * 16 * 768 + 768 * 1000
    assert SHAPES["ResNet-50"][:5] == (
        (64, 3, 7, 7),
        (64, 64, 1, 1),
        (64, 64, 3, 3),
        (256, 64, 1, 1),
        (256, 64, 1, 1),
    )


def test_a_problem_too_large_for_a_device_takes_the_largest_prefix_of_its_network() -> None:
    whole = GPU_PROBLEMS[0]
    assert whole.fitted(whole.device_bytes) == whole
    smaller = whole.fitted(whole.device_bytes - 1)
    assert smaller == whole.prefix(53)
    assert "ResNet-50 (53 of 54 tensors)" in smaller.name
    assert "tensors" not in whole.name
    assert (smaller.bars, smaller.limits) == (whole.bars, whole.limits)
    gradients = 4 * 1024 * 25_502_912
    assert whole.device_bytes > gradients + 4 * 25_502_912 * 50
    assert whole.fitted(0).tensors == 1
    assert SWEPT[0].fitted(0) == SWEPT[0]


@pytest.mark.parametrize("problem", [*PROBLEMS, *GPU_PROBLEMS], ids=lambda p: p.name)
def test_prediction_is_never_below_the_floor(problem: Problem) -> None:
    assert problem.predicted_seconds(100, 30) >= problem.floor.seconds(100, 30) > 0


def test_tables_cover_every_op_in_every_form_under_distinct_names() -> None:
    for name, table in TABLES.items():
        covered = {(p.op, p.form) for p in table}
        only_gpu = set() if name in SWEEPS else {("diagonal", "dual"), ("prune", "dual")}
        assert covered == set(FLOORS) - only_gpu
        assert set(ops.OPS) <= {p.op for p in table}
        swept = [p for sweep in SWEEPS.get(name, {}).values() for p in sweep]
        assert len({p.name for p in (*table, *swept)}) == len({*table, *swept})


def test_bars_of_the_table_name_rivals_that_run() -> None:
    for problem in (*PROBLEMS, *GPU_PROBLEMS):
        for rival in problem.bars:
            assert any(name.startswith(rival) for name in names(problem))


@pytest.mark.parametrize("problem", [*TINY, *GPU_TINY, *SWEPT], ids=lambda problem: problem.name)
def test_contenders_say_what_float64_says(problem: Problem) -> None:
    for name in names(problem):
        if (
            name == "triton"
        ):  # interpreted here, which takes minutes; the conformance suite runs it on small cases
            continue
        chosen = contender(problem, name)
        arguments = chosen.setup()
        assert worst_error(problem, chosen, chosen.run(*arguments), arguments) <= TOLERANCE, name


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = next(p for p in GPU_TINY if "triton" in names(p))
    chosen = contender(problem, "triton")
    with pytest.raises(BackendError, match="triton"):
        chosen.run(*chosen.setup())


@pytest.mark.parametrize("problem", GPU_TINY, ids=lambda problem: problem.name)
def test_rivals_of_a_piece_of_the_blocks_say_so_and_are_right(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs_of.cache_clear()
    monkeypatch.setattr(inputs, "PIECE_BYTES", 300_000)
    parts = 0
    for name in names(problem):
        if name in ("ours", *ops.BACKENDS):
            continue
        chosen = contender(problem, name)
        if chosen.piece is None:
            continue
        arguments = chosen.setup()
        assert worst_error(problem, chosen, chosen.run(*arguments), arguments) <= TOLERANCE, name
        assert chosen.piece.ids.tolist() == list(range(0, problem.num_blocks, chosen.piece.every))
        parts = max(parts, chosen.piece.every)
    inputs_of.cache_clear()
    rivals_of_vectors = ("obs_saliency", "prune_mask", "prune", "kron_matvec", "conv_weight_grads")
    reading = ("inverse_diagonal", "block_matvec", "obs_update_", "factor_diagonal", "block_factor_matvec")
    of_state = problem.form == "primal" and problem.op in reading
    alone = problem.contenders == ("ours",) and problem.op != "prune"
    assert (parts > 1) == (problem.op not in rivals_of_vectors and not of_state and not alone)


def test_check_of_pruning_finds_a_wrong_weight_and_a_wrong_count() -> None:
    problem = next(p for p in GPU_TINY if p.op == "prune")
    chosen = contender(problem, "ours")
    arguments = chosen.setup()
    new = chosen.run(*arguments)
    assert worst_error(problem, chosen, new, arguments) <= TOLERANCE
    weight = inputs_of(problem).weight
    with torch.no_grad():
        for change in (lambda w: w[-200:].mul_(1.01), lambda w: w[200:400].zero_()):
            wrong = new.clone()
            change(wrong)
            assert worst_error(problem, chosen, wrong, arguments) > TOLERANCE
    by_magnitude = torch.where(weight.abs() > weight.abs().median(), new, 0)
    assert worst_error(problem, chosen, by_magnitude, arguments) > TOLERANCE


def test_compiled_rivals_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # traced and made functional as for any compiler, but run without a minute of C++
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    calls, dual = Problem("build", 100, 6, 5, per_call=3), Problem("build", 100, 6, 20, "dual")
    for problem, name in ((calls, "loop"), (calls, "strong primal"), (dual, "loop"), (dual, "strong dual")):
        chosen = contender(problem, f"{name} compiled")
        assert worst_error(problem, chosen, chosen.run(), ()) <= TOLERANCE


def test_check_finds_a_wrong_entry_of_the_last_block() -> None:
    problem = next(p for p in TINY if p.op == "obs_saliency")
    chosen = contender(problem, "strong")
    arguments = chosen.setup()
    returned = chosen.run(*arguments)
    returned[-1] *= 1.01
    assert worst_error(problem, chosen, returned, arguments) > TOLERANCE
    returned[-1] = float("nan")
    assert not worst_error(problem, chosen, returned, arguments) <= TOLERANCE


def test_inputs_are_the_same_each_time() -> None:
    first = inputs_of(TINY[0]).grads.clone()
    inputs_of.cache_clear()
    assert inputs_of(TINY[0]).grads.equal(first)
