"""The pictures of the published experiments: lines over a number or a word, bars, and matrices as heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.paper.experiment import Curves

COLOURS = ("#4b5563", "#e08e1b", "#d1495b", "#1f77b4", "#2a9d6f", "#7b4fa3", "#9aa0a6", "#8c5a3c")

FEW = 6  # groups of bars that have room for the value of each
MANY = 4  # bars in a group, of which that is true


@dataclass(frozen=True)
class Line:
    """One line of the picture.   fisher: the inverse that ranks and corrects the weights, None for magnitude.

    style, colour: of the line; by default the style tells magnitude (dashed), pruning per layer (dash-dotted) and
    global pruning (solid), and the colour is that of its place in the panel.
    """

    label: str
    scope: str = "global"
    fisher: str | None = None
    update: str | None = None
    style: str | None = None
    colour: int | None = None


@dataclass(frozen=True)
class Axes:
    """What the numbers are.   x, y: their names in the CSV file.   scale: of x in the picture; words have none."""

    x: str = "sparsity"
    y: str = "test_accuracy_percent"
    x_label: str = "sparsity, %"
    y_label: str = "test accuracy, %"
    scale: float = 100
    logarithmic: str = ""  # "x", "y" or "xy"
    legend: str = "best"


@dataclass(frozen=True)
class Panel:
    """One part of the picture.   lines: coloured by their place.   range: of values shown; None for all of it.

    axes: its own, where they are not those of the picture.
    """

    title: str
    lines: Sequence[Line]
    range: tuple[float, float] | None = None
    axes: Axes | None = None


def short(number: float) -> str:
    """2,000, 12.5, 0.001."""
    return f"{number:,.0f}" if number >= 1_000 else f"{number:.3g}"


@contextmanager
def _figure(path: Path, rows: int, columns: int, size: tuple[float, float], title: str) -> Iterator[Any]:
    """The grid of axes of a new figure, which is saved in the end."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(textwrap.fill(title, int(11 * size[0])), fontsize=12)
    yield axes
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _above(axis: Any, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=8)


