"""Ours and the rivals, bound to the problems of the table: fresh arguments, the timed call, and its answer for the
check.

An answer is what one block of the result says, and `truth` says the same in float64 from the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks import rivals
from benchmarks.inputs import Inputs, Piece, inputs_of
from benchmarks.problems import DAMPING, PRUNED_FRACTION, TOLERANCE, Problem
from fastfisher import ops
from fastfisher.prune.select import select

Answer = dict[str, Tensor]  # "diag" is compared entry by entry, anything else in the maximum norm


@dataclass(frozen=True)
class Contender:
    """setup() -> arguments of one run; run(*arguments) is timed; answer(block, returned, *arguments) is checked.

    piece: the blocks that it works on; None means all.
    once: timed a single time, after `warm_up`, because a run takes many seconds.
    """

    setup: Callable[[], tuple]
    run: Callable[..., Any]
    answer: Callable[..., Answer]
    piece: Piece | None = None
    once: bool = False
    warm_up: Callable[[], object] | None = None


Makers = dict[str, Callable[[], Contender]]


def _inverse_answer(f_inv: Tensor, x: Tensor) -> Answer:
    """The answer of a block for which F^-1 itself is at hand."""
    return {"diag": f_inv.diagonal(), "product": f_inv @ x.to(f_inv.dtype)}


def _our_block(data: Inputs, state: Tensor, b: int) -> Tensor:
    """Block b of a padded state, without its padding."""
    n = data.length(b)
    return state[b, :n, :n]


def _state_answer(data: Inputs) -> Callable[..., Answer]:
    """The answer of an op of ours that writes a state, its first argument."""
    return lambda b, _, state, *rest: _inverse_answer(_our_block(data, state, b), data.x[data.range(b)])


def _rival_states(data: Inputs, piece: Piece, states: list[Tensor], b: int) -> Answer:
    """The answer of a rival that leaves the inverses themselves, a tensor for each part."""
    n = data.length(b)
    return _inverse_answer(piece.pick(states, b)[:n, :n], data.x[data.range(b)])


def _rival_rows(data: Inputs, piece: Piece, rows: list[Tensor], b: int) -> Tensor:
    """Block b of vectors that a rival holds as rows, without padding."""
    return piece.pick(rows, b)[: data.length(b)]


def _estimates(data: Inputs) -> Tensor:
    """Room for condition and amplification of every block."""
    return torch.empty(2, len(data.blocks), dtype=torch.float64, device=data.device)


def _gather(data: Inputs) -> ff.FisherInverse:
    """The inverse as a user builds it: at once, or from gradients that come in calls."""
    if not data.problem.per_call:
        return ff.FisherInverse.from_grads(
            data.grads, block_size=data.block_size, damping=DAMPING, sizes=data.problem.sizes
        )
    accumulator = ff.FisherAccumulator(data.layout, num_grads=data.num_grads, damping=DAMPING)
    for _ in range(data.problem.num_calls):
        accumulator.add(data.grads)
    return accumulator.finish()


def _loop(data: Inputs, loop: Callable[..., None]) -> Contender:
    """The older pruners' loop from I / damping."""
    piece, m, calls = data.piece, data.num_grads, data.problem.num_calls

    def answer(b: int, built: tuple[list[Tensor], list[Tensor]]) -> Answer:
        diag = _rival_rows(data, piece, built[1], b)
        return {**_rival_states(data, piece, built[0], b), "diag": diag}

    return Contender(
        tuple,
        lambda: rivals.loop_build(piece.parts, m, DAMPING, calls, loop),
        answer,
        piece,
        once=True,
        warm_up=lambda: rivals.loop_build(piece.parts, m, DAMPING, 1, loop, steps=min(4, m)),
    )


def _strong_primal(data: Inputs, build: Callable[..., Any], **route: Any) -> Contender:
    piece, m, calls = data.piece, data.num_grads, data.problem.num_calls
    return replace(
        _loop(data, rivals.loop_),
        run=lambda: build(piece.parts, m, DAMPING, calls, **route),
        once=False,
        warm_up=None,
    )


def _strong_dual(data: Inputs, build: Callable[..., Any]) -> Contender:
    piece = data.dual_piece

    def answer(b: int, built: tuple[list[Tensor], list[Tensor]]) -> Answer:
        v_t, x = _rival_rows(data, piece, built[0], b), data.x[data.range(b)]
        product = (x - v_t @ (v_t.mT @ x)) / DAMPING
        return {"diag": _rival_rows(data, piece, built[1], b), "product": product}

    return Contender(tuple, lambda: build(piece.parts, data.num_grads, DAMPING), answer, piece)


