"""Runs -> one page that needs nothing else: no network, no script, pictures as SVG, light or dark as the reader has it.

A run is a folder of Report.save (one call of prune), or the log of a gradual one (`ff.Pruner(log=...)`).  Curves of all
runs lie in one picture where their times have the same unit; what needs a place of its own stands side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fastfisher import runlog
from fastfisher.errors import FastFisherError
from fastfisher.report import Report, named_scores

MOST_RUNS = 8  # colours that can be told from each other, also by the colour-blind
# Of a picture in its own units, which are pixels on a phone.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM, PAD = 46, 6, 12, 34, 6

Point = tuple[float, float]


@dataclass
class Run:
    """What the page tells of a run.

    unit: of times: "epoch", "step", or "recomputation" inside one call.   sparsity: share of zeros over time.
    before, after: mean loss before and after each pruning.   scores: by name, over time; none of a single call.
    """

    name: str
    unit: str
    reports: list[Report]
    times: list[float]
    sparsity: list[Point]
    before: list[Point]
    after: list[Point]
    scores: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def last(self) -> Report:
        return self.reports[-1]

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase, over all prunings."""
        total: dict[str, float] = {}
        for report in self.reports:
            for phase, seconds in report.seconds.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in folders and files: every report.json, and every log *.jsonl.

    Raises FastFisherError where a path holds none, or all of them hold more than can be told apart.
    """
    runs: list[Run] = []
    for path in map(Path, paths):
        logs = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.suffix == ".jsonl" else []
        # a folder without any is refused by Report.load
        if not logs or (path / "report.json").is_file():
            runs.append(_of_call(path))
        for log in logs:
            runs.append(_of_log(log, path.name if path.is_dir() and len(logs) == 1 else log.stem))
    if len(runs) > MOST_RUNS:
        raise FastFisherError(f"a page shows at most {MOST_RUNS} runs; got {len(runs)}")
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({i + 1})"
    return runs


def _of_call(path: Path) -> Run:
    report = Report.load(path)
    start = report.zeros_before / report.num_weights
    times = [float(i) for i in range(len(report.steps) + 1)] if report.steps else [0.0, 1.0]
    shares = [start, *(step.sparsity for step in report.steps[:-1]), report.num_zeros / report.num_weights]
    before = [(float(i), step.loss_before) for i, step in enumerate(report.steps, 1)]
    after = [] if report.loss_pruned is None else [(times[-1], report.loss_pruned)]
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    return Run(
        name, "recomputation", [report], times[-1:], list(zip(times, shares, strict=True)), before, after
    )


def _of_log(path: Path, name: str) -> Run:
    log = runlog.read(path)
    if not log.steps:
        raise FastFisherError(f"{str(path)!r} tells of no pruning yet")
    reports = [report for _, report in log.steps]
    times = [when for when, _ in log.steps]
    first = reports[0].zeros_before / reports[0].num_weights
    begin = min([times[0], *(when for when, _ in log.scores)])
    end = max([times[-1], *(when for when, _ in log.scores)])
    shares = [r.num_zeros / r.num_weights for r in reports]
    scores: dict[str, list[Point]] = {}
    for when, found in log.scores:
        for key, value in found.items():
            scores.setdefault(key, []).append((when, value))
    return Run(
        name,
        log.unit,
        reports,
        times,
        [(begin, first), *zip(times, shares, strict=True), (end, shares[-1])],
        [(t, r.loss_dense) for t, r in zip(times, reports, strict=True) if r.loss_dense is not None],
        [(t, r.loss_pruned) for t, r in zip(times, reports, strict=True) if r.loss_pruned is not None],
        scores,
    )


def number(value: object) -> str:
    """Four digits, and no more than it takes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Some `count` round numbers from at most `low` to at least `high`; whole: no fractions."""
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.9)
    if whole:
        step = math.ceil(step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Plot:
    """Axes over the range of some points, and what is drawn between them."""

    def __init__(
        self, title: str, points: Iterable[Point], unit: str, *, percent: bool = False, zero: bool = False
    ) -> None:
        finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
        xs, ys = [x for x, _ in finite] or [0.0], [y for _, y in finite] or [0.0]
        low, high = (0.0, 1.0) if percent else (min([*ys, *([0.0] if zero else [])]), max(ys))
        self.y_ticks = ticks(low, high if high > low else low + (abs(low) or 1.0))
        self.left, self.right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        self.whole = all(x == int(x) for x in xs)
        self.title, self.unit, self.percent = title, unit, percent
        self.radius = 3.5 if len(set(xs)) <= 16 else 2.2
        self.parts: list[str] = []

    def x(self, x: float) -> float:
        return LEFT + PAD + (x - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT - 2 * PAD)

    def y(self, y: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[Point], color: int, *, stairs: bool = False, kind: str = "line") -> None:
        """A curve with a gap wherever a value is not finite; stairs: a value holds until the next."""
        path, height = "", None
        for x, y in points:
            if not math.isfinite(y):
                height = None
                continue
            if height is None:
                path += f"M{self.x(x):.1f} {self.y(y):.1f}"
            else:
                path += (f"H{self.x(x):.1f}" if stairs else "") + f"L{self.x(x):.1f} {self.y(y):.1f}"
            height = y
        self.parts.append(f'<path class="{kind}" style="stroke:var(--run{color})" d="{path}"/>')

    def dot(self, point: Point, color: int, says: str, *, hollow: bool = False) -> None:
        if math.isfinite(point[1]):
            ink = f"var(--run{color})"
            self.parts.append(
                f'<circle cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="{self.radius}" class="dot" '
                f'style="stroke:{ink};fill:{"var(--page)" if hollow else ink}">'
                f"<title>{escape(says)}</title></circle>"
            )

    def __str__(self) -> str:
        axes = []
        for y in self.y_ticks:
            at, text = self.y(y), f"{100 * y:g} %" if self.percent else f"{y:g}"
            axes.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            axes.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" class="end">{text}</text>')
        for x in ticks(self.left, self.right, 6, whole=self.whole):
            if self.left <= x <= self.right:
                axes.append(f'<text x="{self.x(x):.1f}" y="{HEIGHT - 18}" class="mid">{x:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        axes.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" class="mid soft">{escape(self.unit)}</text>')
        return _figure(self.title, HEIGHT, [*axes, *self.parts])


def _figure(title: str, height: float, parts: Iterable[str]) -> str:
    picture = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def _section(title: str, text: str, body: str, kind: str = "wall") -> str:
    told = f"<p>{escape(text)}</p>" if text else ""
    return f'<section><h2>{escape(title)}</h2>{told}<div class="{kind}">{body}</div></section>'


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], mark: Callable[[int], bool] | None = None
) -> str:
    """Cells are HTML; the first of a row is its name.   mark: whether row i stands out."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for i, (first, *rest) in enumerate(rows):
        kind = ' class="differs"' if mark is not None and mark(i) else ""
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{first}</th>{cells}</tr>')
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _chip(color: int, name: str) -> str:
    return f'<span class="run"><i style="background:var(--run{color})"></i>{escape(name)}</span>'


