"""Ours and the rivals, bound to the problems of the table: fresh arguments, the timed call, and its answer for the
check.

An answer is what one block of the result says, and `truth` says the same in float64 from the inputs alone.  All
contenders of a problem get the same inputs; what a rival needs in another layout is prepared outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks import rivals
from benchmarks.problems import DAMPING, GRADIENT_SCALE, PRUNED_FRACTION, Problem
from fastfisher import ops

Answer = dict[str, Tensor]  # "diag" is compared entry by entry, anything else in the maximum norm


@dataclass(frozen=True)
class Contender:
    """setup() -> arguments of one run; run(*arguments) is timed; answer(block, returned, *arguments) is checked.

    once: timed a single time, after `warm_up`, because a run takes many seconds.
    """

    setup: Callable[[], tuple]
    run: Callable[..., Any]
    answer: Callable[..., Answer]
    once: bool = False
    warm_up: Callable[[], object] | None = None


class Inputs:
    """The tensors of one problem, made from a fixed seed when they are first needed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.block_size, self.num_grads = problem.block_size, problem.num_grads
        generator = torch.Generator().manual_seed(0)
        d = problem.num_weights
        self.grads = torch.randn(self.num_grads, d, generator=generator).mul_(GRADIENT_SCALE)  # [m, d]
        self.x = torch.randn(d, 1, generator=generator)  # [d, 1]
        self.weight = torch.randn(d, generator=generator)  # [d]
        self.mask = torch.rand(d, generator=generator) >= PRUNED_FRACTION  # [d], True = keep
        starts = torch.arange(0, d, self.block_size)
        self.blocks = torch.stack([starts, (starts + self.block_size).clamp_(max=d)], 1)  # [K, 2]

    @cached_property
    def parts(self) -> list[Tensor]:
        """Views [K, m, B] of the gradients: full blocks, and the short last one."""
        return rivals.block_parts(self.grads, self.block_size)

    @cached_property
    def f_inv(self) -> Tensor:
        """A primal state [K, B, B] for the ops that read one."""
        states, _ = rivals.strong_primal_build(self.grads, self.block_size, DAMPING)
        f_inv = rivals.scaled_identity(len(self.blocks), self.block_size, 1 / DAMPING, self.grads)
        for b, (start, stop) in enumerate(self.blocks.tolist()):
            f_inv[b, : stop - start, : stop - start] = _pick(states, b)
        return f_inv

    @cached_property
    def inv_diag(self) -> Tensor:
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.problem.num_weights].contiguous()  # [d]

    @cached_property
    def factors(self) -> list[Tensor]:
        """Factors of the capacitance, float64 [K, m, m], for each part."""
        return [rivals.dual_factor(part, DAMPING) for part in self.parts]

    @cached_property
    def factor(self) -> Tensor:
        return torch.cat(self.factors)  # [K, m, m]

    def identity(self) -> Tensor:
        return rivals.scaled_identity(len(self.blocks), self.block_size, 1 / DAMPING, self.grads)  # [K, B, B]

    def identities(self) -> list[Tensor]:
        return [rivals.scaled_identity(p.shape[0], p.shape[2], 1 / DAMPING, p) for p in self.parts]

    def padded(self, vector: Tensor) -> Tensor:
        """[d] -> [K, B], the short block filled up with zeros (False for a mask)."""
        out = vector.new_zeros(len(self.blocks) * self.block_size)
        out[: len(vector)] = vector
        return out.view(-1, self.block_size)

    def split(self, vector: Tensor) -> list[Tensor]:
        """[d] -> [K, B] for each part, copied."""
        full = self.problem.num_weights // self.block_size * self.block_size
        pieces = vector[:full].view(-1, self.block_size), vector[full:].view(1, -1)
        return [piece.clone() for piece in pieces if piece.numel()]

    def range(self, b: int) -> slice:
        start, stop = self.blocks[b].tolist()
        return slice(start, stop)

    def exact_inverse(self, b: int) -> Tensor:
        """F^-1 of one block in float64, from the gradients."""
        G = self.grads[:, self.range(b)].double()
        F = G.mT @ G / self.num_grads
        F.diagonal().add_(DAMPING)
        return torch.linalg.inv(F)


@lru_cache(maxsize=1)
def inputs_of(problem: Problem) -> Inputs:
    """The inputs of a problem; those of the last one are kept, so that its contenders share them."""
    return Inputs(problem)


def _pick(states: list[Tensor], b: int) -> Tensor:
    """Block b of a list of parts."""
    return states[0][b] if b < len(states[0]) else states[1][b - len(states[0])]


def _inverse_answer(f_inv: Tensor, x: Tensor) -> Answer:
    """The answer of a block for which F^-1 itself is at hand."""
    return {"diag": f_inv.diagonal(), "product": f_inv @ x.to(f_inv.dtype)}


