"""One auxiliary step of FishLeg on a square root of the inverse Fisher, in blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError
from fastfisher.ops import _checks
from fastfisher.ops._blockwise import ranges, reference
from fastfisher.ops._registry import define

POWER_STEPS = 3


def _check(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    _checks.same_device("root", root, top=top, grads=grads, blocks=blocks, loss=loss, largest=largest)
    num_blocks, block_size = _checks.state("root", root)
    _checks.exact_shape("top", top, (num_blocks, block_size))
    _checks.dtype("top", top, (root.dtype,))
    _checks.contiguous("top", top)
    _, num_weights = _checks.grads("grads", grads)
    _checks.blocks(blocks, num_blocks, num_weights, block_size)
    _checks.num_grads(num_grads)
    _checks.damping(damping)
    if not 0 < rate <= 1:
        raise FastFisherError(f"rate must be in (0, 1], got {rate}")
    _checks.estimate("loss", loss, num_blocks)
    _checks.estimate("largest", largest, num_blocks)


_op = define(
    "fishleg_block_step_(Tensor(a!) root, Tensor(b!) top, Tensor grads, Tensor blocks, int num_grads, float damping, "
    "float rate, Tensor(c!) loss, Tensor(d!) largest) -> ()",
    _check,
)


@reference("fishleg_block_step_")
def _reference(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    for b, start, stop in ranges(blocks):
        n = stop - start
        R = root[b, :n, :n]
        Z = grads[:, start:stop].to(R.dtype) @ R  # [k, n]
        M = Z.T @ Z / num_grads + damping * (R.T @ R)  # [n, n]
        v, eigenvalue = _power_iteration(M, top[b, :n])
        RM = R @ M
        # tr(M RᵀR) = ⟨R M, R⟩
        before = float((RM.double() * R.double()).sum() / 2 - R.double().square().sum())
        if not (math.isfinite(eigenvalue) and math.isfinite(before)):
            loss[b] = largest[b] = math.inf
            continue
        loss[b], largest[b] = before, eigenvalue
        top[b, :n] = v
        R -= rate / 2 / max(1.0, 1.1 * eigenvalue) * (RM - R)


def _power_iteration(M: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """The last normalised product of M [n, n], from `start` [n], and the norm that it had."""
    v = torch.full_like(start, 1 / math.sqrt(len(start)))
    norm = float(start.double().norm())
    if 0 < norm < math.inf:
        v = (start.double() / norm).to(M.dtype)
    for _ in range(POWER_STEPS):
        w = (M @ v).double()
        norm = float(w.norm())
        if 0 < norm < math.inf:
            v = (w / norm).to(M.dtype)
    return v, norm


def fishleg_block_step_(
    root: Tensor,
    top: Tensor,
    grads: Tensor,
    blocks: Tensor,
    num_grads: int,
    damping: float,
    rate: float,
    loss: Tensor,
    largest: Tensor,
) -> None:
    """Take R ← R − η (R M − R), M = RᵀF_γR, in every block: one step of Q = R Rᵀ towards F_γ⁻¹, F_γ = GᵀG/m + γI.

    It is the step down ½ tr(Q F_γ Q) − tr Q in Q's own metric, without sampling.  M = ZᵀZ/m + γ RᵀR with Z = G R, and
    η = ½ rate / max(1, 1.1 λ̂), λ̂ the largest eigenvalue of M by three power iterations.
    root: R, [K, B, B] float32/float64, contiguous, overwritten; a block of n < B weights uses [:n, :n].   Rows of zeros
    stay zeros to the bit.
    top: [K, B], like root, where the power iterations start, overwritten by where they end; it is to be kept from one
    step to the next.  A vector without a positive finite norm counts as one of equal entries.
    grads: [k, d] float16/bfloat16/float32/float64, unit inner stride, read in the dtype of root.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    num_grads: m of the whole estimate, not k.   damping: γ.   rate: in (0, 1].
    loss: float64 [K], overwritten: ½ tr(Q F_γ Q) − tr Q before the step.   largest: float64 [K], overwritten: λ̂.
    A block whose loss or λ̂ is not finite stays as it was, with its row of top, and both are +inf.
    Raises FastFisherError on wrong input.   Source: FishLeg (Garcia et al., 2023) and FishLeg Surgeon (McGowan et al.,
    2024), the auxiliary loss; the expectation over its u is taken exactly.
    """
    _op(root, top, grads, blocks, num_grads, damping, rate, loss, largest)
