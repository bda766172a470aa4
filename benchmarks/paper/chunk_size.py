"""The size of the Fisher blocks on ResNet-20: `python -m benchmarks.paper.chunk_size`.

The 18 3x3 convolutions of one trained network, pruned in one shot (summed update, damping 1e-5) with blocks of 20 to
37,000 weights (a whole layer has up to 36,864), ranked globally and per layer.  Seeds differ in the images drawn.
Source: WoodFisher (Singh & Alistarh, 2020), ablation of the chunk size.
Writes chunk_size.csv, .png and .json.   About 3 GB of memory.
"""

from __future__ import annotations

import argparse
import time

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Line, Panel

CLAIM = Claim(
    "fig. 4.4 and 4.5",
    "Larger chunks prune better, and a few thousand weights are almost as good as whole layers (asked here: blocks of "
    "37,000 above blocks of 20 by a point, and blocks of 5,000 within a point of 37,000).",
)
SIZES = (20, 100, 1_000, 5_000, 12_288, 37_000)
SPARSITIES = (0.4, 0.5, 0.6, 0.7, 0.8)
JUDGED = (0.6, 0.7)
SCOPES = {"global": "global ranking", "layer": "per layer"}
# From the darkest to the brightest.
PLACES = (5, 3, 4, 1, 2, 7)


def ours(scope: str) -> list[Line]:
    return [
        Line(f"blocks of {size:,}, {SCOPES[scope]}", scope, f"{size}", "sum", colour=colour)
        for size, colour in zip(SIZES, PLACES, strict=True)
    ]


def magnitude(scope: str) -> Line:
    return Line(f"magnitude, {SCOPES[scope]}", scope, colour=0)


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, train, test = data.load("resnet20", options.data, options.samples, seed)
        layout = experiment.layout_of(model, targets)
        sizes = [stop - start for start, stop in layout.parameter_ranges.values()]
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        rivals = [magnitude(scope) for scope in SCOPES]
        experiment.prune_all(curves, model, layout, {}, rivals, options.sparsities, test)
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train)
        curves.spent("gradients", started)
        for size in SIZES:
            started = time.perf_counter()
            finv = ff.FisherInverse.from_grads(grads, block_size=size, damping=options.damping, sizes=sizes)
            curves.spent(f"inverse, blocks of {size:,}", started)
            lines = [line for scope in SCOPES for line in ours(scope) if line.fisher == str(size)]
            experiment.prune_all(curves, model, layout, {f"{size}": finv}, lines, options.sparsities, test)
            del finv  # one inverse at a time
        print(f"seed {seed} done", flush=True)


def bars(curves: Curves, sparsities: list[float]) -> list[dict]:
    found = []
    for scope, words in SCOPES.items():
        by_size = {line.fisher: line.label for line in ours(scope)}
        for s in (s for s in JUDGED if s in sparsities):
            smallest, middle, largest = (curves.mean(by_size[size], s) for size in ("20", "5000", "37000"))
            what = f"{words}, {s:.0%}: points of 37,000"
            found.append(experiment.at_least(f"{what} above 20", largest - smallest, 1.0))
            found.append(experiment.at_most(f"{what} above 5,000", largest - middle, 1.0))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "chunk_size", __doc__.split("\n")[0], SPARSITIES, 500, seeds=3, full={"samples": 1_000}
    )
    options = experiment.read(parser, arguments)
    curves = experiment.start(options)
    if not options.render:
        measure(options, curves)
    panels = [Panel(words, [magnitude(scope), *ours(scope)], (15, 95)) for scope, words in SCOPES.items()]
    title = (
        f"Size of the Fisher blocks, ResNet-20 on CIFAR-10 ({experiment.count(options.seeds, 'draw')} of "
        f"{options.samples:,} samples)"
    )
    picture = experiment.lines(curves, panels)
    experiment.report(options, curves, picture, bars(curves, options.sparsities), title, CLAIM)


if __name__ == "__main__":
    main()
