"""What a pruning run did: a record that prints as plain tables, saves to a folder, and reloads.

Sizes are counts of weights, times are seconds, memory is bytes.  The keys size, size_nz, compression_ratio, flops,
flops_nz, theoretical_speedup and val_acc1 follow ShrinkBench (Blalock et al., 2020); flops count two per multiply-add.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfisher.errors import FastFisherError
from fastfisher.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "the picture of the layers needs matplotlib: pip install 'fastfisher[viz]'"


@dataclass
class LayerRow:
    """One target tensor: name, shape, its zeros before and after, and floating-point operations per sample, dense."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros_before: int
    zeros: int
    flops: float | None = None
    tied_to: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


@dataclass
class StepRow:
    """One step of a run with recomputations: sparsity after it, mean loss before it, its gradients and its λ.

    auxiliary: of a learned inverse, what its last fit came to: steps, rate (the share taken of each), loss, and error,
    an estimate of ‖Q F_γ − I‖_F / √d from held-out gradients.
    """

    sparsity: float
    loss_before: float
    effective_grads: float
    damping_used: float
    auxiliary: dict[str, float] | None = None


@dataclass
class Report:
    """The outcome of `prune`.  Fields that do not apply (no gradients, no eval_fn) are None or empty.

    dense, control, pruned: what eval_fn returned for the dense model, for global magnitude at the same sparsity, and
    for the pruned model.   loss_dense, loss_pruned: mean loss over loss_samples of the samples that gave the gradients.
    predicted_change: ½ δᵀF δ with the full empirical Fisher F over these samples (damping included) and the δ that
    was applied; slope: ∇L · δ on the same samples, which the quadratic model takes to be 0.   effective_grads:
    (Σ‖g‖²)²/Σ‖g‖⁴.   unfit: tensors left dense because they cannot take the pattern, with the reason.
    """

    method: str
    scope: str
    sparsity: float
    update: str | None
    num_weights: int
    num_zeros: int
    zeros_before: int
    layers: list[LayerRow]
    frozen: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    pattern: str = "unstructured"
    notes: list[str] = field(default_factory=list)

    dense: Any = None
    control: Any = None
    pruned: Any = None
    loss_dense: float | None = None
    loss_pruned: float | None = None
    loss_samples: int = 0
    predicted_change: float | None = None
    slope: float | None = None

    block_size: int | None = None
    damping: float | None = None
    damping_mode: str | None = None
    damping_used: float | None = None
    form: str | None = None
    num_grads: int | None = None
    grad_batch_size: int | None = None
    effective_grads: float | None = None
    non_finite_grads: int = 0
    steps: list[StepRow] = field(default_factory=list)

    size: int = 0
    size_nz: int = 0
    compression_ratio: float = 1.0
    flops: float | None = None
    flops_nz: float | None = None
    theoretical_speedup: float | None = None

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    seed: int = 0
    device: str = "cpu"
    data_fingerprint: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def val_acc1(self) -> float | None:
        """The pruned model's score, where eval_fn returned one number."""
        return self.pruned if isinstance(self.pruned, float) else None

    @property
    def measured_change(self) -> float | None:
        """Mean loss of the pruned model minus that of the dense one, on the gradients' samples."""
        if self.loss_dense is None or self.loss_pruned is None:
            return None
        return self.loss_pruned - self.loss_dense

    def print(self) -> None:
        """Write the tables to standard output."""
        print(self)

    def __str__(self) -> str:
        return "\n\n".join(
            part
            for part in (
                self._head(),
                self._scores(),
                self._step_table(),
                self._layer_table(),
                self._foot(),
            )
            if part
        )

    def _head(self) -> str:
        lines = [
            f"{self.method}, {self.scope} scope: {self.num_zeros:,} of {self.num_weights:,} weights are zero "
            f"({self.num_zeros / self.num_weights:.2%})"
        ]
        if self.num_grads is not None:
            block = "the whole network" if self.block_size is None else str(self.block_size)
            per = f", each over {self.grad_batch_size} samples" if (self.grad_batch_size or 1) > 1 else ""
            lines.append(
                f"update {self.update}, {self.num_grads} gradients{per} ({self.effective_grads or 0:.0f} effective), "
                f"block size {block} ({self.form}), damping {self.damping_used:.3g} ({self.damping_mode})"
            )
        return "\n".join(lines)

    def _scores(self) -> str:
        rows = []
        for key in dict.fromkeys(
            [*named_scores(self.dense), *named_scores(self.control), *named_scores(self.pruned)]
        ):
            row = [key]
            for scores in map(named_scores, (self.dense, self.control, self.pruned)):
                row.append(f"{scores[key]:.4f}" if key in scores else "-")
            rows.append(row)
        table = align([["", "dense", "magnitude", "pruned"], *rows]) if rows else ""
        lines = [table] if table else []
        if self.loss_dense is not None and self.loss_pruned is not None:
            lines.append(
                f"loss on {self.loss_samples} of the gradients' samples: {self.loss_dense:.4g} dense, "
                f"{self.loss_pruned:.4g} pruned"
            )
            text = f"loss change: {self.measured_change:+.4g} measured"
            if self.predicted_change is not None:
                text += f", {self.predicted_change:+.4g} predicted by ½ δᵀFδ"
            if self.slope is not None:
                text += f" (slope {self.slope:+.4g} left out)"
            lines.append(text)
        return "\n".join(lines)

    def _step_table(self) -> str:
        if len(self.steps) < 2:
            return ""
        rows = [["step", "sparsity", "loss before", "effective gradients", "damping"]]
        rows += [
            [
                str(i),
                f"{step.sparsity:.2%}",
                f"{step.loss_before:.4g}",
                f"{step.effective_grads:.0f}",
                f"{step.damping_used:.3g}",
            ]
            for i, step in enumerate(self.steps, 1)
        ]
        if any(step.auxiliary for step in self.steps):
            rows[0] += ["auxiliary steps", "‖QF−I‖/√d"]
            for row, step in zip(rows[1:], self.steps, strict=True):
                row += [f"{(step.auxiliary or {}).get(key, 0):.3g}" for key in ("steps", "error")]
        return align(rows)

    def _layer_table(self) -> str:
        rows = [["layer", "shape", "weights", "zeros", "sparsity"]]
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            name = layer.name if not layer.tied_to else f"{layer.name} (= {', '.join(layer.tied_to)})"
            rows.append([name, shape, f"{layer.weights:,}", f"{layer.zeros:,}", f"{layer.sparsity:.2%}"])
        rows += [[name, "", "", "", "frozen"] for name in self.frozen]
        return align(rows, left=2)

    def _foot(self) -> str:
        lines = [
            f"size {self.size:,}, nonzero {self.size_nz:,}, compression ratio {self.compression_ratio:.2f}"
            + (f", theoretical speedup {self.theoretical_speedup:.2f}" if self.theoretical_speedup else "")
        ]
        spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())
        memory = f"; peak memory {format_bytes(self.peak_memory)}" if self.peak_memory is not None else ""
        lines.append(f"{spent}{memory}; seed {self.seed}; data {self.data_fingerprint or 'not read'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON takes them, with val_acc1 and measured_change."""
        content = asdict(self)
        content["layers"] = [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers]
        return content | {"val_acc1": self.val_acc1, "measured_change": self.measured_change}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """The inverse of to_dict."""
        fields = {key: value for key, value in content.items() if key in cls.__dataclass_fields__}
        fields["layers"] = [
            LayerRow(
                layer["name"],
                tuple(layer["shape"]),
                layer["weights"],
                layer["zeros_before"],
                layer["zeros"],
                layer["flops"],
                tuple(layer["tied_to"]),
            )
            for layer in content["layers"]
        ]
        fields["steps"] = [StepRow(**step) for step in content.get("steps", [])]
        return cls(**fields)

    def save(self, folder: str | Path) -> None:
        """Write report.json, layers.csv and, with matplotlib installed, layers.png into the folder, made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, default=float)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "shape", "weights", "zeros_before", "zeros", "sparsity", "flops"])
            for row in self.layers:
                shape = "x".join(map(str, row.shape))
                writer.writerow(
                    [
                        row.name,
                        shape,
                        row.weights,
                        row.zeros_before,
                        row.zeros,
                        f"{row.sparsity:.6f}",
                        row.flops,
                    ]
                )
        try:
            figure = self.plot_layers()
        except ImportError:
            warnings.warn(f"layers.png was not written: {NO_MATPLOTLIB}", stacklevel=2)
            return
        figure.savefig(folder / "layers.png", dpi=150)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report back from its folder or its report.json.  Raises FastFisherError where there is none."""
        path = Path(path)
        if path.is_dir():
            path = path / "report.json"
        if not path.is_file():
            raise FastFisherError(f"no report at {str(path)!r}")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FastFisherError(f"{str(path)!r} is not a report of fastfisher: {error}") from error

    def plot_layers(self) -> Figure:
        """A bar per layer with its sparsity, a line at that of the network.  Raises ImportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(NO_MATPLOTLIB) from error
        count = len(self.layers)
        figure = Figure(figsize=(7.0, 1.2 + 0.24 * count), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(count), [100 * layer.sparsity for layer in self.layers], color="#4c78a8")
        axes.axvline(100 * self.num_zeros / self.num_weights, color="#e45756", label="network")
        axes.set_yticks(range(count), [layer.name.removesuffix(".weight") for layer in self.layers])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("sparsity (%)")
        axes.set_title(f"{self.method}, {self.scope} scope, {self.num_zeros / self.num_weights:.1%} zeros")
        axes.legend()
        return figure


def named_scores(result: Any) -> dict[str, float]:
    """What eval_fn returned, by name."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return {str(key): float(value) for key, value in result.items()}
    return {"score": float(result)}


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text as columns: the first `left` columns flush left, the others flush right, a rule under the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
