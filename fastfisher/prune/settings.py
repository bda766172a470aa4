"""The numbers and choices of one pruning run, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastfisher.errors import FastFisherError

BLOCK_METHODS = ("woodfisher", "woodtaylor")
# Power of the polynomial along which recomputed steps approach the final sparsity.
SPACING = 2
# Steps for each factor e by which the weights become fewer, where their number is not given: 13 to 80 %, 19 to 90 %.
STEPS_PER_E = 8

CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": ("woodfisher", "woodtaylor", "diagonal", "magnitude"),
    "scope": ("global", "layer"),
    "damping_mode": ("absolute", "relative"),
    "update": ("auto", "sum", "joint", None),
}


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FastFisherError(f"{name} must be a whole number of at least 1; got {value!r}")


@dataclass(frozen=True)
class Settings:
    """All that `prune` and `plan` share but model and data.  Raises FastFisherError with the offending value."""

    sparsity: float
    method: str
    scope: str
    block_size: int | None
    num_grads: int
    grad_batch_size: int
    damping: float
    damping_mode: str
    update: str | None
    seed: int
    num_recomputations: int | None = 0
    centered: bool = False

    def __post_init__(self) -> None:
        s = self.sparsity
        number = isinstance(s, (int, float)) and not isinstance(s, bool)
        if not number or not 0 <= s < 1:
            hint = f" Did you mean {s / 100:.2f}?" if number and 1 < s < 100 else ""
            raise FastFisherError(f"sparsity must be a fraction in [0, 1); got {s!r}.{hint}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices))
                raise FastFisherError(f"{name} must be one of {listed}; got {getattr(self, name)!r}")
        if self.block_size is not None:
            _positive_int("block_size", self.block_size)
        _positive_int("num_grads", self.num_grads)
        n = self.num_recomputations
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
            raise FastFisherError(
                f"num_recomputations must be None or a whole number of at least 0; got {n!r}"
            )
        if self.centered and self.method != "woodtaylor":
            raise FastFisherError(f"centered=True goes with method='woodtaylor'; got method={self.method!r}")
        _positive_int("grad_batch_size", self.grad_batch_size)
        damping = self.damping
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
            raise FastFisherError(f"damping must be a positive number; got {damping!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise FastFisherError(f"seed must be a whole number; got {self.seed!r}")

    @property
    def fisher_block(self) -> int | None:
        """The block size of the Fisher estimate: 1 for the diagonal method."""
        return 1 if self.method == "diagonal" else self.block_size

    @property
    def applied_update(self) -> str | None:
        """The update of the kept weights: only methods with blocks have one (a diagonal Fisher couples nothing).

        "auto": "joint", the minimiser of the quadratic model, but "sum" where one step is to trust it all the way.
        """
        if self.method not in BLOCK_METHODS:
            return None
        if self.update == "auto":
            return "sum" if self.num_recomputations == 0 else "joint"
        return self.update

    def targets_of_steps(self, before: float) -> list[float]:
        """The sparsity after each step, from that `before` to the final one: s_f − (s_f − s_0)(1 − i/n)², i = 1 ... n.

        A method without gradients has nothing to recompute, and one step.   Source: Zhu & Gupta, 2017, with power 3.
        """
        if self.method == "magnitude":
            return [self.sparsity]
        if self.num_recomputations is None:
            left = max((1 - before) / (1 - self.sparsity), 1.0)
            steps = max(1, math.ceil(STEPS_PER_E * math.log(left)))
        else:
            steps = self.num_recomputations + 1
        gap = max(self.sparsity - before, 0.0)
        early = [self.sparsity - gap * (1 - i / steps) ** SPACING for i in range(1, steps)]
        return [*early, self.sparsity]
