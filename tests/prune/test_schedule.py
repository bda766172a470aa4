"""Schedules: the formulas against their definition, which times are due, and what is refused."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.prune.schedule import as_schedule

RAMPS = (ff.CubicSchedule, ff.LinearSchedule, ff.ExponentialSchedule)


@pytest.mark.parametrize("t", [2, 3, 5.5, 11, 12])
def test_ramps_follow_their_formulas(t: float) -> None:
    x = (t - 2) / 10
    s = {ramp: ramp(0.3, 0.9, begin=2, end=12)(t) for ramp in RAMPS}
    assert math.isclose(s[ff.CubicSchedule], 0.9 + (0.3 - 0.9) * (1 - (t - 2) / (12 - 2)) ** 3)
    assert math.isclose(s[ff.LinearSchedule], 0.3 + 0.6 * x)
    assert math.isclose(1 - s[ff.ExponentialSchedule], 0.7 * (0.1 / 0.7) ** x)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_begin_and_end_exactly(ramp: Any) -> None:
    schedule = ramp(0.3, 0.9, begin=2, end=12, every=3)
    assert math.isclose(schedule(-5), 0.3)
    assert math.isclose(schedule(2), 0.3)
    assert schedule(12) == schedule(100) == schedule.final == 0.9


@pytest.mark.parametrize("ramp", RAMPS)
def test_due_times_are_begin_and_every_and_end(ramp: Any) -> None:
    schedule = ramp(0.3, 0.9, begin=2, end=9, every=3)
    found = [schedule.due(when) for when in range(12)]
    assert found[:2] == [None, None]
    assert [due[0] for due in found[2:]] == [2, 2, 2, 5, 5, 5, 8, 9, 9, 9]
    # a time between two that are due has the target of the one that was missed, not its own
    assert all(due[1] == schedule(due[0]) for due in found[2:])


def test_fractions_of_an_epoch() -> None:
    schedule = ff.LinearSchedule(0.0, 0.5, begin=0, end=1, every=0.1)
    times = {schedule.due(step * 0.01)[0] for step in range(120)}
    assert len(times) == 11
    assert schedule.due(0.1 + 0.1 + 0.1)[0] == schedule.due(0.3)[0]


@given(
    st.sampled_from(RAMPS),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 7),
)
def test_targets_never_fall(ramp: Any, a: float, b: float, begin: int, length: int, every: int) -> None:
    low, high = sorted((a, b))
    schedule = ramp(low, high, begin=begin, end=begin + length, every=every)
    found = [due for due in map(schedule.due, range(50)) if due is not None]
    sparsities = [sparsity for _, sparsity in found]
    assert all(one <= other + 1e-12 for one, other in pairwise(sparsities))
    assert found[-1] == (begin + length, high)
    assert all(0 <= sparsity < 1 for sparsity in sparsities)


def test_pairs_and_functions() -> None:
    pairs = as_schedule([(1, 0.5), (4, 0.8)])
    assert [pairs.due(when) for when in (0, 1, 3, 4, 9)] == [None, (1, 0.5), (1, 0.5), (4, 0.8), (4, 0.8)]
    assert pairs.final == 0.8
    called = as_schedule(lambda epoch: 0.1 * epoch if epoch % 2 else None)
    assert called.due(2) is None
    assert called.due(3) == (3, 0.1 * 3)
    assert called.final is None
    with pytest.raises(
        FastFisherError, match=re.escape("returns for 11 must be a fraction in [0, 1); got 1.1")
    ):
        called.due(11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.CubicSchedule(0.3, 90, begin=0, end=1), "a fraction in [0, 1); got 90. Did you mean 0.90?"),
        (lambda: ff.CubicSchedule(0.3, 0.2, begin=0, end=1), "got initial=0.3, final=0.2"),
        (lambda: ff.LinearSchedule(0.3, 0.9, begin=5, end=1), "got begin=5, end=1"),
        (lambda: ff.LinearSchedule(0.3, 0.9, begin=0, end=5, every=0), "every must be above 0; got 0"),
        (lambda: ff.LinearSchedule(0, 0.9, begin=0, end=math.inf), "end must be a number of epochs or steps; got inf"),
        (lambda: ff.ExponentialSchedule(True, 0.9, begin=0, end=1), "initial must be a fraction in [0, 1); got True"),
        (lambda: as_schedule([]), "got []"),
        (lambda: as_schedule(0.5), "got 0.5"),
        (lambda: as_schedule([1, 2]), "a list of pairs (when, sparsity) or a function; got [1, 2]"),
        (lambda: as_schedule([(2, 0.5), (1, 0.8)]), "times in a schedule must rise"),
        (lambda: as_schedule([(1, 0.5), (2, 0.4)]), "sparsities must not fall; got (1, 0.5) before (2, 0.4)"),
        (lambda: as_schedule([("one", 0.5)]), "must be a number of epochs or steps; got 'one'"),
        (lambda: as_schedule([(1, 1.0)]), "must be a fraction in [0, 1); got 1.0"),
    ],
)  # fmt: skip
def test_bad_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(FastFisherError, match=re.escape(message)):
        make()