def _build_rivals(data: Inputs) -> Makers:
    compiled = rivals.compiled
    return {
        "loop": lambda: _loop(data, rivals.loop_),
        "loop compiled": lambda: _loop(data, rivals.compiled_loop()),
        "strong primal": lambda: _strong_primal(data, rivals.strong_primal_build),
        "strong solve": lambda: _strong_primal(
            data, rivals.strong_primal_build, invert=rivals.spd_inverse_by_solve
        ),
        "strong lu": lambda: _strong_primal(
            data, rivals.strong_primal_build, invert=rivals.spd_inverse_by_lu
        ),
        "strong dual": lambda: _strong_dual(data, rivals.strong_dual_build),
        "strong primal compiled": lambda: _strong_primal(data, compiled(rivals.strong_primal_build)),
        "strong dual compiled": lambda: _strong_dual(data, compiled(rivals.strong_dual_build)),
    }


def _build(data: Inputs) -> Makers:
    def ours() -> tuple[ff.FisherInverse, Tensor]:
        finv = _gather(data)
        return finv, finv.diag()

    def answer(b: int, built: tuple[ff.FisherInverse, Tensor]) -> Answer:
        finv, diag = built
        return {"diag": diag[data.range(b)], "product": (finv @ data.x)[data.range(b)]}

    return {"ours": lambda: Contender(tuple, ours, answer), **_build_rivals(data)}


def _diagonal(data: Inputs) -> Makers:
    """The diagonal of the dual form and nothing else: no state is kept."""

    def ours() -> Tensor:
        diag: Tensor = ff.inverse_diagonal(
            data.grads, block_size=data.block_size, damping=DAMPING, sizes=data.problem.sizes
        )
        return diag

    return {
        "ours": lambda: Contender(tuple, ours, lambda b, diag: {"diag": diag[data.range(b)]}),
        **_build_rivals(data),
    }


def _prune(data: Inputs) -> Makers:
    """What follows a build: saliency, selection over the whole network, and the summed update."""
    nothing_dead = torch.zeros_like(data.mask)

    def ours(finv: ff.FisherInverse) -> Tensor:
        saliency = finv.saliency(data.weight)
        mask = select(saliency, nothing_dead, PRUNED_FRACTION, scope="global", ranges=())
        return finv.prune_update(data.weight, mask, "sum")

    def make() -> Contender:
        finv = _gather(data)
        finv.diag()  # belongs to the build
        return Contender(
            lambda: (finv,),
            ours,
            lambda b, new, _: {"weight": new[data.range(b)], "zeros": (new == 0).sum().double()},
        )

    return {"ours": make}


def _inverse_from_grads(data: Inputs) -> Makers:
    def ours() -> Contender:
        state, (condition, amplification) = data.identity(), _estimates(data)
        arguments = state, data.grads, data.blocks, data.num_grads, condition, amplification
        return Contender(
            lambda: arguments,
            lambda *args: ops.inverse_from_grads(*args, damping=DAMPING),
            _state_answer(data),
        )

    return {"ours": ours, **_build_rivals(data)}


def _inverse_diagonal_from_grads(data: Inputs) -> Makers:
    def ours() -> Contender:
        out, (condition, amplification) = torch.empty_like(data.weight), _estimates(data)
        arguments = out, data.grads, data.blocks, data.num_grads, condition, amplification
        return Contender(
            lambda: arguments,
            lambda *args: ops.inverse_diagonal_from_grads(*args, block_size=data.block_size, damping=DAMPING),
            lambda b, *rest: {"diag": out[data.range(b)]},
        )

    return {"ours": ours, **_build_rivals(data)}


