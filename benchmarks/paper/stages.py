"""Gradual pruning from a trained network in stages, the same for every method: what the scripts of FishLeg share."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfisher as ff
from benchmarks.paper import data, experiment, pictures
from benchmarks.paper.experiment import Curves
from benchmarks.paper.gradual import batches
from benchmarks.paper.networks import LeNet5, ResNet18
from benchmarks.paper.pictures import Axes, Line, Panel
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.prune.surgeon import Surgeon

SURGEON = "FishLeg Surgeon"  # stands where the other paper's figures have a number
DAMPING = 0.1  # of the mean diagonal, the default of the package
BLOCK = 128  # weights in a block of WoodFisher, and of FishLeg with blocks
SAMPLED = {"aux": "sampled", "u": "gaussian", "preconditioner": True, "max_aux_steps": 50, "aux_lr": 1e-3}
AXES = Axes("sparsity", "value", "sparsity, %", "test accuracy, %")
ERRORS = Axes("sparsity", "value", "sparsity, %", "‖Q F_γ − I‖ / √d", logarithmic="y")
STATES = Axes("state", "value", "state, MiB", "test accuracy at the end, %", 1, logarithmic="x")
# What is noted of a method beside its accuracy, at the end of its label.
ERROR, STATE, SECONDS = ": error", ": MiB", ": seconds"


@dataclass(frozen=True)
class Network:
    """What is pruned, and how far.   num_grads: of one stage.   reference: images that only measure errors.

    epochs: of training where there is no trained network, 0 where there is one.   rate: of learning.
    """

    title: str
    final: float
    num_grads: int
    reference: int
    samples: int
    epochs: int = 0
    rate: float = 0.02
    flips: bool = False


NETWORKS = {
    "mlpnet": Network("MLPNET on MNIST", 0.95, 250, 500, 3_000),
    "lenet": Network("LeNet-5 on MNIST", 0.95, 250, 500, 20_000, epochs=3, rate=0.05),
    "resnet20": Network("ResNet-20 on CIFAR-10", 0.92, 250, 250, 2_750, flips=True),
    "resnet18": Network("ResNet-18 on CIFAR-10", 0.95, 250, 50, 5_000, epochs=2, flips=True),
    "tinyimagenet": Network("ResNet-18 on Tiny ImageNet", 0.8, 250, 50, 5_000, epochs=2, flips=True),
}
FULL: dict[str, dict[str, int]] = {
    "mlpnet": {"samples": 60_000, "num_grads": 1_000},
    "lenet": {"samples": 60_000, "num_grads": 1_000, "epochs": 10},
    "resnet20": {"samples": 40_000, "num_grads": 1_000},
    "resnet18": {"samples": 40_000, "num_grads": 1_000, "epochs": 60, "train_steps": 400},
    "tinyimagenet": {"samples": 100_000, "num_grads": 1_000, "epochs": 60, "train_steps": 800},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-grads", type=int, help="per-sample gradients of one stage, for every method")
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument(
        "--train-steps", type=int, default=0, help="of SGD after every stage, in batches of 100"
    )


@dataclass
class Trained:
    """A trained network with the names of its weights to prune; `reference` are images kept from pruning."""

    model: nn.Module
    names: list[str]
    train: data.Split
    reference: data.Split
    test: data.Split


def train(model: nn.Module, images: data.Split, epochs: int, network: Network, seed: int) -> nn.Module:
    """SGD with momentum, its rate falling to zero in a line; returns the model in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), network.rate, momentum=0.9, weight_decay=5e-4)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs)
    model.train()
    for epoch in range(epochs):
        _steps(model, optimizer, images, 1_000 * seed + epoch, network.flips)
        slower.step()
    return model.eval()


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: data.Split,
    seed: int,
    flips: bool,
    most: int | None = None,
) -> None:
    """Training steps on one epoch, or on the first batches of it."""
    for x, y in islice(batches(images, seed, flips), most):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def load(options: argparse.Namespace, seed: int) -> Trained:
    """The network of one seed; lenet, resnet18 and tinyimagenet are trained here where no checkpoint is named."""
    kind, network = options.network, NETWORKS[options.network]
    device = getattr(options, "device", "cpu")
    if kind in ("mlpnet", "resnet20"):
        model, names, images, test = data.load(kind, options.data, options.samples, seed)
    else:
        read = {"lenet": data.mnist, "resnet18": data.cifar10, "tinyimagenet": data.tiny_imagenet}[kind]
        images, test = read(options.data, options.samples, seed)
        torch.manual_seed(seed)
        model = LeNet5() if kind == "lenet" else ResNet18(200 if kind == "tinyimagenet" else 10)
        names = [name for name, p in model.named_parameters() if p.ndim > 1]
    model = model.to(device)
    images, test = (data.Split(*(part.to(device) for part in split)) for split in (images, test))
    last = len(images.labels) - network.reference
    kept, reference = (
        data.Split(*(part[rows] for part in images)) for rows in (slice(last), slice(last, None))
    )
    path: Path | None = getattr(options, "checkpoint", None)
    if path is not None:
        data.load_weights(model, path.parent, path.name)
    elif network.epochs:
        train(model, kept, options.epochs, network, seed)
    return Trained(model.eval(), names, kept, reference, test)


