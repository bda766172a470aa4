"""What a pruning run will cost: bytes and seconds per phase, before anything runs.

Bytes are counted from the sizes.  Seconds are measured and scaled: one micro-batch is differentiated, and the Fisher of
a few blocks is built from random gradients, on this machine, in well under a second each.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.errors import DoesNotFitError, FastFisherError
from fastfisher.fisher import offload
from fastfisher.fisher.batches import SampleReader
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.gradients import ACTIVATION_FACTOR, GRAD_DTYPES, KEPT_GRADS, GradientStream, chunks
from fastfisher.fisher.inverse import FisherAccumulator, choose_form
from fastfisher.fisher.kronecker import tile_side
from fastfisher.fisher.objective import COLUMNS, LossFn, Objective, untouched
from fastfisher.fisher.parts import slab_bytes
from fastfisher.fisher.sharded import gathered
from fastfisher.memory import format_bytes, free_bytes, parse_bytes, peak_of
from fastfisher.prune import saliency
from fastfisher.prune.groups import ONE_GROUP, Storage, shares_blocks
from fastfisher.prune.masks import unwrapped
from fastfisher.prune.ranks import Ranks, group_of
from fastfisher.prune.select import keep_mask
from fastfisher.prune.settings import DATA_FREE, FROM_GRADIENTS, FishLeg, Settings
from fastfisher.prune.surgeon import BATCH_BYTES
from fastfisher.prune.targets import Targets, find_targets
from fastfisher.prune.update import updated
from fastfisher.report import align

# Micro-batches may use this much beside the Fisher, and less where less is free.
GRADIENT_BYTES = 1 << 30
# Vectors [d] alive at the end: old and new weights (flat and shaped), saliency, diag F⁻¹, masks, scratch.
FLAT_VECTORS = 8
# Of where a weight is that is left, after the first step.
INDEX_BYTES = 8
# Multiply-adds of one calibration run.
CALIBRATION = 1e9
# Of the gradients in it, were they float64.
CALIBRATION_BYTES = 128 << 20
# Of memory written for the first time, to see how long that takes: too many for what the C library keeps.
NEW_BYTES = 64 << 20
# Scratch of matrix products, and memory that is free and not given back (measured 34 to 66 MB on seven runs).
KEPT_BY_LIBRARIES = 48 << 20
# A forward, in gradients of the same samples.
FORWARD = 0.3


@dataclass(frozen=True)
class Phase:
    """One phase: the bytes it needs at once beyond the model, and its estimated seconds (None: not measured)."""

    name: str
    bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.  free is None where the system does not say; largest_block is None where nothing fits.

    gradients: how they come about, "" where that was not tried.
    """

    sizes: Sizes
    num_grads: int
    form: str
    phases: tuple[Phase, ...]
    free: int | None
    device: str
    storage: Storage = ONE_GROUP
    largest_block: int | None = None
    notes: tuple[str, ...] = ()
    gradients: str = ""

    @property
    def peak_bytes(self) -> int:
        """Bytes the run needs beyond the model: those of the largest phase."""
        return max(phase.bytes for phase in self.phases)

    @property
    def resident_bytes(self) -> int:
        """The same and what the C library and matrix products keep beside on a CPU: how much a process grows."""
        return self.peak_bytes + (KEPT_BY_LIBRARIES if self.device == "cpu" else 0)

    @property
    def seconds(self) -> float | None:
        """The whole run without eval_fn; None where the gradients could not be timed."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None

    @property
    def fits(self) -> bool:
        """Whether the peak is within what is free."""
        return self.free is None or self.peak_bytes <= self.free

    @property
    def refusal(self) -> str:
        """The sentence for a run that does not fit."""
        block = None if self.sizes.single_block else self.sizes.block_size
        found = f"Largest that fits: {self.largest_block}." if self.largest_block else "No block size fits."
        return (
            f"block_size={block} needs {format_bytes(self.peak_bytes)}; "
            f"free on {self.device}: {format_bytes(self.free or 0)}. {found}"
        )

    def __str__(self) -> str:
        rows = [["phase", "memory", "seconds"]]
        rows += [[phase.name, format_bytes(phase.bytes), _seconds(phase.seconds)] for phase in self.phases]
        rows.append(["all", format_bytes(self.peak_bytes), _seconds(self.seconds)])
        sizes = self.sizes
        head = f"{sizes.num_weights:,} weights"
        if self.form != "none":
            blocks = (
                "one block"
                if sizes.single_block
                else f"{sizes.num_blocks:,} blocks of up to {sizes.block_size}"
            )
            head += f" in {blocks}, {self.num_grads} gradients, {self.form} form"
        if self.storage.groups > 1 and self.fits:
            head += f"\n{self.storage}"
        free = "unknown" if self.free is None else format_bytes(self.free)
        foot = f"free on {self.device}: {free}" if self.fits else self.refusal
        if self.fits and self.resident_bytes > self.peak_bytes and self.form != "none":
            grows = format_bytes(self.resident_bytes)
            foot += f"; with what libraries keep the process grows by about {grows}"
        how = [f"gradients: {self.gradients}"] if self.gradients else []
        return "\n".join([head, align(rows), foot, *how, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Sizes:
    """The numbers that cost follows from: d, K, B, whether one block holds everything, bytes of one number.

    row_itemsize: bytes of one number of a gradient, 0 for the same.
    """

    num_weights: int
    num_blocks: int
    block_size: int
    single_block: bool
    itemsize: int
    factors: int = 0  # bytes of Kronecker factors
    row_itemsize: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one gradient where gradients are collected."""
        return self.num_weights * (self.row_itemsize or self.itemsize)

    @classmethod
    def of(cls, layout: BlockLayout, itemsize: int) -> Sizes:
        """The numbers of a layout."""
        return cls(layout.num_weights, layout.num_blocks, layout.block_size, layout.single_block, itemsize)

    def form(self, num_grads: int) -> str:
        """The form that the accumulator will choose."""
        return choose_form("auto", num_grads, self.block_size)

    def fisher_bytes(self, num_grads: int) -> tuple[int, int]:
        """Bytes of the Fisher while gradients arrive, and of its inverse."""
        if self.factors:
            return self.factors, self.factors + 8 * self.num_weights
        if self.form(num_grads) == "dual":
            # the gradients are stored once; the factor is float64
            stored = num_grads * self.row_bytes
            return stored, stored + 8 * self.num_blocks * num_grads**2
        # accumulated in float64, and emptied group by group as the inverse fills
        padded = self.num_blocks * self.block_size**2
        return 8 * padded, 8 * padded

    def operations(self, num_grads: int) -> float:
        """Multiply-adds of building the inverse."""
        if self.form(num_grads) == "dual":
            return self.num_blocks * (num_grads**2 * self.block_size + num_grads**3 / 3)
        return self.num_blocks * (num_grads * self.block_size**2 + self.block_size**3)

    def base_bytes(self, settings: Settings) -> int:
        """Bytes of what is there throughout: the weights, the dead ones, and from the second step on their places."""
        places = INDEX_BYTES if settings.num_recomputations != 0 else 0
        return (2 * self.itemsize + 1 + places) * self.num_weights

    def part(self, parts: int) -> float:
        """The largest share of the blocks that one of so many equal parts holds."""
        return -(-self.num_blocks // parts) / self.num_blocks

    def phase_bytes(
        self,
        settings: Settings,
        limit: int,
        activation: int,
        rows_per_grad: int = 1,
        *,
        parts: int = 1,
        samples: int = 0,
        scratch: int | None = None,
        slab: int = 0,
    ) -> dict[str, int]:
        """Bytes per phase when the gradients may take `limit`, and a sample's activations take `activation`.

        parts: into which the blocks are cut, of which one is at hand.   samples: bytes of those that are kept.
        scratch: measured bytes of a micro-batch, in place of what `chunks` takes for safe.   slab: bytes by which the
        inverse is ahead of the Fisher that it takes the place of.
        """
        num_rows = settings.num_grads * rows_per_grad
        vectors = FLAT_VECTORS * self.num_weights * self.itemsize
        if settings.method in DATA_FREE:
            return {"select": vectors}
        if settings.num_recomputations != 0:
            vectors += 2 * INDEX_BYTES * self.num_weights
        row = self.row_bytes
        rows, micro = chunks(row, num_rows, limit, activation)
        base = self.base_bytes(settings) + samples
        buffer = rows * row  # which are handed over at once
        fisher, inverse = (math.ceil(self.part(parts) * n) for n in self.fisher_bytes(num_rows))
        arriving = 0
        if settings.method == "woodtaylor":
            arriving = 8 * (min(self.num_weights, COLUMNS) * rows + 2 * self.num_weights)  # sums in float64
        if scratch is None:
            scratch = micro * (max(row, self.num_weights * self.itemsize) + ACTIVATION_FACTOR * activation)
        ahead = fisher  # of the inverse, while the Fisher goes
        if self.form(num_rows) != "dual" and not self.factors:
            ahead += min(inverse, slab)
        if settings.chosen_update == "greedy":
            vectors += 4 * 8 * self.num_weights  # order, losses, and saliencies in order
        return {
            "gradients": base + buffer + fisher + scratch,
            "fisher": base + buffer + fisher + arriving,
            "inverse": base + max(ahead, inverse),
            "select and update": vectors + inverse,
        }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _largest_block(layout: BlockLayout, sizes: Sizes, settings: Settings, free: int, slab: int) -> int | None:
    """The largest of 1, 2, 5, 10, 20, 50, ... below the block asked for that fits with one gradient at a time."""
    candidates = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    for size in reversed([size for size in candidates if size < sizes.block_size]):
        count = sum(-(-(stop - start) // size) for start, stop in layout.parameter_ranges.values())
        smaller = replace(sizes, num_blocks=count, block_size=size, single_block=False)
        if max(smaller.phase_bytes(settings, 1, 0, parts=count, slab=slab).values()) <= free:
            return size
    return None


def byte_plan(
    layout: BlockLayout,
    settings: Settings,
    targets: Targets,
    memory_limit: int | str | None,
    activation: int = 0,
    rows_per_grad: int = 1,
    *,
    ranks: int = 1,
    samples: int = 0,
    scratch: int | None = None,
) -> tuple[Plan, int]:
    """The plan without seconds, and the bytes that the gradients may take beside the Fisher.

    activation: bytes of one sample's activations, 0 where they are not known.   rows_per_grad: outer products that a
    sample gives, more than 1 for fisher_type "exact".   ranks: processes that share the blocks.
    samples: bytes of those that stay to recompute gradients from, with more than one group.
    scratch: measured bytes that a micro-batch takes, None where it was not.
    The blocks are worked on in as few groups as fit; where even groups of one block do not, the plan says so.
    """
    num_rows = settings.num_grads * rows_per_grad
    if settings.method == "hessian":
        num_rows = max(num_rows, layout.block_size)  # its blocks are always there as such
    wide = any(parameter.dtype == torch.float64 for parameter in targets.parameters.values())
    sizes = Sizes.of(layout, 8 if wide or settings.method == "hessian" else 4)
    narrow = GRAD_DTYPES[settings.grad_dtype]
    if narrow is not None:
        sizes = replace(sizes, row_itemsize=narrow.itemsize)
    if settings.method == "kfac":
        sides = [(len(p), p.numel() // len(p)) for p in targets.parameters.values()]
        # both factors, their eigenvectors, and scratch for making those
        sizes = replace(sizes, factors=sum(3 * 8 * (out**2 + inputs**2) for out, inputs in sides))
    if settings.method == "fishleg":
        sizes = replace(sizes, factors=_fishleg_bytes(layout, settings, sizes.itemsize))
    free = free_bytes(targets.device) if memory_limit is None else parse_bytes(memory_limit)
    parts_apart = shares_blocks(settings)
    slab = slab_bytes(targets.device) * sizes.itemsize // 8

    def at(groups: int) -> tuple[Plan, int]:
        parts = groups * ranks if parts_apart else 1
        kept = samples if groups > 1 else 0
        limit = GRADIENT_BYTES
        if free is not None and settings.method not in DATA_FREE:
            fisher = math.ceil(sizes.part(parts) * max(sizes.fisher_bytes(num_rows)))
            limit = max(1, min(limit, free - fisher - sizes.base_bytes(settings) - kept))
        phases = sizes.phase_bytes(
            settings,
            limit,
            activation,
            rows_per_grad,
            parts=parts,
            samples=kept,
            scratch=scratch,
            slab=slab,
        )
        return Plan(
            sizes=sizes,
            num_grads=settings.num_grads,
            form="none" if settings.method in DATA_FREE else sizes.form(num_rows),
            phases=tuple(Phase(*item) for item in phases.items()),
            free=free,
            device=str(targets.device),
            storage=Storage(groups=groups),
        ), limit

    groups, most = 1, max(1, layout.num_blocks // ranks) if parts_apart else 1
    plan, limit = at(groups)
    while not plan.fits and groups < most:
        groups = min(most, max(groups + 1, groups * 5 // 4))
        plan, limit = at(groups)
    if not plan.fits and free is not None and parts_apart:
        plan = replace(plan, largest_block=_largest_block(layout, sizes, settings, free, slab))
    return plan, limit


def checked_plan(
    layout: BlockLayout,
    settings: Settings,
    targets: Targets,
    memory_limit: int | str | None,
    rows_per_grad: int = 1,
    ranks: int = 1,
) -> tuple[int, int]:
    """Groups of blocks, and bytes the gradients may take beside one.   Raises DoesNotFitError where nothing fits."""
    found, limit = byte_plan(
        layout, settings, targets, memory_limit, rows_per_grad=rows_per_grad, ranks=ranks
    )
    if not found.fits:
        raise DoesNotFitError(found.refusal)
    return found.storage.groups, limit


def choose_storage(
    sizes: Sizes,
    settings: Settings,
    groups: int,
    device: torch.device,
    *,
    num_rows: int,
    gradients: float | None,
    inverse: float,
    samples: int,
    ranks: int = 1,
) -> Storage:
    """What is cheapest to do with gradients and inverses while other groups of blocks are worked on.

    gradients: seconds that all of them take, None where that is not known.   inverse: seconds to build all groups.
    samples: bytes that must stay in CPU memory to recompute gradients from.
    Raises DoesNotFitError where there is room for nothing that would do.
    """
    rows_bytes = num_rows * sizes.row_bytes // ranks
    state_bytes = num_rows * sizes.row_bytes + 8 * sizes.num_blocks * num_rows**2
    if sizes.form(num_rows) != "dual":
        state_bytes = sizes.num_blocks * sizes.block_size**2 * sizes.itemsize
    state_bytes //= ranks
    visits = 2 + (settings.method == "woodtaylor") - (settings.chosen_update is None)
    free = free_bytes(torch.device("cpu"))
    # labels that are drawn would be drawn anew
    again = gradients is not None and settings.fisher_type != "mc" and (free is None or samples <= free // 2)
    options: list[tuple[float, Storage]] = []
    for stored_rows, stored_states in itertools.product((False, True), repeat=2):
        if (not stored_rows and not again) or (stored_states and visits == 1):
            continue
        nbytes = rows_bytes * stored_rows + state_bytes * stored_states
        place = offload.place_for(nbytes, device)
        if place is None:
            continue
        storage = Storage(
            groups,
            "stored" if stored_rows else "recomputed",
            "stored" if stored_states else "rebuilt",
            place,
            nbytes,
            visits=visits,
        )
        if nbytes:
            write, read = offload.seconds_per_byte(place, device)
            moved = rows_bytes * stored_rows * (write + storage.builds * read)
            moved += state_bytes * stored_states * (write + (visits - 1) * read)
            storage = replace(storage, seconds=moved)
        computed = storage.passes * (gradients or 0.0) + storage.builds * inverse
        options.append((computed + storage.seconds, storage))
    if not options:
        raise DoesNotFitError(
            f"{format_bytes(rows_bytes)} of gradients fit neither into memory_limit nor into the folder of temporary "
            f"files; set TMPDIR to a larger one, or take fewer gradients"
        )
    options.sort(key=lambda option: option[0])
    (seconds, best), rest = options[0], options[1:]
    why = f"{seconds:.2g} s a step"
    if gradients is None:
        why = "the data can be read only once"
    elif settings.fisher_type == "mc":
        why = "labels would be drawn anew"
    elif rest:
        second = rest[0][1]
        why += (
            f", against {rest[0][0]:.2g} s with gradients {second.gradients} and inverses {second.inverses}"
        )
    return replace(best, why=why)


def storage_for(
    model: nn.Module,
    data: Iterable[Any] | None,
    objective: Objective,
    settings: Settings,
    layout: BlockLayout,
    sizes: Sizes,
    groups: int,
    limit: int,
    *,
    ranks: int = 1,
) -> Storage:
    """`choose_storage` from what gradients and inverses take on this machine."""
    if groups == 1:
        return ONE_GROUP
    device, gradients, samples, each = objective.device, None, 0, 1
    if data is not None and not isinstance(data, Iterator):
        with untouched(model, settings.seed):
            cost = _gradient_cost(data, objective, settings, limit, layout)
        gradients, samples, each = cost.seconds, cost.samples, cost.rows_per_grad
    num_rows = settings.num_grads * each
    rows, _ = chunks(sizes.row_bytes, num_rows, limit)
    seconds = _fisher_seconds(sizes, settings, device, num_rows, rows)
    return choose_storage(
        sizes,
        settings,
        groups,
        device,
        num_rows=num_rows,
        gradients=None if gradients is None else gradients / ranks,
        inverse=(seconds["fisher"] + seconds["inverse"]) / ranks,
        samples=samples // ranks,
        ranks=ranks,
    )


def _fishleg_bytes(layout: BlockLayout, settings: Settings, itemsize: int) -> int:
    """What FishLeg's inverse takes: its state, twice while a step may be taken back, and the gradients of a fit."""
    options = settings.options
    numbers = 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        start, stop = layout.parameter_ranges[name]
        if "kron" in options.parameterization and len(shape) > 1:
            largest = options.tile if options.parameterization == "block-kron" else None
            rows, columns = shape[0], (stop - start) // shape[0]
            a, b = (tile_side(n, largest) for n in (rows, columns))
            # both factors, the moments behind them, scale and diagonal
            numbers += -(-rows // a) * -(-columns // b) * 2 * (a * a + b * b + a * b)
        else:
            # R and Q, both written out
            numbers += 2 * (stop - start) * (layout.block_size if settings.has_blocks else 1)
    batch = min(BATCH_BYTES, settings.num_grads * layout.num_weights * itemsize)
    return 2 * numbers * itemsize + batch


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the second of two runs, and its result: the first pays for threads and caches."""
    run()
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _fisher_seconds(
    sizes: Sizes, settings: Settings, device: torch.device, num_grads: int, rows: int
) -> dict[str, float]:
    """Seconds of every phase after the gradients, from a problem of the same form that is small enough to try.

    rows: gradients that come at once.
    """
    if sizes.form(num_grads) == "dual":
        m, b = min(num_grads, 256), min(sizes.block_size, 4096)
    else:
        m, b = min(num_grads, 256), min(sizes.block_size, 256)
    one = replace(sizes, num_blocks=1, block_size=b, num_weights=b)
    count = int(
        max(1, min(sizes.num_blocks, CALIBRATION // one.operations(m), CALIBRATION_BYTES // (m * b * 8)))
    )
    if sizes.single_block:
        count = 1
    small = replace(one, num_blocks=count, num_weights=count * b)
    scale = sizes.operations(num_grads) / small.operations(m)
    dtype = torch.float64 if sizes.itemsize == 8 else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    grads = torch.randn(m, count * b, generator=generator, device=device, dtype=dtype)  # [m, d]
    weight = torch.randn(count * b, generator=generator, device=device, dtype=dtype)  # [d]
    layout = BlockLayout(["calibration"], [(count * b,)], None if sizes.single_block else b)

    def fill() -> FisherAccumulator:
        # a damping of the size of the gradients: no block needs mending
        accumulator = FisherAccumulator(
            layout,
            num_grads=m,
            damping=1.0,
            damping_mode=settings.damping_mode,
            mean=settings.method == "woodtaylor",
        )
        for piece in grads.split(rows):
            accumulator.add(piece)
        return accumulator

    def choose() -> Tensor:
        greedy = settings.chosen_update == "greedy" and settings.rule.size == 1
        scores = saliency.greedy(weight, finv, settings.rule) if greedy else finv.saliency(weight)
        mask = keep_mask(scores, weight == 0, int(settings.sparsity * len(weight)))
        if greedy:
            mask = saliency.no_worse(mask, weight, finv)
        return updated(weight, mask, finv, settings.applied_update)

    added, _ = _timed(fill)
    both, finv = _timed(lambda: fill().finish())
    chosen, _ = _timed(choose)
    by_block = settings.applied_update == "joint" and sizes.form(num_grads) != "dual"
    more = sizes.num_blocks * sizes.block_size**3 / (count * b**3) if by_block else 1.0
    fresh = _seconds_per_new_byte(device)
    fisher, inverse = sizes.fisher_bytes(num_grads)
    return {
        "fisher": added * scale + fresh * fisher,
        "inverse": max(both - added, 0.0) * scale + fresh * inverse / 2,
        "select and update": chosen * max(more, sizes.num_weights / small.num_weights),
    }


def _seconds_per_new_byte(device: torch.device) -> float:
    """What the first write into memory takes more than the second: pages must be found and cleared."""
    if device.type != "cpu":
        return 0.0
    start = time.perf_counter()
    memory = torch.empty(NEW_BYTES, dtype=torch.uint8).zero_()
    once = time.perf_counter()
    memory.zero_()
    return max(0.0, 2 * once - start - time.perf_counter()) / NEW_BYTES


@dataclass(frozen=True)
class GradientCost:
    """Of all gradients of one step: seconds, bytes of the samples; of one: bytes of activations, rows.

    scratch: bytes of all tensors beside the rows while a micro-batch is differentiated, None where it was not measured.
    """

    seconds: float
    samples: int
    activation: int
    rows_per_grad: int
    scratch: int | None = None


def _gradient_cost(
    data: Iterable[Any], objective: Objective, settings: Settings, limit: int, layout: BlockLayout
) -> GradientCost:
    """Measured on the loader's first samples."""
    # of its own, which reads nothing
    stream = GradientStream(objective, iter(()), layout, num_grads=1, dtype=settings.grad_dtype)
    row = layout.num_weights * stream.dtype.itemsize
    reader = SampleReader(data, objective.device)
    per_sample = settings.grad_batch_size == 1
    samples = reader.peek() if per_sample else reader.take(settings.grad_batch_size, exactly=False)
    activation = objective.activation_bytes(samples) if samples is not None else 0
    if per_sample:
        samples = reader.take(chunks(row, settings.num_grads, limit, activation)[1], exactly=False)
    if samples is None:
        raise FastFisherError(f"num_grads={settings.num_grads} but the loader yields 0 samples.")
    if not per_sample:  # of a loader shorter than one mini-batch, the rest is like what there is
        activation = activation * settings.grad_batch_size // len(samples)
    scratch, each = None, objective.rows_per_sample(samples.narrow(0, 1))
    if settings.fisher_type == "exact" or len(samples) < settings.grad_batch_size:
        seconds, _ = _timed(lambda: objective.gradients(samples))
    else:
        few, batch = len(samples) if per_sample else 1, [samples.batch()]

        def gradients() -> None:
            again = GradientStream(
                objective, batch, layout, num_grads=few, memory_limit=limit, dtype=settings.grad_dtype
            )
            for _ in again:
                pass

        seconds, _ = _timed(gradients)
    if settings.fisher_type != "exact":
        out = torch.empty(
            len(samples) if per_sample else 1, layout.num_weights, dtype=stream.dtype, device=objective.device
        )
        scratch = peak_of(lambda: stream.differentiate(samples, out))
        if not per_sample:
            scratch = scratch * settings.grad_batch_size // len(samples)
    times = settings.num_grads * settings.grad_batch_size / len(samples)
    return GradientCost(seconds * times, int(samples.nbytes * times), activation, each, scratch)


def plan(
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
    memory_limit: int | str | None = None,
    process_group: Any = None,
) -> Plan:
    """What `prune` with the same arguments will need: bytes and estimated seconds per phase.  The model is not changed.

    data: as for `prune`; the first micro-batch is read.  An iterator that can be read only once is left alone, and the
    gradients are then not timed.   memory_limit: bytes or a text like "8 GB", by default what is free.
    process_group: as for `prune`; the plan is that of one process.
    Raises FastFisherError on bad input; a run that does not fit is no error here, see `fits` and `refusal`.
    """
    settings = Settings.of(locals())
    ranks = Ranks(process_group or group_of(model)).size
    model = unwrapped(model)
    with gathered(model):
        found = find_targets(model, targets, ignore)
        found.take(model, settings.rule)
        return _planned(model, data, settings, found, loss_fn, memory_limit, ranks)


def _planned(
    model: nn.Module,
    data: Iterable[Any] | None,
    settings: Settings,
    found: Targets,
    loss_fn: LossFn | None,
    memory_limit: int | str | None,
    ranks: int,
) -> Plan:
    layout = layout_of(found, settings)
    rough, limit = byte_plan(layout, settings, found, memory_limit, ranks=ranks)
    if settings.method in DATA_FREE or not rough.fits:
        return rough
    if settings.method not in FROM_GRADIENTS or settings.method == "fishleg":
        note = f"Only gradients and blocks of a Fisher are timed; method={settings.method!r} does without."
        return replace(rough, notes=(note,))
    zeros = sum(int((parameter == 0).sum()) for parameter in found.parameters.values())
    before = zeros / layout.num_weights
    steps = settings.targets_of_steps(before)
    seconds: dict[str, float] = {}
    price = GradientCost(0.0, 0, 0, 1)
    notes: tuple[str, ...] = ()
    how = ""
    timed = data is not None and not isinstance(data, Iterator)
    if data is None or not timed:
        notes = ("The gradients were not timed: the data can be read only once, or there is none.",)
    else:
        with untouched(model, settings.seed):
            objective = Objective(
                model,
                list(found.parameters),
                loss_fn=loss_fn,
                grad_batch_size=settings.grad_batch_size,
                fisher_type=settings.fisher_type,
            )
            price = _gradient_cost(data, objective, settings, limit, layout)
            seconds["gradients"] = price.seconds * len(steps) / ranks
            how = _counted(objective.explain().values())
            if objective.fallbacks is not None:
                notes = (objective.fallbacks,)
    # every step differentiates the whole network, and works on the blocks of the weights that are left
    work = sum(1 - sparsity for sparsity in [before, *steps[:-1]]) / ranks
    num_rows = settings.num_grads * price.rows_per_grad
    rows, _ = chunks(rough.sizes.row_bytes, num_rows, limit, price.activation)
    once_each = _fisher_seconds(rough.sizes, settings, found.device, num_rows, rows)
    seconds |= {phase: time * work for phase, time in once_each.items()}
    final, _ = byte_plan(
        layout,
        settings,
        found,
        memory_limit,
        price.activation,
        price.rows_per_grad,
        ranks=ranks,
        samples=price.samples // ranks,
        scratch=price.scratch,
    )
    if final.fits and final.storage.groups > 1:
        storage = choose_storage(
            final.sizes,
            settings,
            final.storage.groups,
            found.device,
            num_rows=num_rows,
            gradients=price.seconds / ranks if timed else None,
            inverse=(once_each["fisher"] + once_each["inverse"]) / ranks,
            samples=price.samples // ranks,
            ranks=ranks,
        )
        final = replace(final, storage=storage, phases=(*final.phases, Phase("offload", 0)))
        factors = {"gradients": storage.passes, "fisher": storage.builds, "inverse": storage.builds}
        seconds = {phase: time * factors.get(phase, 1) for phase, time in seconds.items()}
        seconds["offload"] = storage.seconds * work
    if timed:
        # the loss of the first samples before and after, and after a single step its second-order change
        kept = price.seconds / ranks * min(1.0, KEPT_GRADS / settings.num_grads)
        seconds["loss check"] = kept * (FORWARD + (len(steps) == 1))
        final = replace(final, phases=(*final.phases, Phase("loss check", 0)))
        if settings.method == "woodtaylor":
            seconds["step length"] = kept * (1 + FORWARD) * len(steps)
            final = replace(final, phases=(*final.phases, Phase("step length", 0)))
    phases = tuple(replace(phase, seconds=seconds.get(phase.name)) for phase in final.phases)
    return replace(final, phases=phases, notes=notes, gradients=how)


def _counted(words: Iterable[str]) -> str:
    """Each of the words once, with how often it came."""
    return "; ".join(f"{count} x {word}" for word, count in Counter(words).most_common())


def layout_of(targets: Targets, settings: Settings) -> BlockLayout:
    """The targets in one flat order, cut into the blocks of the method."""
    shapes = [tuple(parameter.shape) for parameter in targets.parameters.values()]
    group = settings.rule.size if settings.has_blocks else 1
    return BlockLayout(
        list(targets.parameters), shapes, settings.fisher_block, group=group, last=targets.last
    )
