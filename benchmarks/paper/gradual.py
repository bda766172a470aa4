"""Pruning while training, against dynamic pruning: `python -m benchmarks.paper.gradual mlpnet`.

From one trained network three methods go to the same sparsity within the same epochs, on the same cubic schedule, with
the same optimizer (SGD with momentum 0.9, its rate falling to zero in a line): gradual WoodFisher and magnitude, which
prune at the start of every epoch but the last and hold their zeros, and DPF (Lin et al., 2020), which keeps a dense
copy, takes the gradient at the masked weights, applies it to the copy, and masks the smallest weights of the copy anew
every 16 steps.  Each method has the rate that suits it best: `--find-rates` tries the grid RATES on one seed, judged by
training images that are held out.
Networks: mlpnet (MNIST) and resnet20 (CIFAR-10, its 18 3x3 convolutions, random flips).  Values at whole epochs are
those after training, at half epochs those right after pruning.  Seeds differ in network, images and their order.
Source: WoodFisher (Singh & Alistarh, 2020), figure 4.6 and tables 4.2 and 4.3.
Writes gradual_<network>.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel
from fastfisher.prune.select import select

CLAIM = Claim(
    "fig. 4.6, tables 4.2 and 4.3",
    "Gradual WoodFisher ends above gradual magnitude and above dynamic pruning with feedback (asked here: at 95 %).",
)
METHODS = ("WoodFisher", "magnitude", "DPF")
AXES = Axes("epoch", x_label="epoch", scale=1)
EVERY = 16  # steps between two masks of DPF, its published choice
BATCH = 100
RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
HELD_OUT = 2_000


@dataclass(frozen=True)
class Network:
    """How a network is trained on; samples are training images, num_grads those behind one estimate.

    rates: of learning, by method, at the beginning.
    """

    title: str
    samples: int
    epochs: int
    rates: dict[str, float]
    block_size: int
    num_grads: int
    flips: bool = False


NETWORKS = {
    "mlpnet": Network(
        "MLPNET on MNIST", 10_000, 3, {"WoodFisher": 0.05, "magnitude": 0.1, "DPF": 0.005}, 64, 500
    ),
    "resnet20": Network(
        "ResNet-20 on CIFAR-10",
        5_000,
        5,
        {"WoodFisher": 0.1, "magnitude": 0.1, "DPF": 0.002},
        128,
        250,
        flips=True,
    ),
}
FULL = {"mlpnet": (60_000, 20), "resnet20": (40_000, 30)}


def batches(train: data.Split, seed: int, flips: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a random order."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(len(train.labels), generator=generator).split(BATCH):
        images = train.images[rows]
        if flips:
            turned = torch.rand(len(rows), generator=generator) < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
        yield images, train.labels[rows]


class Dpf:
    """Dynamic pruning with feedback: gradients at the masked weights move the dense ones, which the mask is taken from.

    Source: Lin, Stich, Barba, Dmitriev & Jaggi, 2020.
    """

    def __init__(self, model: nn.Module, names: list[str], schedule: ff.CubicSchedule, steps: int) -> None:
        self.parameters = {name: model.get_parameter(name) for name in names}
        self.layout = experiment.layout_of(model, names)
        self.dense = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        self.schedule, self.steps, self.done = schedule, steps, 0

    def show(self) -> None:
        """Put the masked weights in place."""
        self._put({name: torch.where(self.masks[name], dense, 0) for name, dense in self.dense.items()})

    def before(self) -> None:
        """What precedes a forward pass: the masked weights, with a new mask every EVERY steps."""
        if self.done % EVERY == 0:
            weight = self.layout.flatten(self.dense)
            none = torch.zeros_like(weight, dtype=torch.bool)
            ranges = list(self.layout.parameter_ranges.values())
            target = self.schedule(self.done / self.steps)
            mask = select(weight.abs(), none, target, scope="global", ranges=ranges)
            self.masks = self.layout.unflatten(mask)
        self.show()
        self.done += 1

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step on the dense weights."""
        self._put(self.dense)
        optimizer.step()
        self.dense = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)


