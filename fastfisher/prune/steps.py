"""The steps of one call: gradients -> inverse Fisher -> saliency -> mask -> update, each from where the last ended."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from fastfisher.fisher.gradients import KEPT_GRADS, GradientStream
from fastfisher.fisher.hessian import hessian_inverse, obd_inverse
from fastfisher.fisher.inverse import FisherInverse
from fastfisher.fisher.kfac import KFACInverse, kfac_inverse
from fastfisher.fisher.objective import Objective
from fastfisher.prune import saliency
from fastfisher.prune.groups import ONE_GROUP, GroupedInverse, Storage, shares_blocks, timed
from fastfisher.prune.learner import Learner
from fastfisher.prune.progress import Progress
from fastfisher.prune.ranks import Ranks
from fastfisher.prune.select import select
from fastfisher.prune.settings import FROM_GRADIENTS, Settings
from fastfisher.prune.surgeon import product_of
from fastfisher.prune.update import as_parameters, updated
from fastfisher.report import StepRow

# How many samples the methods without gradients of their own see at once.
GROUP = 64
# How often the step along the gradient is made shorter, each time by a third or more.
SHORTER = 8

Inverse = FisherInverse | FishLegInverse | KFACInverse


@dataclass
class Clock:
    """Seconds per phase, added up; a phase inside another counts for itself.   entered: called when a phase begins."""

    seconds: dict[str, float] = field(default_factory=dict)
    entered: Callable[[str], None] | None = None
    _inside: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.entered is not None:
            self.entered(phase)
        self._count()
        self._inside.append(phase)
        try:
            yield
        finally:
            self._count()
            self._inside.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._inside:
            phase = self._inside[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


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


@dataclass(frozen=True)
class Summary:
    """What the gradients of one step were like, on all processes."""

    effective: float
    num_finite: int
    num_non_finite: int
    first_non_finite: str | None
    unreached: list[str]
    fingerprint: str
    loss: float  # mean over the kept samples

    @classmethod
    def of(cls, stream: GradientStream | Read, ranks: Ranks) -> Summary:
        """Of the gradients that each process has taken."""
        losses = torch.cat(stream.kept_losses)
        if ranks.size == 1 or not isinstance(stream, GradientStream):
            return cls(
                stream.effective,
                stream.num_finite,
                stream.num_non_finite,
                stream.first_non_finite,
                stream.unreached,
                stream.fingerprint,
                float(losses.mean()),
            )
        squares, fourth, loss = ranks.sum(stream.sum_squares, stream.sum_fourth, float(losses.sum()))
        finite, wrong, kept = ranks.count(stream.num_finite, stream.num_non_finite, len(losses))
        told = ranks.objects((stream.first_non_finite, stream.unreached, stream.fingerprint))
        first = next((f"rank {rank}, {text}" for rank, (text, _, _) in enumerate(told) if text), None)
        unreached = [name for name in stream.unreached if all(name in names for _, names, _ in told)]
        data = hashlib.blake2b(" ".join(text for _, _, text in told).encode(), digest_size=8).hexdigest()
        effective = squares**2 / fourth if fourth > 0 else 0.0
        return cls(effective, finite, wrong, first, unreached, data, loss / kept)


@dataclass
class Outcome:
    """What the gradients led to, before the model is written."""

    new: Tensor  # [d]
    mask: Tensor  # bool [d]
    form: str | None = None
    damping: float | None = None  # λ of the last step
    first: GradientStream | Read | None = None  # of this process
    summaries: list[Summary] = field(default_factory=list)  # one for each step
    steps: list[StepRow] = field(default_factory=list)


class Run:
    """The steps of one call: gradients, inverse, mask and update, from the point that the step before has reached.

    costs: what each weight costs in floating-point operations [d]; saliencies are told per operation.
    most: zeros that each tensor may have.   learner: what is kept from one step to the next.
    storage: in how many groups blocks are worked on.   ranks: the processes that do so together.
    num_grads: how many of the settings' gradients this process takes.
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
        storage: Storage | None = None,
        ranks: Ranks | None = None,
        num_grads: int | None = None,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.parameters = parameters
        self.clock = clock
        self.progress = progress
        self.costs = costs
        self.most = most
        self.learner = learner
        self.storage = storage or ONE_GROUP
        self.everyone = ranks or Ranks()
        self.shared = self.everyone.size > 1 and shares_blocks(settings)
        # where blocks are not shared, samples are, and every process does everything
        self.ranks = self.everyone if self.shared else Ranks()
        self.num_grads = settings.num_grads if num_grads is None else num_grads

    def select(self, scores: Tensor, mask: Tensor, sparsity: float, owner: Tensor | None = None) -> Tensor:
        """The next mask from the saliency of every weight, [d] of the whole network.   owner: see `select.select`."""
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
            ranks=self.ranks,
            owner=owner,
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
            source = reader if self.everyone.size == 1 or self.shared else self._gathered(reader)
            stream: GradientStream | Read
            with self.everyone.together("the data"):
                if self.settings.method in FROM_GRADIENTS:
                    stream = GradientStream(
                        objective,
                        source,
                        layout,
                        num_grads=self.num_grads if self.shared else self.settings.num_grads,
                        memory_limit=limit,
                        dtype=self.settings.grad_dtype,
                        keep_samples=self.storage.groups > 1 and self.storage.gradients == "recomputed",
                    )
                else:
                    stream = self._read(objective, source, layout)
            self._step(found, sparsity, stream, i, len(targets), limit)
        if self.everyone.size > 1 and not self.shared:
            # what each has done for itself may differ by rounding
            first = [[(0, len(found.new))]] + [[(0, 0)]] * (self.everyone.size - 1)
            self.everyone.share(found.new, first)
            self.everyone.share(found.mask, first)
        return found

    def _gathered(self, reader: SampleReader) -> SampleReader:
        """The samples of one step, from all processes."""
        with self.everyone.together("the data"), self.clock("data"):
            count = self.num_grads * self.settings.grad_batch_size
            groups = list(reader.groups(GROUP, reader.seen + count))
        return SampleReader(self.everyone.samples(groups), reader.device)

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
        self,
        found: Outcome,
        sparsity: float,
        stream: GradientStream | Read,
        i: int,
        steps: int,
        limit: int,
    ) -> None:
        settings, layout, ranks = self.settings, stream.layout, self.ranks

        def advance(done: int) -> None:
            if self.progress is not None:
                total = self.num_grads if self.shared else settings.num_grads
                self.progress("gradients", i * total + done, steps * total)

        inverse: Inverse | GroupedInverse
        if isinstance(stream, Read):
            with self.clock("inverse"):
                inverse = self._rival(stream)
            stream.groups.clear()
            advance(stream.num_finite)
        elif self.learner is not None:
            inverse = self._learned(self.learner, stream, found.mask, advance)
        else:
            inverse = GroupedInverse(
                stream, settings, self.storage, ranks, enter=self.clock, advance=advance, limit=limit
            )
        # (start, stop, inverse) of every group that this process owns; all there is, but for a GroupedInverse
        groups: Iterable[tuple[int, int, Inverse]] = [(0, layout.num_weights, inverse)]  # type: ignore[list-item]
        spans: list[list[tuple[int, int]]] = []
        owner = None
        if isinstance(inverse, GroupedInverse):
            groups, spans = inverse, inverse.spans
            if ranks.size > 1:
                owner = layout.scatter(inverse.owners() + 1) - 1
        weight = layout.gather(found.new)
        if settings.method == "woodtaylor" and isinstance(stream, GradientStream):
            weight = weight - self._taken(groups, spans, stream).to(weight.dtype)
        scores = None
        with ranks.together("the saliencies"), self.clock("select"):
            for start, stop, some in groups:
                score = self._scores(weight[start:stop], some)
                if len(score) == len(weight):
                    scores = score
                else:
                    scores = score.new_zeros(len(weight)) if scores is None else scores
                    scores[start:stop] = score
                del some, score  # before the next group is made
        if scores is None:  # a process that owns no block
            scores = torch.zeros_like(weight)
        with self.clock("select"):
            mask = layout.gather(self.select(layout.scatter(scores), found.mask, sparsity, owner))
        del scores
        greedy = settings.chosen_update == "greedy" and settings.rule.size == 1 and self.most is None
        new = torch.where(mask, weight, 0)
        with ranks.together("the update"), self.clock("update"):
            if greedy or settings.applied_update is not None:
                for start, stop, some in groups:
                    kept = mask[start:stop]
                    if greedy and isinstance(some, FisherInverse):
                        kept = mask[start:stop] = saliency.no_worse(kept, weight[start:stop], some)
                    new[start:stop] = updated(weight[start:stop], kept, some, settings.applied_update)
                    del some
        ranks.share(new, spans)
        ranks.share(mask, spans)
        found.new, found.mask = layout.scatter(new), layout.scatter(mask)
        found.form, found.damping = inverse.form, float(inverse.damping)
        self.everyone.same("the mask", fingerprint(found.mask))
        if self.learner is not None:
            with self.clock("inverse"):
                self.learner.remove(found.mask)
        summary = Summary.of(stream, ranks)
        found.summaries.append(summary)
        found.steps.append(
            StepRow(
                sparsity=float((~found.mask).sum()) / len(found.mask),
                loss_before=summary.loss,
                effective_grads=summary.effective,
                damping_used=found.damping,
                auxiliary=None if self.learner is None else self.learner.last,
            )
        )
        if found.first is None:
            found.first = stream  # the loss is checked on its samples

    def _learned(
        self, learner: Learner, stream: GradientStream, live: Tensor, advance: Callable[[int], None]
    ) -> Inverse:
        """What is kept, after these gradients; FishLeg's blocks are written out."""

        def pieces() -> Iterator[Tensor]:
            for piece in timed(iter(stream), self.clock):
                # rows of one sample add up
                yield piece * each**0.5 if fishleg and each > 1 else piece
                advance(stream.num_finite)

        each, fishleg = stream.rows_per_grad, self.settings.method == "fishleg"
        rows = self.settings.num_grads * each
        product = product_of(stream.layout, stream.objective, stream.kept, self.settings)
        with self.clock("inverse"):
            learned = learner.learn(pieces(), live, num_rows=rows, product=product)
        return (
            learned.blockwise()
            if isinstance(learned, FishLegInverse) and self.settings.has_blocks
            else learned
        )

    def _rival(self, read: Read) -> Inverse:
        """The inverses of the papers' rivals."""
        settings = self.settings
        of: dict[str, Any] = {"damping": settings.damping, "damping_mode": settings.damping_mode}
        args = (read.objective, read.groups, read.layout)
        if settings.method == "obd":
            return obd_inverse(*args, seed=settings.seed, **of)
        if settings.method == "hessian":
            return hessian_inverse(*args, **of)
        return kfac_inverse(*args, fisher_type=settings.fisher_type, seed=settings.seed, **of)

    def _scores(self, weight: Tensor, finv: Inverse) -> Tensor:
        """The saliency of every weight of the inverse's layout."""
        if not self.settings.has_blocks or not isinstance(finv, FisherInverse):
            return self._summed(finv.saliency(weight))
        if self.settings.chosen_update == "greedy":
            return saliency.greedy(weight, finv, self.settings.rule)
        return saliency.obs(weight, finv, self.settings.rule)

    def _taken(
        self,
        groups: Iterable[tuple[int, int, Inverse]],
        spans: Sequence[Sequence[tuple[int, int]]],
        stream: GradientStream,
    ) -> Tensor:
        """What is taken of the step u = F⁻¹ ∇L: t u, 0 <= t <= 1, the minimum along u under the Fisher without blocks.

        Blocks do not know of each other, and together they overshoot where each goes all the way: t = 1 / ρ but for the
        damping, ρ = Σ (Σ_b g_b·u_b)² / Σ Σ_b (g_b·u_b)², the curvature without blocks over that of the blocks.  ρ is
        taken from the kept samples; as a ratio it hardly depends on which of the few large gradients are among them.
        Then their loss is looked at, which may bend far more than the Fisher of the gradients tells (see `_shortened`).
        """
        layout, ranks = stream.layout, self.ranks
        u, mean = torch.zeros(2, layout.num_weights, dtype=torch.float64, device=stream.objective.device)
        damping = 0.0
        with ranks.together("the Newton step"), self.clock("step length"):
            for start, stop, finv in groups:
                assert isinstance(finv, FisherInverse)
                assert finv.mean is not None
                u[start:stop], mean[start:stop], damping = saliency.newton_step(finv), finv.mean, finv.damping
                del finv
        ranks.share(u, spans)
        ranks.share(mean, spans)
        blocks = layout.blocks.to(u.device)
        slope, seen, whole, apart, product = float(mean @ u), 0.0, 0.0, 0.0, torch.empty_like(u)
        with ranks.together("the step length"), self.clock("step length"):
            for group in stream.kept:
                grads, _ = stream.objective.gradients(group)
                rows = torch.cat([layout.rows(name, grads[name]) for name in layout.names], dim=1)  # [k, d]
                along = (rows @ u.to(rows.dtype)).double()  # [k]
                seen += float(along.sum())
                if self.settings.centered:
                    rows -= mean.to(rows.dtype)
                    along -= slope
                whole += float(along.square().sum())
                ops.fisher_vector_product(rows, blocks, len(rows), u[:, None], out=product[:, None])
                apart += len(rows) * float(u @ product)
        seen, whole, apart = ranks.sum(seen, whole, apart)
        damping = max(ranks.objects(damping))  # a process that owns no block knows none
        ridge = damping * float(u.square().sum())
        curvature = ridge + (slope - ridge) * (whole / apart if apart > 0 else 1.0)
        if not curvature > 0:
            return u
        return u * self._shortened(min(1.0, slope / curvature), u, slope, seen, stream)

    def _shortened(self, t: float, u: Tensor, slope: float, seen: float, stream: GradientStream) -> float:
        """t, or less: until the loss falls by a quarter of t times its slope (a parabola does by half of it).

        The gradient of a mean over P positions, or samples, has 1/P of the loss's curvature as its second moment where
        they do not depend on each other, so that F⁻¹ ∇L is up to P times too long for a model of sequences.
        The kept samples tell how the loss bends, their change of loss less that by their own slopes, of sum `seen`; the
        slope is that of all.  Each time t goes to the minimum of the parabola through what was measured, by a third or
        more.
        """
        objective, step = stream.objective, stream.layout.unflatten(u)

        def loss(t: float) -> float:
            with self.ranks.together("the step length"), self.clock("step length"), torch.no_grad():
                moved = {
                    name: w - t * step[name].reshape(w.shape).to(w) for name, w in objective.weights.items()
                }
                losses = torch.cat([objective.losses(moved, group) for group in stream.kept]).double()
            total, count = self.ranks.sum(float(losses.sum()), len(losses))
            return total / count

        losses = torch.cat(stream.kept_losses)
        total, count = self.ranks.sum(float(losses.sum()), len(losses))
        for _ in range(SHORTER):
            change = loss(t) - total / count + t * (seen / count - slope)
            if change <= -t * slope / 4:
                break
            t = slope * t**2 / (2 * (change + t * slope)) if math.isfinite(change) else t / 10
        return t


def fingerprint(vector: Tensor) -> str:
    """A hash of a vector's bits."""
    bits = vector.contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(bits.data, digest_size=16).hexdigest()
