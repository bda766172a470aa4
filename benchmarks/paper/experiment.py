"""One-shot pruning of one trained network by many methods over many sparsities, and what every experiment shares: the
claim it tests, its options, the numbers over the seeds, and the files it writes.

`fastfisher.prune` builds its inverse anew for every call; here the same pieces are called one by one, so that one set
of gradients and one inverse serve every sparsity, scope and update.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastfisher as ff
from benchmarks import machine
from benchmarks.paper import pictures
from benchmarks.paper.data import Split, add_argument
from benchmarks.paper.pictures import Axes, Line, Panel
from benchmarks.tables import markdown_table
from fastfisher.fisher.gradients import GradientStream
from fastfisher.fisher.objective import Objective, untouched
from fastfisher.prune import saliency
from fastfisher.prune.select import select
from fastfisher.prune.update import updated, written

RESULTS = Path(__file__).resolve().parent.parent / "results" / "paper"
ACCURACY = Axes()
Place = float | str  # where a value stands on the x axis


@dataclass(frozen=True)
class Claim:
    """figure: of the paper, or what stands in its place.   text: what is said there, in one sentence."""

    figure: str
    text: str


@dataclass
class Curves:
    """Values: (label of the line, place on the x axis) -> one for each seed; dense accuracies under ("dense", 0.0)."""

    values: dict[tuple[str, Place], list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, label: str, place: Place, value: float) -> None:
        self.values.setdefault((label, place), []).append(value)

    def mean(self, label: str, place: Place) -> float:
        values = self.values[label, place]
        return sum(values) / len(values)

    def deviation(self, label: str, place: Place) -> float:
        """Standard deviation over the seeds, 0 for one seed."""
        values = self.values[label, place]
        return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0

    def labels(self) -> list[str]:
        """The lines in the order of their first value, without the dense network."""
        return [label for label in dict.fromkeys(label for label, _ in self.values) if label != "dense"]

    def places(self, lines: Sequence[Line]) -> list[Place]:
        """Where any of these lines has a value: numbers sorted, words as they came."""
        labels = {line.label for line in lines}
        found = list(dict.fromkeys(place for label, place in self.values if label in labels))
        return found if any(isinstance(place, str) for place in found) else sorted(found, key=float)

    def spent(self, phase: str, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def count(number: int, noun: str) -> str:
    """1 seed, 3 seeds, 1,000 samples."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def layout_of(model: nn.Module, names: Sequence[str]) -> ff.BlockLayout:
    """The flat order of the weights to prune."""
    parameters = dict(model.named_parameters())
    return ff.BlockLayout(list(names), [tuple(parameters[name].shape) for name in names], 1)


def weights_of(model: nn.Module, layout: ff.BlockLayout) -> Tensor:
    """The weights of the layout as one vector [d]."""
    parameters = dict(model.named_parameters())
    return layout.flatten({name: parameters[name].detach() for name in layout.names})


def gradients(model: nn.Module, layout: ff.BlockLayout, samples: Split, grad_batch_size: int = 1) -> Tensor:
    """Gradients of the loss, per sample or of means over mini-batches: [m, d] float32."""
    num_grads = len(samples.labels) // grad_batch_size
    grads = torch.empty(num_grads, layout.num_weights, device=samples.images.device)
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


def mask_of(
    weight: Tensor, layout: ff.BlockLayout, finv: ff.FisherInverse | None, line: Line, sparsity: float
) -> Tensor:
    """What a line keeps, bool [d].   weight: [d], for WoodTaylor already w - F⁻¹ ∇L.   finv: None for magnitude."""
    scores = saliency.magnitude(weight) if finv is None else finv.saliency(weight)
    ranges = list(layout.parameter_ranges.values())
    return select(scores, weight == 0, sparsity, scope=line.scope, ranges=ranges)


def pruned(
    weight: Tensor,
    layout: ff.BlockLayout,
    inverses: Mapping[str, ff.FisherInverse],
    line: Line,
    sparsity: float,
) -> Tensor:
    """The weights that a line leaves at one sparsity, [d].

    An inverse that holds the mean gradient is WoodTaylor's: its lines start from w - F⁻¹ ∇L in place of w.
    """
    finv = None if line.fisher is None else inverses[line.fisher]
    if finv is not None and finv.mean is not None:
        weight = weight - saliency.newton_step(finv).to(weight.dtype)
    return updated(weight, mask_of(weight, layout, finv, line, sparsity), finv, line.update)


