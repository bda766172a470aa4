"""One-shot pruning: gradients -> inverse Fisher -> saliency -> mask -> update -> weights, written at the very end.

With recomputations this way is taken several times, each a little sparser and with gradients at the point reached.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastfisher
from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.gradients import GradientStream
from fastfisher.fisher.objective import LossFn, Objective, untouched
from fastfisher.fisher.sharded import gathered
from fastfisher.memory import peak_bytes
from fastfisher.prune.flops import count_flops
from fastfisher.prune.groups import ONE_GROUP, shares_blocks
from fastfisher.prune.learner import Learner, learner_of
from fastfisher.prune.masks import unwrapped
from fastfisher.prune.plan import Sizes, checked_plan, layout_of, plan, storage_for
from fastfisher.prune.progress import Bar, Progress
from fastfisher.prune.ranks import Ranks, group_of
from fastfisher.prune.select import num_zeros
from fastfisher.prune.settings import DATA_FREE, FROM_GRADIENTS, FishLeg, Settings, layer_limits
from fastfisher.prune.steps import Clock, Outcome, Read, Run, fingerprint
from fastfisher.prune.targets import Targets, find_targets
from fastfisher.prune.update import as_parameters, written
from fastfisher.report import LayerRow, Report

__all__ = ["plan", "prune"]

# Below this share of the gradients the Fisher estimate rests on a few samples.
FEW_EFFECTIVE = 0.1


def _mean_loss(
    objective: Objective, groups: Sequence[Samples], weights: dict[str, Tensor], ranks: Ranks
) -> float:
    """Mean loss over the kept samples (mini-batches, where the gradients are means over them)."""
    with torch.no_grad():
        losses = torch.cat([objective.losses(weights, group).double() for group in groups])
    total, count = ranks.sum(float(losses.sum()), len(losses))
    return total / count


def _second_order(
    objective: Objective,
    groups: Sequence[Samples],
    change: dict[str, Tensor],
    damping: float,
    ranks: Ranks,
) -> tuple[float, float]:
    """½ δᵀ(λI + F)δ, F the Fisher of the kept samples, and (1/n) Σ g·δ over them."""
    slopes = torch.cat([objective.slopes(change, group) for group in groups])
    if objective.fisher_type == "empirical":
        curvatures = slopes**2
    else:
        curvatures = torch.cat([objective.curvatures(change, group) for group in groups])
    length = sum(float((delta.double() ** 2).sum()) for delta in change.values())
    curvature, slope, count = ranks.sum(float(curvatures.sum()), float(slopes.sum()), len(slopes))
    return 0.5 * (curvature / count + damping * length), slope / count


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
        rows.append(
            LayerRow(
                name=name,
                shape=tuple(targets.parameters[name].shape),
                weights=stop - start,
                zeros_before=int(dead[start:stop].sum()),
                zeros=int((~mask[start:stop]).sum()),
                flops=None if flops is None else _layer_flops(targets, name, flops),
                tied_to=targets.aliases[name][1:],
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


def _fill_gradients(report: Report, settings: Settings, outcome: Outcome, objective: Objective) -> None:
    if not outcome.summaries:
        return
    first = outcome.summaries[0]
    report.block_size = settings.fisher_block
    report.damping = settings.damping
    report.damping_mode = settings.damping_mode
    report.damping_used = outcome.damping
    report.form = outcome.form
    report.num_grads = settings.num_grads
    report.grad_batch_size = settings.grad_batch_size
    report.steps = outcome.steps
    report.effective_grads = first.effective
    report.non_finite_grads = sum(summary.num_non_finite for summary in outcome.summaries)
    report.data_fingerprint = first.fingerprint
    if first.effective < FEW_EFFECTIVE * settings.num_grads:
        report.notes.append(
            f"Effective number of gradients is {first.effective:.0f} of {settings.num_grads}: the model fits this "
            f"data almost perfectly; use held-out data, fisher_type='mc', or larger damping."
        )
    for summary in outcome.summaries:
        if summary.num_non_finite:
            used = (
                "" if summary.num_finite == settings.num_grads else f"; {summary.num_finite} were left to use"
            )
            report.notes.append(
                f"{summary.num_non_finite} of {summary.num_finite + summary.num_non_finite} gradients were non-finite "
                f"(first: {summary.first_non_finite}){used}."
            )
    rows = settings.method in FROM_GRADIENTS or objective.why_loop is not None
    if rows and objective.fallbacks is not None:
        report.notes.append(objective.fallbacks)
    if first.unreached:
        report.notes.append(
            f"No gradient reached {', '.join(first.unreached)}: ranked by damping times weight squared."
        )


def prune(
    model: nn.Module,
    data: Iterable[Any] | None,
    *,
    sparsity: float | None = None,
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
    fisher_type: str = "empirical",
    pattern: str = "unstructured",
    cost: str = "params",
    max_layer_sparsity: float | Mapping[str, float] = 1.0,
    fisher_average: float = 0.0,
    fishleg: FishLeg | Mapping[str, Any] | None = None,
    grad_dtype: str = "auto",
    seed: int = 0,
    progress: Progress | bool | None = None,
    memory_limit: int | str | None = None,
    process_group: Any = None,
) -> Report:
    """Set round(sparsity · d) of the d target weights to zero where the loss suffers least, and correct the others.

    data: iterable of batches (input, label) or dicts, read only as far as needed: num_grads · grad_batch_size samples
        for every estimate, in the loader's order.  Labels tell the loss: integers cross entropy, floats squared error,
        bools binary cross entropy with logits.  It may be None for methods that take no gradient.
    sparsity: the fraction of zeros; it may be left out where the pattern fixes it.
    method: "woodfisher" (blocks of the inverse Fisher), "woodtaylor" (the same with the gradient of the loss, which
        repairs what the steps before have done too), "fishleg" (an inverse that is learned and kept between steps),
        "diagonal" (blocks of one); "kfac" (Kronecker factors), "hessian" (blocks of the Hessian, for small networks),
        "obd" (its diagonal); "magnitude" and "random" (no gradients).
    scope: "global" ranks all weights together, "layer" gives every tensor the same share; what rounding leaves
        over goes to the tensors with the largest remainders.
    block_size: B, weights per Fisher block; None for one block over everything.
    grad_batch_size: 1 for per-sample gradients, n for means over mini-batches of n.
    damping: λ, added to the Fisher's diagonal ("absolute", the paper's), or the multiple of its mean diagonal to add
        ("relative", which needs no tuning from network to network).
    update: of the kept weights: "sum" (the paper's), "joint" (exact for all removed weights of a block together),
        "greedy" (weights are chosen one at a time, each after the correction for those before), None, or "auto":
        "joint" with recomputations, "greedy" for a single step ("sum" where blocks exceed 256 weights and for "kfac",
        "joint" for "fishleg" in tiles).  Only for methods with blocks, "kfac" and "fishleg".
    num_recomputations: how often gradients and inverse are made anew on the way to the final sparsity, each time at the
        point reached and for the weights that are left; None: as often as the sparsity calls for (12 times to 80 %).
        The data are read on, and from the beginning again at their end.
    centered: the covariance of the gradients in place of the Fisher, for "woodtaylor".
    fisher_type: "empirical" (the labels of the data), "mc" (labels drawn from the prediction) or "exact" (the sum over
        all outputs, num_grads samples with as many rows each).
    pattern: "unstructured", "2:4" or any N:M along the input dimension, "block4" or other whole blocks.  Tensors that
        cannot take it stay dense and are listed in the report.
    cost: "params", or "flops" to rank by loss per operation.
    max_layer_sparsity: the most that a tensor may lose, for all or by name or glob.
    targets, ignore: names, module names or globs, with or without ".weight"; by default Linear and convolution weights.
    loss_fn: loss_fn(model, batch) -> one number, the mean over the batch.  For per-sample gradients it is called with
        batches of one sample, under torch.func.vmap.  The model it gets is the same object, in eval mode.
    eval_fn: eval_fn(model) -> number or dict of numbers, called for the dense model, for global magnitude at the same
        sparsity, and for the pruned model; always in eval mode.
    fisher_average: β, the share of the estimates before in F ← β F + (1 − β) F_new, for "woodfisher".
    fishleg: options of method="fishleg", a mapping or `FishLeg`.
    grad_dtype: of the gradients on their way into the estimate: "auto" (float32, float64 where a weight is), "float32",
        "bfloat16" or "float16", which take half the memory; what they overflow or lose altogether counts as not finite.
        For "woodfisher", "woodtaylor" and "diagonal".
    seed: of torch's generators while this function runs; their state is restored.
    progress: None for a line with phase and remaining time on a terminal, True for one anywhere, False for none; or a
        function: progress(phase, done, total) is called after every piece of gradients.
    memory_limit: bytes or a text like "8 GB" for what a run needs beyond the model; by default what is free.  Blocks
        that do not fit at once are worked on in groups, see `plan`.
    process_group: processes that hold the same weights and prune them together, each with data of its own, num_grads in
        all; by default those of DistributedDataParallel around the model.  Every process calls with the same arguments.

    The model is changed in place, at the very end: on any error or interrupt it is bit for bit as it was.  Weights keep
    dtype, memory and ties; zeros that are there already stay and count.
    Raises FastFisherError (a ValueError) on bad input, FisherError where the arithmetic breaks down.
    Source: WoodFisher (Singh & Alistarh, 2020), sections 2, 3 and 5.
    """
    return prune_once(
        model,
        data,
        Settings.of(locals()),
        targets=targets,
        ignore=ignore,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        progress=progress,
        memory_limit=memory_limit,
        process_group=process_group,
    )


def prune_once(
    model: nn.Module,
    data: Iterable[Any] | None,
    settings: Settings,
    *,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: Callable[[nn.Module], Any] | None = None,
    progress: Progress | bool | None = None,
    memory_limit: int | str | None = None,
    title: str = "prune",
    learner: Learner | None = None,
    process_group: Any = None,
) -> Report:
    """`prune` with settings that are checked already, among them such as its keywords cannot express.

    title: what stands before the progress.
    learner: what earlier prunings have learned, with method="fishleg" or a fisher_average; it learns on.
    """
    ranks = Ranks(process_group or group_of(model))
    model = unwrapped(model)
    with gathered(model):
        with ranks.together("the checks"):
            found = find_targets(model, targets, ignore)
            found.take(model, settings.rule)
            layout = layout_of(found, settings)
            groups, limit = checked_plan(layout, settings, found, memory_limit, ranks=ranks.size)
            most = layer_limits(settings, layout)
            needs_data = settings.method not in DATA_FREE
            if (needs_data or settings.cost == "flops") and data is None:
                what = (
                    f"method={settings.method!r} needs data to take gradients from"
                    if needs_data
                    else "cost='flops' needs a sample"
                )
                raise FastFisherError(f"{what}; got None")
        ranks.same(
            "the settings", f"{settings} for {layout.names} of {[tuple(shape) for shape in layout.shapes]}"
        )
        groups = max(ranks.objects(groups))
        bar = Bar(progress, f"{title} to {100 * settings.sparsity:.3g} %")
        clock = Clock(entered=bar.phase)

        # draws of their own for samples of their own
        shift = ranks.rank if shares_blocks(settings) else 0
        with bar, untouched(model, settings.seed + shift):
            old = {name: parameter.detach() for name, parameter in found.parameters.items()}
            wide = torch.float64 if any(p.dtype == torch.float64 for p in old.values()) else torch.float32
            weight = layout.flatten({name: value.to(wide) for name, value in old.items()})  # [d]
            # compared in the model's own dtype: nothing nonzero there becomes zero in a wider one
            dead = weight == 0
            if not bool(torch.isfinite(weight).all()):
                name = next(name for name, value in old.items() if not bool(torch.isfinite(value).all()))
                raise FastFisherError(f"{name!r} holds weights that are not finite")
            if ranks.size > 1:
                ranks.same("the weights", fingerprint(weight))
            objective = Objective(
                model,
                list(found.parameters),
                loss_fn=loss_fn,
                grad_batch_size=settings.grad_batch_size,
                fisher_type=settings.fisher_type,
            )
            dense = control = None
            if eval_fn is not None:
                with clock("evaluate"):
                    dense = _number(eval_fn(model))

            notes = [
                f"Left dense, {name} cannot take {settings.pattern}: {why}."
                for name, why in found.unfit.items()
            ]
            reader, num_grads = None, settings.num_grads
            with ranks.together("the data"):
                if data is not None:
                    reader = SampleReader(data, found.device)
            if reader is not None and needs_data:
                known = None if reader.known is None else reader.known // settings.grad_batch_size
                num_grads = ranks.shares(settings.num_grads, known)
                reader.repeat = num_grads * settings.grad_batch_size
                if any(ranks.objects(reader.once)) and settings.num_recomputations is None:
                    settings = replace(settings, num_recomputations=0)
                    notes.append(
                        "The data can be read only once, so there was one step without recomputations."
                    )
            counted, costs = None, None
            if settings.cost == "flops" and reader is not None and data is not None:
                sample = reader.peek() if reader.once else _some_samples(data, objective)
                counted = None if sample is None else count_flops(objective, model, sample)
                counted = ranks.objects(counted)[0]  # of the first one's samples
                costs = _costs(found, layout, counted[1] if counted else {})
            learner = learner or learner_of(model, layout, settings)
            sizes = Sizes.of(layout, wide.itemsize)
            storage = ONE_GROUP
            if groups > 1:
                with ranks.together("the plan"), clock("plan"):
                    storage = storage_for(
                        model, data, objective, settings, layout, sizes, groups, limit, ranks=ranks.size
                    )
                storage = ranks.objects(storage)[0]
                notes.append(f"{storage}.")
            run = Run(
                layout,
                settings,
                found.parameters,
                clock,
                bar,
                costs=costs,
                most=most,
                learner=learner,
                storage=storage,
                ranks=ranks,
                num_grads=num_grads,
            )
            if reader is None or not needs_data:
                outcome = run.without_gradients(weight, ~dead)
            else:
                if settings.fisher_type == "exact":
                    with ranks.together("the data"):
                        each = objective.rows_per_sample(_first(reader))
                        _, limit = checked_plan(layout, settings, found, memory_limit, each, ranks.size)
                outcome = run.with_gradients(weight, ~dead, objective, reader, limit)
                objective.weights = old
            stream = outcome.first
            values = as_parameters(outcome.new, outcome.mask, layout, found.parameters)
            if counted is None and data is not None:
                sample = (
                    stream.kept[0].narrow(0, settings.grad_batch_size)
                    if stream
                    else _some_samples(data, objective)
                )
                counted = None if sample is None else count_flops(objective, model, sample)
            total_flops, flops = counted or (None, None)

            report = Report(
                method=settings.method,
                scope=settings.scope,
                sparsity=float(settings.sparsity),
                update=settings.chosen_update,
                num_weights=layout.num_weights,
                num_zeros=int((~outcome.mask).sum()),
                zeros_before=int(dead.sum()),
                layers=_layer_rows(found, layout, dead, outcome.mask, flops),
                frozen=found.frozen,
                unfit=dict(found.unfit),
                pattern=settings.pattern,
                seed=settings.seed,
                device=str(found.device),
                versions=_versions(),
                command=_command(),
                notes=notes,
            )
            _fill_gradients(report, settings, outcome, objective)
            if report.num_zeros > num_zeros(settings.sparsity, layout.num_weights):
                report.notes.append(
                    f"{report.zeros_before:,} weights were zero before, in places more than asked for; all stay zero."
                )
            if stream is not None and outcome.damping is not None:
                with clock("loss check"):
                    _check_loss(report, stream, old, values, outcome, run.ranks)

            if eval_fn is not None and settings.method != "magnitude":
                with clock("evaluate"):
                    rival = replace(
                        settings, method="magnitude", scope="global", fisher_type="empirical", centered=False
                    )
                    run = Run(layout, rival, found.parameters, clock, None)
                    by_size = run.without_gradients(weight, ~dead)
                    magnitude = as_parameters(by_size.new, by_size.mask, layout, found.parameters)
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


def _first(reader: SampleReader) -> Samples:
    """The first sample, which stays to be read."""
    sample = reader.peek()
    if sample is None:
        raise FastFisherError("the loader yields no sample")
    return sample


def _some_samples(data: Iterable[Any], objective: Objective) -> Samples | None:
    """What operations are counted on where no gradient was taken."""
    return SampleReader(data, objective.device).take(objective.grad_batch_size, exactly=False)


def _layer_flops(targets: Targets, name: str, flops: Mapping[str, float]) -> float:
    """Operations per sample of the modules that use a tensor."""
    return sum(flops.get(alias.rpartition(".")[0], 0.0) for alias in targets.aliases[name])


def _costs(targets: Targets, layout: BlockLayout, flops: Mapping[str, float]) -> Tensor:
    """Operations per sample that each weight takes part in, [d]."""
    costs = torch.empty(layout.num_weights, dtype=torch.float64, device=targets.device)
    for name, (start, stop) in layout.parameter_ranges.items():
        count = _layer_flops(targets, name, flops)
        if not count:
            raise FastFisherError(
                f"cost='flops': no operation of {name!r} was counted in a forward pass; name it in ignore"
            )
        costs[start:stop] = count / (stop - start)
    return costs


def _check_loss(
    report: Report,
    stream: GradientStream | Read,
    old: dict[str, Tensor],
    values: dict[str, Tensor],
    outcome: Outcome,
    ranks: Ranks,
) -> None:
    """Fill in the measured and the predicted change of the loss, on the samples that all processes have kept."""
    report.loss_samples = ranks.count(sum(map(len, stream.kept)))[0]
    report.loss_dense = outcome.summaries[0].loss
    report.loss_pruned = _mean_loss(stream.objective, stream.kept, values, ranks)
    if not math.isfinite(report.loss_pruned):
        report.notes.append(
            f"The loss of the pruned model is {report.loss_pruned} on the gradients' samples."
        )
    if len(report.steps) > 1 or outcome.damping is None:
        return  # no one quadratic model led from the dense network to the pruned one
    change = {name: values[name] - old[name] for name in old}
    report.predicted_change, report.slope = _second_order(
        stream.objective, stream.kept, change, outcome.damping, ranks
    )
