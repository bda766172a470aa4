"""How sparse the network is to be, and when: the time of training (an epoch or a step) -> the sparsity due, or None.

A ramp goes from the sparsity `initial` at time `begin` to `final` at `end`, with x = (t − begin) / (end − begin):
    CubicSchedule        s(t) = s_f + (s_i − s_f)(1 − x)³, fast while there is much to remove (Zhu & Gupta, 2017)
    LinearSchedule       s(t) = s_i + (s_f − s_i) x, the same number of weights each time
    ExponentialSchedule  1 − s(t) = (1 − s_i)^(1 − x) (1 − s_f)^x, the same share of what is left each time
Pruning is due at begin, begin + every, ... and at end.  Sparsities are absolute: a time
that was missed changes nothing of what is reached at the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from fastfisher.errors import FastFisherError

# Times are compared up to this share of `every`: 0.1 + 0.2 is later than 0.3.
SLACK = 1e-9


class Schedule(Protocol):
    """What `Pruner` needs to know.   final: the largest sparsity, None where it cannot be told."""

    @property
    def final(self) -> float | None: ...

    def due(self, when: float) -> tuple[float, float] | None:
        """The latest time up to `when` at which pruning is due, and its sparsity."""


def real(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_fraction(name: str, value: Any) -> None:
    if not real(value) or not 0 <= value < 1:
        hint = f" Did you mean {value / 100:.2f}?" if real(value) and 1 < value < 100 else ""
        raise FastFisherError(f"{name} must be a fraction in [0, 1); got {value!r}.{hint}")


def _check_time(name: str, value: Any) -> None:
    if not real(value):
        raise FastFisherError(f"{name} must be a number of epochs or steps; got {value!r}")


@dataclass(frozen=True)
class _Ramp:
    initial: float
    final: float
    begin: float
    end: float
    every: float = 1

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            _check_fraction(name, getattr(self, name))
        for name in ("begin", "end", "every"):
            _check_time(name, getattr(self, name))
        if self.final < self.initial:
            raise FastFisherError(
                f"final must not be below initial, as removed weights stay removed; got initial={self.initial!r}, "
                f"final={self.final!r}"
            )
        if self.end < self.begin:
            raise FastFisherError(f"end must not be before begin; got begin={self.begin!r}, end={self.end!r}")
        if self.every <= 0:
            raise FastFisherError(f"every must be above 0; got {self.every!r}")

    def _at(self, x: float) -> float:
        """The sparsity after the share x of the way, 0 <= x < 1."""
        raise NotImplementedError

    def __call__(self, when: float) -> float:
        """s(t), whether or not pruning is due then."""
        if when >= self.end:
            return float(self.final)
        return self._at(max(0.0, (when - self.begin) / (self.end - self.begin)))

    def due(self, when: float) -> tuple[float, float] | None:
        """The latest time up to `when` at which pruning is due, and its sparsity; None before `begin`."""
        turns = math.floor((when - self.begin) / self.every + SLACK)
        if turns < 0:
            return None
        at = self.end if when >= self.end else self.begin + turns * self.every
        return at, self(at)


class CubicSchedule(_Ramp):
    """s(t) = s_f + (s_i − s_f)(1 − (t − begin) / (end − begin))³, at begin, begin + every, ... and end.

    initial, final: fractions in [0, 1).   begin, end, every: epochs or steps, whichever Pruner.step is told.
    Raises FastFisherError on bad input.   Source: Zhu & Gupta, 2017.
    """

    def _at(self, x: float) -> float:
        return self.final + (self.initial - self.final) * (1 - x) ** 3


class LinearSchedule(_Ramp):
    """s(t) = s_i + (s_f − s_i)(t − begin) / (end − begin), at begin, begin + every, ... and end.

    initial, final, begin, end, every: as for CubicSchedule.
    """

    def _at(self, x: float) -> float:
        return self.initial + (self.final - self.initial) * x


class ExponentialSchedule(_Ramp):
    """1 − s(t) = (1 − s_i)^(1 − x) (1 − s_f)^x with x = (t − begin) / (end − begin): the same share of the weights left
    goes each time.

    initial, final, begin, end, every: as for CubicSchedule.
    """

    def _at(self, x: float) -> float:
        return 1 - (1 - self.initial) ** (1 - x) * (1 - self.final) ** x


@dataclass(frozen=True)
class _Listed:
    """Pairs (when, sparsity)."""

    pairs: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for when, sparsity in self.pairs:
            _check_time("the time in a schedule", when)
            _check_fraction("a sparsity in a schedule", sparsity)
        for one, other in pairwise(self.pairs):
            if other[0] <= one[0] or other[1] < one[1]:
                raise FastFisherError(
                    f"times in a schedule must rise and sparsities must not fall; got {one} before {other}"
                )

    @property
    def final(self) -> float:
        return self.pairs[-1][1]

    def due(self, when: float) -> tuple[float, float] | None:
        return next((pair for pair in reversed(self.pairs) if pair[0] <= when), None)


@dataclass(frozen=True)
class _Called:
    """A function when -> sparsity or None.  What it would have said at a time that was missed nobody knows."""

    function: Callable[[float], float | None]
    final: None = None

    def __repr__(self) -> str:
        return "a function"  # the address of one tells nothing in another process

    def due(self, when: float) -> tuple[float, float] | None:
        sparsity = self.function(when)
        if sparsity is None:
            return None
        _check_fraction(f"what the schedule returns for {when!r}", sparsity)
        return when, sparsity


def as_schedule(given: Any) -> Schedule:
    """A ramp, a list of pairs or a function, as Pruner takes them.  Raises FastFisherError on anything else."""
    if isinstance(given, _Ramp):
        return given
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given):
        if all(isinstance(pair, Sequence) and len(pair) == 2 for pair in given):
            return _Listed(tuple((when, sparsity) for when, sparsity in given))
    elif callable(given):
        return _Called(given)
    raise FastFisherError(
        f"schedule must be a CubicSchedule or its like, a list of pairs (when, sparsity) or a function; got {given!r}"
    )
