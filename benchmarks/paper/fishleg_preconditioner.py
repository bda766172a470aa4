"""FishLeg's auxiliary loss with and without its preconditioner: `python -m benchmarks.paper.fishleg_preconditioner`.

All weights of MLPNET, one batch of per-sample gradients for every step, γ a tenth of their mean square, Q = I/γ at
first.  Steps with u drawn and Adam, as published, with and without the preconditioner, at rates of learning relative to
what the roots begin with; and the steps exact in u, which have no rate.  Left: blocks of 128; right: Kronecker factors
of whole layers.
Shown is (A(Q) − A*) / |A*|, A* the smallest loss of any Q within the same blocks or layers, which factors do not reach.
Writes fishleg_preconditioner.csv, .png and .json.   Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks.paper import data, experiment, stages
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel
from fastfisher.errors import FisherError
from fastfisher.fisher.auxiliary import SampledSteps
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.fisher.roots import BlockRoots

CLAIM = Claim(
    f"{stages.SURGEON}, preconditioner",
    "The preconditioner makes the auxiliary loss fall further in as many steps (asked here: at the best rate of each; "
    "and that the steps exact in u end below both).",
)
FORMS = {"block": f"blocks of {stages.BLOCK}", "kron": "Kronecker factors of whole layers"}
KINDS = {"preconditioned": True, "plain": False}
EXACT = "exact in u"
MOST = 10  # steps exact in u, which have long arrived
SHOWN = (0, 1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300)
WORST, LEAST = 1e6, 1e-3  # shown for what went astray, and for what has arrived
AXES = Axes("steps", "excess", "steps", "(A(Q) − A*) / |A*|", 1, logarithmic="y", legend="center right")


def loss(inverse: FishLegInverse, grads: Tensor) -> float:
    """½ tr(Q F_γ Q) − tr Q.   Tiles measure their own loss in units of their D, so theirs is written out here."""
    total, γ = 0.0, inverse.damping
    for form in inverse.forms:
        if isinstance(form, BlockRoots):
            total += form.loss(grads, γ)
            continue
        T, S = (factor.double() for factor in form.factors)
        scale = form.scale.double()
        square = scale.square()
        image = scale * (T @ (scale * form.tiles(grads.double())) @ S)
        spread = (T.square() @ square @ S.square()) * square
        traces = T.diagonal(dim1=1, dim2=2)[:, :, None] * S.diagonal(dim1=1, dim2=2)[:, None]
        total += float((image.square().sum() / len(grads) + γ * spread.sum()) / 2 - (square * traces).sum())
    return total


def smallest(grads: Tensor, ranges: list[tuple[int, int]], damping: float) -> float:
    """A* = −½ tr F_γ⁻¹ over blocks, from the eigenvalues of F or of the Gram matrix, whichever is smaller."""
    total = 0.0
    for start, stop in ranges:
        g = grads[:, start:stop].double()
        gram = g.T @ g if g.shape[1] < len(g) else g @ g.T
        found = torch.linalg.eigvalsh(gram / len(g)).clamp(min=0)
        total += float((1 / (found + damping)).sum()) + (stop - start - len(found)) / damping
    return -total / 2


def descend(inverse: FishLegInverse, grads: Tensor, steps: int, adam: SampledSteps | None) -> Iterator[int]:
    """Steps on one batch; yields their number where it is to be shown, until they go astray."""

    def product(v: Tensor) -> Tensor:
        return grads.T @ (grads @ v) / len(grads)

    for step in range(steps + 1):
        if step in SHOWN:
            yield step
        try:
            if adam is not None:
                adam.step(product)
            else:
                for form in inverse.forms:
                    form.step(grads, inverse.damping, 1.0)
        except FisherError:
            return


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, names, train, _ = data.load("mlpnet", options.data, options.samples, seed)
        shapes = [tuple(model.get_parameter(name).shape) for name in names]
        layout = ff.BlockLayout(names, shapes, stages.BLOCK)
        grads = experiment.gradients(model, layout, train)
        damping = 0.1 * float(grads.double().square().mean())
        for form in FORMS:
            ranges = layout.blocks.tolist() if form == "block" else list(layout.parameter_ranges.values())
            best = smallest(grads, ranges, damping)
            for label, kind, rate in runs(options, form):
                started = time.perf_counter()
                inverse = FishLegInverse.start(layout, damping=damping, parameterization=form)
                adam = None
                if kind:
                    adam = SampledSteps(inverse, lr=rate, preconditioner=KINDS[kind], seed=seed)
                steps = options.steps if kind else min(MOST, options.steps)
                excess = dict.fromkeys((step for step in SHOWN if step <= steps), WORST)
                for step in descend(inverse, grads, steps, adam):
                    excess[step] = (loss(inverse, grads) - best) / abs(best)
                    if not excess[step] < WORST:
                        excess[step] = WORST
                        break
                for step, value in excess.items():
                    curves.add(label, step, max(value, LEAST))
                curves.spent(label, started)
        print(f"seed {seed} done", flush=True)


def runs(options: argparse.Namespace, form: str) -> list[tuple[str, str, float]]:
    """Label, kind of sampled steps ("" for exact ones) and rate of every line of a panel."""
    sampled = [(f"{form}: {kind}, rate {rate:g}", kind, rate) for kind in KINDS for rate in options.rates]
    return [*sampled, (f"{form}: {EXACT}", "", 0.0)]


def bars(curves: Curves, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Excess at the last step that is shown, of each kind at its best rate."""
    found = []
    for form, title in FORMS.items():
        best = dict.fromkeys((*KINDS, ""), float("inf"))
        for label, kind, _ in runs(options, form):
            end = max(curves.places([Line(label)]), key=float)
            best[kind] = min(best[kind], curves.mean(label, end))
        what = f"{title}: excess with the preconditioner over that without"
        found.append(experiment.at_most(what, best["preconditioned"] / best["plain"], 1.0))
        what = f"{title}: excess of the steps exact in u over the best of the others"
        found.append(experiment.at_most(what, best[""] / min(best[kind] for kind in KINDS), 1.0))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "fishleg_preconditioner", __doc__.split("\n")[0], (), 250, seeds=3, damping=None
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    panels = [
        Panel(
            title,
            [
                Line(
                    label,
                    style="-" if kind != "plain" else "--",
                    colour=options.rates.index(rate) + 1 if kind else 0,
                )
                for label, kind, rate in runs(options, form)
            ],
        )
        for form, title in FORMS.items()
    ]
    experiment.report(
        options,
        curves,
        experiment.lines(curves, panels, AXES),
        bars(curves, options),
        f"FishLeg's auxiliary loss on one batch of {options.samples:,} gradients of MLPNET "
        f"({experiment.count(options.seeds, 'seed')})",
        CLAIM,
        AXES,
        keys=("samples", "steps", "rates", "seeds", "name"),
    )


if __name__ == "__main__":
    main()