def _legend(runs: Sequence[tuple[int, Run]]) -> str:
    return (
        f'<div class="legend">{"".join(_chip(i, run.name) for i, run in runs)}</div>' if len(runs) > 1 else ""
    )


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for i, run in enumerate(runs, 1):
        last = run.last
        final = [f"{escape(key)} {number(points[-1][1])}" for key, points in run.scores.items()]
        final = final or [f"{escape(k)} {number(v)}" for k, v in named_scores(last.pruned).items()]
        rows.append(
            [
                _chip(i, run.name),
                f"{last.num_zeros / last.num_weights:.2%}",
                "<br>".join(final) or "–",
                "–"
                if last.loss_pruned is None
                else f"{number(last.loss_dense)} → {number(last.loss_pruned)}",
                escape(f"{last.method}, {last.scope}"),
                f"{last.num_zeros:,} of {last.num_weights:,}",
                f"{last.compression_ratio:.2f}",
                f"{sum(run.seconds.values()):.3g} s",
            ]
        )
    head = [
        "run",
        "sparsity",
        "scores",
        "loss, last pruning",
        "method",
        "zeros",
        "compression",
        "pruning took",
    ]
    return _section("Overview", "", _table(head, rows), "wide")


def _over_time(runs: Sequence[Run]) -> str:
    """Sparsity, one picture for every unit of time."""
    pictures = []
    for unit in dict.fromkeys(run.unit for run in runs):
        chosen = [(i, run) for i, run in enumerate(runs, 1) if run.unit == unit]
        plot = _Plot(
            f"share of zeros, by {unit}", [p for _, r in chosen for p in r.sparsity], unit, percent=True
        )
        drawn: list[list[Point]] = []
        for i, run in chosen:
            # dashes over a curve that is the same leave both to be seen
            plot.line(run.sparsity, i, stairs=True, kind="line dashed" if run.sparsity in drawn else "line")
            if run.sparsity not in drawn:
                for when, share in run.sparsity:
                    plot.dot((when, share), i, f"{run.name}, {unit} {when:g}: {share:.2%}")
            drawn.append(run.sparsity)
        pictures.append(f"<div>{plot}{_legend(chosen)}</div>")
    return _section("Sparsity over time", "", "".join(pictures))