def accuracy_with(model: nn.Module, layout: ff.BlockLayout, flat: Tensor, test: Split) -> float:
    """Accuracy with the weights of the layout taken from a vector [d]; the model ends as it was."""
    parameters = dict(model.named_parameters())
    targets = {name: parameters[name] for name in layout.names}
    with written(targets, layout.unflatten(flat), keep=False):
        return accuracy(model, test)


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
    weight = weights_of(model, layout)
    for line in lines:
        started = time.perf_counter()
        for sparsity in sparsities:
            new = pruned(weight, layout, inverses, line, sparsity)
            curves.add(line.label, sparsity, accuracy_with(model, layout, new, test))
        curves.spent(line.label, started)


def woodtaylor(grads: Tensor, layout: ff.BlockLayout, damping: float) -> ff.FisherInverse:
    """The inverse of one block over everything that holds the mean gradient, as WoodTaylor needs it."""
    whole = ff.BlockLayout(layout.names, layout.shapes, None)
    accumulator = ff.FisherAccumulator(whole, num_grads=len(grads), damping=damping, mean=True)
    accumulator.add(grads)
    return accumulator.finish()


def parser(
    name: str,
    description: str,
    sparsities: Sequence[float],
    num_samples: int | list[int],
    seeds: int,
    *,
    full: Mapping[str, Any] | None = None,
    damping: float | None = 1e-5,
    grad_batch_size: bool = False,
) -> argparse.ArgumentParser:
    """The options that the experiments have; the defaults are the published settings, or smaller counts where `full`
    names the published ones.   damping: None for experiments that choose their own.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--samples",
        type=int,
        nargs="+" if isinstance(num_samples, list) else None,
        default=num_samples,
        help="training samples behind the Fisher estimate",
    )
    if grad_batch_size:
        made.add_argument("--grad-batch-size", type=int, default=1, help="samples averaged into one gradient")
    if damping is not None:
        made.add_argument("--damping", type=float, default=damping)
    made.add_argument("--seeds", type=int, default=seeds)
    if sparsities:
        made.add_argument("--sparsities", type=float, nargs="+", default=list(sparsities))
    made.add_argument("--name", default=name, help="of the result files")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    made.add_argument(
        "--render", action="store_true", help="measure nothing: judge and draw the numbers that are stored"
    )
    if full:
        made.add_argument("--full", action="store_true", help="the paper's counts; writes <name>_full")
    made.set_defaults(published=dict(full or {}))
    add_argument(made)
    return made


def read(made: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, and under `defaults` what they are where nothing is said.   --full puts the paper's counts in."""
    options = made.parse_args(arguments)
    options.defaults = {key: made.get_default(key) for key in vars(options)}
    if getattr(options, "full", False):
        options.defaults |= options.published | {"name": f"{made.get_default('name')}_full"}
        for key, value in options.defaults.items():
            if key in {*options.published, "name"} and getattr(options, key) == made.get_default(key):
                setattr(options, key, value)
    return options


def fill(options: argparse.Namespace, script: str, **own: Any) -> None:
    """Put in what an experiment sets for its network where the user says nothing.   script: words of the command."""
    suffix = "_full" if getattr(options, "full", False) else ""
    own["name"] = script.replace(" ", "_") + suffix
    for key, value in own.items():
        if getattr(options, key) == options.defaults[key]:
            setattr(options, key, value)
    options.defaults |= own | {"script": script, "network": options.network}


def start(options: argparse.Namespace, axes: Axes = ACCURACY) -> Curves:
    """Empty curves; with --render the stored ones, and the options as they were.   Notes the commit that measures."""
    options.commit = machine.commit()
    if not options.render:
        return Curves()
    record = json.loads((options.out / f"{options.name}.json").read_text())
    for key, value in record["settings"].items():
        setattr(options, key, value)
    return read_csv(options.out / f"{options.name}.csv", axes)


def place(text: str) -> Place:
    try:
        return float(text)
    except ValueError:
        return text


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


def verdict(bars: Sequence[Mapping[str, Any]]) -> str:
    """Whether a claim held: yes, or NO and how much of it did."""
    passed = sum(bar["passed"] for bar in bars)
    if not bars:
        return "nothing to judge"
    return "yes" if passed == len(bars) else f"NO, {passed} of {len(bars)} bars cleared"


def bar_table(bars: Sequence[Mapping[str, Any]]) -> str:
    rows = [[b["what"], b["bar"], f"{b['measured']:.2f}", "yes" if b["passed"] else "NO"] for b in bars]
    return markdown_table(["bar", "asked", "measured", "cleared"], rows)