def _build(data: Inputs) -> dict[str, Contender]:
    B, grads, x = data.block_size, data.grads, data.x

    def ours() -> tuple[Any, Tensor]:
        finv = ff.FisherInverse.from_grads(grads, block_size=B, damping=DAMPING)
        return finv, finv.diag()

    def our_answer(b: int, built: tuple[Any, Tensor]) -> Answer:
        finv, diag = built
        return {"diag": diag[data.range(b)], "product": (finv @ x)[data.range(b)]}

    def primal_answer(b: int, built: tuple[list[Tensor], Tensor]) -> Answer:
        return {**_inverse_answer(_pick(built[0], b), x[data.range(b)]), "diag": built[1][data.range(b)]}

    def dual_answer(b: int, built: tuple[list[Tensor], Tensor]) -> Answer:
        v_t, x_b = _pick(built[0], b), x[data.range(b)]
        return {"diag": built[1][data.range(b)], "product": (x_b - v_t @ (v_t.mT @ x_b)) / DAMPING}

    def arguments() -> tuple:
        return grads, B, DAMPING

    return {
        "ours": Contender(tuple, ours, our_answer),
        "loop": Contender(
            arguments,
            rivals.loop_build,
            lambda b, built, *_: primal_answer(b, built),
            once=True,
            warm_up=lambda: rivals.loop_build(grads[:4], B, DAMPING),
        ),
        "strong primal": Contender(
            arguments, rivals.strong_primal_build, lambda b, built, *_: primal_answer(b, built)
        ),
        "strong dual": Contender(
            arguments, rivals.strong_dual_build, lambda b, built, *_: dual_answer(b, built)
        ),
    }


def _each(step: Callable[..., None]) -> Callable[..., None]:
    """Run a rival on every part: arguments are lists of parts, and whatever is no list is handed on."""

    def run(*arguments: Any) -> None:
        for i in range(len(arguments[0])):
            step(*(a[i] if isinstance(a, list) else a for a in arguments))

    return run


def _sherman_morrison(data: Inputs) -> dict[str, Contender]:
    m, x = data.num_grads, data.x
    build = _build(data)
    return {
        "ours": Contender(
            lambda: (data.identity(), data.grads, data.blocks, m),
            ops.sherman_morrison_,
            lambda b, _, state, *rest: _inverse_answer(_our_block(data, state, b), x[data.range(b)]),
        ),
        "loop": Contender(
            lambda: (data.identities(), data.parts, m),
            _each(rivals.loop_),
            lambda b, _, states, *rest: _inverse_answer(_pick(states, b), x[data.range(b)]),
            once=True,
            warm_up=build["loop"].warm_up,
        ),
        "strong primal": build["strong primal"],
    }


def _our_block(data: Inputs, state: Tensor, b: int) -> Tensor:
    """Block b of a padded state, without its padding."""
    n = data.range(b).stop - data.range(b).start
    return state[b, :n, :n]


def _woodbury(data: Inputs) -> dict[str, Contender]:
    m, x = data.num_grads, data.x
    return {
        "ours": Contender(
            lambda: (data.identity(), data.grads, data.blocks, m),
            ops.woodbury_,
            lambda b, _, state, *rest: _inverse_answer(_our_block(data, state, b), x[data.range(b)]),
        ),
        "strong": Contender(
            lambda: (data.identities(), data.parts, m),
            _each(rivals.woodbury_),
            lambda b, _, states, *rest: _inverse_answer(_pick(states, b), x[data.range(b)]),
        ),
    }


def _accumulate(data: Inputs) -> dict[str, Contender]:
    m = data.num_grads
    return {
        "ours": Contender(
            lambda: (data.identity().zero_(), data.grads, data.blocks, m),
            ops.fisher_accumulate_,
            lambda b, _, state, *rest: {"fisher": _our_block(data, state, b).tril()},
        ),
        "strong": Contender(
            lambda: ([i.zero_() for i in data.identities()], data.parts, m),
            _each(rivals.fisher_accumulate_),
            lambda b, _, states, *rest: {"fisher": _pick(states, b).tril()},
        ),
    }


def _spd_inverse(data: Inputs) -> dict[str, Contender]:
    fishers = [
        rivals.scaled_identity(p.shape[0], p.shape[2], DAMPING, p).baddbmm_(p.mT, p, alpha=1 / data.num_grads)
        for p in data.parts
    ]

    template = rivals.scaled_identity(len(data.blocks), data.block_size, DAMPING, data.grads)
    for b in range(len(data.blocks)):
        _our_block(data, template, b).copy_(_pick(fishers, b))
    condition, amplification = torch.empty(2, len(template), dtype=torch.float64)
    return {
        "ours": Contender(
            lambda: (template.clone(), condition, amplification),
            ops.spd_inverse_,
            lambda b, _, state, *rest: _inverse_answer(_our_block(data, state, b), data.x[data.range(b)]),
        ),
        "strong": Contender(
            lambda: (fishers,),
            lambda matrices: [rivals.spd_inverse(matrix) for matrix in matrices],
            lambda b, states, *rest: _inverse_answer(_pick(states, b), data.x[data.range(b)]),
        ),
    }


