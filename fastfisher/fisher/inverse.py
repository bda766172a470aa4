"""The inverse empirical Fisher F⁻¹ = (λ I + (1/m) Σ g gᵀ)⁻¹ in blocks: one interface, whatever form lies behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfisher import ops
from fastfisher.errors import FastFisherError, FisherError
from fastfisher.fisher import parts as _parts
from fastfisher.fisher.blocks import BlockLayout, covered, padded
from fastfisher.fisher.parts import Part
from fastfisher.fisher.streaming import streamed
from fastfisher.ops.memory import empty_state, zero_state
from fastfisher.ops.threads import torch_on_one_thread

FORMS = ("auto", "primal", "dual", "rank1", "woodbury")
DAMPING_MODES = ("absolute", "relative")
UPDATES = ("sum", "joint")
_TILE = 4096


class FisherInverse:
    """F⁻¹ of every block, ready for diagonals, products, saliencies and updates.  Made by `from_grads` or an
    accumulator.

    layout: the blocks.   form: "primal", "dual", "rank1" or "woodbury", as it was built.   damping: λ,
    absolute.
    num_grads: m.   condition: float64 [K], of the diagonally scaled matrix behind each block as spd_inverse_ or
    dual_factor_ returns it, NaN where none exists.
    dtype: of diagonals and of primal states; mended blocks are float64.
    mean: the mean gradient, float64 [d], where it was asked for.
    """

    def __init__(
        self,
        layout: BlockLayout,
        parts: Sequence[Part],
        *,
        form: str,
        damping: float,
        num_grads: int,
        condition: Tensor,
        dtype: torch.dtype,
        mean: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.parts = list(parts)
        self.form = form
        self.damping = damping
        self.num_grads = num_grads
        self.condition = condition
        self.dtype = dtype
        self.mean = mean
        self._diagonal: Tensor | None = None

    @classmethod
    @torch_on_one_thread()
    def from_grads(
        cls,
        grads: Tensor | Mapping[str, Tensor],
        *,
        block_size: int | None,
        damping: float,
        damping_mode: str = "absolute",
        num_grads: int | None = None,
        form: str = "auto",
        sizes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> FisherInverse:
        """F⁻¹ of F = λ I + (1/m) Σ g gᵀ in blocks of B weights, from all gradients at once.

        grads: [k, d] float16/bfloat16/float32/float64 with unit inner stride, or named tensors [k, *shape].
        block_size: B; None makes one block over everything.
        damping: λ itself, or with damping_mode="relative" λ over the mean of the Fisher diagonal.
        num_grads: m, the divisor, when these are not all gradients; default k.
        form: "auto" takes "primal" for k >= B and "dual" below; "rank1" and "woodbury" update a running
        inverse.
        sizes: of the parameter tensors that [k, d] consists of; no block crosses one.   Default: one tensor.
        device: where the inverse is built; default, where the gradients are.  Gradients in CPU memory stream to a GPU
        while it works on those before them, if their memory is pinned.
        Raises FastFisherError on wrong input, FisherError where float64 cannot hold a block.
        Source: WoodFisher, eqs. 3.1 to 3.5.
        """
        layout, flat, own = _flat_grads(grads, block_size, sizes)
        m = _checked_num_grads(flat, num_grads)
        _check_options(damping, damping_mode, form)
        form = choose_form(form, flat.shape[0], layout.block_size)
        if damping_mode == "relative":
            damping = absolute_damping(damping, float(sum_of_squares(flat)) / (m * layout.num_weights))
        if device is not None and torch.device(device) != flat.device:
            accumulator = FisherAccumulator(
                layout, num_grads=m, num_rows=flat.shape[0], damping=damping, form=form, device=device
            )
            accumulator.add(flat)
            return accumulator.finish()
        dtype = _parts.state_dtype(flat.dtype)
        if form == "dual":
            state = flat if own else empty_state(tuple(flat.shape), flat.dtype, flat.device).copy_(flat)
            parts, condition = _parts.dual_parts(state, layout, num_grads=m, damping=damping)
        elif form == "primal":
            source = _parts.grads_source(flat, layout, m, damping)
            parts, condition = _parts.primal_parts(
                source, layout, num_grads=m, damping=damping, dtype=dtype, device=flat.device
            )
        else:
            parts, condition = _parts.running_parts(flat, layout, form=form, num_grads=m, damping=damping)
        return cls(layout, parts, form=form, damping=damping, num_grads=m, condition=condition, dtype=dtype)

    @property
    def block_size(self) -> int:
        """B, the size of the largest block allowed."""
        return self.layout.block_size

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.layout.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.parts[0].state.device

    @property
    def num_mended(self) -> int:
        """How many blocks float32 could not hold, so that they are kept in float64."""
        if self.dtype == torch.float64:
            return 0
        return sum(
            len(part.block_ids)
            for part in self.parts
            if part.kind == "primal" and part.state.dtype != self.dtype
        )

    def __repr__(self) -> str:
        return (
            f"FisherInverse({self.layout.num_weights} weights, {self.num_blocks} blocks of up to {self.block_size}, "
            f"form={self.form!r}, num_grads={self.num_grads}, damping={self.damping:g}, mended={self.num_mended})"
        )

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, a new [d] in the dtype of the inverse."""
        return self._inv_diag().clone()

    def mul(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """F⁻¹ v, new.

        v: [d], [d, n], or named tensors of the layout's shapes; the result has the same form.  float32 and
        float64 are kept, half precision comes back as float32.   Raises FastFisherError on another shape,
        dtype or device.
        """
        if isinstance(v, Mapping):
            return self.layout.unflatten(self.mul(self.layout.flatten(v)))
        wide = checked_vectors(v, self.layout.num_weights)
        x = v.detach().to(wide).reshape(self.layout.num_weights, -1).contiguous()  # [d, n]
        out = torch.empty_like(x)
        for part in self.parts:
            if part.refine:
                self._refined_product(part, x, out)
            else:
                ops.block_matvec(
                    part.state, part.blocks, x, out=out, factor=part.factor, damping=self.damping
                )
        return out.reshape(v.shape)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Any:
        """F⁻¹ @ v, the same as `mul`."""
        return self.mul(v)

    def saliency(self, weight: Tensor) -> Tensor:
        """ρ = w² / (2 diag F⁻¹), what removing each weight alone costs.   weight: [d] float32/float64;
        returns the like.

        Source: WoodFisher, eq. 2.13.
        """
        check_weight(weight, self.layout.num_weights)
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        ops.obs_saliency(weight.detach().contiguous(), self._inv_diag(), out=out)
        return out

    def group_saliency(self, weight: Tensor, size: int) -> Tensor:
        """½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q of every `size` consecutive weights Q, what removing them together costs.

        weight: [d] float32/float64; each block holds a multiple of `size`.   Returns float64 [d / size].
        Raises FisherError where F⁻¹[Q, Q] is not positive definite.   Source: WoodFisher, eq. 2.13, for many weights.
        """
        check_weight(weight, self.layout.num_weights)
        lengths = self.layout.blocks[:, 1] - self.layout.blocks[:, 0]
        if int((lengths % size).max()):
            b = int((lengths % size).argmax())
            raise FastFisherError(
                f"groups of {size} do not fill {self.layout.describe_block(b)}, which holds {int(lengths[b])} weights"
            )
        out = torch.empty(self.layout.num_weights // size, dtype=torch.float64, device=weight.device)
        rows = weight.detach().double().view(-1, size, 1)  # [d / size, size, 1]
        for part in self.parts:
            for ids, block in _parts.group_blocks(part, size, self.damping):
                L, info = torch.linalg.cholesky_ex(block)
                if bool((info > 0).any()):
                    at = int(ids[(info > 0).nonzero()[0, 0]]) * size
                    b = int((self.layout.blocks[:, 0] <= at).sum()) - 1
                    raise FisherError(
                        f"a group of {size} in {self.layout.describe_block(b)} breaks down at "
                        f"damping={self.damping:g}; use a larger damping"
                    )
                half = torch.linalg.solve_triangular(L, rows[ids], upper=False)
                out[ids] = half.square().sum(dim=(1, 2)) / 2
        return out

    def eliminate(self, weight: Tensor, *, keep: int = 0, together: int = 1) -> tuple[Tensor, Tensor]:
        """Remove the weights of every block one by one, always the cheapest, and tell in which order and at which loss.

        weight: [d] float32/float64, left as it is.   keep: of each of the layout's groups so many stay.
        together: so many consecutive weights leave at once.
        Returns order int64 [d], block by block the places of the weights in [0, d), and loss float64 [d], what each
        removal adds; NaN for weights that stay.  The first j of a block are the `mask` that `prune_update` with "joint"
        turns into weights whose quadratic loss is the sum of their losses.
        Raises FisherError where a block breaks down.   Source: see ops.obs_eliminate.
        """
        check_weight(weight, self.layout.num_weights)
        order = torch.empty(self.layout.num_weights, dtype=torch.int64, device=weight.device)
        loss = torch.empty(self.layout.num_weights, dtype=torch.float64, device=weight.device)
        groups = self.layout.groups.to(weight.device) if keep else None
        for part in self.parts:
            failed = torch.empty(len(part.blocks), dtype=torch.bool, device=weight.device)
            ops.obs_eliminate(
                weight.detach().contiguous(),
                part.state,
                part.blocks,
                order,
                loss,
                failed,
                factor=part.factor,
                damping=self.damping,
                groups=groups,
                keep=keep,
                together=together,
            )
            self._raise_failed(part, failed, "greedy")
        return order, loss

    def removal_loss(self, weight: Tensor, mask: Tensor) -> Tensor:
        """½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q = ½ δwᵀ F δw of every block, Q what the mask removes and δw the joint update for it.

        weight: [d] float32/float64.   mask: bool [d], True = keep.   Returns float64 [K].
        Raises FisherError where a joint solve breaks down.   Source: WoodFisher, eq. 2.13, for many weights.
        """
        check_weight(weight, self.layout.num_weights)
        out = torch.empty(self.num_blocks, dtype=torch.float64, device=weight.device)
        for part in self.parts:
            if part.factor is None:
                losses, failed = _parts.primal_losses(part, weight, mask)
                self._raise_failed(part, failed, "joint")
            else:
                new = weight.detach().double().contiguous()
                self._solve(new, part, mask)
                losses = _parts.dual_losses(part, new - weight, self.num_grads, self.damping)
            out[part.block_ids.to(out.device)] = losses
        return out

    def prune_update(self, weight: Tensor, mask: Tensor, update: str = "sum") -> Tensor:
        """The weights after removing those outside the mask and correcting the others; new, exactly 0
        outside.

        weight: [d] float32/float64, left as it is.   mask: bool [d], True = keep.
        update: "sum" adds the corrections of all removed weights (the paper's), "joint" minimises the
        quadratic model.
        Raises FastFisherError on wrong input, FisherError where a joint solve breaks down.
        Source: WoodFisher, eq. 2.11 and section 2.2.
        """
        check_weight(weight, self.layout.num_weights)
        if update not in UPDATES:
            raise FastFisherError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        pruned = weight.detach().clone(memory_format=torch.contiguous_format)
        for part in self.parts:
            if update == "sum":
                ops.obs_update_(
                    pruned,
                    part.state,
                    part.blocks,
                    self._inv_diag(),
                    mask,
                    factor=part.factor,
                    damping=self.damping,
                )
            else:
                self._solve(pruned, part, mask)
        return pruned

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state_dict` needs: tensors, numbers and names that torch.load(weights_only=True) reads."""
        return {
            **self.layout.state_dict(),
            "form": self.form,
            "damping": self.damping,
            "num_grads": self.num_grads,
            "condition": self.condition,
            "dtype": self.dtype,
            "mean": self.mean,
            "parts": [
                {
                    "state": _without_slack(part.state),
                    "factor": part.factor,
                    "blocks": part.blocks,
                    "block_ids": part.block_ids,
                    "refine": part.refine,
                }
                for part in self.parts
            ],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], layout: BlockLayout | None = None) -> FisherInverse:
        """The inverse that `state_dict` described; the tensors are shared, not copied.

        layout: that of the inverse, where it is more than its state tells, such as part of another one.
        """
        return cls(
            layout or BlockLayout.from_state_dict(state),
            [Part(**part) for part in state["parts"]],
            form=state["form"],
            damping=state["damping"],
            num_grads=state["num_grads"],
            condition=state["condition"],
            dtype=state["dtype"],
            mean=state.get("mean"),
        )

    def _inv_diag(self) -> Tensor:
        """The diagonal [d], computed once."""
        if self._diagonal is None:
            diagonal = torch.empty(self.layout.num_weights, dtype=self.dtype, device=self.device)
            for part in self.parts:
                ops.inverse_diagonal(
                    part.state, part.blocks, out=diagonal, factor=part.factor, damping=self.damping
                )
            self._diagonal = diagonal
        return self._diagonal

    @torch_on_one_thread()
    def _refined_product(self, part: Part, x: Tensor, out: Tensor) -> None:
        """out = F⁻¹ x of a dual part by two steps of y ← y + F⁻¹ (x − F y) in float64.   x, out: [d, n]."""
        x = x.double()
        residual, step, fisher_y = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        y = torch.zeros_like(x)
        for last in (False, False, True):
            ops.block_matvec(
                part.state, part.blocks, residual, out=step, factor=part.factor, damping=self.damping
            )
            y += step
            if not last:
                ops.fisher_vector_product(part.state, part.blocks, self.num_grads, y, out=fisher_y)
                residual = x - self.damping * y - fisher_y
        if len(part.blocks) == self.num_blocks:
            out.copy_(y)
        else:
            weights = covered(part.blocks, self.layout.num_weights)
            out[weights] = y[weights].to(out.dtype)

    def _solve(self, weight: Tensor, part: Part, mask: Tensor) -> None:
        failed = torch.empty(len(part.blocks), dtype=torch.bool, device=weight.device)
        ops.obs_solve_(
            weight,
            part.state,
            part.blocks,
            mask,
            failed,
            num_grads=self.num_grads,
            factor=part.factor,
            damping=self.damping,
        )
        self._raise_failed(part, failed, "joint")

    def _raise_failed(self, part: Part, failed: Tensor, update: str) -> None:
        if failed.any():
            b = int(part.block_ids[failed.nonzero()[0].cpu()])
            raise FisherError(
                f"the {update} update of {self.layout.describe_block(b)} (block {b} of {self.num_blocks}) breaks down "
                f"in float64 at damping={self.damping:g}; use update='sum' or a larger damping"
            )


def check_weight(weight: Tensor, num_weights: int) -> None:
    """Raise FastFisherError unless a vector is [d]."""
    if weight.shape != (num_weights,):
        raise FastFisherError(f"weight must be [{num_weights}], got {list(weight.shape)}")


def checked_vectors(v: Tensor, num_weights: int) -> torch.dtype:
    """The dtype of F⁻¹ v.   v: [d] or [d, n], any float dtype.   Raises FastFisherError on anything else."""
    if v.ndim not in (1, 2) or v.shape[0] != num_weights or v.numel() == 0:
        raise FastFisherError(f"v must be [{num_weights}] or [{num_weights}, n], got {list(v.shape)}")
    if not v.is_floating_point():
        raise FastFisherError(f"v must be of a float dtype, got {v.dtype}")
    return torch.float64 if v.dtype == torch.float64 else torch.float32


@torch_on_one_thread()
def inverse_diagonal(
    grads: Tensor | Mapping[str, Tensor],
    *,
    block_size: int | None,
    damping: float,
    damping_mode: str = "absolute",
    num_grads: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Any:
    """diag F⁻¹ of F = λ I + (1/m) Σ g gᵀ in blocks of B weights, straight from the gradients; no inverse is kept.

    The arguments are those of `FisherInverse.from_grads`.
    Returns a new [d], float64 for float64 gradients and else float32; named tensors for named gradients.
    Raises FastFisherError on wrong input, FisherError where float64 cannot hold a block.
    Source: WoodFisher, eqs. 2.13 and 3.1 to 3.5.
    """
    layout, flat, _ = _flat_grads(grads, block_size, sizes)
    m = _checked_num_grads(flat, num_grads)
    _check_options(damping, damping_mode, "auto")
    if damping_mode == "relative":
        damping = absolute_damping(damping, float(sum_of_squares(flat)) / (m * layout.num_weights))
    out = torch.empty(layout.num_weights, dtype=_parts.state_dtype(flat.dtype), device=flat.device)
    if choose_form("auto", flat.shape[0], layout.block_size) == "dual":
        _parts.dual_diagonal(flat, layout, num_grads=m, damping=damping, out=out)
    else:
        ids = _parts.block_ids(0, layout.num_blocks)
        _parts.primal_diagonal(flat, layout, ids, num_grads=m, damping=damping, out=out)
    return layout.unflatten(out) if isinstance(grads, Mapping) else out


class FisherAccumulator:
    """Gathers gradients as they come and makes the inverse at the end, in the form that suits their number.

    layout: the blocks.   num_grads: m, the divisor.   num_rows: how many rows will come, default m; more than m where a
    gradient gives several (fisher_type "exact").
    damping, damping_mode, form: as in `from_grads`.
    device: where the states are, default where the first gradients are; gradients from elsewhere stream there.
    mean: keep the mean gradient, as `FisherInverse.mean`.
    centered: F = λ I + (1/m) Σ (g − ḡ)(g − ḡ)ᵀ, the covariance of the gradients; in the primal and the dual form.
    dtype: in which the primal form adds up; float64 lets a block be mended when no gradient is at hand any
    more. The dual form keeps the gradients [m, d] in the dtype of the first that come; the other forms keep
    [K, B, B]. "rank1" and "woodbury" keep the inverse valid all the time and cannot be mended: they raise
    where float32 breaks down.
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        num_grads: int,
        damping: float,
        damping_mode: str = "absolute",
        form: str = "auto",
        dtype: torch.dtype = torch.float64,
        num_rows: int | None = None,
        device: torch.device | str | None = None,
        mean: bool = False,
        centered: bool = False,
    ) -> None:
        if num_grads < 1:
            raise FastFisherError(f"num_grads must be at least 1, got {num_grads}")
        self._num_rows = num_grads if num_rows is None else num_rows
        if self._num_rows < 1:
            raise FastFisherError(f"num_rows must be at least 1, got {num_rows}")
        _check_options(damping, damping_mode, form)
        self.form = choose_form(form, self._num_rows, layout.block_size)
        if self.form in ("rank1", "woodbury") and damping_mode == "relative":
            raise FastFisherError(
                f"form={form!r} needs the damping before the first gradient, got damping_mode='relative'"
            )
        if self.form in ("rank1", "woodbury") and centered:
            raise FastFisherError(
                f"form={form!r} cannot be centered: the mean is known after the last gradient"
            )
        if centered and self._num_rows != num_grads:
            raise FastFisherError(
                f"centered=True needs all num_grads={num_grads} gradients, got {num_rows} rows"
            )
        if dtype not in (torch.float32, torch.float64):
            raise FastFisherError(f"dtype must be float32 or float64, got {dtype}")
        self.layout = layout
        self.num_grads = num_grads
        self.count = 0
        self._device = None if device is None else torch.device(device)
        self._damping = damping
        self._damping_mode = damping_mode
        self._dtype = dtype
        self._grads_dtype: torch.dtype | None = None
        self._states: list[Tensor] = []  # per group of blocks [g, B, B]; the dual form: one [m, d]
        self._blocks: list[Tensor] = []  # per group of blocks, their ranges [g, 2]
        self._probe: _parts.Probe | None = None
        self._squares: Tensor | float = 0.0  # Σ g², where the gradients are
        self._wants_mean = mean or centered
        self._centered = centered
        self._sum: Tensor | None = None  # Σ g, float64 [d]

    @property
    def states(self) -> list[Tensor]:
        """What has been gathered, per group of blocks: in the primal form F without damping, [g, B, B], of which the
        lower triangle counts.
        """
        return self._states

    def add(self, grads: Tensor) -> None:
        """Take k gradients in.   grads: [k, d] of any float dtype, unit inner stride; the same dtype in every
        call.

        Raises FastFisherError on a wrong shape, dtype or device, and when more than num_grads rows arrive.
        """
        if grads.ndim != 2 or grads.shape[1] != self.layout.num_weights:
            raise FastFisherError(f"grads must be [k, {self.layout.num_weights}], got {list(grads.shape)}")
        if self.count + grads.shape[0] > self._num_rows:
            raise FastFisherError(
                f"num_grads={self._num_rows} were announced, got {self.count + grads.shape[0]} so far"
            )
        if self._grads_dtype not in (None, grads.dtype):
            raise FastFisherError(f"grads must be {self._grads_dtype} as before, got {grads.dtype}")
        if not grads.is_floating_point():
            raise FastFisherError(f"grads must be of a float dtype, got {grads.dtype}")
        self._grads_dtype = grads.dtype
        for piece in streamed(grads.detach(), self._device or grads.device):
            self._take(piece)

    def _take(self, grads: Tensor) -> None:
        """Take in gradients that are where the states are."""
        if not self._states:
            self._allocate(grads)
        if self._damping_mode == "relative":
            self._squares = self._squares + sum_of_squares(grads)
        if self._wants_mean:
            total = column_sums(grads)
            self._sum = total if self._sum is None else self._sum + total
        if self.form == "dual":
            self._states[0][self.count : self.count + grads.shape[0]] = grads
        elif self.form == "primal":
            for fisher, blocks in zip(self._states, self._blocks, strict=True):
                ops.fisher_accumulate_(fisher, grads, blocks, self.num_grads)
        else:
            assert self._probe is not None
            self._probe.add(grads, self.num_grads)
            for f_inv, blocks in zip(self._states, self._blocks, strict=True):
                _parts.running_step(self.form, f_inv, grads, blocks, self.num_grads)
        self.count += grads.shape[0]

    def finish(self, damping: float | None = None) -> FisherInverse:
        """The inverse; the accumulator is empty afterwards.

        damping: λ itself, where it is known by now: this layout may be part of a larger one, over which the mean of a
        relative damping is taken.
        Raises FastFisherError when fewer than num_grads gradients have come, FisherError where a block breaks
        down.
        """
        if self.count < self._num_rows:
            raise FastFisherError(f"num_grads={self._num_rows} were announced, got only {self.count}")
        assert self._grads_dtype is not None
        mean = None if self._sum is None else self._sum / self.num_grads
        if damping is None and self._damping_mode == "relative":
            squares = float(self._squares)
            if self._centered and mean is not None:
                squares -= self.num_grads * float(sum_of_squares(mean[None]))
            damping = absolute_damping(self._damping, squares / (self.num_grads * self.layout.num_weights))
        elif damping is None:
            damping = self._damping
        dtype = _parts.state_dtype(self._grads_dtype)
        states, self._states, self.count, self._sum = self._states, [], 0, None
        if self._centered and mean is not None:
            self._subtract(mean, states)
        if self.form == "dual":
            parts, condition = _parts.dual_parts(
                states[0], self.layout, num_grads=self.num_grads, damping=damping
            )
        elif self.form == "primal":
            device = states[0].device
            source = _parts.stored_source(states, self.layout, damping)
            parts, condition = _parts.primal_parts(
                source, self.layout, num_grads=self.num_grads, damping=damping, dtype=dtype, device=device
            )
        else:
            parts = self._proved(states, damping)
            condition = torch.full((self.layout.num_blocks,), torch.nan, dtype=torch.float64)
        return FisherInverse(
            self.layout,
            parts,
            form=self.form,
            damping=damping,
            num_grads=self.num_grads,
            condition=condition,
            dtype=dtype,
            mean=mean,
        )

    def _subtract(self, mean: Tensor, states: list[Tensor]) -> None:
        """Take the mean out of gradients that are kept, or its outer product out of a Fisher."""
        if self.form == "dual":
            states[0].sub_(mean.to(states[0].dtype))
            return
        for state, blocks in zip(states, self._blocks, strict=True):
            rows = padded(mean, blocks, self.layout.block_size, 0).to(state.dtype)  # [g, B]
            state.baddbmm_(rows[:, :, None], rows[:, None, :], alpha=-1)

    def _allocate(self, grads: Tensor) -> None:
        """Make the states on the device of the first gradients."""
        if self.form == "dual":
            shape = (self._num_rows, self.layout.num_weights)
            self._states = [empty_state(shape, grads.dtype, grads.device)]
            return
        running = self.form != "primal"
        dtype = _parts.state_dtype(grads.dtype) if running else self._dtype
        size = self.layout.block_size
        blocks = self.layout.blocks.to(grads.device)
        ranges = list(_parts.groups(self.layout, dtype, grads.device))
        together = _parts.SLAB.get(grads.device.type, 1)
        for i in range(0, len(ranges), together):
            some = ranges[i : i + together]
            begin = some[0][0]
            slab = empty_state((some[-1][1] - begin, size, size), dtype, grads.device)
            for first, last in some:
                state = slab[first - begin : last - begin]
                if running:
                    _parts.start_from_damping(state, self._damping)
                else:
                    zero_state(state)
                self._states.append(state)
                self._blocks.append(blocks[first:last])
        if running:
            self._probe = _parts.Probe(self.layout, grads.device)

    def _proved(self, states: list[Tensor], damping: float) -> list[Part]:
        """The running inverses as parts, after each block passed the probe."""
        assert self._probe is not None
        parts = []
        first = 0
        for state, blocks in zip(states, self._blocks, strict=True):
            good = self._probe.passes(state, blocks, damping)
            if not good.all():
                b = first + int((~good).nonzero()[0])
                raise FisherError(
                    f"the running inverse of {self.layout.describe_block(b)} (block {b} of {self.layout.num_blocks}) "
                    f"lost its accuracy in {state.dtype} at damping={damping:g}; use form='auto' or float64 gradients"
                )
            parts.append(Part(state, None, blocks, _parts.block_ids(first, first + len(blocks))))
            first += len(blocks)
        return parts


def choose_form(form: str, num_rows: int, block_size: int) -> str:
    """The form that is both faster and more accurate: "primal" where k >= B, else "dual"; another wish is granted."""
    if form != "auto":
        return form
    return "primal" if num_rows >= block_size else "dual"


def sum_of_squares(grads: Tensor) -> Tensor:
    """Σ g² as a float64 number on the device, in an order that does not depend on threads.   grads: [k, d]."""
    if grads.device.type != "cpu":
        return torch.linalg.vector_norm(grads, dtype=torch.float64).square()
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, grads.shape[1], _TILE):
        squares = grads[:, first : first + _TILE].double().square()
        # cumsum adds one by one; a plain sum would be cut into as many pieces as there are threads
        total += squares.sum(dim=0).cumsum(dim=0)[-1]
    return total


def column_sums(grads: Tensor) -> Tensor:
    """Σ g in float64 [d], a few columns at a time.   grads: [k, d]."""
    return torch.cat([part.double().sum(dim=0) for part in grads.split(16 * _TILE, dim=1)])


def mean_diagonal(grads: Tensor) -> float:
    """Of the Fisher of gradients [k, d], weights that are gone counting as zeros."""
    return float(sum_of_squares(grads)) / grads.numel()


def absolute_damping(damping: float, mean_diagonal: float) -> float:
    """λ from its ratio to the mean of the Fisher diagonal."""
    if not (mean_diagonal > 0 and math.isfinite(mean_diagonal)):
        raise FastFisherError(
            f"damping_mode='relative' needs a positive, finite mean Fisher diagonal, got {mean_diagonal:g}"
        )
    return damping * mean_diagonal


def _checked_num_grads(flat: Tensor, num_grads: int | None) -> int:
    """m: as given, or the number of rows."""
    if num_grads is not None and num_grads < flat.shape[0]:
        raise FastFisherError(
            f"num_grads must be at least the {flat.shape[0]} rows of grads, got {num_grads}"
        )
    return flat.shape[0] if num_grads is None else num_grads


def _check_options(damping: float, damping_mode: str, form: str) -> None:
    if not (damping > 0 and math.isfinite(damping)):
        raise FastFisherError(f"damping must be positive and finite, got {damping}")
    if damping_mode not in DAMPING_MODES:
        raise FastFisherError(f"damping_mode must be one of {', '.join(DAMPING_MODES)}, got {damping_mode!r}")
    if form not in FORMS:
        raise FastFisherError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _flat_grads(
    grads: Tensor | Mapping[str, Tensor], block_size: int | None, sizes: Sequence[int] | None
) -> tuple[BlockLayout, Tensor, bool]:
    """The layout, the gradients [k, d], and whether they are a copy that may be kept."""
    if isinstance(grads, Mapping):
        if sizes is not None:
            raise FastFisherError(f"sizes go with grads [k, d], got them with a dict of {len(grads)} tensors")
        for name, tensor in grads.items():
            if tensor.ndim < 1 or tensor.numel() == 0:
                raise FastFisherError(f"grads[{name!r}] must be [k, *shape], got {list(tensor.shape)}")
        layout = BlockLayout(list(grads), [tensor.shape[1:] for tensor in grads.values()], block_size)
        return layout, layout.flatten({name: tensor.detach() for name, tensor in grads.items()}), True
    if grads.ndim != 2 or grads.numel() == 0:
        raise FastFisherError(f"grads must be [k, d] with every size at least 1, got {list(grads.shape)}")
    layout = BlockLayout.from_sizes([grads.shape[1]] if sizes is None else sizes, block_size)
    if layout.num_weights != grads.shape[1]:
        raise FastFisherError(f"sizes must add up to d={grads.shape[1]}, got {layout.num_weights}")
    return layout, grads.detach(), False


def _without_slack(state: Tensor) -> Tensor:
    """The state alone: a view would be saved with the whole buffer behind it."""
    needed = state.numel() * state.element_size()
    return state if state.untyped_storage().nbytes() == needed else state.clone()