def table(curves: Curves, axes: Axes = ACCURACY) -> str:
    """Mean and deviation for every line and place, as markdown; words on the x axis make the rows."""
    labels = curves.labels()
    places = curves.places([Line(label) for label in labels])
    digits, fewer = (".1f", ".1f") if axes.y.endswith("percent") else (".3g", ".2g")

    def cell(label: str, place: Place) -> str:
        if (label, place) not in curves.values:
            return "–"
        mean, deviation = curves.mean(label, place), curves.deviation(label, place)
        several = len(curves.values[label, place]) > 1
        return f"{mean:{digits}} ± {deviation:{fewer}}" if several else f"{mean:{digits}}"

    names = [_name(place, axes) for place in places]
    if any(isinstance(place, str) for place in places):
        rows = [[name, *(cell(label, p) for label in labels)] for name, p in zip(names, places, strict=True)]
        return markdown_table([axes.x.replace("_", " "), *labels], rows)
    return markdown_table(
        ["method", *names], [[label, *(cell(label, p) for p in places)] for label in labels]
    )


def _name(place: Place, axes: Axes) -> str:
    """How a column is headed: 80%, 2,000, 0.001, or the word itself."""
    if isinstance(place, str):
        return place
    return f"{100 * place:.3g}%" if axes.x == "sparsity" else pictures.short(place)


def write_csv(path: Path, curves: Curves, axes: Axes) -> None:
    digits = ".2f" if axes.y.endswith("percent") else ".5g"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", axes.x, "seed", axes.y])
        for (label, place), values in curves.values.items():
            writer.writerows([label, place, seed, f"{value:{digits}}"] for seed, value in enumerate(values))


def read_csv(path: Path, axes: Axes) -> Curves:
    """What `write_csv` wrote; seconds are not in it."""
    curves = Curves()
    with path.open() as file:
        for row in csv.DictReader(file):
            curves.add(row["method"], place(row[axes.x]), float(row[axes.y]))
    return curves


def _command(options: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    changed = [
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for key, value in settings.items()
        if value != options.defaults[key]
    ]
    if getattr(options, "full", False):
        changed.insert(0, "--full")
    script = options.defaults.get("script", options.defaults["name"].removesuffix("_full"))
    return " ".join([f"python -m benchmarks.paper.{script}", *changed])


def _record(target: Path, curves: Curves, options: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """Machine, command, settings and seconds; with --render those of the stored run."""
    if options.render:
        record: dict[str, Any] = json.loads(target.with_suffix(".json").read_text())
        return record
    settings = {key: getattr(options, key) for key in keys}
    record = {
        "command": _command(options, settings),
        "date": datetime.date.today().isoformat(),
        "commit": options.commit,
        "machine": machine.describe(),
        "settings": settings,
        "seconds": {phase: round(spent, 1) for phase, spent in curves.seconds.items()},
    }
    if ("dense", 0.0) in curves.values:
        record["dense"] = curves.values["dense", 0.0]
    return record


def report(
    options: argparse.Namespace,
    curves: Curves,
    picture: Callable[[Path, str], None],
    bars: Sequence[dict[str, Any]],
    title: str,
    claim: Claim,
    axes: Axes = ACCURACY,
    keys: Sequence[str] = ("samples", "damping", "seeds", "sparsities", "name"),
    more: Sequence[str] = (),
) -> None:
    """Print the table, the bars and the verdict, and write <out>/<name>.csv, .png and .json with the options `keys`.

    picture: draws the file of this path under this title.   more: what ends the names of other pictures it draws.
    """
    target = options.out / options.name
    if ("dense", 0.0) in curves.values:
        print(f"dense: {curves.mean('dense', 0.0):.2f} ± {curves.deviation('dense', 0.0):.2f}\n")
    print(table(curves, axes), "\n")
    print(bar_table(bars) if bars else "no bar at these sparsities")
    print(f"\n{claim.figure}: {claim.text}\nHeld: {verdict(bars)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        write_csv(target.with_suffix(".csv"), curves, axes)
    record = _record(target, curves, options, keys)
    record |= {
        "figure": claim.figure,
        "title": title,
        "claim": claim.text,
        "held": verdict(bars),
        "bars": list(bars),
        "pictures": [f"{options.name}.png", *(f"{options.name}_{suffix}.png" for suffix in more)],
        "axes": {"x": axes.x, "y": axes.y, "y_label": axes.y_label},
    }
    picture(target.with_suffix(".png"), title)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten: {target}.csv, .png, .json")


def lines(curves: Curves, panels: Sequence[Panel], axes: Axes = ACCURACY) -> Callable[[Path, str], None]:
    """The usual picture for `report`."""
    return lambda path, title: pictures.lines(path, curves, panels, axes, title)
