"""Which damping, how many gradients, which blocks: one-shot runs over a grid, judged by the loss on samples held out.

model + data -> trials -> the settings whose pruned network has the lowest mean loss on the held-out samples.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastfisher.errors import DoesNotFitError, FastFisherError, FisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.objective import LossFn, Objective, untouched
from fastfisher.prune.progress import Bar, Progress
from fastfisher.prune.pruner import prune
from fastfisher.prune.settings import Settings
from fastfisher.prune.targets import Targets, find_targets
from fastfisher.prune.update import written
from fastfisher.report import NO_MATPLOTLIB, align

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELATIVE_DAMPING = (0.001, 0.01, 0.1, 1.0)
ABSOLUTE_DAMPING = (1e-6, 1e-5, 1e-4, 1e-3)
# Of the samples that are read for the gradients, this share is held out.
HELD_OUT = 0.25
# Without a length the data are read for this many times the gradients of the largest trial.
PASSES = 4
EVALUATION_BATCH = 256
FILE = "tune.json"


def _count(recomputations: int | None) -> str:
    return "auto" if recomputations is None else str(recomputations)


@dataclass
class Trial:
    """One run: its settings as keywords of `prune`, the held-out loss of its network, or why there is none."""

    settings: dict[str, Any]
    loss: float | None = None
    seconds: float = 0.0
    error: str | None = None

    @property
    def damping(self) -> str:
        """The damping with its mode, as a label."""
        return f"{self.settings['damping_mode']} {self.settings['damping']:g}"

    @property
    def others(self) -> str:
        """All settings but the damping, as a label."""
        block = self.settings["block_size"]
        text = f"{self.settings['num_grads']} gradients\nblocks of {'all' if block is None else block}"
        steps = self.settings["num_recomputations"]
        return text if steps is None else f"{text}\n{steps} recomputed"


@dataclass
class Tuning:
    """What `tune` found.   dense_loss: of the dense network on the same held-out samples."""

    sparsity: float
    dense_loss: float
    held_out: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def winner(self) -> Trial:
        """The trial with the lowest loss; the first among equals.  Raises FisherError where every trial failed."""
        finished = [trial for trial in self.trials if trial.loss is not None and math.isfinite(trial.loss)]
        if not finished:
            reason = next((trial.error for trial in self.trials if trial.error), "no loss is finite")
            raise FisherError(f"none of {len(self.trials)} trials gave a network: {reason}")
        return min(finished, key=lambda trial: trial.loss or 0.0)

    @property
    def best(self) -> dict[str, Any]:
        """The settings of the winner, as keywords of `prune`."""
        return dict(self.winner.settings)

    def __str__(self) -> str:
        rows = [["damping", "gradients", "block size", "recomputations", "loss", "seconds", ""]]
        winner = self.winner
        for trial in self.trials:
            block = trial.settings["block_size"]
            rows.append(
                [
                    trial.damping,
                    str(trial.settings["num_grads"]),
                    "all" if block is None else str(block),
                    _count(trial.settings["num_recomputations"]),
                    "-" if trial.loss is None else f"{trial.loss:.4g}",
                    f"{trial.seconds:.1f}",
                    "best" if trial is winner else (trial.error or ""),
                ]
            )
        head = (
            f"{self.sparsity:.1%} sparsity, loss on {self.held_out} samples held out: {self.dense_loss:.4g} dense, "
            f"{winner.loss:.4g} with the best settings"
        )
        return f"{head}\n\n{align(rows)}"

    def print(self) -> None:
        """Write the table to standard output."""
        print(self)

    def save(self, folder: str | Path) -> None:
        """Write tune.csv and, with matplotlib installed, the heat map tune.png into the folder, made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "tune.csv").open("w", newline="", encoding="utf-8") as file:
            names = ["damping_mode", "damping", "num_grads", "block_size", "num_recomputations"]
            writer = csv.writer(file)
            writer.writerow([*names, "loss", "seconds", "error"])
            for trial in self.trials:
                settings = [trial.settings[name] for name in names]
                writer.writerow([*settings, trial.loss, f"{trial.seconds:.3f}", trial.error])
        try:
            figure = self.plot()
        except ImportError:
            warnings.warn(f"tune.png was not written: {NO_MATPLOTLIB}", stacklevel=2)
            return
        figure.savefig(folder / "tune.png", dpi=150)

    def plot(self) -> Figure:
        """A heat map of the loss, damping against all other settings.  Raises ImportError without matplotlib."""
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise ImportError(NO_MATPLOTLIB) from error
        rows = list(dict.fromkeys(trial.damping for trial in self.trials))
        columns = list(dict.fromkeys(trial.others for trial in self.trials))
        losses = torch.full((len(rows), len(columns)), torch.nan)
        winner = self.winner
        figure = Figure(figsize=(3.2 + 1.3 * len(columns), 1.8 + 0.38 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        finished = [
            trial.loss for trial in self.trials if trial.loss is not None and math.isfinite(trial.loss)
        ]
        middle = math.sqrt(max(min(finished), 1e-30) * max(*finished, 1e-30))
        for trial in self.trials:
            i, j = rows.index(trial.damping), columns.index(trial.others)
            loss = math.nan if trial.loss is None else trial.loss
            losses[i, j] = loss
            text, color = (f"{loss:.4g}", "white" if loss < middle else "black")
            if not math.isfinite(loss):
                text, color = "failed", "black"
            axes.text(j, i, text, ha="center", va="center", color=color)
            if trial is winner:
                axes.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#e45756", linewidth=3)
                )
        wide = min(finished) > 0 and max(finished) > 10 * min(finished)
        image = axes.imshow(losses.numpy(), aspect="auto", cmap="viridis", norm=LogNorm() if wide else None)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylabel("damping")
        axes.set_title(f"loss held out at {self.sparsity:.0%}")
        figure.colorbar(image, ax=axes)
        return figure


def _list(name: str, value: Any) -> list[Any]:
    """One value or several, as a list.  Raises FastFisherError where it is empty."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise FastFisherError(f"{name} must hold at least one value, got {value!r}")
    return values


def _grid(
    relative: Any, absolute: Any, num_grads: Any, block_size: Any, num_recomputations: Any
) -> list[dict[str, Any]]:
    dampings = [
        ("relative", value) for value in ([] if relative is None else _list("relative_damping", relative))
    ]
    dampings += [
        ("absolute", value) for value in ([] if absolute is None else _list("absolute_damping", absolute))
    ]
    if not dampings:
        raise FastFisherError(
            "relative_damping and absolute_damping are both None: there is no damping to try"
        )
    return [
        {
            "damping": damping,
            "damping_mode": mode,
            "num_grads": m,
            "block_size": size,
            "num_recomputations": steps,
        }
        for m, size, steps, (mode, damping) in itertools.product(
            _list("num_grads", num_grads),
            _list("block_size", block_size),
            _list("num_recomputations", num_recomputations),
            dampings,
        )
    ]


def _checked(given: Mapping[str, Any]) -> Settings:
    """The settings of a trial.  Raises FastFisherError on what `prune` would refuse, before anything runs."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(prune).parameters.items()}
    return Settings.of({**defaults, **given})


def _split(groups: Sequence[Samples], share: float) -> tuple[list[Samples], list[Samples]]:
    """Samples for the gradients and samples held out, spread evenly over the data."""
    ours: list[Samples] = []
    theirs: list[Samples] = []
    seen = 0
    for group in groups:
        at = torch.arange(seen, seen + len(group), dtype=torch.float64)
        held = ((at + 1) * share).floor() > (at * share).floor()
        seen += len(group)
        ours += [group.pick(~held)] if not bool(held.all()) else []
        theirs += [group.pick(held)] if bool(held.any()) else []
    return ours, theirs


def _mean_loss(objective: Objective, groups: Sequence[Samples]) -> float:
    """The mean loss of the model as it is; its batches weigh by their samples."""
    total = sum(float(objective.batch_loss(group)) * len(group) for group in groups)
    return total / sum(map(len, groups))


class _Record:
    """The finished trials of a run in a file, so that the next one goes on after them."""

    def __init__(self, folder: str | Path | None, identity: str) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.identity = identity
        self.trials: dict[str, Trial] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            identity = content["identity"]
            trials = [Trial(**trial) for trial in content["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FastFisherError(
                f"{path} is no record of a tuning run: {error}; remove it to begin anew"
            ) from error
        if identity != self.identity:
            raise FastFisherError(
                f"{path} is of another run (other weights, data, sparsity or options); give another folder"
            )
        self.trials = {self._key(trial.settings): trial for trial in trials}

    @staticmethod
    def _key(settings: Mapping[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)

    def find(self, settings: Mapping[str, Any]) -> Trial | None:
        """The trial with these settings, where one is finished."""
        return self.trials.get(self._key(settings))

    def add(self, trial: Trial) -> None:
        """Note a finished trial; the file is replaced as a whole, so that it is never half written."""
        self.trials[self._key(trial.settings)] = trial
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"identity": self.identity, "trials": [asdict(one) for one in self.trials.values()]}
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)


def _identity(
    targets: Targets, fingerprints: Sequence[str], sparsity: float, options: Mapping[str, Any]
) -> str:
    """A hash of all that a trial's result depends on, its own settings aside."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in targets.parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    plain = {key: value for key, value in options.items() if not callable(value)}
    digest.update(repr((fingerprints, sparsity, sorted(plain.items()))).encode())
    return digest.hexdigest()


def tune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    sparsity: float | None = None,
    relative_damping: float | Sequence[float] | None = RELATIVE_DAMPING,
    absolute_damping: float | Sequence[float] | None = ABSOLUTE_DAMPING,
    num_grads: int | Sequence[int] = 512,
    block_size: int | Sequence[int | None] | None = 64,
    num_recomputations: int | Sequence[int | None] | None = None,
    held_out: float | Iterable[Any] = HELD_OUT,
    folder: str | Path | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Tuning:
    """Prune once with every combination of the settings; the best one has the lowest mean loss on samples held out.

    data: batches as for `prune`.  They are read into memory: all that a list or a loader of known length has, else
        four times what the largest trial needs.
    relative_damping, absolute_damping: the λ to try in each mode; None for none of this mode.
    num_grads, block_size, num_recomputations: one value or several.
    held_out: the share of the samples that no gradient is taken from, or batches of their own.
    folder: where finished trials are noted (tune.json); a run that is repeated goes on after them.
    options: further keywords of `prune`, the same for every trial, such as method, update, scope, targets.
    progress: as in `prune`; a function is called as progress("trials", done, total) after every trial.

    The model is as it was afterwards.  A trial that breaks down or does not fit is listed with its reason.
    Raises FastFisherError on bad input, and where `folder` holds the trials of another run.
    """
    unknown = {"damping", "damping_mode", "eval_fn"} & set(options)
    if unknown:
        raise FastFisherError(
            f"tune takes no {sorted(unknown)[0]!r}: relative_damping and absolute_damping are tried"
        )
    grid = _grid(relative_damping, absolute_damping, num_grads, block_size, num_recomputations)
    targets = find_targets(model, options.get("targets"), options.get("ignore"))
    checked = [_checked({**options, **settings, "sparsity": sparsity}) for settings in grid]
    goal = checked[0].sparsity
    targets.take(model, checked[0].rule)
    reader = SampleReader(data, targets.device)
    largest = max(settings["num_grads"] for settings in grid) * options.get("grad_batch_size", 1)
    limit = None if reader.known is not None else PASSES * largest
    ours = list(reader.groups(EVALUATION_BATCH, limit))
    fingerprints = [reader.fingerprint]
    if isinstance(held_out, float):
        if not 0 < held_out < 1:
            raise FastFisherError(f"held_out must be a share between 0 and 1 or batches; got {held_out!r}")
        ours, theirs = _split(ours, held_out)
    else:
        other = SampleReader(held_out, targets.device)
        theirs = list(other.groups(EVALUATION_BATCH))
        fingerprints.append(other.fingerprint)
    for_gradients, for_loss = (sum(map(len, groups)) for groups in (ours, theirs))
    if for_gradients < largest or not for_loss:
        raise FastFisherError(
            f"the largest trial needs {largest} samples for gradients and some held out; "
            f"the data leave {for_gradients} and {for_loss}"
        )
    record = _Record(folder, _identity(targets, fingerprints, goal, options | {"seed": seed}))
    objective = Objective(model, list(targets.parameters), loss_fn=loss_fn, grad_batch_size=2)
    with untouched(model, seed):
        found = Tuning(float(goal), _mean_loss(objective, theirs), for_loss)
    batches = [group.batch() for group in ours]
    with Bar(progress, "tune") as bar:
        for done, settings in enumerate(grid, 1):
            trial = record.find(settings)
            if trial is None:
                trial = _try(
                    model, batches, theirs, targets, objective, settings, goal, loss_fn, seed, options
                )
                record.add(trial)
            found.trials.append(trial)
            bar("trials", done, len(grid))
    found.winner  # noqa: B018  (raises where every trial failed)
    return found


def _try(
    model: nn.Module,
    batches: list[Any],
    held_out: list[Samples],
    targets: Targets,
    objective: Objective,
    settings: dict[str, Any],
    sparsity: float,
    loss_fn: LossFn | None,
    seed: int,
    options: Mapping[str, Any],
) -> Trial:
    """One trial; the model has its old weights afterwards."""
    started = time.perf_counter()
    trial = Trial(settings)
    now = {name: parameter.detach() for name, parameter in targets.parameters.items()}
    with written(targets.parameters, now, keep=False):  # for what happens inside to be undone
        try:
            prune(
                model,
                batches,
                sparsity=sparsity,
                loss_fn=loss_fn,
                seed=seed,
                progress=False,
                **settings,
                **options,
            )
            with untouched(model, seed):
                trial.loss = _mean_loss(objective, held_out)
        except (FisherError, DoesNotFitError) as error:
            trial.error = str(error)
    trial.seconds = time.perf_counter() - started
    return trial
