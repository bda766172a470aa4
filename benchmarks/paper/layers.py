"""How sparse each layer becomes under one global ranking: `python -m benchmarks.paper.layers mlpnet` (or resnet20).

mlpnet: all 32,360 weights at 77.6 % overall, one Fisher block over the network.   resnet20: its 18 3x3 convolutions at
80 %, one block for each layer.  WoodFisher (summed update, damping 1e-5) against global magnitude, one shot.  Seeds
differ in the images drawn, and for MLPNET in the network.
Source: WoodFisher (Singh & Alistarh, 2020), layer-wise sparsity.
Writes layers_<network>.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import fastfisher as ff
from benchmarks.paper import data, experiment, pictures
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel


@dataclass(frozen=True)
class Network:
    """samples: by default and with --full.   block_size: None for one block over all layers, 0 for one a layer."""

    title: str
    figure: str
    sparsity: float
    samples: int
    full: int
    block_size: int | None


NETWORKS = {
    "mlpnet": Network("MLPNET on MNIST", "table 4.1", 0.776, 2_000, 8_000, None),
    "resnet20": Network("ResNet-20 on CIFAR-10", "fig. 4.7", 0.8, 1_000, 1_000, 0),
}
CLAIM = (
    "Global ranking by WoodFisher finds a distribution of sparsity over the layers of its own, and is at least as "
    "accurate with it as global magnitude (asked here: some layer differs by a point or more)."
)
LINES = (Line("magnitude", "global"), Line("WoodFisher", "global", "blocks", "sum"))
ACCURACY = "test accuracy"
AXES = Axes("layer", "percent", "", "sparsity (last: test accuracy), %")


def measure(options: argparse.Namespace, network: Network, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, train, test = data.load(options.network, options.data, options.samples, seed)
        layout = experiment.layout_of(model, targets)
        weight = experiment.weights_of(model, layout)
        ranges = layout.parameter_ranges
        sizes = [stop - start for start, stop in ranges.values()]
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train)
        inverse = ff.FisherInverse.from_grads(
            grads,
            block_size=max(sizes) if network.block_size == 0 else network.block_size,
            damping=options.damping,
            sizes=sizes if network.block_size == 0 else None,
        )
        curves.spent("gradients and inverse", started)
        for line in LINES:
            new = experiment.pruned(weight, layout, {"blocks": inverse}, line, options.sparsity)
            for name, (start, stop) in ranges.items():
                zeros = (new[start:stop] == 0).double().mean()
                curves.add(line.label, name.removesuffix(".weight"), 100 * float(zeros))
            curves.add(line.label, ACCURACY, experiment.accuracy_with(model, layout, new, test))
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        print(f"seed {seed} done", flush=True)


def bars(curves: Curves) -> list[dict]:
    magnitude, ours = (line.label for line in LINES)
    gaps = {
        place: curves.mean(ours, place) - curves.mean(magnitude, place)
        for place in curves.places(LINES)
        if place != ACCURACY
    }
    where = max(gaps, key=lambda place: abs(gaps[place]))
    gain = curves.mean(ours, ACCURACY) - curves.mean(magnitude, ACCURACY)
    return [
        experiment.at_least(
            f"largest difference of a layer's sparsity, points (at {where})", abs(gaps[where]), 1.0
        ),
        experiment.at_least("accuracy: points of WoodFisher above magnitude", gain, 0.0),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser("layers", __doc__.split("\n")[0], (), 0, seeds=3, full={"samples": 0})
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--sparsity", type=float, help="over all layers")
    options = experiment.read(parser, arguments)
    network = NETWORKS[options.network]
    experiment.fill(
        options,
        f"layers {options.network}",
        samples=network.full if options.full else network.samples,
        sparsity=network.sparsity,
    )
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, network, curves)
    title = (
        f"{network.title}: sparsity of each layer at {options.sparsity:.1%} overall "
        f"({experiment.count(options.seeds, 'seed')}, {options.samples:,} samples)"
    )
    claim = Claim(network.figure, CLAIM)
    words = (
        "one shot" if options.network == "mlpnet" else "one shot; above the bars: WoodFisher minus magnitude"
    )
    panels = [Panel(words, LINES, (0, 105))]
    experiment.report(
        options,
        curves,
        lambda path, title: pictures.bars(path, curves, panels, AXES, title),
        bars(curves),
        title,
        claim,
        AXES,
        ("network", "samples", "damping", "seeds", "sparsity", "name"),
    )


if __name__ == "__main__":
    main()