def _bare(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def lines(path: Path, curves: Curves, panels: Sequence[Panel], axes: Axes, title: str) -> None:
    """Values over x, a line for each method; bands are one standard deviation over the seeds."""
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    with _figure(path, rows, columns, (6.3 * columns + 0.4, 4.8 * rows + 0.2), title) as grid:
        for axis, panel in zip(grid.flat, panels, strict=True):
            draw_panel(axis, curves, panel, panel.axes or axes)
            if panel.axes:
                axis.set_ylabel(panel.axes.y_label)
        for row, panel in zip(grid, panels[::columns], strict=True):
            row[0].set_ylabel((panel.axes or axes).y_label)


def _apart(ticks: Sequence[float], logarithmic: bool) -> list[str]:
    """Numbers for the ticks, none where the next one that has a number is too near."""
    places = np.log(ticks) if logarithmic else np.array(ticks)
    labels, last = [""] * len(ticks), np.inf
    for i in reversed(range(len(ticks))):
        if last - places[i] >= 0.05 * (places[-1] - places[0]):
            labels[i], last = short(ticks[i]), places[i]
    return labels


def draw_panel(axis: Any, curves: Curves, panel: Panel, axes: Axes) -> None:
    if ("dense", 0.0) in curves.values and "accuracy" in axes.y_label:
        dense = curves.mean("dense", 0.0)
        axis.axhline(dense, color="black", linewidth=1, linestyle=":", label=f"dense, {dense:.1f} %")
    places = curves.places(panel.lines)
    words = any(isinstance(place, str) for place in places)
    ticks = list(range(len(places))) if words else [axes.scale * float(place) for place in places]
    for index, line in enumerate(panel.lines):
        known = [i for i, place in enumerate(places) if (line.label, place) in curves.values]
        x = [ticks[i] for i in known]
        mean = np.array([curves.mean(line.label, places[i]) for i in known])
        band = np.array([curves.deviation(line.label, places[i]) for i in known])
        style = line.style or ("--" if line.fisher is None else "-." if line.scope == "layer" else "-")
        number = index if line.colour is None else line.colour
        colour = COLOURS[number % len(COLOURS)]
        marker = "^" if line.scope == "layer" else "o" if number < len(COLOURS) else "s"
        axis.plot(x, mean, style, marker=marker, markersize=4, color=colour, label=line.label)
        axis.fill_between(x, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
    if "x" in axes.logarithmic:
        axis.set_xscale("log")
    if "y" in axes.logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
    labels = [str(place) for place in places] if words else _apart(ticks, "x" in axes.logarithmic)
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel(axes.x_label)
    axis.set_ylim(panel.range)
    axis.grid(alpha=0.25)
    axis.set_title(panel.title, fontsize=10)
    _bare(axis)
    axis.legend(fontsize=8, loc=axes.legend, framealpha=0.9)


def bars(path: Path, curves: Curves, panels: Sequence[Panel], axes: Axes, title: str) -> None:
    """Values as groups of bars, one group for each word on the x axis; whiskers are one standard deviation.

    Above a few bars stand their values; above many groups, what the last line of each is more than the first.
    """
    places = curves.places([line for panel in panels for line in panel.lines])
    size = (max(6.3, 0.7 * len(places) + 1) * len(panels), 5.0)
    with _figure(path, 1, len(panels), size, title) as grid:
        for axis, panel in zip(grid[0], panels, strict=True):
            places = curves.places(panel.lines)
            width = 0.8 / len(panel.lines)
            for i, line in enumerate(panel.lines):
                middle = [at + (i - (len(panel.lines) - 1) / 2) * width for at in range(len(places))]
                mean = [curves.mean(line.label, place) for place in places]
                band = [curves.deviation(line.label, place) for place in places]
                colour = COLOURS[i if line.colour is None else line.colour]
                axis.bar(middle, mean, width, yerr=band, color=colour, label=line.label, capsize=2)
                if len(places) <= FEW and len(panel.lines) <= MANY:
                    for at, value, deviation in zip(middle, mean, band, strict=True):
                        _above(axis, at, value + deviation, f"{value:.1f}")
            if len(places) > FEW:
                for at, place in enumerate(places):
                    first, *_, last = (curves.mean(line.label, place) for line in panel.lines)
                    _above(axis, at, max(first, last), f"{last - first:+.1f}")
            turned = {"rotation": 40, "ha": "right"} if len(places) > FEW else {}
            axis.set_xticks(range(len(places)), [str(place) for place in places], fontsize=8, **turned)
            axis.set_ylim(panel.range)
            axis.margins(x=0.01)
            axis.grid(alpha=0.25, axis="y")
            axis.set_axisbelow(True)
            axis.set_title(panel.title, fontsize=10, loc="left")
            _bare(axis)
            # Above or below the bars, where nothing is covered.
            above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(panel.lines)}
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": 2}
            axis.legend(fontsize=8, frameon=False, **(above if len(panel.lines) <= MANY else below))
        grid[0][0].set_ylabel(axes.y_label)


def matrices(path: Path, rows: Mapping[str, Mapping[str, Tensor]], title: str) -> None:
    """Heat maps: row -> column -> matrix.   Colours run over ± the 99.5th percentile of |entries| of each matrix."""
    columns = max(len(row) for row in rows.values())
    with _figure(path, len(rows), columns, (2.3 * columns + 0.6, 2.3 * len(rows) + 0.7), title) as grid:
        for i, (axes, (name, row)) in enumerate(zip(grid, rows.items(), strict=True)):
            for axis, (column, matrix) in zip(axes, row.items(), strict=True):
                limit = float(matrix.double().abs().flatten().quantile(0.995)) or 1.0
                axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_xlabel(f"± {limit:.1e}", fontsize=7, labelpad=2)
                if i == 0 or list(row) != list(next(iter(rows.values()))):
                    axis.set_title(column, fontsize=9)
            axes[0].set_ylabel(name, fontsize=9)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the bytes
