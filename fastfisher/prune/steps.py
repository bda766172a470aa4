"""The steps of one call: gradients -> inverse Fisher -> saliency -> mask -> update, each from where the last ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import SampleReader, Samples
from fastfisher.fisher.blocks import BlockLayout, LiveLayout
from fastfisher.fisher.fishleg import FishLegInverse
from fastfisher.fisher.gradients import KEPT_GRADS, GradientStream, Objective
from fastfisher.fisher.hessian import hessian_inverse, obd_inverse
from fastfisher.fisher.inverse import FisherAccumulator, FisherInverse
from fastfisher.fisher.kfac import KFACInverse, kfac_inverse
from fastfisher.prune import saliency
from fastfisher.prune.learner import Learner
from fastfisher.prune.progress import Progress
from fastfisher.prune.select import select
from fastfisher.prune.settings import FROM_GRADIENTS, Settings
from fastfisher.prune.surgeon import product_of
from fastfisher.prune.update import as_parameters, updated
from fastfisher.report import StepRow

# How many samples the methods without gradients of their own see at once.
GROUP = 64


@dataclass
class Clock:
    """Seconds per phase, added up.   entered: called with each phase when it begins."""

    seconds: dict[str, float] = field(default_factory=dict)
    entered: Callable[[str], None] | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.entered is not None:
            self.entered(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Read:
    """What a method that takes no gradient of its own has read, told like a GradientStream.

    groups: all samples, emptied once they are used.
    """

    objective: Objective
    layout: BlockLayout
    groups: list[Samples]
    fingerprint: str
    num_finite: int = 0
    kept: list[Samples] = field(default_factory=list)  # the first samples, for the loss before and after
    kept_losses: list[Tensor] = field(default_factory=list)
    num_non_finite: int = 0
    first_non_finite: str | None = None
    unreached: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_finite = sum(map(len, self.groups)) // self.objective.grad_batch_size
        for group in self.groups:
            if sum(map(len, self.kept)) < KEPT_GRADS:
                self.kept.append(group)
                self.kept_losses.append(self.objective.losses(self.objective.weights, group).double())

    @property
    def effective(self) -> float:
        return float(self.num_finite)


@dataclass
class Outcome:
    """What the gradients led to, before the model is written."""

    new: Tensor  # [d]
    mask: Tensor  # bool [d]
    form: str | None = None
    damping: float | None = None  # λ of the last step
    streams: list[GradientStream | Read] = field(default_factory=list)  # one for each step
    steps: list[StepRow] = field(default_factory=list)


def _timed(pieces: Iterator[Tensor], clock: Clock) -> Iterator[Tensor]:
    while True:
        with clock("gradients"):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


class Run:
    """The steps of one call: gradients, inverse, mask and update, from the point that the step before has reached.

    costs: what each weight costs in floating-point operations [d]; saliencies are told per operation.
    most: zeros that each tensor may have.   learner: what is kept from one step to the next.
    """

    def __init__(
        self,
        layout: BlockLayout,
        settings: Settings,
        parameters: dict[str, nn.Parameter],
        clock: Clock,
        progress: Progress | None,
        *,
        costs: Tensor | None = None,
        most: Sequence[int] | None = None,
        learner: Learner | None = None,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.parameters = parameters
        self.clock = clock
        self.progress = progress
        self.costs = costs
        self.most = most
        self.learner = learner

    def select(self, scores: Tensor, mask: Tensor, sparsity: float) -> Tensor:
        """The next mask from the saliency of every weight, [d] of the whole network."""
        if self.costs is not None:
            scores = scores / self.costs
        return select(
            scores,
            ~mask,
            sparsity,
            scope=self.settings.scope,
            ranges=list(self.layout.parameter_ranges.values()),
            pattern=self.settings.rule,
            most=self.most,
        )

    def _summed(self, scores: Tensor) -> Tensor:
        """Saliencies of single weights, which for whole blocks add up."""
        size = self.settings.rule.together
        return scores.view(-1, size).sum(dim=1).repeat_interleave(size) if size > 1 else scores

    def without_gradients(self, weight: Tensor, mask: Tensor) -> Outcome:
        """Magnitude or random pruning: one step."""
        with self.clock("select"):
            if self.settings.method == "random":
                # drawn on the CPU: the same weights on every device
                scores = torch.rand(len(weight), dtype=torch.float64).to(weight.device)
            else:
                scores = saliency.magnitude(weight)
            mask = self.select(self._summed(scores), mask, self.settings.sparsity)
        return Outcome(torch.where(mask, weight, 0), mask)

    def with_gradients(
        self, weight: Tensor, mask: Tensor, objective: Objective, reader: SampleReader, limit: int
    ) -> Outcome:
        """Every step takes gradients where the one before has ended, over the weights that it has left.

        weight: [d].   mask: bool [d], False where a weight is zero already.
        """
        found = Outcome(weight, mask)
        targets = self.settings.targets_of_steps(float((~mask).sum()) / len(mask))
        for i, sparsity in enumerate(targets):
            if i:
                with self.clock("update"):
                    objective.weights = as_parameters(found.new, found.mask, self.layout, self.parameters)
            # K-FAC's Fisher of some weights of a layer is no Kronecker product, and what is kept keeps its blocks
            all_live = self.settings.method == "kfac" or self.learner is not None or bool(found.mask.all())
            layout = self.layout if all_live else LiveLayout(self.layout, found.mask)
            stream: GradientStream | Read
            if self.settings.method in FROM_GRADIENTS:
                stream = GradientStream(
                    objective,
                    reader,
                    layout,
                    num_grads=self.settings.num_grads,
                    memory_limit=limit,
                    dtype=self.settings.grad_dtype,
                )
            else:
                stream = self._read(objective, reader, layout)
            self._step(found, sparsity, stream, i, len(targets))
        return found

    def _read(self, objective: Objective, reader: SampleReader, layout: BlockLayout) -> Read:
        """The samples of one step."""
        settings = self.settings
        wanted = settings.num_grads * settings.grad_batch_size
        before = reader.seen
        with self.clock("data"):
            groups = list(reader.groups(GROUP, before + wanted))
        if reader.seen - before < wanted:
            raise FastFisherError(
                f"num_grads={settings.num_grads} but the loader yields {reader.seen - before} samples."
            )
        return Read(objective, layout, groups, reader.fingerprint)

    def _step(
        self, found: Outcome, sparsity: float, stream: GradientStream | Read, i: int, steps: int
    ) -> None:
        settings, layout = self.settings, stream.layout

        def advance(done: int) -> None:
            if self.progress is not None:
                self.progress("gradients", i * settings.num_grads + done, steps * settings.num_grads)

        finv: FisherInverse | FishLegInverse | KFACInverse
        if isinstance(stream, Read):
            with self.clock("inverse"):
                finv = self._rival(stream)
            stream.groups.clear()
            advance(stream.num_finite)
        elif self.learner is not None:
            finv = self._learned(self.learner, stream, found.mask, advance)
        else:
            finv = self._estimate(stream, advance)
        weight = layout.gather(found.new)
        if isinstance(stream, GradientStream) and isinstance(finv, FisherInverse) and finv.mean is not None:
            weight = weight - self._taken(saliency.newton_step(finv), finv, stream).to(weight.dtype)
        with self.clock("select"):
            mask = self.select(layout.scatter(self._scores(weight, finv)), found.mask, sparsity)
            free = settings.rule.size == 1 and self.most is None
            if settings.chosen_update == "greedy" and free and isinstance(finv, FisherInverse):
                mask = layout.scatter(saliency.no_worse(layout.gather(mask), weight, finv))
        with self.clock("update"):
            new = layout.scatter(updated(weight, layout.gather(mask), finv, settings.applied_update))
        found.new, found.mask, found.form, found.damping = new, mask, finv.form, float(finv.damping)
        if self.learner is not None:
            with self.clock("inverse"):
                self.learner.remove(mask)
        found.streams.append(stream)
        found.steps.append(
            StepRow(
                sparsity=float((~mask).sum()) / len(mask),
                loss_before=float(torch.cat(stream.kept_losses).mean()),
                effective_grads=stream.effective,
                damping_used=found.damping,
                auxiliary=None if self.learner is None else self.learner.last,
            )
        )
        if i:
            stream.kept.clear()  # the loss is checked on the first samples alone

    def _estimate(self, stream: GradientStream, advance: Callable[[int], None]) -> FisherInverse:
        settings = self.settings
        accumulator = FisherAccumulator(
            stream.layout,
            num_grads=settings.num_grads,
            num_rows=settings.num_grads * stream.rows_per_grad,
            damping=settings.damping,
            damping_mode=settings.damping_mode,
            mean=settings.method == "woodtaylor",
            centered=settings.centered,
        )
        for piece in _timed(iter(stream), self.clock):
            with self.clock("fisher"):
                accumulator.add(piece)
            advance(stream.num_finite)
        with self.clock("inverse"):
            return accumulator.finish()

    def _learned(
        self, learner: Learner, stream: GradientStream, live: Tensor, advance: Callable[[int], None]
    ) -> FisherInverse | FishLegInverse:
        """What is kept, after these gradients; FishLeg's blocks are written out."""

        def pieces() -> Iterator[Tensor]:
            for piece in _timed(iter(stream), self.clock):
                # rows of one sample add up
                yield piece * each**0.5 if fishleg and each > 1 else piece
                advance(stream.num_finite)

        each, fishleg = stream.rows_per_grad, self.settings.method == "fishleg"
        rows = self.settings.num_grads * each
        product = product_of(stream.layout, stream.objective, stream.kept, self.settings)
        started, before = time.perf_counter(), self.clock.seconds.get("gradients", 0.0)
        learned = learner.learn(pieces(), live, num_rows=rows, product=product)
        seconds = time.perf_counter() - started - (self.clock.seconds["gradients"] - before)
        self.clock.seconds["inverse"] = self.clock.seconds.get("inverse", 0.0) + seconds
        return (
            learned.blockwise()
            if isinstance(learned, FishLegInverse) and self.settings.has_blocks
            else learned
        )

    def _rival(self, read: Read) -> FisherInverse | KFACInverse:
        """The inverses of the papers' rivals."""
        settings = self.settings
        of: dict[str, Any] = {"damping": settings.damping, "damping_mode": settings.damping_mode}
        args = (read.objective, read.groups, read.layout)
        if settings.method == "obd":
            return obd_inverse(*args, seed=settings.seed, **of)
        if settings.method == "hessian":
            return hessian_inverse(*args, **of)
        return kfac_inverse(*args, fisher_type=settings.fisher_type, seed=settings.seed, **of)

    def _scores(self, weight: Tensor, finv: FisherInverse | FishLegInverse | KFACInverse) -> Tensor:
        """The saliency of every weight of the inverse's layout."""
        if not self.settings.has_blocks or not isinstance(finv, FisherInverse):
            return self._summed(finv.saliency(weight))
        if self.settings.chosen_update == "greedy":
            return saliency.greedy(weight, finv, self.settings.rule)
        return saliency.obs(weight, finv, self.settings.rule)

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