def state_mib(method: str, model: nn.Module, names: Sequence[str]) -> float:
    """What a rival keeps of its estimate, in MiB."""
    shapes = [model.get_parameter(name).shape for name in names]
    d = sum(shape.numel() for shape in shapes)
    if method == "kfac":  # factors, their eigenvectors and the spectrum, float64
        sides = [(shape[0], math.prod(shape[1:])) for shape in shapes]
        return sum(8 * (2 * (o * o + i * i) + o * i) for o, i in sides) / 2**20
    return 4 * d * {"woodfisher": BLOCK, "diagonal": 1, "magnitude": 0}[method] / 2**20


def prune(
    options: argparse.Namespace,
    curves: Curves,
    seed: int,
    trained: Trained,
    label: str,
    told: Mapping[str, Any],
) -> None:
    """One method to the final sparsity, in stages that each remove the same share of what is left; notes accuracy,
    error, state and seconds.

    told: to `ff.Pruner`.   The error is that of what the method has learned of the weights that the stage leaves, with
    gradients of other images at the point where it has learned.
    """
    network = NETWORKS[options.network]
    model = copy.deepcopy(trained.model)
    schedule = ff.ExponentialSchedule(0.5, options.final, begin=0, end=options.stages - 1)
    pruner = ff.Pruner(
        model,
        schedule=schedule,
        targets=trained.names,
        num_grads=options.num_grads,
        damping=DAMPING,
        seed=seed,
        **{"block_size": BLOCK, **told},
    )
    optimizer = torch.optim.SGD(model.parameters(), network.rate / 2, momentum=0.9)
    pruner.attach(optimizer)
    learns, spent = told["method"] == "fishleg", 0.0
    for stage in range(options.stages):
        rows = torch.arange(stage * options.num_grads, (stage + 1) * options.num_grads) % len(
            trained.train.labels
        )
        part = data.Split(*(x[rows.to(x.device)] for x in trained.train))
        grads = _reference(pruner, model, trained) if learns else None
        started = time.perf_counter()
        report = pruner.step(
            list(zip(part.images.split(100), part.labels.split(100), strict=True)), epoch=stage
        )
        spent += time.perf_counter() - started
        if report is None:
            raise RuntimeError(f"{label}: nothing was pruned in stage {stage}")
        place = round(report.sparsity, 4)
        curves.add(label, place, experiment.accuracy(model.eval(), trained.test))
        if grads is not None and (inverse := _learned(pruner)) is not None:
            curves.add(label + ERROR, place, inverse.error(grads))
        if options.train_steps:
            model.train()
            order = 1_000 * seed + stage
            _steps(model, optimizer, trained.train, order, network.flips, options.train_steps)
            curves.add(label + ", trained", place, experiment.accuracy(model.eval(), trained.test))
    inverse = _learned(pruner)
    state = inverse.state_bytes / 2**20 if inverse else state_mib(told["method"], model, trained.names)
    curves.add(label + STATE, place, state)
    curves.add(label + SECONDS, place, spent)
    curves.seconds[label] = curves.seconds.get(label, 0.0) + spent
    print(f"seed {seed}, {label}: {curves.values[label, place][-1]:.2f}, {spent:.0f} s", flush=True)


def _learned(pruner: ff.Pruner) -> FishLegInverse | None:
    """The inverse that a pruner keeps."""
    return pruner._learner.inverse if isinstance(pruner._learner, Surgeon) else None


def _reference(pruner: ff.Pruner, model: nn.Module, trained: Trained) -> Tensor:
    """Gradients of the images kept for that, in the order of the pruner's weights."""
    learner = pruner._learner or pruner._new_learner()
    assert learner is not None
    layout = learner.layout
    return experiment.gradients(model.eval(), layout, trained.reference)


def lead(curves: Curves, ours: str, rival: str, place: float) -> tuple[float, float]:
    """Points of ours above a rival, the mean over the seeds and its standard error."""
    pairs = zip(curves.values[ours, place], curves.values[rival, place], strict=True)
    gaps = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0


def panels(curves: Curves, labels: Sequence[str], final: float) -> list[Panel]:
    """Accuracy and error after every stage, and accuracy at the end over the state."""
    low = min(curves.mean(label, final) for label in labels) // 10 * 10
    learned = [label for label in labels if (label + ERROR, final) in curves.values]

    def line(label: str, ending: str = "") -> Line:
        style = "--" if label in ("magnitude", "diagonal Fisher") else "-"
        return Line(label + ending, style=style, colour=labels.index(label))

    return [
        Panel("after every stage", [line(label) for label in labels], (low, 100)),
        Panel(
            "error of what FishLeg has learned, on other images",
            [line(label, ERROR) for label in learned],
            axes=ERRORS,
        ),
    ]


def picture(curves: Curves, labels: Sequence[str], final: float) -> Any:
    """The usual picture, and beside it the accuracy at the end over the state."""
    at_end = Curves()
    at_end.values = dict(curves.values)
    shown = []
    for label in labels:
        state = curves.mean(label + STATE, final)
        if state > 0:
            name = f"{label}, {pictures.short(curves.mean(label + SECONDS, final))} s"
            at_end.values[name, round(state, 2)] = curves.values[label, final]
            shown.append(Line(name, style="-", colour=list(labels).index(label)))
    all_panels = [*panels(curves, list(labels), final), Panel("at the end", shown, axes=STATES)]
    return experiment.lines(at_end, all_panels, AXES)
