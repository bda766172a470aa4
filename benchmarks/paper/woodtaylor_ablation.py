"""WoodTaylor over damping and number of samples: `python -m benchmarks.paper.woodtaylor_ablation`.

MLPNET after two epochs of training only, all weights, one Fisher block over the network, one shot, summed update.
Seeds differ in network and images; fewer samples are the first of more.
Source: WoodFisher (Singh & Alistarh, 2020), ablation of WoodTaylor.
Writes woodtaylor_ablation.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "fig. 5.3",
    "WoodTaylor gains with the number of samples, and wants more damping than WoodFisher (asked here: at damping 0.1 "
    "most samples are above fewest, and with most samples damping 0.1 is above 1e-5).",
)
SPARSITIES = (0.5, 0.8)
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PUBLISHED = 0.1
AXES = Axes("damping", "test_accuracy_percent", "damping λ", "test accuracy, %", 1, logarithmic="x")
TAYLOR = Line("WoodTaylor", "global", "taylor", "sum")


def label(sparsity: float, samples: int) -> str:
    return f"{sparsity:.0%}, {samples:,} samples"


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, train, test = data.load("mlpnet_ep2", options.data, max(options.samples), seed)
        layout = experiment.layout_of(model, targets)
        weight = experiment.weights_of(model, layout)
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train)
        curves.spent("gradients", started)
        for samples in options.samples:
            for damping in options.dampings:
                started = time.perf_counter()
                inverses = {"taylor": experiment.woodtaylor(grads[:samples], layout, damping)}
                curves.spent("inverses", started)
                for sparsity in options.sparsities:
                    new = experiment.pruned(weight, layout, inverses, TAYLOR, sparsity)
                    curves.add(
                        label(sparsity, samples), damping, experiment.accuracy_with(model, layout, new, test)
                    )
        print(f"seed {seed} done", flush=True)


def bars(curves: Curves, options: argparse.Namespace) -> list[dict]:
    few, most, least = min(options.samples), max(options.samples), min(options.dampings)
    found = []
    for s in options.sparsities:
        ours = curves.mean(label(s, most), PUBLISHED)
        what = f"{s:.0%}, damping {PUBLISHED}: points of {most:,} samples above {few:,}"
        found.append(experiment.at_least(what, ours - curves.mean(label(s, few), PUBLISHED), 0.0))
        what = f"{s:.0%}, {most:,} samples: points of damping {PUBLISHED} above {least:g}"
        found.append(experiment.at_least(what, ours - curves.mean(label(s, most), least), 0.0))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "woodtaylor_ablation",
        __doc__.split("\n")[0],
        SPARSITIES,
        [250, 1_000, 2_000],
        seeds=3,
        damping=None,
        full={"samples": [250, 1_000, 4_000, 8_000]},
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=list(DAMPINGS))
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    panels = [
        Panel(
            f"{s:.0%} of the weights removed",
            [Line(label(s, n), style="-", colour=i + 1) for i, n in enumerate(options.samples)],
        )
        for s in options.sparsities
    ]
    title = f"WoodTaylor on MLPNET, trained for two epochs ({experiment.count(options.seeds, 'network')})"
    keys = ("samples", "dampings", "seeds", "sparsities", "name")
    picture = experiment.lines(curves, panels, AXES)
    experiment.report(options, curves, picture, bars(curves, options), title, CLAIM, AXES, keys)


if __name__ == "__main__":
    main()
