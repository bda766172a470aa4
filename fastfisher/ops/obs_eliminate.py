"""Optimal Brain Surgeon one weight at a time: in which order a block loses its weights, and what each removal costs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.errors import FastFisherError
from fastfisher.ops import _checks
from fastfisher.ops._blockwise import fisher_inverse_times, ranges, reference
from fastfisher.ops._registry import define


def _check(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    groups: Tensor | None,
    keep: int,
    together: int,
    order: Tensor,
    loss: Tensor,
    failed: Tensor,
) -> None:
    others = {"state": state, "factor": factor, "blocks": blocks, "groups": groups}
    _checks.same_device("weight", weight, **others, order=order, loss=loss, failed=failed)
    num_weights = _checks.vector("weight", weight)
    _checks.inverse(state, factor, blocks, damping, num_weights)
    for name, tensor, dtype in (
        ("groups", groups, torch.int64),
        ("order", order, torch.int64),
        ("loss", loss, torch.float64),
    ):
        if tensor is not None:
            _checks.exact_shape(name, tensor, (num_weights,))
            _checks.dtype(name, tensor, (dtype,))
            _checks.contiguous(name, tensor)
    _checks.exact_shape("failed", failed, (blocks.shape[0],))
    _checks.dtype("failed", failed, (torch.bool,))
    _checks.contiguous("failed", failed)
    if keep < 0:
        raise FastFisherError(f"keep must be at least 0, got {keep}")
    if together < 1:
        raise FastFisherError(f"together must be at least 1, got {together}")
    if together > 1 and groups is not None:
        raise FastFisherError(f"groups keep single weights; together must be 1 with them, got {together}")


_op = define(
    "obs_eliminate(Tensor weight, Tensor state, Tensor? factor, Tensor blocks, float damping, Tensor? groups, "
    "int keep, int together, Tensor(a!) order, Tensor(b!) loss, Tensor(c!) failed) -> ()",
    _check,
)


@reference("obs_eliminate")
def _reference(
    weight: Tensor,
    state: Tensor,
    factor: Tensor | None,
    blocks: Tensor,
    damping: float,
    groups: Tensor | None,
    keep: int,
    together: int,
    order: Tensor,
    loss: Tensor,
    failed: Tensor,
) -> None:
    for b, start, stop in ranges(blocks):
        n = stop - start
        F_inv = torch.empty(n, n, dtype=torch.float64, device=weight.device)
        unit = torch.eye(n, dtype=torch.float64, device=weight.device)
        fisher_inverse_times(state, factor, b, start, stop, damping, unit, F_inv)
        w, ids = weight[start:stop].double(), None if groups is None else groups[start:stop]
        found, costs, failed[b] = _eliminate(w, F_inv, ids, keep, together)
        order[start:stop] = start + torch.tensor(found, device=order.device)
        loss[start:stop] = torch.tensor(costs, dtype=torch.float64, device=loss.device)


def _eliminate(
    w: Tensor, F_inv: Tensor, ids: Tensor | None, keep: int, together: int
) -> tuple[list[int], list[float], bool]:
    """Places in order of removal, the loss of each (NaN for those that stay), and whether a pivot was unusable.

    w: [n], F_inv: [n, n], both overwritten.   ids: [n], the group of each weight, or None.
    """
    n = len(w)
    sets = torch.arange(n).split(together)
    there = torch.ones(n, dtype=torch.bool, device=w.device)
    order: list[int] = []
    losses: list[float] = []

    def may_go() -> Tensor:
        """Which weights are candidates, [n]."""
        if ids is None:
            return there
        left = (ids[:, None] == ids[None, :]) & there[None, :]
        return there & (left.sum(dim=1) > keep)

    while bool((candidates := may_go()).any()):
        if together == 1:
            costs = torch.where(candidates, w.square() / (2 * F_inv.diagonal()), torch.inf)
        else:
            costs = torch.stack([_joint_loss(w[Q], F_inv[Q][:, Q]) for Q in sets])
            costs[~torch.stack([candidates[Q[0]] for Q in sets])] = torch.inf
        chosen = sets[int(costs.nan_to_num(torch.inf, torch.inf).argmin())]  # the first of equal ones
        for q in chosen.tolist():
            pivot = float(F_inv[q, q])
            if not (bool(candidates[q]) and 0 < pivot < torch.inf):
                return _completed(order, n), losses + [torch.nan] * (n - len(losses)), True
            column = F_inv[:, q] / pivot**0.5
            step = w[q] / pivot**0.5
            order.append(q)
            losses.append(0.5 * float(step) ** 2)
            there[q] = False
            w -= column * step
            F_inv -= torch.outer(column, column)
    return _completed(order, n), losses + [torch.nan] * (n - len(losses)), False


def _completed(order: list[int], n: int) -> list[int]:
    """The order with the places that are not in it at its end."""
    gone = set(order)
    return order + [i for i in range(n) if i not in gone]


def _joint_loss(w: Tensor, block: Tensor) -> Tensor:
    """½ wᵀ (F⁻¹[Q, Q])⁻¹ w."""
    L, info = torch.linalg.cholesky_ex(block)
    if int(info):
        return w.new_tensor(torch.inf)
    return torch.linalg.solve_triangular(L, w[:, None], upper=False).square().sum() / 2


def obs_eliminate(
    weight: Tensor,
    state: Tensor,
    blocks: Tensor,
    order: Tensor,
    loss: Tensor,
    failed: Tensor,
    *,
    factor: Tensor | None = None,
    damping: float = 0.0,
    groups: Tensor | None = None,
    keep: int = 0,
    together: int = 1,
) -> None:
    """Remove the weights of every block one by one, always the one with the least w²/(2 [F⁻¹]_qq) of those left.

    After each, w ← w − F⁻¹e_q w_q/[F⁻¹]_qq and F⁻¹ ← F⁻¹ − F⁻¹e_q e_qᵀF⁻¹/[F⁻¹]_qq, in float64.  The first j removals
    of a block together leave what obs_solve_ leaves for that set, and the sum of their losses is its ½ δwᵀ F δw.
    weight: [d] float32/float64, contiguous, only read.
    state: primal [K, B, B] float32/float64, or with `factor` the gradients [k, d] of any float dtype.
    factor: None, or float64 [K, k, k] from dual_factor_.   damping: λ, read in the dual form only.
    blocks: int64 [K, 2], (start, stop) of each block in [0, d), increasing and disjoint.
    groups, keep: None, or int64 [d], equal for weights that belong together, side by side and within a block: of each
    group at least `keep` stay (N:M sparsity).
    together: c consecutive weights from the start of a block leave at once, the set with the least
    ½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q first; they stand one after the other in `order`.
    order: int64 [d], overwritten inside the blocks: at start + i the place in [0, d) of the weight removed as i-th;
    weights that must stay come last.   loss: float64 [d], what that removal adds, NaN for weights that stay.
    failed: bool [K], overwritten: True where a pivot was not positive and finite; NaN from there on.
    On a GPU the dual form and `groups` wait for the device: they ask it for sizes.
    Raises FastFisherError on wrong input.   Source: WoodFisher, eq. 2.11, applied again and again as in Optimal Brain
    Surgeon (Hassibi & Stork, 1993).
    """
    _op(weight, state, factor, blocks, damping, groups, keep, together, order, loss, failed)