def _each(step: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Run a rival on every part: arguments are lists of parts, and whatever is no list is handed on."""

    def run(*arguments: Any) -> list[Any]:
        parts = range(len(arguments[0]))
        return [step(*(a[i] if isinstance(a, list) else a for a in arguments)) for i in parts]

    return run


def _sherman_morrison(data: Inputs) -> Makers:
    piece, m = data.piece, data.num_grads
    return {
        **_build_rivals(data),
        "ours": lambda: Contender(
            lambda: (data.identity(), data.grads, data.blocks, m),
            ops.sherman_morrison_,
            _state_answer(data),
        ),
        "loop": lambda: replace(
            _loop(data, rivals.loop_),
            setup=lambda: (piece.identities(), piece.parts, m),
            run=_each(rivals.loop_),
            answer=lambda b, _, states, *rest: _rival_states(data, piece, states, b),
        ),
    }


def _woodbury(data: Inputs) -> Makers:
    piece, m = data.piece, data.num_grads
    return {
        "ours": lambda: Contender(
            lambda: (data.identity(), data.grads, data.blocks, m), ops.woodbury_, _state_answer(data)
        ),
        "strong": lambda: Contender(
            lambda: (piece.identities(), piece.parts, m),
            _each(rivals.woodbury_),
            lambda b, _, states, *rest: _rival_states(data, piece, states, b),
            piece,
        ),
    }


IN_CACHE = 64  # blocks at a time whose matrices stay in the caches of a core


def _fishleg_step(data: Inputs) -> Makers:
    piece, m = data.piece, data.num_grads

    def ours() -> Contender:
        loss, largest = _estimates(data)

        def answer(b: int, _: object, root: Tensor, *rest: object) -> Answer:
            return {"root": _our_block(data, root, b), "loss": loss[b], "largest": largest[b]}

        return Contender(
            lambda: (data.root.clone(), data.top.clone(), data.grads, data.blocks, m),
            lambda root, top, grads, blocks, m: ops.fishleg_block_step_(
                root, top, grads, blocks, m, DAMPING, 1.0, loss, largest
            ),
            answer,
        )

    def rival(at_once: int) -> Contender:
        def setup() -> tuple:
            sizes = [part.shape[2] for part in piece.parts]
            roots = [x[:, :n, :n].clone() for x, n in zip(piece.split(data.root), sizes, strict=True)]
            tops = [x[:, :n].clone() for x, n in zip(piece.split(data.top), sizes, strict=True)]
            return roots, tops, piece.parts, m, DAMPING

        def answer(b: int, found: list, roots: list[Tensor], *rest: object) -> Answer:
            n = data.length(b)
            loss, largest = ([each[i] for each in found] for i in range(2))
            return {
                "root": piece.pick(roots, b)[:n, :n],
                "loss": piece.pick(loss, b),
                "largest": piece.pick(largest, b),
            }

        step = rivals.fishleg_steps_ if at_once else rivals.fishleg_step_
        rest = (at_once,) if at_once else ()
        return Contender(lambda: (*setup(), *rest), _each(step), answer, piece)

    return {
        "ours": ours,
        "loop": lambda: rival(1),
        "strong": lambda: rival(0),
        "strong in cache": lambda: rival(IN_CACHE),
    }


def _accumulate(data: Inputs) -> Makers:
    piece, m = data.piece, data.num_grads

    def rival_answer(b: int, _: object, states: list[Tensor], *rest: object) -> Answer:
        n = data.length(b)
        return {"fisher": piece.pick(states, b)[:n, :n].tril()}

    return {
        "ours": lambda: Contender(
            lambda: (data.identity().zero_(), data.grads, data.blocks, m),
            ops.fisher_accumulate_,
            lambda b, _, state, *rest: {"fisher": _our_block(data, state, b).tril()},
        ),
        "strong": lambda: Contender(
            lambda: ([i.zero_() for i in piece.identities()], piece.parts, m),
            _each(rivals.fisher_accumulate_),
            rival_answer,
            piece,
        ),
    }


def _spd_inverse(data: Inputs) -> Makers:
    piece = data.piece

    def ours() -> Contender:
        condition, amplification = _estimates(data)
        return Contender(
            lambda: (data.fisher.clone(), condition, amplification), ops.spd_inverse_, _state_answer(data)
        )

    def strong(invert: Callable[[Tensor], Tensor]) -> Contender:
        matrices = [
            matrix[:, : part.shape[2], : part.shape[2]]
            for matrix, part in zip(piece.split(data.fisher), piece.parts, strict=True)
        ]
        return Contender(
            lambda: (matrices,),
            _each(invert),
            lambda b, states, *rest: _rival_states(data, piece, states, b),
            piece,
        )

    return {
        "ours": ours,
        "strong": lambda: strong(rivals.spd_inverse),
        "strong solve": lambda: strong(rivals.spd_inverse_by_solve),
        "strong lu": lambda: strong(rivals.spd_inverse_by_lu),
    }


def _dual_factor(data: Inputs) -> Makers:
    piece, m = data.dual_piece, data.num_grads

    def ours() -> Contender:
        factor = torch.empty(len(data.blocks), m, m, dtype=torch.float64, device=data.device)
        return Contender(
            lambda: (factor, data.grads, data.blocks, m, DAMPING, _estimates(data)[0]),
            ops.dual_factor_,
            lambda b, *rest: {"factor": factor[b]},
        )

    return {
        "ours": ours,
        "strong": lambda: Contender(
            lambda: (piece.parts, DAMPING),
            _each(rivals.dual_factor),
            lambda b, factors, *rest: {"factor": piece.pick(factors, b)},
            piece,
        ),
    }


def _inverse_diagonal(data: Inputs) -> Makers:
    primal, piece = data.problem.form == "primal", data.dual_piece

    def ours() -> Contender:
        out = torch.empty_like(data.weight)
        state, factor = (data.f_inv, None) if primal else (data.grads, data.factor)
        return Contender(
            lambda: (state, data.blocks),
            lambda *args: ops.inverse_diagonal(*args, out=out, factor=factor, damping=DAMPING),
            lambda b, *rest: {"diag": out[data.range(b)]},
        )

    def strong() -> Contender:
        if primal:
            return Contender(
                lambda: (data.f_inv,),
                rivals.inverse_diagonal_primal,
                lambda b, got, *rest: {"diag": got[b, : data.length(b)]},
            )
        factors = piece.split(data.factor)
        return Contender(
            lambda: (piece.parts, factors, DAMPING),
            _each(rivals.inverse_diagonal_dual),
            lambda b, got, *rest: {"diag": _rival_rows(data, piece, got, b)},
            piece,
        )

    return {"ours": ours, "strong": strong}


def _block_matvec(data: Inputs) -> Makers:
    primal, piece = data.problem.form == "primal", data.dual_piece

    def ours() -> Contender:
        out = torch.empty_like(data.x)
        state, factor = (data.f_inv, None) if primal else (data.grads, data.factor)
        return Contender(
            lambda: (state, data.blocks, data.x),
            lambda *args: ops.block_matvec(*args, out=out, factor=factor, damping=DAMPING),
            lambda b, *rest: {"product": out[data.range(b), 0]},
        )

    def strong() -> Contender:
        if primal:
            x = data.padded(data.x[:, 0])
            return Contender(
                lambda: (data.f_inv, x),
                rivals.block_matvec_primal,
                lambda b, got, *rest: {"product": got[b, : data.length(b)]},
            )
        factors, x_parts = piece.split(data.factor), piece.row_parts(data.x[:, 0])
        return Contender(
            lambda: (piece.parts, factors, DAMPING, x_parts),
            _each(rivals.block_matvec_dual),
            lambda b, got, *rest: {"product": _rival_rows(data, piece, got, b)},
            piece,
        )

    return {"ours": ours, "strong": strong}


def _one_by_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rival run on a block at a time."""
    return lambda *args: torch.cat(
        [function(*block) for block in zip(*(x.split(1) for x in args), strict=True)]
    )


def _fisher_vector_product(data: Inputs) -> Makers:
    piece, m = data.dual_piece, data.num_grads

    def ours() -> Contender:
        out = torch.empty_like(data.x)
        return Contender(
            lambda: (data.grads, data.blocks, m, data.x),
            lambda *args: ops.fisher_vector_product(*args, out=out),
            lambda b, *rest: {"product": out[data.range(b), 0]},
        )

    def product(grads: Tensor, x: Tensor) -> Tensor:
        return rivals.fisher_vector_product(grads, m, x)

    def rival(run: Callable[..., Tensor]) -> Contender:
        x_parts = piece.row_parts(data.x[:, 0])
        return Contender(
            lambda: (piece.parts, x_parts),
            _each(run),
            lambda b, got, *rest: {"product": _rival_rows(data, piece, got, b)},
            piece,
        )

    return {
        "ours": ours,
        "loop": lambda: rival(_one_by_one(product)),
        "strong": lambda: rival(product),
    }


def _factor_diagonal(data: Inputs) -> Makers:
    def ours() -> Contender:
        out = torch.empty_like(data.weight)
        return Contender(
            lambda: (data.root, data.blocks),
            lambda root, blocks: ops.factor_diagonal(root, blocks, out=out),
            lambda b, *rest: {"diag": out[data.range(b)]},
        )

    def rival(run: Callable[..., Tensor]) -> Contender:
        return Contender(lambda: (data.root,), run, lambda b, got, *rest: {"diag": got[b, : data.length(b)]})

    return {
        "ours": ours,
        "loop": lambda: rival(_one_by_one(rivals.factor_diagonal)),
        "strong": lambda: rival(rivals.factor_diagonal),
    }


def _block_factor_matvec(data: Inputs) -> Makers:
    def ours() -> Contender:
        out = torch.empty_like(data.x)
        return Contender(
            lambda: (data.root, data.blocks, data.x),
            lambda root, blocks, x: ops.block_factor_matvec(root, blocks, x, out=out),
            lambda b, *rest: {"product": out[data.range(b), 0]},
        )

    def rival(run: Callable[..., Tensor]) -> Contender:
        x = data.padded(data.x[:, 0])
        return Contender(
            lambda: (data.root, x), run, lambda b, got, *rest: {"product": got[b, : data.length(b)]}
        )

    return {
        "ours": ours,
        "loop": lambda: rival(_one_by_one(rivals.block_factor_matvec)),
        "strong": lambda: rival(rivals.block_factor_matvec),
    }


def _factor_downdate(data: Inputs) -> Makers:
    piece = data.piece

    def ours() -> Contender:
        return Contender(
            lambda: (data.root.clone(), data.blocks, data.mask),
            ops.factor_downdate_,
            lambda b, _, root, *rest: {"root": _our_block(data, root, b)},
        )

    def rival(run: Callable[..., None]) -> Contender:
        mask = piece.rows(data.mask, True)
        return Contender(
            lambda: (piece.of(data.root).clone(), mask),
            run,
            lambda b, _, root, *rest: {"root": root[b // piece.every, : data.length(b), : data.length(b)]},
            piece,
        )

    return {
        "ours": ours,
        "loop": lambda: rival(rivals.factor_downdate_loop_),
        "strong": lambda: rival(rivals.factor_downdate_),
    }


def _kron_matvec(data: Inputs) -> Makers:
    def ours() -> Contender:
        out = torch.empty_like(data.tiles[3])
        return Contender(
            lambda: data.tiles,
            lambda *args: ops.kron_matvec(*args, out=out),
            lambda b, *rest: {"product": out[0, b % out.shape[1]]},
        )

    def rival(run: Callable[..., Tensor]) -> Contender:
        *factors, x = data.tiles
        return Contender(lambda: (*factors, x[0]), run, lambda b, got, *rest: {"product": got[b % len(got)]})

    return {
        "ours": ours,
        "loop": lambda: rival(_one_by_one(rivals.kron_matvec)),
        "strong": lambda: rival(rivals.kron_matvec),
    }


def _conv_weight_grads(data: Inputs) -> Makers:
    def answer(b: int, got: Tensor) -> Answer:
        return {"rows": got[b % len(got)]}

    def ours() -> Contender:
        channels, outputs, _ = data.problem.convolution
        out = torch.empty(data.num_grads, outputs, channels, 3, 3, device=data.device)
        return Contender(
            lambda: data.images,
            lambda *args: ops.conv_weight_grads(*args, out=out, padding=(1, 1)),
            lambda b, *rest: answer(b, out),
        )

    def rival(run: Callable[..., Tensor]) -> Contender:
        return Contender(lambda: data.images, run, lambda b, got, *rest: answer(b, got))

    return {
        "ours": ours,
        "loop": lambda: rival(rivals.conv_weight_grads_loop),
        "strong": lambda: rival(rivals.conv_weight_grads),
        "strong unfolded": lambda: rival(rivals.conv_weight_grads_unfolded),
    }


def _obs_saliency(data: Inputs) -> Makers:
    def ours() -> Contender:
        out = torch.empty_like(data.weight)
        return Contender(
            lambda: (data.weight, data.inv_diag),
            lambda *args: ops.obs_saliency(*args, out=out),
            lambda b, *rest: {"diag": out[data.range(b)]},
        )

    return {
        "ours": ours,
        "strong": lambda: Contender(
            lambda: (data.weight, data.inv_diag),
            rivals.obs_saliency,
            lambda b, got, *rest: {"diag": got[data.range(b)]},
        ),
    }


def _prune_mask(data: Inputs) -> Makers:
    def answer(b: int, mask: Tensor) -> Answer:
        return {"mask": mask[data.range(b)].double(), "zeros": (~mask).sum().double()}

    def ours() -> Contender:
        mask, invalid = torch.empty_like(data.mask), torch.empty(1, dtype=torch.int64, device=data.device)
        return Contender(
            lambda: (data.saliency, data.dead, data.zeros),
            lambda *args: ops.prune_mask(*args, mask=mask, invalid=invalid),
            lambda b, *rest: answer(b, mask),
        )

    def strong(select: Callable[..., Tensor]) -> Contender:
        return Contender(
            lambda: (data.saliency, data.dead, data.zeros), select, lambda b, mask, *rest: answer(b, mask)
        )

    return {
        "ours": ours,
        "strong": lambda: strong(rivals.prune_mask),
        "strong sort": lambda: strong(rivals.prune_mask_by_sort),
    }


def _obs_eliminate(data: Inputs) -> Makers:
    """The answer is the loss after every removal: where two weights cost nearly the same, either may go first."""
    primal = data.problem.form == "primal"

    def ours() -> Contender:
        order, loss = torch.empty_like(data.weight, dtype=torch.int64), torch.empty_like(data.weight).double()
        failed = torch.empty(len(data.blocks), dtype=torch.bool, device=data.device)
        state, factor = (data.f_inv, None) if primal else (data.grads, data.factor)
        return Contender(
            lambda: (data.weight, state, data.blocks, order, loss, failed),
            lambda *args: ops.obs_eliminate(*args, factor=factor, damping=DAMPING),
            lambda b, *rest: {"loss": loss[data.range(b)].cumsum(0)},
        )

    def strong() -> Contender:
        piece = data.piece
        length = (data.blocks[:, 1] - data.blocks[:, 0])[piece.ids]
        return Contender(
            lambda: (piece.rows(data.weight), piece.of(data.f_inv), length),
            rivals.obs_eliminate,
            lambda b, found, *rest: {"loss": found[1][b // piece.every, : data.length(b)].double().cumsum(0)},
            piece,
        )

    return {"ours": ours, "strong": strong}


def _obs_update(data: Inputs) -> Makers:
    primal, piece = data.problem.form == "primal", data.dual_piece

    def ours() -> Contender:
        state, factor = (data.f_inv, None) if primal else (data.grads, data.factor)
        inv_diag = data.inv_diag if primal else data.dual_diag
        return Contender(
            lambda: (data.weight.clone(), state, data.blocks, inv_diag, data.mask),
            lambda *args: ops.obs_update_(*args, factor=factor, damping=DAMPING),
            lambda b, _, weight, *rest: {"weight": weight[data.range(b)]},
        )

    def strong() -> Contender:
        if primal:
            inv_diag, mask = data.padded(data.inv_diag, 1), data.padded(data.mask, True)
            return Contender(
                lambda: (data.padded(data.weight), data.f_inv, inv_diag, mask),
                rivals.obs_update_,
                lambda b, _, weight, *rest: {"weight": weight[b, : data.length(b)]},
            )
        factors = piece.split(data.factor)
        diag_parts, mask_parts = piece.row_parts(data.dual_diag, 1), piece.row_parts(data.mask, True)
        return Contender(
            lambda: (piece.row_parts(data.weight), piece.parts, factors, DAMPING, diag_parts, mask_parts),
            _each(rivals.obs_update_dual_),
            lambda b, _, weights, *rest: {"weight": _rival_rows(data, piece, weights, b)},
            piece,
        )

    return {"ours": ours, "strong": strong}


def _obs_solve(data: Inputs) -> Makers:
    primal = data.problem.form == "primal"
    piece = data.piece if primal else data.dual_piece

    def ours() -> Contender:
        failed = torch.zeros(len(data.blocks), dtype=torch.bool, device=data.device)
        state, factor = (data.f_inv, None) if primal else (data.grads, data.factor)
        m = data.num_grads
        return Contender(
            lambda: (data.weight.clone(), state, data.blocks, data.mask, failed),
            lambda *args: ops.obs_solve_(*args, num_grads=m, factor=factor, damping=DAMPING),
            lambda b, _, weight, *rest: {"weight": weight[data.range(b)]},
        )

    def strong() -> Contender:
        def answer(b: int, _: object, weights: list[Tensor], *rest: object) -> Answer:
            return {"weight": _rival_rows(data, piece, weights, b)}

        if primal:
            state, mask = [piece.of(data.f_inv)], [piece.rows(data.mask, True)]
            return Contender(
                lambda: ([piece.rows(data.weight)], state, mask),
                _each(rivals.obs_solve_primal_),
                answer,
                piece,
            )
        masks = piece.row_parts(data.mask, True)
        return Contender(
            lambda: (piece.row_parts(data.weight), piece.parts, DAMPING, masks),
            _each(rivals.obs_solve_dual_),
            answer,
            piece,
        )

    return {"ours": ours, "strong": strong}


_MAKERS: dict[str, Callable[[Inputs], Makers]] = {
    "build": _build,
    "diagonal": _diagonal,
    "prune": _prune,
    "inverse_from_grads": _inverse_from_grads,
    "inverse_diagonal_from_grads": _inverse_diagonal_from_grads,
    "sherman_morrison_": _sherman_morrison,
    "woodbury_": _woodbury,
    "fishleg_block_step_": _fishleg_step,
    "fisher_accumulate_": _accumulate,
    "spd_inverse_": _spd_inverse,
    "dual_factor_": _dual_factor,
    "inverse_diagonal": _inverse_diagonal,
    "block_matvec": _block_matvec,
    "fisher_vector_product": _fisher_vector_product,
    "factor_diagonal": _factor_diagonal,
    "block_factor_matvec": _block_factor_matvec,
    "factor_downdate_": _factor_downdate,
    "kron_matvec": _kron_matvec,
    "conv_weight_grads": _conv_weight_grads,
    "obs_eliminate": _obs_eliminate,
    "obs_saliency": _obs_saliency,
    "prune_mask": _prune_mask,
    "obs_update_": _obs_update,
    "obs_solve_": _obs_solve,
}

NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_MAKERS, ("ours", "strong")),
    "build": ("ours", "loop", "strong primal", "strong dual"),
    "inverse_from_grads": ("ours", "strong primal"),
    "inverse_diagonal_from_grads": ("ours", "strong primal"),
    "sherman_morrison_": ("ours", "loop", "strong primal"),
    "fishleg_block_step_": ("ours", "loop", "strong", "strong in cache"),
    "conv_weight_grads": ("ours", "loop", "strong", "strong unfolded"),
    **dict.fromkeys(
        (
            "fisher_vector_product",
            "factor_diagonal",
            "block_factor_matvec",
            "factor_downdate_",
            "kron_matvec",
        ),
        ("ours", "loop", "strong"),
    ),
}


def names(problem: Problem) -> tuple[str, ...]:
    """Who runs on a problem."""
    return problem.contenders or NAMES[problem.op]


def contender(problem: Problem, name: str, device: str = "cpu") -> Contender:
    """One contender of a problem, by a name of `names(problem)`; that of a backend is ours, forced to it.

    A backend that cannot run raises BackendError when it is called.
    """
    makers = _MAKERS[problem.op](inputs_of(problem, device))
    if name not in ops.BACKENDS:
        return makers[name]()
    ours = makers["ours"]()

    def forced(*arguments: Any) -> Any:
        with ops.use_backend(name):
            return ours.run(*arguments)

    return replace(ours, run=forced)


def _pruned(data: Inputs, b: int, new: Tensor) -> Answer:
    """What saliency, selection and update should leave of block b, for a selection that is right.

    Saliencies within TOLERANCE of the threshold may fall on either side; the result tells on which they did.
    """
    part = data.range(b)
    saliency, threshold = data.exact_saliency[0][part], data.exact_saliency[1]
    close = (saliency / threshold - 1).abs() < TOLERANCE
    mask = torch.where(close, new != 0, saliency > threshold)
    f_inv, weight = data.exact_inverse(b), data.weight[part].double()
    x = torch.where(mask, 0, weight / f_inv.diagonal())
    zeros = torch.tensor(float(data.zeros), device=data.device)
    return {"weight": (weight - f_inv @ x) * mask, "zeros": zeros}


def _fishleg_truth(data: Inputs, b: int) -> Answer:
    """One step of FishLeg on block b, in float64."""
    n, G = data.length(b), data.grads[:, data.range(b)].double()
    R, v = data.root[b, :n, :n].double(), data.top[b, :n].double()
    M = R.mT @ (G.mT @ G / data.num_grads + DAMPING * torch.eye(n, device=data.device)) @ R
    for _ in range(3):
        w = M @ (v / v.norm())
        v = w
    largest = w.norm()
    step = (R @ M - R) * (0.5 / (1.1 * largest).clamp(min=1))
    loss = (R @ M * R).sum() / 2 - R.square().sum()
    return {"root": R - step, "loss": loss, "largest": largest}


def _cumulative_loss(weight: Tensor, f_inv: Tensor) -> Tensor:
    """The loss after every removal, the cheapest weight of those left each time, float64 [n]."""
    weight, f_inv = weight.clone(), f_inv.clone()
    gone = torch.zeros_like(weight, dtype=torch.bool)
    losses = []
    for _ in range(len(weight)):
        cost = torch.where(gone, torch.inf, weight.square() / (2 * f_inv.diagonal()))
        q = int(cost.argmin())
        losses.append(cost[q])
        column = f_inv[:, q] / f_inv[q, q]
        weight -= column * weight[q].clone()
        f_inv -= torch.outer(column, f_inv[q].clone())
        gone[q] = True
    return torch.stack(losses).cumsum(0)


def truth(problem: Problem, b: int, device: str = "cpu", got: Answer | None = None) -> Answer:
    """What block b should say, in float64.   got: the answer to compare with; it settles what may be either way."""
    data = inputs_of(problem, device)
    part = data.range(b)
    x, weight, mask = data.x[part].double(), data.weight[part].double(), data.mask[part]
    G = data.grads[:, part].double()
    if problem.op == "prune":
        assert got is not None
        return _pruned(data, b, got["weight"])
    if problem.op == "fisher_accumulate_":
        return {"fisher": (G.mT @ G / data.num_grads).tril()}
    if problem.op == "fisher_vector_product":
        return {"product": G.mT @ (G @ x) / data.num_grads}
    if problem.op == "fishleg_block_step_":
        return _fishleg_truth(data, b)
    if problem.op == "kron_matvec":
        left, right, scale, y = (
            each.flatten(end_dim=-3)[b % problem.num_tiles].double() for each in data.tiles
        )
        return {"product": scale * (left @ (scale * y) @ right)}
    if problem.op == "conv_weight_grads":
        image, slope = (each[b % problem.num_grads, None].double() for each in data.images)
        return {"rows": rivals.conv_weight_grads_unfolded(image, slope)[0]}
    if problem.op in ("factor_diagonal", "block_factor_matvec", "factor_downdate_"):
        R = _our_block(data, data.root, b).double()
        V = torch.linalg.qr(R[~mask].mT).Q
        removed = torch.where(mask[:, None], R - (R @ V) @ V.mT, 0)
        return {"diag": R.square().sum(dim=1), "product": R @ (R.mT @ x), "root": removed}
    if problem.op == "dual_factor_":
        C = G @ G.mT
        C.diagonal().add_(data.num_grads * DAMPING)
        return {"factor": torch.linalg.cholesky(C, upper=True)}
    if problem.op == "obs_saliency":
        return {"diag": weight**2 / (2 * data.inv_diag[part].double())}
    if problem.op == "prune_mask":
        kept = rivals.prune_mask(data.saliency, data.dead, data.zeros)
        return {"mask": kept[part].double(), "zeros": (~kept).sum().double()}
    reads_state = problem.form == "primal" and problem.op in (
        "inverse_diagonal",
        "block_matvec",
        "obs_eliminate",
        "obs_update_",
        "obs_solve_",
    )
    f_inv = _our_block(data, data.f_inv, b).double() if reads_state else data.exact_inverse(b)
    if problem.op == "obs_eliminate":
        return {"loss": _cumulative_loss(weight, f_inv)}
    if problem.op == "obs_update_":
        x = torch.where(mask, 0, weight / f_inv.diagonal())
        return {"weight": (weight - f_inv @ x) * mask}
    if problem.op == "obs_solve_":
        pruned = ~mask
        solved = torch.linalg.solve(f_inv[pruned][:, pruned], weight[pruned])
        return {"weight": (weight - f_inv[:, pruned] @ solved) * mask}
    return _inverse_answer(f_inv, x)


def worst_error(
    problem: Problem, contestant: Contender, returned: object, arguments: tuple, device: str = "cpu"
) -> float:
    """Worst relative error of the first, a middle and the last block of one run, against `truth`."""
    ids = range(problem.num_blocks) if contestant.piece is None else contestant.piece.ids.tolist()
    worst = 0.0
    for b in sorted({ids[0], ids[(len(ids) - 1) // 2], ids[-1]}):
        answer = contestant.answer(b, returned, *arguments)
        exact = truth(problem, b, device, answer)
        for key, got in answer.items():
            want = exact[key].reshape(got.shape)
            scale = want.abs() if key == "diag" else want.abs().max()
            error = ((got.double() - want).abs() / scale).max().item()
            worst = error if error != error else max(worst, error)
    return worst
