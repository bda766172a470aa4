"""WoodTaylor against WoodFisher and magnitude: `python -m benchmarks.paper.woodtaylor mlpnet` (or resnet20).

mlpnet: all weights of MLPNET after two epochs of training only, one Fisher block over the network.   resnet20: the
first three 3x3 convolutions of the trained ResNet-20 (6,912 weights), one Fisher block over the three layers
together.  One shot, global ranking, summed updates; damping 1e-5 for WoodFisher and 0.1 for WoodTaylor, as in the
authors' own sweep.  Seeds differ in the images drawn, and for MLPNET in the network.
Source: WoodFisher (Singh & Alistarh, 2020), pruning with the first-order term.
Writes woodtaylor_<network>.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Line, Panel


@dataclass(frozen=True)
class Network:
    """data: its name there.   layers: how many of its tensors are pruned.   above_dense: asked of WoodTaylor."""

    title: str
    claim: Claim
    data: str
    samples: int
    full: int
    layers: int | None = None
    above_dense: bool = False


NETWORKS = {
    "mlpnet": Network(
        "MLPNET on MNIST, trained for two epochs",
        Claim(
            "fig. 5.1",
            "On a partially trained network WoodTaylor is above WoodFisher and magnitude at every sparsity, and "
            "exceeds the dense accuracy.",
        ),
        "mlpnet_ep2",
        2_000,
        8_000,
        above_dense=True,
    ),
    "resnet20": Network(
        "First three 3x3 convolutions of ResNet-20 on CIFAR-10",
        Claim(
            "fig. 5.2",
            "With one full matrix over three layers of ResNet-20 WoodTaylor is at least as accurate as WoodFisher and "
            "magnitude at every sparsity.",
        ),
        "resnet20",
        1_000,
        8_000,
        layers=3,
    ),
}
SPARSITIES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
MAGNITUDE = Line("magnitude", "global")
FISHER = Line("WoodFisher", "global", "fisher", "sum")
TAYLOR = Line("WoodTaylor", "global", "taylor", "sum")
LINES = (MAGNITUDE, Line("diagonal Fisher", "global", "diagonal"), FISHER, TAYLOR)


def measure(options: argparse.Namespace, network: Network, curves: Curves) -> None:
    for seed in range(options.seeds):
        model, targets, train, test = data.load(network.data, options.data, options.samples, seed)
        layout = experiment.layout_of(model, targets[: network.layers])
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train)
        inverses = {
            "fisher": ff.FisherInverse.from_grads(grads, block_size=None, damping=options.damping),
            "diagonal": ff.FisherInverse.from_grads(grads, block_size=1, damping=options.damping),
            "taylor": experiment.woodtaylor(grads, layout, options.taylor_damping),
        }
        curves.spent("gradients and inverses", started)
        curves.add("dense", 0.0, experiment.accuracy(model, test))
        experiment.prune_all(curves, model, layout, inverses, LINES, options.sparsities, test)
        print(f"seed {seed} done", flush=True)


def bars(network: Network, curves: Curves, sparsities: list[float]) -> list[dict]:
    """The least that WoodTaylor gains on its rivals over all sparsities, and on the dense network at its best."""
    found = []
    for rival in (FISHER, MAGNITUDE):
        least, where = min(
            (curves.mean(TAYLOR.label, s) - curves.mean(rival.label, s), s) for s in sparsities
        )
        what = f"least points above {rival.label}, at {where:.0%}"
        found.append(experiment.at_least(what, least, 0.0))
    if network.above_dense:
        gain = max(curves.mean(TAYLOR.label, s) for s in sparsities) - curves.mean("dense", 0.0)
        found.append(experiment.at_least("points above dense at the best sparsity", gain, 0.0))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "woodtaylor", __doc__.split("\n")[0], SPARSITIES, 0, seeds=3, full={"samples": 0}
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--taylor-damping", type=float, default=0.1, help="of WoodTaylor")
    options = experiment.read(parser, arguments)
    network = NETWORKS[options.network]
    samples = network.full if options.full else network.samples
    experiment.fill(options, f"woodtaylor {options.network}", samples=samples)
    curves = experiment.start(options)
    if not options.render:
        measure(options, network, curves)
    panels = [Panel(f"damping {options.damping:g}, WoodTaylor {options.taylor_damping:g}", LINES)]
    title = f"{network.title} ({experiment.count(options.seeds, 'seed')}, {options.samples:,} samples)"
    found = bars(network, curves, options.sparsities)
    keys = ("network", "samples", "damping", "taylor_damping", "seeds", "sparsities", "name")
    picture = experiment.lines(curves, panels)
    experiment.report(options, curves, picture, found, title, network.claim, keys=keys)


if __name__ == "__main__":
    main()
