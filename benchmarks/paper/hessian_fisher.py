"""Hessian and empirical Fisher during training: `python -m benchmarks.paper.hessian_fisher`.

MLPNET is trained on MNIST from scratch by plain SGD (batches of 64, rate 0.01).  At several epochs the Hessian of the
mean loss and the empirical Fisher are taken over the same training images, for one block of each layer: the weights
from every second of the central 14 x 14 pixels to the first four units of fc1 (196), the first 200 weights of fc2 and
all 200 of fc3.  Pearson correlation and cosine are those of the entries of both matrices.  Seeds differ in the initial
weights and the order of the images; the matrices shown are those of the first.
Source: WoodFisher (Singh & Alistarh, 2020), Hessian against empirical Fisher.
Writes hessian_fisher.csv, .png, _matrices.png and .json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from benchmarks.paper import data, experiment, pictures
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.networks import MLPNet
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "fig. 3.1 to 3.3",
    "Hessian and empirical Fisher share their structure up to scale all along training (asked here: the entries of "
    "each block correlate by at least 0.5 after every epoch shown).",
)
EPOCHS = (0, 1, 2, 5, 10)
RATE, BATCH = 0.01, 64
CHUNK = 2_000  # images whose gradients are in memory together
AXES = Axes("epoch", "value", "epoch", "similarity of Hessian and Fisher, and ratio of their norms", 1)


def blocks() -> dict[str, tuple[str, Tensor]]:
    """Name of a block -> its parameter and the flat places of its weights there."""
    rows = torch.arange(7, 21, 2)
    pixels = (28 * rows[:, None] + rows).flatten()  # [49]
    units = 784 * torch.arange(4)
    return {
        "fc1, 196 weights": ("fc1.weight", (units[:, None] + pixels).flatten()),
        "fc2, first 200": ("fc2.weight", torch.arange(200)),
        "fc3, all 200": ("fc3.weight", torch.arange(200)),
    }


def train_epoch(model: nn.Module, train: data.Split, generator: torch.Generator) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for picked in torch.randperm(len(train.labels), generator=generator).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[picked]), train.labels[picked]).backward()
        optimizer.step()


def matrices(model: nn.Module, samples: data.Split, name: str, index: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian of the mean loss and empirical Fisher of some weights of one parameter: float64 [n, n] each."""
    weights = {key: value.detach() for key, value in model.named_parameters()}
    layout = experiment.layout_of(model, [name])
    ours, fisher = torch.zeros(2, len(index), len(index), dtype=torch.float64)
    for images, labels in zip(samples.images.split(CHUNK), samples.labels.split(CHUNK), strict=True):
        part = data.Split(images, labels)

        def loss(v: Tensor, part: data.Split = part) -> Tensor:
            changed = weights[name].flatten().index_copy(0, index, v).view_as(weights[name])
            return F.cross_entropy(
                functional_call(model, weights | {name: changed}, (part.images,)), part.labels
            )

        ours += len(labels) * hessian(loss)(weights[name].flatten()[index])
        grads = experiment.gradients(model, layout, part)[:, index].double()
        fisher += grads.T @ grads
    return ours / len(samples.labels), fisher / len(samples.labels)


def pearson(a: Tensor, b: Tensor) -> float:
    return cosine(a - a.mean(), b - b.mean())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def measure(options: argparse.Namespace, curves: Curves) -> dict[str, dict[str, Tensor]]:
    """Fill the curves, and return the heat maps of the first seed: row -> epoch -> matrix."""
    maps: dict[str, dict[str, Tensor]] = {}
    for seed in range(options.seeds):
        train, _ = data.mnist(options.data, 60_000, seed)
        samples = data.Split(train.images[: options.samples], train.labels[: options.samples])
        torch.manual_seed(seed)
        model, generator = MLPNet(), torch.Generator().manual_seed(seed)
        for epoch in range(max(options.epochs) + 1):
            if epoch:
                started = time.perf_counter()
                train_epoch(model, train, generator)
                curves.spent("training", started)
            if epoch not in options.epochs:
                continue
            started = time.perf_counter()
            for block, (name, index) in blocks().items():
                ours, fisher = matrices(model, samples, name, index)
                curves.add(f"{block}: Pearson", epoch, pearson(ours, fisher))
                curves.add(f"{block}: cosine", epoch, cosine(ours, fisher))
                curves.add(f"{block}: norm of Fisher over Hessian", epoch, float(fisher.norm() / ours.norm()))
                if seed == 0:
                    maps.setdefault(f"{block}\nHessian", {})[f"epoch {epoch}"] = ours
                    maps.setdefault(f"{block}\nFisher", {})[f"epoch {epoch}"] = fisher
            curves.spent("matrices", started)
        print(f"seed {seed} done", flush=True)
    return maps


def bars(curves: Curves, epochs: list[int]) -> list[dict]:
    return [
        experiment.at_least(
            f"{block}: lowest Pearson correlation after the first epoch",
            min(curves.mean(f"{block}: Pearson", epoch) for epoch in epochs if epoch),
            0.5,
        )
        for block in blocks()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "hessian_fisher", __doc__.split("\n")[0], (), 2_000, seeds=3, damping=None, full={"samples": 60_000}
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS), help="where to look")
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    maps = {} if options.render else measure(options, curves)
    panels = [
        Panel(kind, [Line(f"{block}: {kind}", style="-") for block in blocks()], limits)
        for kind, limits in (
            ("Pearson", (0, 1.05)),
            ("cosine", (0, 1.05)),
            ("norm of Fisher over Hessian", None),
        )
    ]

    def picture(path: Path, title: str) -> None:
        pictures.lines(path, curves, panels, AXES, title)
        if maps:
            shown = (
                f"MLPNET on MNIST, one network, {options.samples:,} images: colours up to ± the number below"
            )
            pictures.matrices(path.with_stem(f"{path.stem}_matrices"), maps, shown)

    title = (
        f"Hessian and empirical Fisher of MLPNET on MNIST ({experiment.count(options.seeds, 'network')}, "
        f"{options.samples:,} images)"
    )
    keys = ("samples", "seeds", "epochs", "name")
    experiment.report(
        options, curves, picture, bars(curves, options.epochs), title, CLAIM, AXES, keys, ("matrices",)
    )


if __name__ == "__main__":
    main()