def _losses(runs: Sequence[Run]) -> str:
    every = [p for run in runs for p in run.before + run.after]
    if not every:
        return ""
    scale = _Plot("", every, "", zero=True).y_ticks
    pictures = []
    for i, run in enumerate(runs, 1):
        if not run.before + run.after:
            continue
        plot = _Plot(run.name, run.before + run.after, run.unit)
        plot.y_ticks = scale
        # at each time from the loss before to that after, and on to the next
        plot.line(sorted(run.before + run.after, key=lambda point: point[0]), i, kind="line thin")
        for points, word in ((run.before, "before"), (run.after, "after")):
            for when, loss in points:
                says = f"{run.unit} {when:g}, {word}: {number(loss)}"
                plot.dot((when, loss), i, says, hollow=word == "before")
        pictures.append(str(plot))
    told = "Mean loss on the samples that gave the gradients: hollow before a pruning, filled after it."
    if len(pictures) > 1:
        told += " All pictures have one scale."
    return _section("Loss before and after each pruning", told, "".join(pictures))


def _labels(names: Sequence[str], most: int = 20) -> list[str]:
    """Names of layers without the part that all begin with, and cut in the middle where they are long."""
    words = [name.split(".") for name in names]
    common = 0
    while len({tuple(word[: common + 1]) for word in words}) == 1 < min(map(len, words)) - common:
        common += 1
    short = [".".join(word[common:]) for word in words]
    return [name if len(name) <= most else f"{name[:8]}…{name[9 - most :]}" for name in short]


def _heat(run: Run) -> str:
    """A row for each layer, a column for each pruning, the darker the sparser."""
    names = [layer.name.removesuffix(".weight") for layer in run.last.layers]
    shares = [{row.name: row.sparsity for row in report.layers} for report in run.reports]
    labels = _labels(names)
    left, right, row = 12 + 6 * max(map(len, labels)), 52, 15
    wide = (WIDTH - left - right) / len(shares)
    gap = 1 if wide > 8 else 0  # between narrow cells gaps would be stripes
    parts = []
    for j, (layer, name, label) in enumerate(zip(run.last.layers, names, labels, strict=True)):
        y = 4 + row * j
        parts.append(
            f'<text x="{left - 5}" y="{y + 10.5}" class="end">{escape(label)}<title>{escape(name)}</title></text>'
        )
        for i, (when, share) in enumerate(zip(run.times, shares, strict=True)):
            value = share.get(layer.name, 0.0)
            says = f"{name}, {run.unit} {when:g}: {value:.2%}"
            parts.append(
                f'<rect x="{left + i * wide:.1f}" y="{y}" width="{wide - gap:.1f}" height="{row - 1}" '
                f'class="heat" style="fill-opacity:{value:.3f}"><title>{escape(says)}</title></rect>'
            )
        parts.append(f'<text x="{WIDTH - right + 5}" y="{y + 10.5}">{100 * layer.sparsity:.1f} %</text>')
    bottom = 4 + row * len(names)
    shown = math.ceil((7 * max(len(f"{when:g}") for when in run.times) + 6) / wide)
    for i, when in enumerate(run.times):
        if i % shown == 0 and len(shares) > 1:
            parts.append(
                f'<text x="{left + (i + 0.5) * wide:.1f}" y="{bottom + 13}" class="mid">{when:g}</text>'
            )
    if len(shares) > 1:
        middle = left + (WIDTH - left - right) / 2
        parts.append(f'<text x="{middle}" y="{bottom + 27}" class="mid soft">{escape(run.unit)}</text>')
    return _figure(run.name, bottom + (32 if len(shares) > 1 else 4), parts)


