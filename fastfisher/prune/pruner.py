"""One-shot pruning: gradients -> inverse Fisher -> saliency -> mask -> update -> weights, written at the very end.

With recomputations this way is taken several times, each a little sparser and with gradients at the point reached.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastfisher
from fastfisher import ops
from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.gradients import GradientStream, LossFn, Objective, untouched
from fastfisher.fisher.inverse import FisherAccumulator, FisherInverse
from fastfisher.memory import peak_bytes
from fastfisher.prune import saliency
from fastfisher.prune.flops import count_flops
from fastfisher.prune.plan import gradient_limit, layout_of, plan
from fastfisher.prune.select import num_zeros, select
from fastfisher.prune.settings import Settings
from fastfisher.prune.targets import Targets, find_targets
from fastfisher.prune.update import as_parameters, updated, written
from fastfisher.report import LayerRow, Report, StepRow

__all__ = ["plan", "prune"]

Progress = Callable[[str, int, int], None]

# Below this share of the gradients the Fisher estimate rests on a few samples.
FEW_EFFECTIVE = 0.1


@dataclass
class _Clock:
    """Seconds per phase, added up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class _Outcome:
    """What the gradients led to, before the model is written."""

    new: Tensor  # [d]
    mask: Tensor  # bool [d]
    form: str | None = None
    damping: float | None = None  # λ of the last step
    streams: list[GradientStream] = field(default_factory=list)  # one for each step
    steps: list[StepRow] = field(default_factory=list)


def _timed(pieces: Iterator[Tensor], clock: _Clock) -> Iterator[Tensor]:
    while True:
        with clock("gradients"):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _estimate(
    stream: GradientStream, settings: Settings, clock: _Clock, advance: Callable[[int], None]
) -> FisherInverse:
    accumulator = FisherAccumulator(
        stream.layout,
        num_grads=settings.num_grads,
        damping=settings.damping,
        damping_mode=settings.damping_mode,
        mean=settings.method == "woodtaylor",
        centered=settings.centered,
    )
    for piece in _timed(iter(stream), clock):
        with clock("fisher"):
            accumulator.add(piece)
        advance(stream.num_finite)
    with clock("inverse"):
        return accumulator.finish()


