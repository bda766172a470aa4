"""MLPNET on MNIST: `python -m benchmarks.paper.mlpnet_mnist`.

Four trained networks, pruned in one shot; the inverse Fisher is one block over all 32,360 weights (dual form), from
the gradients of 8,000 training images, damping 1e-5.   Source: WoodFisher (Singh & Alistarh, 2020), one-shot pruning
of MLPNET. Writes mlpnet_mnist.csv, .png and .json.   About 2.5 GB of memory.
"""

from __future__ import annotations

import argparse
import time

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Line, Panel

CLAIM = Claim(
    "fig. 4.1",
    "Joint WoodFisher keeps the dense accuracy of MLPNET to about 80 % sparsity and is within 2 % of it at 90 %.",
)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
OURS = (
    Line("WoodFisher, global, sum", "global", "full", "sum"),
    Line("WoodFisher, global, joint", "global", "full", "joint"),
)
GLOBAL = (Line("magnitude, global", "global"), Line("diagonal Fisher, global", "global", "diagonal"), *OURS)
LINES = (
    *GLOBAL,
    Line("magnitude, per layer", "layer"),
    Line("WoodFisher, per layer, sum", "layer", "full", "sum"),
)


def bars(curves: Curves, sparsities: list[float]) -> list[dict]:
    """Points lost against dense by global WoodFisher: at most 0.5 at 80 %, 2 at 90 %."""
    dense = curves.mean("dense", 0.0)
    return [
        experiment.at_most(
            f"{line.label}: points below dense at {s:.0%}", dense - curves.mean(line.label, s), bar
        )
        for line in OURS
        for s, bar in ((0.8, 0.5), (0.9, 2.0))
        if s in sparsities
    ]


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, train, test = data.load("mlpnet", options.data, options.samples, seed)
        layout = experiment.layout_of(model, targets)
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train, options.grad_batch_size)
        curves.spent("gradients", started)
        started = time.perf_counter()
        inverses = {
            name: ff.FisherInverse.from_grads(grads, block_size=size, damping=options.damping)
            for name, size in (("full", None), ("diagonal", 1))
        }
        curves.spent("inverse", started)
        del grads
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        experiment.prune_all(curves, model, layout, inverses, LINES, options.sparsities, test)
        print(f"seed {seed} done", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "mlpnet_mnist", __doc__.split("\n")[0], SPARSITIES, 8_000, seeds=4, grad_batch_size=True
    )
    options = experiment.read(parser, arguments)
    curves = experiment.start(options)
    if not options.render:
        measure(options, curves)
    networks = experiment.count(options.seeds, "network")
    title = f"MLPNET on MNIST, pruned in one shot ({networks}, {options.samples:,} samples)"
    panels = [
        Panel(f"one Fisher block over the network, {options.samples:,} samples", LINES, (0, 100)),
        Panel("the same, global methods near the dense accuracy", GLOBAL, (84, 95)),
    ]
    keys = ("samples", "grad_batch_size", "damping", "seeds", "sparsities", "name")
    picture = experiment.lines(curves, panels)
    experiment.report(options, curves, picture, bars(curves, options.sparsities), title, CLAIM, keys=keys)


if __name__ == "__main__":
    main()
