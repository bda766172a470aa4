"""A character-level transformer pruned by one call, no training after: `python -m benchmarks.paper.char_transformer`.

Four layers of width 64 with tied embeddings are trained to predict the next character of Shakespeare's plays, 64 of
them at a time, or read by --checkpoint.  Every method then prunes a copy by one call of `ff.prune` with the defaults of
the package, which prune all linear layers and, since it is the output layer too, the embedding; a sample of the Fisher
is a sequence.  The last tenth of the text is held out from all of it and judges.  Seeds differ in the sequences drawn
for the estimates.
Writes char_transformer.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Claim, Curves
from benchmarks.paper.networks import CharTransformer
from benchmarks.paper.pictures import Axes, Line, Panel

CLAIM = Claim(
    "beyond the papers",
    "Asked for here: WoodFisher with the defaults of the package beats magnitude pruning, the better one of global and "
    "per layer, on a transformer at every sparsity.",
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
# label -> what ff.prune is told
METHODS: dict[str, dict[str, Any]] = {
    "magnitude, global": {"method": "magnitude"},
    "magnitude, per layer": {"method": "magnitude", "scope": "layer"},
    "WoodFisher": {"method": "woodfisher"},
    "WoodTaylor": {"method": "woodtaylor"},
    "FishLeg": {"method": "fishleg"},
}
OURS, RIVALS = "WoodFisher", ("magnitude, global", "magnitude, per layer")
BITS = ", bits"  # ends the label of a line that tells bits per character
AXES = Axes("sparsity", "value", "sparsity, %", "accuracy of the next character, %")
BITS_AXES = Axes("sparsity", "value", "sparsity, %", "bits per character")
BATCH = 64  # sequences, of training and of what is handed to ff.prune


def trained(options: argparse.Namespace, text: data.Text) -> nn.Module:
    """The network, by AdamW with a rate that rises for a twentieth of the steps and falls to zero along a cosine."""
    torch.manual_seed(0)
    model = CharTransformer(len(text.characters), options.context, options.width, options.layers)
    path: Path | None = options.checkpoint
    if path is not None and path.exists():
        load_model(model, path)
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm = max(1, options.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / options.steps)),
    )
    draws = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        x, y = data.sequences(text.train, options.context, BATCH, draws)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits per character", flush=True)
    if path is not None:
        save_model(model, str(path))
    return model.eval()


@torch.inference_mode()
def scores(model: nn.Module, held_out: Tensor, context: int) -> tuple[float, float]:
    """Percent of the characters that are the most likely one, and bits per character.

    held_out: characters [n], read in windows side by side.
    """
    count = (len(held_out) - 1) // context
    x = held_out[: count * context].view(count, context)
    y = held_out[1 : count * context + 1].view(count, context)
    right, nats = 0, 0.0
    for inputs, labels in zip(x.split(256), y.split(256), strict=True):
        logits = model(inputs)
        right += int((logits.argmax(1) == labels).sum())
        nats += float(F.cross_entropy(logits, labels, reduction="sum"))
    return 100 * right / y.numel(), nats / math.log(2) / y.numel()


def measure(options: argparse.Namespace, curves: Curves) -> None:
    text = data.shakespeare(options.data)
    started = time.perf_counter()
    dense = trained(options, text)
    curves.spent("training", started)
    accuracy, bits = scores(dense, text.held_out, options.context)
    print(f"dense: {accuracy:.2f} %, {bits:.3f} bits per character", flush=True)
    for seed in range(options.seeds):
        draws = torch.Generator().manual_seed(1 + seed)  # not those of the training
        x, y = data.sequences(text.train, options.context, options.samples, draws)
        loader = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        curves.add("dense", 0.0, accuracy)
        for sparsity in options.sparsities:
            curves.add("dense" + BITS, sparsity, bits)
            for label, told in METHODS.items():
                started = time.perf_counter()
                model = copy.deepcopy(dense)
                ff.prune(model, loader, sparsity=sparsity, seed=seed, **told)
                curves.spent(label, started)
                found = scores(model, text.held_out, options.context)
                curves.add(label, sparsity, found[0])
                curves.add(label + BITS, sparsity, found[1])
                print(
                    f"seed {seed}, {sparsity:.0%}, {label}: {found[0]:.2f} %, {found[1]:.3f} bits", flush=True
                )


def bars(curves: Curves, sparsities: list[float]) -> list[dict[str, Any]]:
    """Points above, and bits below, what is best of magnitude."""
    found = []
    for s in sparsities:
        ahead = curves.mean(OURS, s) - max(curves.mean(label, s) for label in RIVALS)
        found.append(experiment.at_least(f"{s:.0%}: points of {OURS} above magnitude", ahead, 0.0))
        saved = min(curves.mean(label + BITS, s) for label in RIVALS) - curves.mean(OURS + BITS, s)
        found.append(experiment.at_least(f"{s:.0%}: bits of {OURS} below magnitude", saved, 0.0))
    return found


def panels() -> list[Panel]:
    def line(i: int, label: str, ending: str) -> Line:
        told = METHODS[label]
        fisher = None if told["method"] == "magnitude" else label
        return Line(
            label + ending, told.get("scope", "global"), fisher, style=None if fisher else "--", colour=i
        )

    accuracy, bits = ([line(i, label, ending) for i, label in enumerate(METHODS)] for ending in ("", BITS))
    dense = Line("dense" + BITS, style=":", colour=0)
    return [
        Panel("accuracy", accuracy, (0, 60)),
        Panel("cross entropy", [dense, *bits], axes=BITS_AXES),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser(
        "char_transformer", __doc__.split("\n")[0], SPARSITIES, 4_096, seeds=3, damping=None
    )
    parser.add_argument("--steps", type=int, default=2_500, help=f"of training, {BATCH} sequences each")
    parser.add_argument("--context", type=int, default=64, help="characters in a sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--checkpoint", type=Path, help="read in place of training, written where it is absent"
    )
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, AXES)
    if not options.render:
        measure(options, curves)
    title = (
        f"A character-level transformer on Shakespeare, one call without retraining "
        f"({experiment.count(options.seeds, 'draw')} of {options.samples:,} sequences)"
    )
    keys = ("samples", "steps", "context", "width", "layers", "seeds", "sparsities", "name")
    picture = experiment.lines(curves, panels(), AXES)
    experiment.report(options, curves, picture, bars(curves, options.sparsities), title, CLAIM, AXES, keys)


if __name__ == "__main__":
    main()
