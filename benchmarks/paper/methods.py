"""Every method of the papers on one network, and N:M patterns: `python -m benchmarks.paper.methods mlpnet`.

Networks: mlpnet (MNIST) and resnet20 (CIFAR-10, its 18 3x3 convolutions), pruned by `ff.prune` alone, nothing trained
afterwards.  One step: every method as the papers have it, and the updates of WoodFisher.  Several steps: the same with
gradients made anew on the way, where that pays.  Dampings are the default of the package (relative 0.1), for the rivals
as for us.  Patterns are places of their own: 2:4, and on MLPNET 4:8 and blocks of 4 at 50 %.
Writes methods_<network>.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import fastfisher as ff
from benchmarks.paper import data, experiment, pictures
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "beyond the paper",
    "At every sparsity and pattern the best of our updates is at least as accurate as every rival in the same number "
    "of steps, and 2:4 loses less than half of what magnitude 2:4 loses.",
)
NETWORKS = {
    "mlpnet": ("MLPNET on MNIST", 8_000, 1_000, 64, (0.8, 0.9, 0.95)),
    "resnet20": ("ResNet-20 on CIFAR-10", 1_000, 250, 128, (0.7, 0.8)),
}
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "block4": {"pattern": "block4", "sparsity": 0.5},
}
ONE: dict[str, Any] = {"num_recomputations": 0}
# label -> what ff.prune is told; the last three of each are ours
ONE_STEP: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "OBD": {"method": "obd", **ONE},
    "diagonal Fisher": {"method": "diagonal", **ONE},
    "K-FAC": {"method": "kfac", **ONE},
    "WoodFisher, sum": {"update": "sum", **ONE},
    "WoodFisher, joint": {"update": "joint", **ONE},
    "WoodFisher, greedy": {"update": "greedy", **ONE},
}
STEPS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "diagonal Fisher, recomputed": {"method": "diagonal"},
    "K-FAC, recomputed": {"method": "kfac"},
    "WoodFisher, recomputed, joint": {"update": "joint"},
    "WoodFisher, recomputed, greedy": {"update": "greedy"},
    "WoodTaylor, recomputed, greedy": {"method": "woodtaylor", "update": "greedy"},
}
OURS = 3
AXES = Axes("place", x_label="sparsity or pattern")


def panels(options: argparse.Namespace) -> list[Panel]:
    counts = experiment.count(options.num_grads, "gradient")
    return [
        Panel(f"{name} ({counts} each)", [Line(label) for label in methods], (0, 100))
        for name, methods in (("one step", ONE_STEP), ("several steps", STEPS))
    ]


def places(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What ff.prune is asked for, by the name under the bars."""
    patterns = PATTERNS if options.network == "mlpnet" else {"2:4": PATTERNS["2:4"]}
    return {f"{s:.0%}": {"sparsity": s} for s in options.sparsities} | patterns


def bars(curves: Curves, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours over every rival with as many steps, at each place; and what 2:4 loses."""
    found = []
    for name, methods in (("one step", ONE_STEP), ("several steps", STEPS)):
        labels = list(methods)
        for place in places(options):
            ours = max(curves.mean(label, place) for label in labels[-OURS:])
            _, best = max((curves.mean(label, place), label) for label in labels[:-OURS])
            what = f"{name}, {place}: points above the best rival, {best}"
            found.append(experiment.at_least(what, ours - curves.mean(best, place), 0.0))
    dense = curves.mean("dense", 0.0)
    lost = dense - max(curves.mean(label, "2:4") for label in [*list(ONE_STEP)[-OURS:], *list(STEPS)[-OURS:]])
    by_magnitude = dense - curves.mean("magnitude", "2:4")
    found.append(
        experiment.at_most("2:4: points lost over those that magnitude loses", lost / by_magnitude, 0.5)
    )
    return found


def measure(options: argparse.Namespace, curves: Curves) -> None:
    *_, block_size, _ = NETWORKS[options.network]
    for seed in range(options.seeds):
        dense, targets, train, test = data.load(options.network, options.data, options.samples, seed)
        loader = list(zip(train.images.split(100), train.labels.split(100), strict=True))
        curves.add("dense", 0.0, experiment.accuracy(dense, test))
        for label, told in {**ONE_STEP, **STEPS}.items():
            started = time.perf_counter()
            for place, asked in places(options).items():
                model = copy.deepcopy(dense)
                estimate = {"num_grads": options.num_grads, "block_size": block_size}
                ff.prune(model, loader, targets=targets, seed=seed, **estimate, **told, **asked)
                curves.add(label, place, experiment.accuracy(model, test))
                print(f"seed {seed}, {label}, {place}: {curves.values[label, place][-1]:.1f}", flush=True)
            curves.spent(label, started)


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser("methods", __doc__.split("\n")[0], (0.0,), 0, seeds=3)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--num-grads", type=int, help="gradients in one estimate")
    options = experiment.read(parser, arguments)
    title, samples, num_grads, _, sparsities = NETWORKS[options.network]
    experiment.fill(
        options,
        f"methods {options.network}",
        samples=samples,
        num_grads=num_grads,
        sparsities=list(sparsities),
    )
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    experiment.report(
        options,
        curves,
        lambda path, text: pictures.bars(path, curves, panels(options), AXES, text),
        bars(curves, options),
        f"{title}, every method, without retraining ({experiment.count(options.seeds, 'seed')})",
        CLAIM,
        AXES,
        keys=("network", "samples", "num_grads", "seeds", "sparsities"),
    )


if __name__ == "__main__":
    main()