def _scores(runs: Sequence[Run]) -> str:
    pictures = []
    for unit in dict.fromkeys(run.unit for run in runs if run.scores):
        chosen = [(i, run) for i, run in enumerate(runs, 1) if run.unit == unit and run.scores]
        for key in dict.fromkeys(key for _, run in chosen for key in run.scores):
            having = [(i, run) for i, run in chosen if key in run.scores]
            plot = _Plot(f"{key}, by {unit}", [p for _, run in having for p in run.scores[key]], unit)
            for i, run in having:
                plot.line(run.scores[key], i)
                for when, value in run.scores[key]:
                    if when in run.times:
                        plot.dot((when, value), i, f"{run.name}, {unit} {when:g}: {number(value)}")
            pictures.append(f"<div>{plot}{_legend(having)}</div>")
    curves = (
        _section("Scores over time", "As the run recorded them; dots where it pruned.", "".join(pictures))
        if pictures
        else ""
    )
    rows = []
    for i, run in enumerate(runs, 1):
        kinds = [named_scores(score) for score in (run.last.dense, run.last.control, run.last.pruned)]
        for key in dict.fromkeys(key for kind in kinds for key in kind):
            rows.append([_chip(i, run.name), escape(key), *(number(kind.get(key)) for kind in kinds)])
    told = "What eval_fn returned for the dense network, for magnitude pruning at the same sparsity, and in the end."
    table = _table(["run", "", "dense", "magnitude", "pruned"], rows)
    return curves + (_section("Scores beside dense and magnitude", told, table, "wide") if rows else "")


def _timings(runs: Sequence[Run]) -> str:
    phases = list(dict.fromkeys(phase for run in runs for phase in run.seconds))
    if not phases:
        return ""
    most = max(seconds for run in runs for seconds in run.seconds.values()) or 1.0
    rows = []
    for phase in phases:
        cells = []
        for i, run in enumerate(runs, 1):
            seconds = run.seconds.get(phase)
            width = 100 * (seconds or 0.0) / most
            bar = f'<span class="bar"><i style="width:{width:.1f}%;background:var(--run{i})"></i></span>'
            cells.append("–" if seconds is None else f"{bar}{seconds:.3g} s")
        rows.append([escape(phase), *cells])
    rows.append(["all", *(f"{sum(run.seconds.values()):.3g} s" for run in runs)])
    head = ["phase", *(_chip(i, run.name) for i, run in enumerate(runs, 1))]
    return _section("Time", "Seconds in each phase, over all prunings of a run.", _table(head, rows), "wide")


def _settings(runs: Sequence[Run]) -> str:
    def of(report: Report) -> dict[str, object]:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        return {
            "method": report.method,
            "scope": report.scope,
            "sparsity": report.sparsity,
            "pattern": report.pattern,
            "update": report.update,
            "block size": "the whole network"
            if report.num_grads and report.block_size is None
            else report.block_size,
            "gradients": report.num_grads,
            "samples in each": report.grad_batch_size,
            "effective gradients": report.effective_grads and round(report.effective_grads),
            "damping": report.damping,
            "damping mode": report.damping_mode,
            "damping used": report.damping_used,
            "form of the inverse": report.form,
            "layers": len(report.layers),
            "frozen": ", ".join(report.frozen) or None,
            "left dense": ", ".join(report.unfit) or None,
            "seed": report.seed,
            "device": report.device,
            "data": report.data_fingerprint,
            "versions": versions,
            "command": report.command,
        }

    found = [of(run.last) for run in runs]
    keys = [key for key in found[0] if any(content[key] not in (None, "") for content in found)]
    rows = [[escape(key), *(escape(number(content[key])) for content in found)] for key in keys]
    head = ["", *(_chip(i, run.name) for i, run in enumerate(runs, 1))]
    told = "Of the last pruning." + (" Rows in which runs differ are marked." if len(runs) > 1 else "")
    table = _table(head, rows, lambda i: len(set(rows[i][1:])) > 1)
    return _section("Settings", told, table, "wide text")


