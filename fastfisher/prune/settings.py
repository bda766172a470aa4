"""The numbers and choices of one pruning run, checked once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from fastfisher.errors import FastFisherError
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.fishleg import AUX, DRAWS, PARAMETERIZATIONS, PRODUCTS, TILE
from fastfisher.fisher.gradients import GRAD_DTYPES
from fastfisher.fisher.likelihood import FISHER_TYPES
from fastfisher.prune.patterns import Pattern

# They have blocks of an inverse, and an update for the kept weights.
BLOCK_METHODS = ("woodfisher", "woodtaylor", "hessian")
# Power of the polynomial along which recomputed steps approach the final sparsity.
SPACING = 2
# Steps for each factor e by which the weights become fewer, where their number is not given: 13 to 80 %, 19 to 90 %.
STEPS_PER_E = 8
# The largest block that goes one by one where no update is named: the work grows with its square for each weight.
GREEDY_BLOCK = 256

CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": (
        "woodfisher",
        "woodtaylor",
        "fishleg",
        "diagonal",
        "obd",
        "kfac",
        "hessian",
        "magnitude",
        "random",
    ),
    "scope": ("global", "layer"),
    "damping_mode": ("absolute", "relative"),
    "update": ("auto", "sum", "joint", "greedy", None),
    "fisher_type": FISHER_TYPES,
    "cost": ("params", "flops"),
    "grad_dtype": tuple(GRAD_DTYPES),
}
# Their estimate is a sum of outer products of gradients.
FROM_GRADIENTS = ("woodfisher", "woodtaylor", "fishleg", "diagonal")
# They look at weights alone.
DATA_FREE = ("magnitude", "random")


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FastFisherError(f"{name} must be a whole number of at least 1; got {value!r}")


@dataclass(frozen=True)
class FishLeg:
    """How method="fishleg" learns its inverse; the defaults are exact in u, not the published loop.

    parameterization: "diagonal", "block" (of block_size), "kron", "block-kron", "full".   tile: side of "block-kron".
    aux: "exact" in u, or "sampled", the published way: u drawn, Adam.
    max_aux_steps: on the gradients of one pruning; fewer where the loss on the held-out ones stops falling ("exact").
    update_aux_every: steps of an attached optimizer between two auxiliary steps in a `Pruner`; 0 for none.
    aux_grads: gradients of each of those.   horizon: gradients that the inverse remembers, by default 4 num_grads.
    Of "sampled":
    u: "gaussian", "rademacher" or "gradient".   preconditioner: of the slope, by Q itself.
    aux_lr: Adam's rate, relative to the largest entry of each factor.
    product: with the Fisher, from "rows" (gradients of single samples) or "antithetic" (two gradients of a batch at
    w ± ε v, with labels drawn from the model).
    Raises FastFisherError with the offending value.
    """

    parameterization: str = "block"
    tile: int = TILE
    aux: str = "exact"
    max_aux_steps: int = 30
    update_aux_every: int = 10
    aux_grads: int = 32
    horizon: int | None = None
    u: str = "gaussian"
    aux_lr: float = 1e-3
    preconditioner: bool = True
    product: str = "rows"

    def __post_init__(self) -> None:
        choices = {"parameterization": PARAMETERIZATIONS, "aux": AUX, "u": DRAWS, "product": PRODUCTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(map(repr, known))
                raise FastFisherError(f"fishleg: {name} must be one of {listed}; got {getattr(self, name)!r}")
        for name in ("tile", "max_aux_steps", "aux_grads"):
            _positive_int(f"fishleg: {name}", getattr(self, name))
        if self.update_aux_every != 0:
            _positive_int("fishleg: update_aux_every", self.update_aux_every)
        if self.horizon is not None:
            _positive_int("fishleg: horizon", self.horizon)
        if not isinstance(self.aux_lr, (int, float)) or not 0 < self.aux_lr < math.inf:
            raise FastFisherError(f"fishleg: aux_lr must be a positive number; got {self.aux_lr!r}")

    @classmethod
    def of(cls, given: Any) -> FishLeg:
        """Itself, or those named in a mapping; the defaults for None."""
        if given is None or isinstance(given, cls):
            return given or cls()
        if not isinstance(given, Mapping):
            raise FastFisherError(f"fishleg must be a mapping of options; got {given!r:.60}")
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
                raise FastFisherError(f"fishleg has no option {name!r}; the closest is {close[0]!r}")
        return cls(**given)


@dataclass(frozen=True)
class Settings:
    """All that `prune` and `plan` share but model and data.  Raises FastFisherError with the offending value.

    on_the_way: a step of a gradual run, at which N:M may have fewer zeros than it makes in the end.
    """

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
    fisher_type: str = "empirical"
    pattern: str = "unstructured"
    cost: str = "params"
    max_layer_sparsity: float | Mapping[str, float] = 1.0
    fisher_average: float = 0.0
    fishleg: FishLeg | Mapping[str, Any] | None = None
    grad_dtype: str = "auto"
    on_the_way: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Those among keyword arguments; where no sparsity is given, that of the pattern."""
        chosen = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        if chosen["sparsity"] is None:
            chosen["sparsity"] = Pattern.parse(chosen["pattern"]).sparsity
        return cls(**chosen)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fishleg", FishLeg.of(self.fishleg))
        own = self.rule.sparsity
        if own is not None and self.sparsity != own and not (self.on_the_way and self.sparsity < own):
            raise FastFisherError(
                f"pattern={self.pattern!r} makes a sparsity of {own:g}, so leave it out; got {self.sparsity!r}"
            )
        s = self.sparsity
        if s is None:
            raise FastFisherError(f"sparsity is missing: pattern={self.pattern!r} leaves it open")
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
        if self.fisher_type != "empirical" and self.method == "woodtaylor":
            raise FastFisherError(
                f"method='woodtaylor' needs the gradient of the loss, which fisher_type={self.fisher_type!r} "
                f"does not give; use 'empirical'"
            )
        if self.fisher_type != "empirical" and self.method in ("obd", "hessian"):
            raise FastFisherError(
                f"method={self.method!r} takes the Hessian of the loss, not a Fisher; got "
                f"fisher_type={self.fisher_type!r}"
            )
        if self.fisher_type == "exact" and self.method == "kfac":
            raise FastFisherError("method='kfac' knows fisher_type 'empirical' and 'mc'; got 'exact'")
        if self.fisher_type == "exact" and self.grad_batch_size != 1:
            raise FastFisherError(
                f"fisher_type='exact' sums over the outputs of single samples; got "
                f"grad_batch_size={self.grad_batch_size!r}"
            )
        share = self.fisher_average
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise FastFisherError(f"fisher_average must be a share in [0, 1); got {share!r}")
        if share and (self.method != "woodfisher" or self.block_size is None):
            raise FastFisherError(
                f"fisher_average goes with method='woodfisher' in blocks; got method={self.method!r} with "
                f"block_size={self.block_size!r}"
            )
        if self.grad_dtype != "auto" and self.method not in ("woodfisher", "woodtaylor", "diagonal"):
            raise FastFisherError(
                f"grad_dtype goes with method 'woodfisher', 'woodtaylor' or 'diagonal'; got method={self.method!r} "
                f"with grad_dtype={self.grad_dtype!r}"
            )
        if self.options.product == "antithetic" and self.fisher_type == "exact":
            raise FastFisherError(
                "fishleg: product='antithetic' needs labels, of which fisher_type='exact' has none; use 'mc'"
            )
        if self.update == "greedy" and (self.block_size is None or not self.has_blocks):
            raise FastFisherError(
                f"update='greedy' goes through blocks of an inverse; got method={self.method!r} with "
                f"block_size={self.block_size!r}"
            )
        caps = self.max_layer_sparsity
        for cap in caps.values() if isinstance(caps, Mapping) else [caps]:
            if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 <= cap <= 1:
                raise FastFisherError(f"max_layer_sparsity must be within [0, 1]; got {cap!r}")
        _positive_int("grad_batch_size", self.grad_batch_size)
        damping = self.damping
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
            raise FastFisherError(f"damping must be a positive number; got {damping!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise FastFisherError(f"seed must be a whole number; got {self.seed!r}")

    @cached_property
    def rule(self) -> Pattern:
        """The pattern of zeros."""
        return Pattern.parse(self.pattern)

    @property
    def fisher_block(self) -> int | None:
        """The block size of the Fisher estimate: 1 for methods that know nothing of blocks."""
        if self.method == "fishleg" and self.options.parameterization == "full":
            return None
        return self.block_size if self.has_blocks else 1

    @property
    def options(self) -> FishLeg:
        """Those of method="fishleg"."""
        return FishLeg.of(self.fishleg)

    @property
    def has_blocks(self) -> bool:
        """Whether the method's inverse consists of blocks of weights."""
        if self.method == "fishleg":
            return self.options.parameterization in ("block", "full")
        return self.method in BLOCK_METHODS

    @property
    def chosen_update(self) -> str | None:
        """The update of the kept weights: a diagonal Fisher, which couples nothing, and others have none.

        "auto": "joint", the minimiser of the quadratic model.  Where one step is to trust that model all the way, the
        choice of the weights has to follow it too: "greedy", or "sum" where blocks are too large or there are none.
        """
        coupled = self.has_blocks or self.method == "kfac"
        if not coupled and not (self.method == "fishleg" and self.options.parameterization != "diagonal"):
            return None
        if self.update != "auto":
            return self.update
        if self.num_recomputations != 0 or (self.method == "fishleg" and not self.has_blocks):
            return "joint"
        small = self.has_blocks and (self.fisher_block or math.inf) <= GREEDY_BLOCK
        return "greedy" if small else "sum"

    @property
    def applied_update(self) -> str | None:
        """What corrects the kept weights: after removals one by one that is the minimiser for all of them."""
        return "joint" if self.chosen_update == "greedy" else self.chosen_update

    def targets_of_steps(self, before: float) -> list[float]:
        """The sparsity after each step, from that `before` to the final one: s_f − (s_f − s_0)(1 − i/n)², i = 1 ... n.

        A method without gradients has nothing to recompute, and one step.   Source: Zhu & Gupta, 2017, with power 3.
        """
        if self.method in DATA_FREE:
            return [self.sparsity]
        if self.num_recomputations is None:
            left = max((1 - before) / (1 - self.sparsity), 1.0)
            steps = max(1, math.ceil(STEPS_PER_E * math.log(left)))
        else:
            steps = self.num_recomputations + 1
        gap = max(self.sparsity - before, 0.0)
        early = [self.sparsity - gap * (1 - i / steps) ** SPACING for i in range(1, steps)]
        return [*early, self.sparsity]


def layer_limits(settings: Settings, layout: BlockLayout) -> list[int] | None:
    """How many weights of each tensor may be zero, None where all may.

    Raises FastFisherError where a cap names no tensor, or the caps leave fewer zeros than are asked for.
    """
    caps = settings.max_layer_sparsity
    if not isinstance(caps, Mapping):
        if caps == 1:
            return None
        caps = {"*": caps}
    names = {name: name.removesuffix(".weight") for name in layout.names}
    most = []
    for name, (start, stop) in layout.parameter_ranges.items():
        fitting = [
            cap for glob, cap in caps.items() if any(fnmatchcase(n, glob) for n in (name, names[name]))
        ]
        most.append(math.floor(min(fitting, default=1.0) * (stop - start)))
    for glob in caps:
        if not any(fnmatchcase(n, glob) for pair in names.items() for n in pair):
            raise FastFisherError(f"max_layer_sparsity={{{glob!r}: ...}} matches none of {', '.join(names)}")
    wanted = round(settings.sparsity * layout.num_weights)
    if sum(most) < wanted:
        raise FastFisherError(
            f"sparsity={settings.sparsity:g} needs {wanted:,} zeros, but max_layer_sparsity leaves {sum(most):,}"
        )
    return most
