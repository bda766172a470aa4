"""The Hessian H = ∇²L of the mean loss: its diagonal by random probes, its blocks by unit vectors, and their inverses.

H v comes from differentiating twice, ∇(∇L · v), on mini-batches; no loss is differentiated per sample, so the batch
loss must be a mean over its samples.  All sums over batches are float64, the products are in the model's own dtype.
Source: LeCun, Denker & Solla, Optimal Brain Damage, 1990; WoodFisher, eqs. 2.13 and 2.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher import parts as _parts
from fastfisher.fisher.batches import Samples
from fastfisher.fisher.blocks import BlockLayout
from fastfisher.fisher.inverse import FisherInverse, _check_options
from fastfisher.fisher.objective import Objective, untouched

# d products with the Hessian and B² numbers for each block: what a small network can afford.
MAX_WEIGHTS = 10_000
# Unit vectors multiplied at once: above 64 a small network gets no faster, and the activations of all are held.
VECTORS_AT_ONCE = 64


class _Products:
    """v -> H v for the loss of one batch, from one recorded gradient.

    names: the tensors that v and H v consist of.   Raises FastFisherError where the loss has no second derivative.
    """

    def __init__(self, objective: Objective, samples: Samples, names: Iterable[str]) -> None:
        self.samples = samples
        self.why_loop: str | None = None
        self.weights = {name: weight.detach() for name, weight in objective.weights.items()}
        self.names = list(names)
        for name in self.names:
            self.weights[name].requires_grad_()
        inputs = [self.weights[name] for name in self.names]
        # the fused kernels of attention have no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = objective.loss_at(self.weights, samples)
            self.grads: dict[str, Tensor] = {}
            if loss.requires_grad:
                with self._twice():
                    found = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
                self.grads = {
                    name: grad
                    for name, grad in zip(self.names, found, strict=True)
                    if grad is not None and grad.requires_grad
                }

    @contextmanager
    def _twice(self) -> Iterator[None]:
        """Say of a failure inside that the loss cannot be differentiated twice."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            raise FastFisherError(
                f"the loss of batch {self.samples.origin[0]} cannot be differentiated twice: {text}"
            ) from error

    def times(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H v in float64, as named tensors like v."""
        inputs = [self.weights[name] for name in self.names]
        for weight in inputs:
            weight.grad = None
        if self.grads:
            # backward runs all of the graph: autograd.grad would go around a function that is differentiable only once
            with self._twice():
                torch.autograd.backward(
                    list(self.grads.values()),
                    [v[name].to(grad.dtype) for name, grad in self.grads.items()],
                    retain_graph=True,
                )
        return {
            name: torch.zeros_like(weight, dtype=torch.float64)
            if weight.grad is None
            else weight.grad.double()
            for name, weight in zip(self.names, inputs, strict=True)
        }

    def _batched(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H v of several v along a leading dimension.   Raises RuntimeError where vmap cannot trace the model."""
        inputs = [self.weights[name] for name in self.names]
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if self.grads:
            found = torch.autograd.grad(
                list(self.grads.values()),
                inputs,
                grad_outputs=[v[name].to(grad.dtype) for name, grad in self.grads.items()],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        return {
            name: torch.zeros_like(v[name], dtype=torch.float64) if part is None else part.double()
            for name, part in zip(self.names, found, strict=True)
        }

    def rows(self, vectors: Tensor, layout: BlockLayout) -> Tensor:
        """H v for every row of vectors, [c, d], at once where torch can, else one by one."""
        first, *rest = (layout.unflatten(v) for v in vectors)
        row = layout.flatten(self.times(first))[None]  # alone, for what `times` notices and the others do not
        if not rest:
            return row
        if self.why_loop is None:
            try:
                stacked = {name: torch.stack([v[name] for v in rest]) for name in self.names}
                return torch.cat([row, layout.flatten(self._batched(stacked))])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.why_loop = str(error)
        return torch.cat([row, torch.stack([layout.flatten(self.times(v)) for v in rest])])


def target_names(layout: BlockLayout, objective: Objective) -> list[str]:
    """The names of the tensors behind a layout.   Raises FastFisherError where the objective has no such weight."""
    names = list(layout.unflatten(torch.zeros(layout.num_weights, device=objective.device)))
    for name in names:
        if name not in objective.weights:
            raise FastFisherError(f"{name!r} of the layout is not among the objective's weights")
    return names


def _products(
    objective: Objective, groups: Iterable[Samples], layout: BlockLayout, seed: int
) -> Iterator[tuple[_Products, int]]:
    """The Hessian of every group's loss and the size of the group, with the model in eval mode meanwhile."""
    names = target_names(layout, objective)
    with untouched(objective.model, seed):
        for samples in groups:
            yield _Products(objective, samples, names), len(samples)


def _checked(total: Tensor, count: int, layout: BlockLayout) -> None:
    """Raises FastFisherError where there were no samples, FisherError where an entry of a row [d] is not finite."""
    if not count:
        raise FastFisherError("the Hessian needs at least one sample, the data yielded none")
    for name, values in layout.unflatten(total).items():
        if not bool(values.isfinite().all()):
            raise FisherError(
                f"the Hessian of the loss over {count} samples is not finite in {name!r}; "
                f"check the loss and the precision of the model"
            )


def hessian_diagonal(
    objective: Objective,
    groups: Iterable[Samples],
    layout: BlockLayout,
    *,
    num_probes: int = 8,
    seed: int = 0,
) -> Tensor:
    """Estimate diag H of the mean loss as the mean of z ∘ H z over random signs z (Hutchinson).

    groups: mini-batches; each takes num_probes probes of its own, for two reverse passes each.
    Returns float64 [d], unbiased; an entry may be negative, by noise or because the loss curves downwards there.
    The variance of an entry is Σ_{j≠i} H_ij² over the number of probes: a diagonal Hessian is found exactly.
    Raises FastFisherError without samples or second derivatives, FisherError where the result is not finite.
    Source: Hutchinson, 1989; Optimal Brain Damage, 1990; WoodFisher, eq. 2.20.
    """
    if isinstance(num_probes, bool) or not isinstance(num_probes, int) or num_probes < 1:
        raise FastFisherError(f"num_probes must be a whole number of at least 1, got {num_probes!r}")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(layout.num_weights, dtype=torch.float64, device=objective.device)  # [d]
    count = 0
    for hessian, size in _products(objective, groups, layout, seed):
        for _ in range(num_probes):
            signs = 2 * torch.randint(2, (layout.num_weights,), generator=generator, dtype=torch.int8) - 1
            z = signs.to(total)  # [d]
            total += (size / num_probes) * z * layout.flatten(hessian.times(layout.unflatten(z)))
        count += size
        del hessian  # its graph, before the next one is recorded
    _checked(total, count, layout)
    return total / count


def hessian_blocks(
    objective: Objective,
    groups: Iterable[Samples],
    layout: BlockLayout,
    *,
    max_weights: int = MAX_WEIGHTS,
) -> Tensor:
    """The blocks of H itself, H e_q for every weight q, symmetrised.

    Returns float64 [K, B, B] on the model's device, 0 beyond a short block.   Costs d products with H for every group.
    Raises FastFisherError above max_weights, without samples or second derivatives, FisherError where the result is
    not finite.
    """
    d, size = layout.num_weights, layout.block_size
    if d > max_weights:
        raise FastFisherError(
            f"the exact Hessian of {d} weights takes {d} Hessian-vector products for every batch, more than "
            f"max_weights={max_weights}; prune fewer targets, or use the Fisher or the Hessian's diagonal instead"
        )
    blocks = layout.blocks.to(objective.device)
    owner = torch.repeat_interleave(blocks[:, 1] - blocks[:, 0])  # [d], the block of each weight
    columns = blocks[owner, :1] + torch.arange(size, device=blocks.device)  # [d, B]
    inside = columns < blocks[owner, 1:]
    place = torch.arange(d, device=blocks.device) - blocks[owner, 0]  # [d], of each weight in its block
    H = torch.zeros(layout.num_blocks, size, size, dtype=torch.float64, device=blocks.device)
    count = 0
    for hessian, n in _products(objective, groups, layout, 0):
        for q in torch.arange(d, device=blocks.device).split(VECTORS_AT_ONCE):
            units = torch.zeros(len(q), d, dtype=torch.float64, device=blocks.device)  # [c, d]
            units[torch.arange(len(q)), q] = 1
            rows = hessian.rows(units, layout).gather(1, columns[q].clamp(max=d - 1))  # [c, B]
            H[owner[q], place[q]] += n * torch.where(inside[q], rows, 0)
        count += n
        del hessian  # its graph, before the next one is recorded
    _checked(H.sum(dim=2)[owner, place], count, layout)
    H /= count
    return (H + H.transpose(1, 2)) / 2


def _absolute(damping: float, damping_mode: str, diagonal: Tensor) -> float:
    """λ itself, or the multiple of the mean of max(h_qq, 0).   diagonal: [d]."""
    if damping_mode == "absolute":
        return damping
    mean = float(diagonal.clamp(min=0).mean())
    if not mean > 0:
        raise FastFisherError(
            "damping_mode='relative' needs a positive curvature somewhere, and the diagonal of the Hessian has none; "
            "use damping_mode='absolute'"
        )
    return damping * mean


def _inverse(
    matrix: Tensor, layout: BlockLayout, *, damping: float, count: int, dtype: torch.dtype
) -> FisherInverse:
    """The inverse of positive definite blocks [K, B, B] that hold the damping already."""
    stored = [matrix[first:last] for first, last in _parts.groups(layout, matrix.dtype, matrix.device)]
    parts, condition = _parts.primal_parts(
        # no damping here: the estimate of rounding takes roots of the diagonal, and that of H alone may be negative
        _parts.stored_source(stored, layout, 0.0),
        layout,
        num_grads=count,
        damping=damping,
        dtype=dtype,
        device=matrix.device,
    )
    return FisherInverse(
        layout, parts, form="primal", damping=damping, num_grads=count, condition=condition, dtype=dtype
    )


class _Counted:
    """Samples as they pass by, and how many there were."""

    def __init__(self, groups: Iterable[Samples]) -> None:
        self.groups = groups
        self.count = 0

    def __iter__(self) -> Iterator[Samples]:
        for samples in self.groups:
            self.count += len(samples)
            yield samples


def obd_inverse(
    objective: Objective,
    groups: Iterable[Samples],
    layout: BlockLayout,
    *,
    damping: float,
    damping_mode: str = "absolute",
    num_probes: int = 8,
    seed: int = 0,
) -> FisherInverse:
    """(max(diag H, 0) + λ)⁻¹, whose saliency is Optimal Brain Damage's with damping, ½ w_q² (max(h_qq, 0) + λ).

    Negative curvature counts as none: removing such a weight would be a gain by the quadratic model, which holds only
    near the weights, and half of the negative estimates are noise around 0; λ ranks these weights by magnitude.
    layout: with blocks of one weight.   damping: λ, or its ratio to the mean of max(h_qq, 0).
    The other arguments and the errors are those of `hessian_diagonal`.   Source: WoodFisher, eq. 2.20.
    """
    _check_options(damping, damping_mode, "primal")
    if layout.block_size != 1:
        raise FastFisherError(
            f"the diagonal of the Hessian needs a layout of block_size=1, got {layout.block_size}"
        )
    counted = _Counted(groups)
    diagonal = hessian_diagonal(objective, counted, layout, num_probes=num_probes, seed=seed)
    damping = _absolute(damping, damping_mode, diagonal)
    wide = any(weight.dtype == torch.float64 for weight in objective.weights.values())
    return _inverse(
        (diagonal.clamp(min=0) + damping)[:, None, None],
        layout,
        damping=damping,
        count=counted.count,
        dtype=torch.float64 if wide else torch.float32,
    )


def hessian_inverse(
    objective: Objective,
    groups: Iterable[Samples],
    layout: BlockLayout,
    *,
    damping: float,
    damping_mode: str = "absolute",
    max_weights: int = MAX_WEIGHTS,
) -> FisherInverse:
    """(H + λ I)⁻¹ of the blocks of the exact Hessian, float64: Optimal Brain Surgeon without the Fisher.

    layout: the blocks; block_size=None inverts the Hessian of the whole network.
    damping: λ, or its ratio to the mean of max(h_qq, 0).
    Raises FisherError where H + λ I of a block is not positive definite, as away from a minimum it need not be; the
    other arguments and errors are those of `hessian_blocks`.   Source: Hassibi & Stork, 1993; WoodFisher, eq. 2.13.
    """
    _check_options(damping, damping_mode, "primal")
    counted = _Counted(groups)
    H = hessian_blocks(objective, counted, layout, max_weights=max_weights)
    blocks = layout.blocks.to(H.device)
    diagonals = H.diagonal(dim1=1, dim2=2)  # [K, B]
    inside = torch.arange(layout.block_size, device=H.device) < blocks[:, 1:] - blocks[:, :1]
    damping = _absolute(damping, damping_mode, diagonals[inside])
    diagonals += damping
    try:
        return _inverse(H, layout, damping=damping, count=counted.count, dtype=torch.float64)
    except FisherError as error:
        lowest = torch.linalg.eigvalsh(H)[:, 0]  # [K]; the padding only adds λ to the spectrum
        b = int(lowest.argmin())
        smallest = float(lowest[b])
        raise FisherError(
            f"H + λI of {layout.describe_block(b)} (block {b} of {layout.num_blocks}) is not positive definite at "
            f"damping={damping:g}: its smallest eigenvalue is {smallest:.3g}; use a damping above "
            f"{damping - smallest:.3g} (absolute)"
        ) from error