def _dual_factor(data: Inputs) -> dict[str, Contender]:
    m = data.num_grads
    factor = torch.empty(len(data.blocks), m, m, dtype=torch.float64)
    condition = torch.empty(len(data.blocks), dtype=torch.float64)
    return {
        "ours": Contender(
            lambda: (factor, data.grads, data.blocks, m, DAMPING, condition),
            ops.dual_factor_,
            lambda b, *rest: {"factor": factor[b]},
        ),
        "strong": Contender(
            lambda: (data.parts,),
            lambda parts: [rivals.dual_factor(part, DAMPING) for part in parts],
            lambda b, factors, *rest: {"factor": _pick(factors, b)},
        ),
    }


def _inverse_diagonal(data: Inputs) -> dict[str, Contender]:
    out = torch.empty(data.problem.num_weights)

    def our_answer(b: int, *rest: object) -> Answer:
        return {"diag": out[data.range(b)]}

    if data.problem.form == "primal":
        return {
            "ours": Contender(
                lambda: (data.f_inv, data.blocks),
                lambda state, blocks: ops.inverse_diagonal(state, blocks, out=out),
                our_answer,
            ),
            "strong": Contender(
                lambda: (data.f_inv,),
                rivals.inverse_diagonal_primal,
                lambda b, got, *rest: {"diag": _unpad(data, got, b)},
            ),
        }
    return {
        "ours": Contender(
            lambda: (data.grads, data.blocks, data.factor),
            lambda state, blocks, factor: ops.inverse_diagonal(
                state, blocks, out=out, factor=factor, damping=DAMPING
            ),
            our_answer,
        ),
        "strong": Contender(
            lambda: (data.parts, data.factors),
            lambda parts, factors: [
                rivals.inverse_diagonal_dual(p, f, DAMPING) for p, f in zip(parts, factors, strict=True)
            ],
            lambda b, got, *rest: {"diag": _pick(got, b)},
        ),
    }


def _unpad(data: Inputs, rows: Tensor, b: int) -> Tensor:
    """Row b of [K, B] without its padding."""
    return rows[b, : data.range(b).stop - data.range(b).start]


def _block_matvec(data: Inputs) -> dict[str, Contender]:
    out = torch.empty_like(data.x)

    def our_answer(b: int, *rest: object) -> Answer:
        return {"product": out[data.range(b), 0]}

    if data.problem.form == "primal":
        x_padded = data.padded(data.x[:, 0])
        return {
            "ours": Contender(
                lambda: (data.f_inv, data.blocks, data.x),
                lambda state, blocks, x: ops.block_matvec(state, blocks, x, out=out),
                our_answer,
            ),
            "strong": Contender(
                lambda: (data.f_inv, x_padded),
                rivals.block_matvec_primal,
                lambda b, got, *rest: {"product": _unpad(data, got, b)},
            ),
        }
    x_parts = data.split(data.x[:, 0])
    return {
        "ours": Contender(
            lambda: (data.grads, data.blocks, data.x, data.factor),
            lambda state, blocks, x, factor: ops.block_matvec(
                state, blocks, x, out=out, factor=factor, damping=DAMPING
            ),
            our_answer,
        ),
        "strong": Contender(
            lambda: (data.parts, data.factors, x_parts),
            lambda *lists: [
                rivals.block_matvec_dual(p, f, DAMPING, x) for p, f, x in zip(*lists, strict=True)
            ],
            lambda b, got, *rest: {"product": _pick(got, b)},
        ),
    }


def _obs_saliency(data: Inputs) -> dict[str, Contender]:
    out = torch.empty_like(data.weight)
    return {
        "ours": Contender(
            lambda: (data.weight, data.inv_diag),
            lambda weight, inv_diag: ops.obs_saliency(weight, inv_diag, out=out),
            lambda b, *rest: {"diag": out[data.range(b)]},
        ),
        "strong": Contender(
            lambda: (data.weight, data.inv_diag),
            rivals.obs_saliency,
            lambda b, got, *rest: {"diag": got[data.range(b)]},
        ),
    }