def run(
    options: argparse.Namespace,
    curves: Curves,
    seed: int,
    method: str,
    sparsity: float,
    *,
    rate: float | None = None,
    held_out: bool = False,
) -> None:
    """One method to one sparsity; notes the accuracy after every pruning and every epoch.

    rate: of learning, by default the method's own.   held_out: judge by training images that are not trained on.
    """
    network = NETWORKS[options.network]
    more = HELD_OUT if held_out else 0
    dense, names, train, test = data.load(options.network, options.data, options.samples + more, seed)
    if held_out:
        test = data.Split(*(part[options.samples :] for part in train))
        train = data.Split(*(part[: options.samples] for part in train))
    label = f"{method}, {sparsity:.0%}"
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), rate or network.rates[method], momentum=0.9)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, options.epochs)
    last = options.epochs - 2
    schedule = ff.CubicSchedule(min(0.5, sparsity), sparsity, begin=0, end=last, every=1)
    dpf = Dpf(model, names, schedule, -(-options.samples // BATCH)) if method == "DPF" else None
    pruner = None
    if dpf is None:
        pruner = ff.Pruner(
            model,
            schedule=schedule,
            method=method.lower(),
            targets=names,
            block_size=network.block_size,
            num_grads=network.num_grads,
            seed=seed,
        )
        pruner.attach(optimizer)
    started = time.perf_counter()
    for epoch in range(options.epochs):
        order = 1_000 * seed + epoch
        if pruner is not None:
            report = pruner.step(batches(train, order, network.flips), epoch=epoch)
            if report is not None:
                curves.add(label, epoch + 0.5, experiment.accuracy(model.eval(), test))
        model.train()
        for images, labels in batches(train, order, network.flips):
            if dpf is not None:
                dpf.before()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if dpf is None:
                optimizer.step()
            else:
                dpf.step(optimizer)
        slower.step()
        if dpf is not None:
            dpf.show()
        curves.add(label, epoch + 1.0, experiment.accuracy(model.eval(), test))
    curves.spent(label, started)
    weights = [model.get_parameter(name) for name in names]
    reached = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    if abs(reached - sparsity) > 1e-3:
        raise RuntimeError(f"{label} ended at a sparsity of {reached:.4f}")
    print(f"seed {seed}, {label}: {curves.values[label, float(options.epochs)][-1]:.2f}", flush=True)


def find_rates(options: argparse.Namespace) -> None:
    """Print what every rate of the grid comes to at the highest sparsity, on one seed that the results do not use."""
    sparsity, seed = max(options.sparsities), options.seeds
    for method in METHODS:
        for rate in options.find_rates or RATES:
            curves = Curves()
            run(options, curves, seed, method, sparsity, rate=rate, held_out=True)
            end = curves.mean(f"{method}, {sparsity:.0%}", float(options.epochs))
            print(f"{method} at {rate:g}: {end:.2f} on held-out training images", flush=True)


def bars(options: argparse.Namespace, curves: Curves) -> list[dict]:
    """Points of WoodFisher above each rival at the end, at the highest sparsity."""
    sparsity, end = max(options.sparsities), float(options.epochs)
    ours = curves.mean(f"WoodFisher, {sparsity:.0%}", end)
    return [
        experiment.at_least(
            f"{sparsity:.0%}: points of WoodFisher above {rival} at the end",
            ours - curves.mean(f"{rival}, {sparsity:.0%}", end),
            0.0,
        )
        for rival in METHODS[1:]
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser("gradual", __doc__.split("\n")[0], (0.9, 0.95), 0, seeds=3)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--epochs", type=int, help="of training, pruning included")
    parser.add_argument("--full", action="store_true", help="all images, more epochs; writes <name>_full")
    parser.add_argument("--find-rates", type=float, nargs="*", help="try rates of learning; writes nothing")
    options = experiment.read(parser, arguments)
    network = NETWORKS[options.network]
    samples, epochs = FULL[options.network] if options.full else (network.samples, network.epochs)
    experiment.fill(options, f"gradual {options.network}", samples=samples, epochs=epochs)
    if options.find_rates is not None:
        return find_rates(options)
    curves = experiment.start(options, AXES)
    if not options.render:
        for seed in range(options.seeds):
            dense, _, _, test = data.load(options.network, options.data, options.samples, seed)
            curves.add("dense", 0.0, experiment.accuracy(dense, test))
            for sparsity in options.sparsities:
                for method in METHODS:
                    run(options, curves, seed, method, sparsity)
    panels = [
        Panel(f"{s:.0%}", [Line(f"{m}, {s:.0%}", fisher=m) for m in METHODS]) for s in options.sparsities
    ]
    experiment.report(
        options,
        curves,
        experiment.lines(curves, panels, AXES),
        bars(options, curves),
        f"{network.title}, pruned while training ({experiment.count(options.seeds, 'seed')}, "
        f"{options.samples:,} images)",
        CLAIM,
        AXES,
        keys=("network", "samples", "epochs", "seeds", "sparsities"),
    )


if __name__ == "__main__":
    main()
