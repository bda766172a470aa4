"""The local quadratic model along three directions of pruning: `python -m benchmarks.paper.quadratic_model`.

MLPNET, trained for 25 epochs, and δ, the change of its weights by pruning: magnitude, diagonal Fisher, and WoodFisher
(one block over the network, summed update, damping 1e-5), each ranked globally.  Along w + tδ, 0 <= t <= 1, the real
rise of the mean loss is compared with the quadratic model ½ t² δᵀFδ, F the empirical Fisher without blocks or damping;
loss and Fisher are those of the same training images.  Seeds differ in network and images.
Source: WoodFisher (Singh & Alistarh, 2020), local quadratic model.
Writes quadratic_model.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "fig. 3.4",
    "Along WoodFisher's direction of pruning the loss rises less than along those of magnitude and of the diagonal "
    "Fisher, and the local quadratic model follows it (asked here: within a factor of 2 at the full step).",
)
SPARSITIES = (0.5, 0.8)
STEPS = tuple(i / 10 for i in range(11))
LINES = (
    Line("magnitude", "global"),
    Line("diagonal Fisher", "global", "diagonal"),
    Line("WoodFisher", "global", "full", "sum"),
)
AXES = Axes("step", "rise_of_loss", "step t along the direction", "rise of the mean loss", 1)


def label(line: Line, sparsity: float, kind: str) -> str:
    return f"{line.label}, {sparsity:.0%}, {kind}"


@torch.inference_mode()
def mean_loss(model: nn.Module, layout: ff.BlockLayout, flat: Tensor, samples: data.Split) -> float:
    logits = functional_call(model, layout.unflatten(flat), (samples.images,))
    return float(F.cross_entropy(logits.double(), samples.labels))


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, samples, _ = data.load("mlpnet", options.data, options.samples, seed)
        layout = experiment.layout_of(model, targets)
        weight = experiment.weights_of(model, layout)
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, samples)
        inverses = {
            name: ff.FisherInverse.from_grads(grads, block_size=size, damping=options.damping)
            for name, size in (("full", None), ("diagonal", 1))
        }
        curves.spent("gradients and inverses", started)
        started = time.perf_counter()
        dense = mean_loss(model, layout, weight, samples)
        for sparsity in options.sparsities:
            for line in LINES:
                new = experiment.pruned(weight, layout, inverses, line, sparsity)
                slopes = grads.double() @ (new - weight).double()  # [m]
                curvature = float(slopes.square().mean())
                for t in STEPS:
                    rise = mean_loss(model, layout, weight + t * (new - weight), samples) - dense
                    curves.add(label(line, sparsity, "real"), t, rise)
                    curves.add(label(line, sparsity, "model"), t, 0.5 * t**2 * curvature)
        curves.spent("losses", started)
        print(f"seed {seed} done", flush=True)


def bars(curves: Curves, sparsities: list[float]) -> list[dict]:
    """At the full step: WoodFisher's rise over that of its rivals, and the model over the real rise."""

    def at_end(line: Line, sparsity: float, kind: str) -> float:
        return curves.mean(label(line, sparsity, kind), 1.0)

    found = []
    for s in sparsities:
        *rivals, ours = LINES
        real, model = at_end(ours, s, "real"), at_end(ours, s, "model")
        for rival in rivals:
            what = f"{s:.0%}: rise of the loss by WoodFisher over that by {rival.label}"
            found.append(experiment.at_most(what, real / at_end(rival, s, "real"), 1.0))
        what = f"{s:.0%}, WoodFisher: the larger of model and real rise over the smaller"
        ratio = max(real, model) / min(real, model) if min(real, model) > 0 else float("inf")
        found.append(experiment.at_most(what, ratio, 2.0))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "quadratic_model", __doc__.split("\n")[0], SPARSITIES, 2_000, seeds=3, full={"samples": 8_000}
    )
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    panels = [
        Panel(
            f"{s:.0%} of the weights removed",
            [
                Line(label(line, s, kind), style=style, colour=i)
                for i, line in enumerate(LINES)
                for kind, style in (("real", "-"), ("model", ":"))
            ],
        )
        for s in options.sparsities
    ]
    title = (
        f"Local quadratic model of MLPNET on MNIST ({experiment.count(options.seeds, 'network')}, "
        f"{options.samples:,} images)"
    )
    picture = experiment.lines(curves, panels, AXES)
    experiment.report(options, curves, picture, bars(curves, options.sparsities), title, CLAIM, AXES)


if __name__ == "__main__":
    main()
