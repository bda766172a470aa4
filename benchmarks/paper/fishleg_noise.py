"""Learning an inverse against estimating and inverting, from few gradients: `python -m benchmarks.paper.fishleg_noise`.

The layers fc2 and fc3 of MLPNET, one block for each.  Every method gets the first m of the same per-sample gradients
and is judged by F_γ from many others: ‖Q F_γ − I‖_F / √d, with γ a multiple of the mean diagonal of that F.
Blocks "to the end" follow the loss of the gradients that they learn from, "stopped early" that of every eighth, which
is left out; "in mini-batches" they go once through the gradients, 20 at a time, where the rival averages the inverses
of each 20.
The Kronecker factors take ten steps, as `fit` gives up on the fewest gradients.
Writes fishleg_noise.csv, .png and .json.   Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import fastfisher as ff
from benchmarks.paper import data, experiment, stages
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.pictures import Axes, Line, Panel
from fastfisher.fisher.fishleg import FishLegInverse

CLAIM = Claim(
    f"{stages.SURGEON}, noise",
    "An inverse that is learned directly is less sensitive to noise than an estimate that is inverted (asked here: "
    "blocks that stop early are nearer to the inverse of many gradients than WoodFisher's from the same gradients).",
)
NAMES = ["fc2.weight", "fc3.weight"]
BATCH = 20
STEPS = 100
INVERTED, EARLY = "inverted", "FLS blocks, stopped early"
LABELS = (
    INVERTED,
    "inverted in mini-batches, mean",
    EARLY,
    "FLS blocks, to the end",
    "FLS blocks, in mini-batches",
    "FLS kron, 10 steps",
)
AXES = Axes("gradients", "error", "gradients m", "‖Q F_γ − I‖ / √d", 1, logarithmic="xy")


def found(grads: Tensor, layout: ff.BlockLayout, damping: float) -> dict[str, Tensor]:
    """Q of every method, [d, d], from gradients [m, d]."""
    eye, narrow = torch.eye(layout.num_weights, dtype=torch.float64), grads.float()

    def inverted(part: Tensor) -> Tensor:
        made = ff.FisherAccumulator(layout, num_grads=len(part), damping=damping)
        made.add(part)
        return made.finish().mul(eye).double()

    def learned(held_out: Tensor | None) -> Tensor:
        made = FishLegInverse.from_grads(narrow, layout, damping=damping, held_out=held_out, max_steps=STEPS)
        return made.mul(eye).double()

    moving = FishLegInverse.start(layout, damping=damping, horizon=len(grads))
    kron = FishLegInverse.start(layout, damping=damping, parameterization="kron")
    for _ in range(10):
        for form in kron.forms:
            form.step(narrow, damping, 1.0)
    parts = grads.split(BATCH)
    for part in narrow.split(BATCH):
        moving.aux_step(part)
    return dict(
        zip(
            LABELS,
            (
                inverted(grads),
                sum(inverted(part) for part in parts) / len(parts),
                learned(None),
                learned(narrow),
                moving.mul(eye).double(),
                kron.mul(eye).double(),
            ),
            strict=True,
        )
    )


def measure(options: argparse.Namespace, curves: Curves) -> None:
    for seed in range(options.seeds):
        most = max(options.samples)
        model, _, train, _ = data.load("mlpnet", options.data, most + options.reference, seed)
        shapes = [tuple(model.get_parameter(name).shape) for name in NAMES]
        layout = ff.BlockLayout(NAMES, shapes, max(a * b for a, b in shapes))
        started = time.perf_counter()
        grads = experiment.gradients(model, layout, train).double()
        few, many = grads[:most], grads[most:]
        fisher = torch.block_diag(*((g := many[:, a:b]).T @ g / len(many) for a, b in layout.blocks.tolist()))
        eye = torch.eye(len(fisher), dtype=torch.float64)
        curves.spent("gradients", started)
        for relative in options.dampings:
            damping = relative * float(fisher.diagonal().mean())
            for m in options.samples:
                started = time.perf_counter()
                for label, q in found(few[:m], layout, damping).items():
                    error = (q @ (fisher + damping * eye) - eye).norm() / len(eye) ** 0.5
                    curves.add(of(label, relative), m, float(error))
                curves.spent(f"{m:,} gradients", started)
        print(f"seed {seed} done", flush=True)


def of(label: str, relative: float) -> str:
    return f"γ {relative:g}: {label}"


def bars(curves: Curves, options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        experiment.at_most(
            f"γ {relative:g}, {m:,} gradients: error of {EARLY} over {INVERTED}",
            curves.mean(of(EARLY, relative), m) / curves.mean(of(INVERTED, relative), m),
            1.0,
        )
        for relative in options.dampings
        for m in options.samples
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "fishleg_noise",
        __doc__.split("\n")[0],
        (),
        [20, 60, 200, 600, 2_000, 10_000],
        seeds=3,
        damping=None,
    )
    parser.add_argument("--reference", type=int, default=20_000, help="other gradients, which judge")
    parser.add_argument(
        "--dampings", type=float, nargs="+", default=[0.1, 0.001], help="multiples of the mean diagonal"
    )
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    panels = [
        Panel(
            f"γ = {relative:g} of the mean diagonal",
            [Line(of(label, relative), style="-") for label in LABELS],
        )
        for relative in options.dampings
    ]
    experiment.report(
        options,
        curves,
        experiment.lines(curves, panels, AXES),
        bars(curves, options),
        f"Learned and inverted from few gradients: fc2 and fc3 of MLPNET "
        f"({experiment.count(options.seeds, 'network')})",
        CLAIM,
        AXES,
        keys=("samples", "reference", "dampings", "seeds", "name"),
    )


if __name__ == "__main__":
    main()
