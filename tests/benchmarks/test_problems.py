"""The table of problems: floors that can be counted by hand, and rivals that say what float64 says."""

from __future__ import annotations

import pytest

from benchmarks.contenders import NAMES, contender, inputs_of, worst_error
from benchmarks.problems import FLOORS, PROBLEMS, TABLES, TINY, TOLERANCE, Problem


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


def test_sums_over_blocks_count_the_short_block() -> None:
    problem = Problem("build", 10, 4, 4)
    assert problem.num_blocks == 3
    assert [problem.sum_over_blocks(power) for power in (1, 2, 3)] == [10, 16 + 16 + 4, 64 + 64 + 8]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_prediction_is_never_below_the_floor(problem: Problem) -> None:
    assert problem.predicted_seconds(100, 30) >= problem.floor.seconds(100, 30) > 0


def test_tables_cover_every_op_in_every_form_under_distinct_names() -> None:
    for table in TABLES.values():
        assert {(p.op, p.form) for p in table} == set(FLOORS)
        assert len({p.name for p in table}) == len(table)


def test_bars_of_the_table_name_rivals_that_run() -> None:
    for problem in PROBLEMS:
        for rival in problem.bars:
            assert any(name.startswith(rival) for name in NAMES[problem.op])


@pytest.mark.parametrize(
    ("problem", "name"),
    [(problem, name) for problem in TINY for name in NAMES[problem.op]],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_contenders_say_what_float64_says(problem: Problem, name: str) -> None:
    chosen = contender(problem, name)
    arguments = chosen.setup()
    assert worst_error(problem, chosen, chosen.run(*arguments), arguments) <= TOLERANCE


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
