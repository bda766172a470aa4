"""K-FAC against the true block of the Fisher, and their inverses: `python -m benchmarks.paper.kfac_blocks`.

For fc3 (200 weights) and fc2 (800) of MLPNET, trained for 25 epochs, the true block is the empirical Fisher of 20,000
training images.  From 500 to 8,000 other images K-FAC takes S = E[g gᵀ], g the gradient in the outputs of the layer,
and A = E[a aᵀ], a its inputs: F ≈ S ⊗ A.  WoodFisher takes the block of the same images as it is, and inverts it by
`fastfisher.FisherInverse`.  Inverses are those of block + λ I.  Errors are in the Frobenius norm, relative to the true
block or inverse.  Seeds differ in network and images; the matrices shown are those of fc3 of the first.
Source: WoodFisher (Singh & Alistarh, 2020), comparison with K-FAC.
Writes kfac_blocks.csv, .png, _matrices.png and .json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfisher as ff
from benchmarks.paper import data, experiment, pictures
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "fig. 3.5 to 3.7",
    "K-FAC misses structure of the Fisher block and of its inverse that WoodFisher has (asked here: from the same "
    "2,000 images WoodFisher's error is the smaller one).",
)
LAYERS = ("fc3", "fc2")
METHODS = ("K-FAC", "WoodFisher")
DAMPINGS = (1e-5, 1e-3, 1e-1)
SHOWN = ("block", "inverse, λ = 0.001")  # as heat maps
KINDS = ("block", *(f"inverse, λ = {damping:g}" for damping in DAMPINGS))
JUDGED = 2_000  # images behind bars and heat maps, or the largest count where this one is not asked for
AXES = Axes("images", "relative_error", "images", "relative error, Frobenius norm", 1, logarithmic="xy")


def inputs_and_slopes(model: nn.Module, layer: str, samples: data.Split) -> tuple[Tensor, Tensor]:
    """Inputs of a Linear layer [m, inputs] and the gradients of every image's loss in its outputs [m, outputs]."""
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _, given, out: kept.extend((given[0], out))
    )
    loss = F.cross_entropy(model(samples.images), samples.labels, reduction="sum")
    hook.remove()
    (slopes,) = torch.autograd.grad(loss, kept[1])
    return kept[0].detach().double(), slopes.double()


def weight_gradients(a: Tensor, g: Tensor) -> Tensor:
    return (g[:, :, None] * a[:, None, :]).flatten(1)  # [m, outputs * inputs]


def matrices(a: Tensor, g: Tensor) -> dict[str, dict[str, Tensor]]:
    """Method -> kind -> its block [n, n], or the inverse of block + λ I."""
    grads, m = weight_gradients(a, g), len(a)
    eye = torch.eye(grads.shape[1], dtype=torch.float64)
    kfac = {"block": torch.kron(g.T @ g / m, a.T @ a / m)}
    ours = {"block": grads.T @ grads / m}
    for kind, damping in zip(KINDS[1:], DAMPINGS, strict=True):
        kfac[kind] = (kfac["block"] + damping * eye).inverse()
        ours[kind] = ff.FisherInverse.from_grads(grads, block_size=None, damping=damping).mul(eye)
    return {"K-FAC": kfac, "WoodFisher": ours}


def measure(options: argparse.Namespace, curves: Curves) -> dict[str, dict[str, Tensor]]:
    """Fill the curves, and return the heat maps of fc3 of the first network."""
    maps: dict[str, dict[str, Tensor]] = {}
    for seed in range(options.seeds):
        most = max(options.samples)
        model, _, train, _ = data.load("mlpnet", options.data, most + options.reference, seed)
        others = data.Split(train.images[most:], train.labels[most:])
        for layer in LAYERS:
            started = time.perf_counter()
            grads = weight_gradients(*inputs_and_slopes(model, layer, others))
            true = {"block": grads.T @ grads / len(grads)}
            eye = torch.eye(grads.shape[1], dtype=torch.float64)
            true |= {
                kind: (true["block"] + λ * eye).inverse() for kind, λ in zip(KINDS[1:], DAMPINGS, strict=True)
            }
            a, g = inputs_and_slopes(model, layer, train)
            for count in options.samples:
                for method, found in matrices(a[:count], g[:count]).items():
                    for kind in KINDS:
                        label = f"{layer}, {kind}: {method}"
                        curves.add(label, count, float((found[kind] - true[kind]).norm() / true[kind].norm()))
                        if (
                            seed == 0
                            and layer == LAYERS[0]
                            and kind in SHOWN
                            and count == judged(options.samples)
                        ):
                            maps.setdefault(kind, {"true": true[kind]})[method] = found[kind]
            curves.spent("matrices", started)
        print(f"seed {seed} done", flush=True)
    return maps


def judged(samples: list[int]) -> int:
    return JUDGED if JUDGED in samples else max(samples)


def bars(curves: Curves, samples: list[int]) -> list[dict]:
    """Errors of WoodFisher over those of K-FAC, from the same images."""
    count = judged(samples)
    return [
        experiment.at_most(
            f"{layer}, {kind}: error of WoodFisher over that of K-FAC, {count:,} images",
            curves.mean(f"{layer}, {kind}: WoodFisher", count)
            / curves.mean(f"{layer}, {kind}: K-FAC", count),
            1.0,
        )
        for layer in LAYERS
        for kind in KINDS
    ]


def main(arguments: list[str] | None = None) -> None:
    full = {"samples": [500, 2_000, 8_000, 32_000], "reference": 28_000}
    parser = experiment.parser(
        "kfac_blocks", __doc__.split("\n")[0], (), [500, 2_000, 8_000], seeds=3, damping=None, full=full
    )
    parser.add_argument("--reference", type=int, default=20_000, help="training images behind the true block")
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    maps = {} if options.render else measure(options, curves)
    panels = [
        Panel(
            kind,
            [
                Line(f"{layer}, {kind}: {method}", style=style, colour=colour)
                for layer, style in zip(LAYERS, ("-", "--"), strict=True)
                for method, colour in zip(METHODS, (2, 3), strict=True)
            ],
        )
        for kind in KINDS
    ]
    networks = experiment.count(options.seeds, "network")

    def picture(path: Path, title: str) -> None:
        pictures.lines(path, curves, panels, AXES, title)
        if maps:
            shown = f"fc3 of MLPNET, one network, {judged(options.samples):,} images: colours up to ± the number below"
            pictures.matrices(path.with_stem(f"{path.stem}_matrices"), maps, shown)

    title = f"K-FAC and WoodFisher against the true Fisher block ({networks})"
    keys = ("samples", "reference", "seeds", "name")
    experiment.report(
        options, curves, picture, bars(curves, options.samples), title, CLAIM, AXES, keys, ("matrices",)
    )


if __name__ == "__main__":
    main()