def _obs_update(data: Inputs) -> dict[str, Contender]:
    inv_diag = data.padded(data.inv_diag)
    inv_diag[inv_diag == 0] = 1
    return {
        "ours": Contender(
            lambda: (data.weight.clone(), data.f_inv, data.blocks, data.inv_diag, data.mask),
            ops.obs_update_,
            lambda b, _, weight, *rest: {"weight": weight[data.range(b)]},
        ),
        "strong": Contender(
            lambda: (data.padded(data.weight), data.f_inv, inv_diag, data.padded(data.mask)),
            rivals.obs_update_,
            lambda b, _, weight, *rest: {"weight": _unpad(data, weight, b)},
        ),
    }


def _obs_solve(data: Inputs) -> dict[str, Contender]:
    failed = torch.zeros(len(data.blocks), dtype=torch.bool)
    if data.problem.form == "primal":
        return {
            "ours": Contender(
                lambda: (data.weight.clone(), data.f_inv, data.blocks, data.mask, failed),
                ops.obs_solve_,
                lambda b, _, weight, *rest: {"weight": weight[data.range(b)]},
            ),
            "strong": Contender(
                lambda: (data.padded(data.weight), data.f_inv, data.padded(data.mask)),
                rivals.obs_solve_primal_,
                lambda b, _, weight, *rest: {"weight": _unpad(data, weight, b)},
            ),
        }
    masks = data.split(data.mask)
    return {
        "ours": Contender(
            lambda: (data.weight.clone(), data.grads, data.blocks, data.mask, failed),
            lambda weight, state, blocks, mask, failed: ops.obs_solve_(
                weight,
                state,
                blocks,
                mask,
                failed,
                num_grads=data.num_grads,
                factor=data.factor,
                damping=DAMPING,
            ),
            lambda b, _, weight, *rest: {"weight": weight[data.range(b)]},
        ),
        "strong": Contender(
            lambda: (data.split(data.weight), data.parts, DAMPING, masks),
            _each(rivals.obs_solve_dual_),
            lambda b, _, weights, *rest: {"weight": _pick(weights, b)},
        ),
    }


_MAKERS: dict[str, Callable[[Inputs], dict[str, Contender]]] = {
    "build": _build,
    "sherman_morrison_": _sherman_morrison,
    "woodbury_": _woodbury,
    "fisher_accumulate_": _accumulate,
    "spd_inverse_": _spd_inverse,
    "dual_factor_": _dual_factor,
    "inverse_diagonal": _inverse_diagonal,
    "block_matvec": _block_matvec,
    "obs_saliency": _obs_saliency,
    "obs_update_": _obs_update,
    "obs_solve_": _obs_solve,
}

NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_MAKERS, ("ours", "strong")),
    "build": ("ours", "loop", "strong primal", "strong dual"),
    "sherman_morrison_": ("ours", "loop", "strong primal"),
}


def contender(problem: Problem, name: str) -> Contender:
    """One contender of a problem, by a name of `NAMES[problem.op]`."""
    return _MAKERS[problem.op](inputs_of(problem))[name]


def truth(problem: Problem, b: int) -> Answer:
    """What block b should say, in float64."""
    data = inputs_of(problem)
    part = data.range(b)
    x, weight, mask = data.x[part].double(), data.weight[part].double(), data.mask[part]
    G = data.grads[:, part].double()
    if problem.op == "fisher_accumulate_":
        return {"fisher": (G.mT @ G / data.num_grads).tril()}
    if problem.op == "dual_factor_":
        C = G @ G.mT
        C.diagonal().add_(data.num_grads * DAMPING)
        return {"factor": torch.linalg.cholesky(C, upper=True)}
    if problem.op == "obs_saliency":
        return {"diag": weight**2 / (2 * data.inv_diag[part].double())}
    reads_state = problem.form == "primal" and problem.op in (
        "inverse_diagonal",
        "block_matvec",
        "obs_update_",
        "obs_solve_",
    )
    f_inv = _our_block(data, data.f_inv, b).double() if reads_state else data.exact_inverse(b)
    if problem.op == "obs_update_":
        x = torch.where(mask, 0, weight / f_inv.diagonal())
        return {"weight": (weight - f_inv @ x) * mask}
    if problem.op == "obs_solve_":
        pruned = ~mask
        solved = torch.linalg.solve(f_inv[pruned][:, pruned], weight[pruned])
        return {"weight": (weight - f_inv[:, pruned] @ solved) * mask}
    return _inverse_answer(f_inv, x)


def worst_error(problem: Problem, contestant: Contender, returned: object, arguments: tuple) -> float:
    """Worst relative error of the first, a middle and the last block of one run, against `truth`."""
    last = problem.num_blocks - 1
    worst = 0.0
    for b in sorted({0, last // 2, last}):
        exact = truth(problem, b)
        for key, got in contestant.answer(b, returned, *arguments).items():
            want = exact[key].reshape(got.shape)
            scale = want.abs() if key == "diag" else want.abs().max()
            error = ((got.double() - want).abs() / scale).max().item()
            worst = error if error != error else max(worst, error)
    return worst
