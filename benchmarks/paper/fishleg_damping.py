"""FishLeg over its damping γ, against WoodFisher: `python -m benchmarks.paper.fishleg_damping`.

MLPNET by one call of `ff.prune`, a few steps to one sparsity, the same number of per-sample gradients for every step
and method, the joint update; γ is absolute.  0 stands where a call gives up and asks for a larger damping.
Writes fishleg_damping.csv, .png and .json.   Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import fastfisher as ff
from benchmarks.paper import data, experiment, stages
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel
from fastfisher.errors import FisherError

CLAIM = Claim(
    f"{stages.SURGEON}, damping",
    "The damping has to suit the data, 1e-3 for CIFAR-10 and 1 for Tiny ImageNet (asked here: at its best γ FishLeg is "
    "not below WoodFisher at its own, and over all γ it loses no more to its best on average).",
)
METHODS: dict[str, dict[str, Any]] = {
    "FLS, defaults": {"method": "fishleg"},
    "FLS, tiles": {"method": "fishleg", "fishleg": {"parameterization": "block-kron"}},
    "WoodFisher": {"method": "woodfisher"},
}
OURS, RIVAL = "FLS, defaults", "WoodFisher"
AXES = Axes("damping", "test_accuracy_percent", "damping γ", "test accuracy, %", 1, logarithmic="x")


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, names, train, test = data.load("mlpnet", options.data, options.samples, seed)
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        loader = list(zip(train.images.split(100), train.labels.split(100), strict=True))
        for label, told in METHODS.items():
            started = time.perf_counter()
            for damping in options.dampings:
                pruned = copy.deepcopy(model)
                try:
                    ff.prune(
                        pruned,
                        loader,
                        sparsity=options.sparsities[0],
                        targets=names,
                        block_size=stages.BLOCK,
                        num_grads=options.samples // (options.recomputations + 1),
                        num_recomputations=options.recomputations,
                        damping=damping,
                        damping_mode="absolute",
                        seed=seed,
                        **told,
                    )
                    curves.add(label, damping, experiment.accuracy(pruned, test))
                except FisherError as error:
                    print(f"{label}, {damping:g}: {error}", flush=True)
                    curves.add(label, damping, 0.0)
            curves.spent(label, started)
        print(f"seed {seed} done", flush=True)


def bars(curves: Curves, options: argparse.Namespace) -> list[dict[str, Any]]:
    means = {label: [curves.mean(label, γ) for γ in options.dampings] for label in METHODS}
    lost = {label: max(values) - sum(values) / len(values) for label, values in means.items()}
    return [
        experiment.at_least(
            f"points of {OURS} above {RIVAL}, each at its best γ", max(means[OURS]) - max(means[RIVAL]), 0.0
        ),
        experiment.at_most(
            f"points lost to its best over all γ, {OURS} less {RIVAL}", lost[OURS] - lost[RIVAL], 0.0
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "fishleg_damping", __doc__.split("\n")[0], (0.95,), 1_000, seeds=3, damping=None
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=[10.0**i for i in range(-6, 2)])
    parser.add_argument("--recomputations", type=int, default=3)
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    title = (
        f"Damping of FishLeg and WoodFisher: MLPNET at {options.sparsities[0]:.0%} in {options.recomputations + 1} "
        f"steps ({experiment.count(options.seeds, 'seed')})"
    )
    lines = [Line(label, style="-") for label in METHODS]
    experiment.report(
        options,
        curves,
        experiment.lines(curves, [Panel("", lines, (0, 100))], AXES),
        bars(curves, options),
        title,
        CLAIM,
        AXES,
        keys=("samples", "dampings", "recomputations", "seeds", "sparsities", "name"),
    )


if __name__ == "__main__":
    main()
