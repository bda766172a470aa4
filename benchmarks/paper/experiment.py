"""One-shot pruning of one trained network by many methods over many sparsities, and the table and picture of it.

`fastfisher.prune` builds its inverse anew for every call; here the same pieces are called one by one, so that one set
of gradients and one inverse serve every sparsity, scope and update.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

import fastfisher as ff
from benchmarks import machine
from benchmarks.paper.data import Split
from benchmarks.tables import markdown_table
from fastfisher.fisher.gradients import GradientStream, Objective, untouched
from fastfisher.prune import saliency
from fastfisher.prune.select import select

RESULTS = Path(__file__).resolve().parent.parent / "results" / "paper"


@dataclass(frozen=True)
class Line:
    """One line of the picture.   fisher: the inverse that ranks and corrects the weights, None for magnitude."""

    label: str
    scope: str
    fisher: str | None = None
    update: str | None = None


@dataclass(frozen=True)
class Panel:
    """One part of the picture.   lines: coloured by their place.   range: of accuracy shown; None for all of it."""

    title: str
    lines: Sequence[Line]
    range: tuple[float, float] | None = None


@dataclass
class Curves:
    """Accuracies in percent: (label of the line, sparsity) -> one for each seed; sparsity 0 under "dense"."""

    accuracy: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def mean(self, label: str, sparsity: float) -> float:
        values = self.accuracy[label, sparsity]
        return sum(values) / len(values)

    def deviation(self, label: str, sparsity: float) -> float:
        """Standard deviation over the seeds, 0 for one seed."""
        values = self.accuracy[label, sparsity]
        return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0

    def spent(self, phase: str, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def layout_of(model: nn.Module, names: Sequence[str]) -> ff.BlockLayout:
    """The flat order of the weights to prune."""
    parameters = dict(model.named_parameters())
    return ff.BlockLayout(list(names), [tuple(parameters[name].shape) for name in names], 1)


def gradients(model: nn.Module, layout: ff.BlockLayout, samples: Split, grad_batch_size: int = 1) -> Tensor:
    """Gradients of the loss, per sample or of means over mini-batches: [m, d] float32."""
    num_grads = len(samples.labels) // grad_batch_size
    grads = torch.empty(num_grads, layout.num_weights)
    filled = 0
    with untouched(model, seed=0):
        objective = Objective(model, list(layout.parameter_ranges), grad_batch_size=grad_batch_size)
        batches = list(zip(samples.images.split(100), samples.labels.split(100), strict=True))
        for piece in GradientStream(objective, batches, layout, num_grads=num_grads):
            grads[filled : filled + len(piece)] = piece
            filled += len(piece)
    return grads


@torch.inference_mode()
def accuracy(model: nn.Module, test: Split) -> float:
    """Percent of right answers."""
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
    )
    return 100 * right / len(test.labels)


def prune_all(
    curves: Curves,
    model: nn.Module,
    layout: ff.BlockLayout,
    inverses: Mapping[str, ff.FisherInverse],
    lines: Sequence[Line],
    sparsities: Sequence[float],
    test: Split,
) -> None:
    """Add one seed's accuracies for every line and sparsity; the model ends as it was."""
    parameters = {name: dict(model.named_parameters())[name] for name in layout.parameter_ranges}
    weight = layout.flatten({name: p.detach() for name, p in parameters.items()})  # [d]
    ranges = list(layout.parameter_ranges.values())

    def write(flat: Tensor) -> None:
        with torch.no_grad():
            for name, values in layout.unflatten(flat).items():
                parameters[name].copy_(values)

    scores: dict[str | None, Tensor] = {None: saliency.magnitude(weight)}
    scores.update({name: finv.saliency(weight) for name, finv in inverses.items()})
    for line in lines:
        started = time.perf_counter()
        for sparsity in sparsities:
            mask = select(scores[line.fisher], weight == 0, sparsity, scope=line.scope, ranges=ranges)
            if line.update is None or line.fisher is None:
                new = torch.where(mask, weight, 0)
            else:
                new = inverses[line.fisher].prune_update(weight, mask, update=line.update)
            write(new)
            curves.accuracy.setdefault((line.label, sparsity), []).append(accuracy(model, test))
        curves.spent(line.label, started)
    write(weight)


