"""The numbers and choices of one pruning run, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastfisher.errors import FastFisherError

CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": ("woodfisher", "diagonal", "magnitude"),
    "scope": ("global", "layer"),
    "damping_mode": ("absolute", "relative"),
    "update": ("sum", "joint", None),
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
        """The update of the kept weights: only woodfisher has one (a diagonal Fisher couples nothing)."""
        return self.update if self.method == "woodfisher" else None