class _Run:
    """The steps of one call: gradients, inverse, mask and update, from the point that the step before has reached."""

    def __init__(
        self,
        layout: BlockLayout,
        settings: Settings,
        parameters: dict[str, nn.Parameter],
        clock: _Clock,
        progress: Progress | None,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.parameters = parameters
        self.clock = clock
        self.progress = progress

    def select(self, scores: Tensor, mask: Tensor, sparsity: float) -> Tensor:
        """The next mask from the saliency of every weight."""
        ranges = list(self.layout.parameter_ranges.values())
        return select(scores, ~mask, sparsity, scope=self.settings.scope, ranges=ranges)

    def without_gradients(self, weight: Tensor, mask: Tensor) -> _Outcome:
        """Magnitude pruning: one step."""
        with self.clock("select"):
            mask = self.select(saliency.magnitude(weight), mask, self.settings.sparsity)
        return _Outcome(torch.where(mask, weight, 0), mask)

    def with_gradients(
        self, weight: Tensor, mask: Tensor, objective: Objective, reader: SampleReader, limit: int
    ) -> _Outcome:
        """Every step takes gradients where the one before has ended, over the weights that it has left.

        weight: [d].   mask: bool [d], False where a weight is zero already.
        """
        found = _Outcome(weight, mask)
        targets = self.settings.targets_of_steps(float((~mask).sum()) / len(mask))
        for i, sparsity in enumerate(targets):
            if i:
                with self.clock("update"):
                    objective.weights = as_parameters(found.new, found.mask, self.layout, self.parameters)
            layout = self.layout if bool(found.mask.all()) else LiveLayout(self.layout, found.mask)
            stream = GradientStream(
                objective, reader, layout, num_grads=self.settings.num_grads, memory_limit=limit
            )
            self._step(found, sparsity, stream, i, len(targets))
        return found

    def _step(self, found: _Outcome, sparsity: float, stream: GradientStream, i: int, steps: int) -> None:
        settings, layout = self.settings, stream.layout

        def advance(done: int) -> None:
            if self.progress is not None:
                self.progress("gradients", i * settings.num_grads + done, steps * settings.num_grads)

        finv = _estimate(stream, settings, self.clock, advance)
        weight = layout.gather(found.new)
        if settings.method == "woodtaylor":
            weight = weight - self._taken(saliency.newton_step(finv), finv, stream).to(weight.dtype)
        with self.clock("select"):
            scores = layout.scatter(saliency.SCORES[settings.method](weight, finv))
            mask = self.select(scores, found.mask, sparsity)
        with self.clock("update"):
            new = layout.scatter(updated(weight, layout.gather(mask), finv, settings.applied_update))
        found.new, found.mask, found.form, found.damping = new, mask, finv.form, float(finv.damping)
        found.streams.append(stream)
        found.steps.append(
            StepRow(
                sparsity=float((~mask).sum()) / len(mask),
                loss_before=float(torch.cat(stream.kept_losses).mean()),
                effective_grads=stream.effective,
                damping_used=found.damping,
            )
        )
        if i:
            stream.kept.clear()  # the loss is checked on the first samples alone

    def _taken(self, u: Tensor, finv: FisherInverse, stream: GradientStream) -> Tensor:
        """What is taken of the step u = F⁻¹ ∇L: t u, 0 <= t <= 1, the minimum along u under the Fisher without blocks.

        Blocks do not know of each other, and together they overshoot where each goes all the way: t = 1 / ρ but for the
        damping, ρ = Σ (Σ_b g_b·u_b)² / Σ Σ_b (g_b·u_b)², the curvature without blocks over that of the blocks.  ρ is
        taken from the kept samples; as a ratio it hardly depends on which of the few large gradients are among them.
        """
        if finv.mean is None or finv.num_blocks == 1:
            return u
        layout, blocks = stream.layout, stream.layout.blocks.to(u.device)
        whole, apart, product = 0.0, 0.0, torch.empty_like(u)
        with self.clock("step length"):
            for group in stream.kept:
                grads, _ = stream.objective.gradients(group)
                rows = torch.cat([layout.rows(name, grads[name]) for name in layout.names], dim=1)  # [k, d]
                if self.settings.centered:
                    rows -= finv.mean.to(rows.dtype)
                whole += float((rows @ u.to(rows.dtype)).double().square().sum())
                ops.fisher_vector_product(rows, blocks, len(rows), u[:, None], out=product[:, None])
                apart += len(rows) * float(u @ product)
        slope, ridge = float(finv.mean @ u), float(finv.damping) * float(u.square().sum())
        curvature = ridge + (slope - ridge) * (whole / apart if apart > 0 else 1.0)
        return u * min(1.0, slope / curvature) if curvature > 0 else u


def _mean_loss(objective: Objective, groups: Sequence[Samples], weights: dict[str, Tensor]) -> float:
    """Mean loss over the kept samples (mini-batches, where the gradients are means over them)."""
    with torch.no_grad():
        losses = torch.cat([objective.losses(weights, group).double() for group in groups])
    return float(losses.mean())


def _second_order(
    objective: Objective, groups: Sequence[Samples], change: dict[str, Tensor], damping: float
) -> tuple[float, float]:
    """½ δᵀ(λI + (1/n) Σ ggᵀ)δ and (1/n) Σ g·δ over the kept samples."""
    slopes = torch.cat([objective.slopes(change, group) for group in groups])
    length = sum(float((delta.double() ** 2).sum()) for delta in change.values())
    return 0.5 * (float((slopes**2).mean()) + damping * length), float(slopes.mean())


def _number(result: Any) -> Any:
    """What eval_fn returned as plain numbers: a float, or a dict of floats."""
    try:
        if isinstance(result, dict):
            return {str(key): float(value) for key, value in result.items()}
        return float(result)
    except (TypeError, ValueError) as error:
        raise FastFisherError(
            f"eval_fn must return a number or a dict of numbers; got {result!r:.60}"
        ) from error


def _versions() -> dict[str, str]:
    return {
        "fastfisher": fastfisher.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _command() -> str:
    return shlex.join([os.path.basename(sys.argv[0]) or "python", *sys.argv[1:]]) if sys.argv else "python"


def _layer_rows(
    targets: Targets, layout: BlockLayout, dead: Tensor, mask: Tensor, flops: dict[str, float] | None
) -> list[LayerRow]:
    rows = []
    for name, (start, stop) in layout.parameter_ranges.items():
        aliases = targets.aliases[name]
        modules = [alias.rpartition(".")[0] for alias in aliases]
        rows.append(
            LayerRow(
                name=name,
                shape=tuple(targets.parameters[name].shape),
                weights=stop - start,
                zeros_before=int(dead[start:stop].sum()),
                zeros=int((~mask[start:stop]).sum()),
                flops=None if flops is None else sum(flops.get(module, 0.0) for module in modules),
                tied_to=aliases[1:],
            )
        )
    return rows


def _fill_sizes(report: Report, model: nn.Module, total_flops: float | None) -> None:
    """The ShrinkBench keys, from the pruned model."""
    parameters = list(model.parameters())
    report.size = sum(parameter.numel() for parameter in parameters)
    report.size_nz = sum(int(torch.count_nonzero(parameter.detach())) for parameter in parameters)
    report.compression_ratio = report.size / max(report.size_nz, 1)
    if total_flops:
        report.flops = total_flops
        report.flops_nz = total_flops - sum((row.flops or 0.0) * row.sparsity for row in report.layers)
        report.theoretical_speedup = report.flops / report.flops_nz if report.flops_nz > 0 else None


def _fill_gradients(report: Report, settings: Settings, outcome: _Outcome, objective: Objective) -> None:
    if not outcome.streams:
        return
    first = outcome.streams[0]
    report.block_size = settings.fisher_block
    report.damping = settings.damping
    report.damping_mode = settings.damping_mode
    report.damping_used = outcome.damping
    report.form = outcome.form
    report.num_grads = settings.num_grads
    report.grad_batch_size = settings.grad_batch_size
    report.steps = outcome.steps
    report.effective_grads = first.effective
    report.non_finite_grads = sum(stream.num_non_finite for stream in outcome.streams)
    report.data_fingerprint = first.fingerprint
    if first.effective < FEW_EFFECTIVE * settings.num_grads:
        report.notes.append(
            f"Effective number of gradients is {first.effective:.0f} of {settings.num_grads}: the model fits this "
            f"data almost perfectly; use held-out data or larger damping."
        )
    for stream in outcome.streams:
        if stream.num_non_finite:
            used = (
                "" if stream.num_finite == settings.num_grads else f"; {stream.num_finite} were left to use"
            )
            report.notes.append(
                f"{stream.num_non_finite} of {stream.num_finite + stream.num_non_finite} gradients were non-finite "
                f"(first: {stream.first_non_finite}){used}."
            )
    if objective.why_loop is not None:
        report.notes.append(
            f"Samples were differentiated one at a time: vmap cannot trace the model ({objective.why_loop})."
        )
    if first.unreached:
        report.notes.append(
            f"No gradient reached {', '.join(first.unreached)}: ranked by damping times weight squared."
        )


def prune(
    model: nn.Module,
    data: Iterable[Any] | None,
    *,
    sparsity: float,
    method: str = "woodfisher",
    scope: str = "global",
    block_size: int | None = 64,
    num_grads: int = 512,
    grad_batch_size: int = 1,
    damping: float = 0.1,
    damping_mode: str = "relative",
    update: str | None = "auto",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: Callable[[nn.Module], Any] | None = None,
    num_recomputations: int | None = None,
    centered: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | str | None = None,
) -> Report:
    """Set round(sparsity · d) of the d target weights to zero where the loss suffers least, and correct the others.

    data: iterable of batches (input, label) or dicts, read only as far as needed: num_grads · grad_batch_size samples
        for every estimate, in the loader's order.  It may be None for method "magnitude".
    method: "woodfisher" (blocks of the inverse Fisher), "woodtaylor" (the same with the gradient of the loss, which
        repairs what the steps before have done too), "diagonal" (blocks of one), "magnitude" (no gradients).
    scope: "global" ranks all weights together, "layer" gives every tensor the same share; what rounding leaves
        over goes to the tensors with the largest remainders.
    block_size: B, weights per Fisher block; None for one block over everything.
    grad_batch_size: 1 for per-sample gradients, n for means over mini-batches of n.
    damping: λ, added to the Fisher's diagonal ("absolute", the paper's), or the multiple of its mean diagonal to add
        ("relative", which needs no tuning from network to network).
    update: of the kept weights: "sum" (the paper's), "joint" (exact for all removed weights of a block together), None,
        or "auto": "sum" for a single step, "joint" with recomputations.   Only for methods with blocks.
    num_recomputations: how often gradients and inverse are made anew on the way to the final sparsity, each time at the
        point reached and for the weights that are left; None: as often as the sparsity calls for (12 times to 80 %).
        The data are read on, and from the beginning again at their end.
    centered: the covariance of the gradients in place of the Fisher, for "woodtaylor".
    targets, ignore: names, module names or globs, with or without ".weight"; by default Linear and convolution weights.
    loss_fn: loss_fn(model, batch) -> one number, the mean over the batch.  For per-sample gradients it is called with
        batches of one sample, under torch.func.vmap.  The model it gets is the same object, in eval mode.
    eval_fn: eval_fn(model) -> number or dict of numbers, called for the dense model, for global magnitude at the same
        sparsity, and for the pruned model; always in eval mode.
    seed: of torch's generators while this function runs; their state is restored.
    progress: progress(phase, done, total), called after every piece of gradients.
    memory_limit: bytes or a text like "8 GB"; by default what is free.

    The model is changed in place, at the very end: on any error or interrupt it is bit for bit as it was.  Weights keep
    dtype, memory and ties; zeros that are there already stay and count.
    Raises FastFisherError (a ValueError) on bad input, FisherError where the arithmetic breaks down.
    Source: WoodFisher (Singh & Alistarh, 2020), sections 2 and 3.
    """
    settings = Settings(
        sparsity,
        method,
        scope,
        block_size,
        num_grads,
        grad_batch_size,
        damping,
        damping_mode,
        update,
        seed,
        num_recomputations,
        centered,
    )
    found = find_targets(model, targets, ignore)
    layout = layout_of(found, settings)
    limit = gradient_limit(layout, settings, found, memory_limit)
    if method != "magnitude" and data is None:
        raise FastFisherError(f"method={method!r} needs data to take gradients from; got None")
    clock = _Clock()

    with untouched(model, seed):
        old = {name: parameter.detach() for name, parameter in found.parameters.items()}
        wide = torch.float64 if any(p.dtype == torch.float64 for p in old.values()) else torch.float32
        weight = layout.flatten({name: value.to(wide) for name, value in old.items()})  # [d]
        # compared in the model's own dtype: nothing nonzero there becomes zero in a wider one
        dead = weight == 0
        if not bool(torch.isfinite(weight).all()):
            name = next(name for name, value in old.items() if not bool(torch.isfinite(value).all()))
            raise FastFisherError(f"{name!r} holds weights that are not finite")
        objective = Objective(model, list(found.parameters), loss_fn=loss_fn, grad_batch_size=grad_batch_size)
        dense = control = None
        if eval_fn is not None:
            with clock("evaluate"):
                dense = _number(eval_fn(model))

        notes: list[str] = []
        if method == "magnitude" or data is None:
            run = _Run(layout, settings, found.parameters, clock, progress)
            outcome = run.without_gradients(weight, ~dead)
        else:
            reader = SampleReader(data, found.device, repeat=num_grads * grad_batch_size)
            if reader.once and num_recomputations is None:
                settings = replace(settings, num_recomputations=0)
                notes.append("The data can be read only once, so there was one step without recomputations.")
            run = _Run(layout, settings, found.parameters, clock, progress)
            outcome = run.with_gradients(weight, ~dead, objective, reader, limit)
            objective.weights = old
        stream = outcome.streams[0] if outcome.streams else None
        values = as_parameters(outcome.new, outcome.mask, layout, found.parameters)

        flops: dict[str, float] | None = None
        total_flops: float | None = None
        samples = _first_samples(data, objective) if stream is None else stream.kept[0]
        if samples is not None:
            total_flops, flops = count_flops(objective, model, samples.narrow(0, grad_batch_size))

        report = Report(
            method=method,
            scope=scope,
            sparsity=float(sparsity),
            update=settings.applied_update,
            num_weights=layout.num_weights,
            num_zeros=int((~outcome.mask).sum()),
            zeros_before=int(dead.sum()),
            layers=_layer_rows(found, layout, dead, outcome.mask, flops),
            frozen=found.frozen,
            seed=seed,
            device=str(found.device),
            versions=_versions(),
            command=_command(),
            notes=notes,
        )
        _fill_gradients(report, settings, outcome, objective)
        if report.num_zeros > num_zeros(sparsity, layout.num_weights):
            report.notes.append(
                f"{report.zeros_before:,} weights were zero before, in places more than asked for; all stay zero."
            )
        if stream is not None and outcome.damping is not None:
            with clock("loss check"):
                _check_loss(report, stream, old, values, outcome.damping)

        if eval_fn is not None and method != "magnitude":
            with clock("evaluate"):
                mask = select(saliency.magnitude(weight), dead, sparsity, scope="global", ranges=())
                magnitude = as_parameters(torch.where(mask, weight, 0), mask, layout, found.parameters)
                with written(found.parameters, magnitude, keep=False):
                    control = _number(eval_fn(model))

        with written(found.parameters, values, keep=True):
            if eval_fn is not None:
                with clock("evaluate"):
                    report.pruned = _number(eval_fn(model))
            report.dense, report.control = dense, control
            _fill_sizes(report, model, total_flops)
            report.seconds = clock.seconds
            report.peak_memory = peak_bytes(found.device)
    return report


def _first_samples(data: Iterable[Any] | None, objective: Objective) -> Samples | None:
    """What operations are counted on where no gradient was taken."""
    if data is None:
        return None
    return SampleReader(data, objective.device).take(objective.grad_batch_size, exactly=False)


def _check_loss(
    report: Report,
    stream: GradientStream,
    old: dict[str, Tensor],
    values: dict[str, Tensor],
    damping: float,
) -> None:
    """Fill in the measured and the predicted change of the loss."""
    report.loss_samples = sum(map(len, stream.kept))
    report.loss_dense = float(torch.cat(stream.kept_losses).mean())
    report.loss_pruned = _mean_loss(stream.objective, stream.kept, values)
    if not math.isfinite(report.loss_pruned):
        report.notes.append(
            f"The loss of the pruned model is {report.loss_pruned} on the gradients' samples."
        )
    if len(report.steps) > 1:
        return  # no one quadratic model led from the dense network to the pruned one
    change = {name: values[name] - old[name] for name in old}
    report.predicted_change, report.slope = _second_order(stream.objective, stream.kept, change, damping)
