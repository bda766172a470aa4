"""A first look at speed on the user's own machine; the body of `fastfisher bench`.

A few calls of the public functions are timed beside what a careful user writes in plain PyTorch, a batched Gram matrix
and Cholesky factors, on the same gradients, and both are compared with float64.  benchmarks/README.md has the thorough
tables.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FastFisherError
from fastfisher.fisher.inverse import FisherInverse

TOLERANCE = 1e-4  # worst relative error of the checked entries; above it a row shows no ratio
DAMPING = 1e-5
GRADIENT_SCALE = 1e-2
PRUNED_FRACTION = 0.5
ROUNDS = 50  # at most
WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 22}  # d; a GPU is not busy with less
TOTAL = "cpu"


@dataclass(frozen=True)
class Row:
    """One line: what was done, the worst relative errors of both, and their median seconds."""

    what: str
    error: float
    plain_error: float
    seconds: float
    plain_seconds: float

    @property
    def ratio(self) -> float | None:
        """Plain PyTorch's time over ours, None unless both are right."""
        right = self.error <= TOLERANCE and self.plain_error <= TOLERANCE
        return self.plain_seconds / self.seconds if right else None

    @property
    def verdict(self) -> str:
        """What the row comes to, in a word."""
        if not self.error <= TOLERANCE:
            return "WRONG"
        if self.ratio is None:
            return "plain PyTorch is wrong"
        return "faster" if self.ratio >= 1 else "slower"