def parser(
    name: str, description: str, sparsities: Sequence[float], num_samples: int, seeds: int
) -> argparse.ArgumentParser:
    """The options that both experiments have; the defaults are the published settings."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--samples", type=int, default=num_samples, help="training samples behind the Fisher estimate"
    )
    made.add_argument("--grad-batch-size", type=int, default=1, help="samples averaged into one gradient")
    made.add_argument("--damping", type=float, default=1e-5)
    made.add_argument("--seeds", type=int, default=seeds)
    made.add_argument("--sparsities", type=float, nargs="+", default=list(sparsities))
    made.add_argument("--name", default=name, help="of the result files")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return made


def at_least(what: str, measured: float, bar: float) -> dict[str, Any]:
    return {
        "what": what,
        "bar": f">= {bar:g}",
        "measured": round(measured, 2),
        "passed": bool(measured >= bar),
    }


def at_most(what: str, measured: float, bar: float) -> dict[str, Any]:
    return {
        "what": what,
        "bar": f"<= {bar:g}",
        "measured": round(measured, 2),
        "passed": bool(measured <= bar),
    }


def table(curves: Curves, lines: Sequence[Line], sparsities: Sequence[float]) -> str:
    """Mean and deviation for every line and sparsity, as markdown."""
    rows = [
        [
            line.label,
            *(
                f"{curves.mean(line.label, s):.1f} ± {curves.deviation(line.label, s):.1f}"
                for s in sparsities
            ),
        ]
        for line in lines
    ]
    return markdown_table(["method", *(f"{s:.0%}" for s in sparsities)], rows)


def write_csv(path: Path, curves: Curves) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "sparsity", "seed", "test_accuracy_percent"])
        for (label, sparsity), values in curves.accuracy.items():
            writer.writerows([label, sparsity, seed, f"{value:.2f}"] for seed, value in enumerate(values))


COLOURS = ("#4b5563", "#e08e1b", "#d1495b", "#1f77b4", "#2a9d6f", "#7b4fa3", "#9aa0a6", "#8c5a3c")


def draw(
    path: Path, curves: Curves, panels: Sequence[Panel], sparsities: Sequence[float], title: str
) -> None:
    """Test accuracy over sparsity, a line for each method; bands are one standard deviation over the seeds.

    Magnitude is dashed, per-layer pruning dash-dotted, global pruning solid.
    """
    mpl.use("Agg")
    from matplotlib import pyplot

    size = (6.3 * len(panels) + 0.4, 5.0)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    x = [100 * s for s in sparsities]
    dense = curves.mean("dense", 0.0)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.axhline(dense, color="black", linewidth=1, linestyle=":", label=f"dense, {dense:.1f} %")
        for line, colour in zip(panel.lines, COLOURS, strict=False):
            mean = torch.tensor([curves.mean(line.label, s) for s in sparsities])
            band = torch.tensor([curves.deviation(line.label, s) for s in sparsities])
            style, marker = ("-.", "^") if line.scope == "layer" else ("-", "o")
            if line.fisher is None:
                style = "--"
            axis.plot(x, mean, style, marker=marker, markersize=4, color=colour, label=line.label)
            axis.fill_between(x, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("sparsity, %")
        axis.set_xticks(x, [f"{value:.3g}" for value in x], fontsize=8)
        axis.set_ylim(panel.range)
        axis.grid(alpha=0.25)
        axis.set_title(panel.title, fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.legend(fontsize=8, loc="lower left", framealpha=0.9)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_record(
    path: Path,
    curves: Curves,
    bars: Sequence[dict[str, Any]],
    options: argparse.Namespace,
    keys: Sequence[str],
) -> None:
    """Machine, command, settings, seconds and bars beside the table.   keys: the options that make up the settings."""
    settings = {key: getattr(options, key) for key in keys}
    changed = [
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
        if value != options.defaults[key]
    ]
    record = {
        "command": " ".join([f"python -m benchmarks.paper.{options.defaults['name']}", *changed]),
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "settings": settings,
        "seconds": {phase: round(spent, 1) for phase, spent in curves.seconds.items()},
        "dense": curves.accuracy["dense", 0.0],
        "bars": list(bars),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def report(
    options: argparse.Namespace,
    curves: Curves,
    panels: Sequence[Panel],
    bars: Sequence[dict[str, Any]],
    title: str,
    keys: Sequence[str] = ("samples", "grad_batch_size", "damping", "seeds", "sparsities", "name"),
) -> None:
    """Print the table and the bars, and write <out>/<name>.csv, .png and .json with the options `keys`."""
    target = options.out / options.name
    lines = list({line.label: line for panel in panels for line in panel.lines}.values())
    print(f"dense: {curves.mean('dense', 0.0):.2f} ± {curves.deviation('dense', 0.0):.2f}\n")
    print(table(curves, lines, options.sparsities), "\n")
    verdicts = [[b["what"], b["bar"], f"{b['measured']:.2f}", "yes" if b["passed"] else "NO"] for b in bars]
    print(
        markdown_table(["bar", "asked", "measured", "cleared"], verdicts)
        if bars
        else "no bar at these sparsities"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(target.with_suffix(".csv"), curves)
    draw(target.with_suffix(".png"), curves, panels, options.sparsities, title)
    write_record(target.with_suffix(".json"), curves, bars, options, keys)
    print(f"\nwritten: {target}.csv, .png, .json")