def _notes(runs: Sequence[Run]) -> str:
    items = []
    for i, run in enumerate(runs, 1):
        times: dict[str, list[str]] = {}
        for when, report in zip(run.times, run.reports, strict=True):
            for note in report.notes:
                times.setdefault(note, []).append(f"{when:g}")
        for note, whens in times.items():
            at = "" if run.unit == "recomputation" else f" ({run.unit} {', '.join(whens)})"
            items.append(f"<li>{_chip(i, run.name)}{escape(at)}<br>{escape(note)}</li>")
    return _section("Notes", "", f"<ul>{''.join(items)}</ul>", "wide") if items else ""


def _figures(runs: Sequence[Run]) -> str:
    """The numbers behind the pictures."""
    tables = []
    for i, run in enumerate(runs, 1):
        before, after = dict(run.before), dict(run.after)
        rows = [
            [f"{when:g}", f"{share:.2%}", number(before.get(when)), number(after.get(when))]
            for when, share in run.sparsity
            if when in before or when in after or when in run.times
        ]
        rows = [row for j, row in enumerate(rows) if j + 1 == len(rows) or rows[j + 1][0] != row[0]]
        tables.append(
            f"<div>{_chip(i, run.name)}{_table([run.unit, 'sparsity', 'loss before', 'after'], rows)}</div>"
        )
    body = f"<summary>Sparsity and loss as numbers</summary><div class='wall'>{''.join(tables)}</div>"
    return f"<section><details>{body}</details></section>"


STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1b1b1a; --soft: #62615c; --rule: #e2e1dc; --mark: #fdf3d6;
  --heat: #184f95; --run1: #2a78d6; --run2: #d9551f; --run3: #148f63; --run4: #b07a00; --run5: #c9527f; --run6: #4a3aa7;
  --run7: #008300; --run8: #d03b3b; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1a19; --ink: #f2f1ec; --soft: #b0aea6; --rule: #3a3a37;
  --mark: #3a3214; --heat: #86b6ef; --run1: #4c93ea; --run2: #e8703f; --run3: #27ae7f; --run4: #d09a1c; --run5: #e27aa3;
  --run6: #9f95ee; --run7: #3fa53f; --run8: #ee7070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 8px 0; } h2 { font-size: 17px; margin: 32px 0 4px; }
p { margin: 4px 0 8px; color: var(--soft); max-width: 75ch; }
.wall { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.wide { overflow-x: auto; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; margin: 6px 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--ink); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } svg .soft { fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot { stroke-width: 1.5; } .thin { stroke-width: 1.5; opacity: .6; } .dashed { stroke-dasharray: 7 7; }
.heat { fill: var(--heat); shape-rendering: crispEdges; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 4px; font-size: 13px; }
.run { white-space: nowrap; } .run i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 4px 20px 4px 0; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); } th { font-weight: 500; white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: var(--page); }
td { white-space: nowrap; }
.text td { white-space: normal; min-width: 130px; max-width: 75ch; overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; } li { margin: 6px 0 10px; max-width: 90ch; }
@media (max-width: 600px) { th:first-child { max-width: 42vw; overflow: hidden; text-overflow: ellipsis; } }
.differs td { background: var(--mark); }
.bar { display: inline-block; width: 90px; margin-right: 8px; } .bar i { display: block; height: 9px; min-width: 1px;
  border-radius: 0 3px 3px 0; }
summary { cursor: pointer; margin: 28px 0 8px; font-weight: 600; }
"""


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    heats = "".join(_heat(run) for run in runs)
    told = "The share of zeros in each layer after each pruning, at the end as a number too; a stronger colour is more."
    title = f"fastfisher: {', '.join(run.name for run in runs)}"
    sections = (
        _overview(runs),
        _over_time(runs),
        _losses(runs),
        _scores(runs),
        _section("Layers", told, heats),
        _timings(runs),
        _settings(runs),
        _notes(runs),
        _figures(runs),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def write_page(paths: Sequence[str | Path], target: str | Path) -> list[Run]:
    """Write the page of the runs in folders and files, its folder made if absent.   Returns the runs.

    Raises FastFisherError as `find_runs` does, and where the page cannot be written.
    """
    runs, target = find_runs(paths), Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise FastFisherError(f"{str(target)!r} cannot be written: {error.strerror}") from error
    return runs
